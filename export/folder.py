"""The output folder: written beside OUT as .OUT.partial, and given OUT's name only when it is whole.

OUT itself is at any moment the finished output of before, the finished output of now, or not there. A process that was killed
leaves its .OUT.partial, which the next run clears, or goes on from.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator

from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export import interrupt, stages
from hyperattention.export.bundle import MANIFEST
from hyperattention.export.lock import Lock

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux's fcntl.h and fs.h
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM)


def check_out(out: Path, model: Path | None) -> None:
    """Before any work, and writing nothing: raises UsageError where `out` lies in the directory `model` (None: MODEL is none), or is
    one that `output_folder` would refuse for what is there."""
    out = _named(out)
    if model is not None:
        inner, outer = Path(os.path.realpath(out)), Path(os.path.realpath(model))
        if inner.is_relative_to(outer):
            raise UsageError(
                f"OUT {out} {'is' if inner == outer else 'lies in'} the directory MODEL, which is read only; give a folder outside {outer}"
            )
    try:
        _check_replaceable(out, "OUT ")
    except OSError as error:
        raise _unwritable(out, error) from error


def refuse_output(folder: Path, option: str) -> None:
    """Raises UsageError where `folder` lies in an output of export-model, which would take a file put there for somebody else's."""
    real = Path(os.path.realpath(folder))
    for parent in (real, *real.parents):
        if _listed(parent) is not None:
            where = "is" if parent == real else f"lies in {parent},"
            raise UsageError(
                f"{option} {folder} {where} an output of export-model, which holds only what export-model wrote, or it could not be "
                f"replaced; give a folder outside it"
            )


@contextmanager
def output_folder(out: Path, resume: bool = False, say: Callable[[str], None] = lambda text: None) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well or raises AccuracyFailed.

    Otherwise it vanishes; with `resume` it stays where a stage of it is finished, and `say` is told so. `resume` also begins with
    what an earlier run left. A finished output of ours is replaced. Raises UsageError where `out` is a file or a link, holds
    something else, cannot be written, or is being written by another process.
    """
    out = _named(out)
    # All named before anything is made, so that an interruption at any point finds it.
    work, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    lock = Lock(out.with_name(f".{out.name}.lock"))
    made = [parent for parent in out.parents if not parent.exists()]
    checked: list[Path] = []

    def undo(keep: bool = resume) -> str | None:
        finished = []
        if checked:  # before that, what lies there may be another process's, or the user's
            _recover(out, old)
            finished = stages.prune(work) if keep else []
            if not finished:
                shutil.rmtree(work, ignore_errors=True)
        lock.release()
        _remove_empty(made)
        return f"kept in {work}: {', '.join(finished)}; run the same command again to go on from there" if finished else None

    with interrupt.undoing(undo):
        try:
            _begin(out, work, old, lock, checked)
            if not resume:
                shutil.rmtree(work)
                work.mkdir()
            stages.begin(work)
            try:
                yield work
            except AccuracyFailed:
                _move(work, out, old)
                raise
            _move(work, out, old)
        except BaseException as error:
            if kept := undo(resume and not isinstance(error, AccuracyFailed)):
                say(kept)
            raise
        undo(keep=False)


def _begin(out: Path, work: Path, old: Path, lock: Lock, checked: list[Path]) -> None:
    """Takes the lock and makes `work`, once all three are known to be ours (then they are `checked`). Raises UsageError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(f"OUT {out}")
        for folder, what in ((out, "OUT "), (work, "the work folder "), (old, "the folder ")):
            _check_replaceable(folder, what)
        checked += [out, work, old]
        _recover(out, old)
        work.mkdir(exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _unwritable(out, error) from error


def _named(out: Path) -> Path:
    """`out` from the root on. Raises UsageError for the root itself."""
    out = Path(os.path.abspath(out))
    if not out.name:
        raise UsageError(f"OUT is {out}, the root of the file system; give a folder that does not exist yet")
    return out


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(f"OUT {out} cannot be written: {error.strerror}; give a folder you may write to")


def _recover(out: Path, old: Path) -> None:
    """Ends what a process that was killed between the two renames of `_move` had begun: `old` is the output from before."""
    if old.is_dir() and out.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        old.rename(out)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or gone already
            folder.rmdir()


def _check_replaceable(folder: Path, what: str) -> None:
    """Raises UsageError where `folder` holds anything that its own records do not list: replacing it would destroy that."""
    if folder.is_symlink() or folder.is_file():
        raise UsageError(f"{what}{folder} is a {'link' if folder.is_symlink() else 'file'}; give a folder that does not exist yet")
    foreign = _foreign(folder) if folder.is_dir() else None
    if foreign is not None:
        raise UsageError(
            f"{what}{folder} holds {foreign}, which export-model did not write; move it away, or give a folder that does not exist yet"
        )


def _foreign(folder: Path) -> str | None:
    """The first entry of `folder` that is not part of an output of ours, by its name in `folder`."""
    if stages.is_unfinished(folder):
        return None
    listed = _listed(folder)
    if listed is None:
        return min((path.name for path in folder.iterdir()), default=None)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # A report may have been written anew since.
        ours = name in listed or name.startswith("report/")
        if (path.is_symlink() or not path.is_dir()) and not ours:
            return name
    return None


def _listed(folder: Path) -> set[str] | None:
    """Names of the files of a finished output, of this version or another; None where `folder` is none. Other tools write a
    manifest.json too: only one that opens as ours says what may go."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"] if {"schema", "plan", "versions"} <= manifest.keys() else None
        return {MANIFEST, *files} if isinstance(files, dict) else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _move(work: Path, out: Path, old: Path) -> None:
    """Gives `work` the name `out`; what was there before gets the name `work`, or is removed."""
    # Again, for what came to lie there during the run.
    _check_replaceable(out, "OUT ")
    _settle(work)
    if not out.is_dir():
        work.rename(out)
        return
    try:
        _exchange(work, out)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        # A file system that cannot swap two folders: for a moment there is no OUT, and `_recover` knows it.
        out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two names in one step (renameat2 with RENAME_EXCHANGE). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _settle(folder: Path) -> None:
    """Everything onto the disk before it gets its name: a name may reach the disk before the content. Raises OSError when full."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_dir() or path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
