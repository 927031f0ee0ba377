"""`hyperattention bench --attention --profile`: stages out of launches, differences, shares of the roofline, the record, the figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from hyperattention.config import PRESETS, Config
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.geometry import Geometry
from hyperattention.validate import bench_profile_run, cli
from hyperattention.validate.bench_profile import Ceilings, Launch, floors, ladder, short_name, split, stage_of
from hyperattention.validate.bench_profile_cuda import grouped
from hyperattention.validate.bench_profile_page import figure
from hyperattention.validate.bench_profile_work import PARTS, Work
from hyperattention.validate.bench_timing import Settings

SCHEMA = Path(__file__).resolve().parent.parent / "docs/bench.schema.json"
PNG = b"\x89PNG\r\n\x1a\n"
SMALL: dict[str, Any] = dict(block_size=16, num_blocks=2, sample_size=24, local_size=64, sinks=16, exact_below=32)
CEILINGS = Ceilings(copy_bytes=1e9, matrix_ops=1e12, int8_ops=2e12, text="measured by hand")
POOL, SELECT = "void ha::(anonymous namespace)::pool_kernel<float>(ha::PoolArgs)", "void ha::select_kernel<64>(ha::SelectArgs)"
HASH, SORT = "void ha::hash_kernel<float>(ha::HashArgs)", "void ha::(anonymous namespace)::sort_kernel(ha::SortArgs)"
NEAR, NODE = (
    "void ha::attend_kernel<float, 64, ha::PositionWalk>(ha::TileArgs)",
    "void ha::attend_kernel<float, 64, ha::NodeWalk>(ha::TileArgs)",
)
LISTED = "void ha::attend_kernel<float, 64, ha::PairWalk>(ha::TileArgs)"
COSTS = {"base": 5.0, "sinks": 0.5, "num_blocks": 3.0, "sample_size": 2.0}  # seconds


class FakeOperation:
    """The op without kernels: what it would launch, by what its configuration holds."""

    def __init__(self, config: Config, length: int = 256, dim: int = 64, near: str = NEAR, levels: int = 2, listed: bool = False) -> None:
        self.config, self.near, self.levels, self.listed = config, near, levels, listed
        self.launched: list[tuple[str, float]] = []
        self.geometry = Geometry(config, 1, 2, 2, length, length, dim, dim)

    def select(self) -> torch.Tensor:
        blocks = self.config.selector == "blocks"
        self.launched += [(POOL, 0.25), (POOL, 0.5), (SELECT, 1.5)] if blocks else [(HASH, 0.25), (HASH, 0.5), (SORT, 1.5)]
        return torch.zeros(1, 2, len(self.geometry.query_blocks), self.config.num_blocks if blocks else 1)

    def attend(self, config: Config, plan: torch.Tensor) -> None:
        if config.selector == "blocks":
            assert plan.shape[-1] == config.num_blocks
        spent = COSTS["base"] + sum(COSTS[name] for name in ("sinks", "num_blocks", "sample_size") if getattr(config, name))
        if config.selector == "sortlsh" and (config.num_blocks or config.sample_size):
            self.launched += [(NODE, (spent - COSTS["base"]) / self.levels)] * self.levels
            spent = COSTS["base"]
        if self.listed and config.num_blocks:  # what the plan of `blocks` names, in a launch of its own
            near = COSTS["base"] + COSTS["sinks"] * bool(config.sinks)
            self.launched.append((LISTED, spent - near))
            spent = near
        self.launched.append((self.near if config.sample_size else NEAR, spent))

    def forward(self) -> None:
        if not self.geometry.exact:
            self.select()
        self.attend(self.config, torch.zeros(1, 2, 1, self.config.num_blocks))


class FakeRecorder:
    """A device whose launches follow each other after `gap` seconds; every run takes another `noise` times as long."""

    def __init__(self, op: FakeOperation, gap: float = 0.0, noise: Sequence[float] = (1.0,)) -> None:
        self.op, self.gap, self.noise, self.runs, self.now = op, gap, noise, 0, 100.0

    def record(self, calls: Sequence[Callable[[], object]]) -> list[list[Launch]]:
        found = []
        for call in calls:
            self.op.launched.clear()
            call()
            factor = self.noise[self.runs % len(self.noise)]
            self.runs, run = self.runs + 1, []
            for name, spent in self.op.launched:
                run.append(Launch(name, self.now, self.now + factor * spent))
                self.now = run[-1].stop + self.gap
            found.append(run)
        return found


def split_of(config: Config, gap: float = 0.0, noise: Sequence[float] = (1.0,), **changes: Any) -> dict[str, Any]:
    op = FakeOperation(config, **changes)
    return split(op, FakeRecorder(op, gap, noise), CEILINGS, 2, Settings(repeats=5, max_seconds=1e6))


def times(found: dict[str, Any]) -> dict[str, float]:
    return {row["stage"]: row["seconds"] for row in found["stages"]}


def test_blocks_are_split_by_kernel_and_by_difference() -> None:
    found = split_of(Config(**SMALL), gap=0.125)
    assert times(found) == pytest.approx(
        {"pool": 0.75, "select": 1.5, "local": 5, "sinks": 0.5, "heavy": 3, "sampled": 2, "rest": 3 * 0.125, "total": 12.75 + 3 * 0.125}
    )
    hows = {row["stage"]: row["how"] for row in found["stages"]}
    assert [hows[name] for name in PARTS] == ["kernels", "difference", "difference", "difference"]
    assert [(launch["name"], launch["seconds"]) for launch in found["launches"]] == [
        ("pool_kernel<float>", pytest.approx(0.25)),
        ("pool_kernel<float>", pytest.approx(0.5)),
        ("select_kernel<64>", pytest.approx(1.5)),
        ("attend_kernel<float, 64, PositionWalk>", pytest.approx(10.5)),
    ]
    assert found["runs"] == 5 and found["notes"] == []
    assert sum(row["share"] for row in found["stages"][:-1]) == pytest.approx(1)


def test_blocks_of_two_launches_lose_to_merge_what_the_first_passes_on() -> None:
    found = split_of(Config(**SMALL), listed=True)
    merged = 2 * 2 * 2 * 64 * (2 * 64 + 4) / CEILINGS.copy_bytes  # positions 128 to 255 of both heads see more than local part and sinks
    assert times(found) == pytest.approx(
        {
            "pool": 0.75,
            "select": 1.5,
            "local": 5,
            "sinks": 0.5,
            "heavy": 3 - merged,
            "sampled": 2,
            "merge": merged,
            "rest": 0,
            "total": 12.75,
        }
    )
    assert found["notes"] == []


def test_sorted_nodes_lose_to_merge_what_their_launches_pass_on() -> None:
    config = Config(selector="sortlsh", **{**SMALL, "sinks": 0, "local_overlap": 0})
    found = split_of(config)
    # 256 positions of 64: segments 1 and 3 of level 0 and the upper half of level 1 meet a node, each row's O (2 x 64 bytes) and LSE
    # (4 bytes) then go out and in again; two heads.
    merged = 2 * 2 * (2 * 64 + 128) * (2 * 64 + 4) / CEILINGS.copy_bytes
    assert times(found) == pytest.approx(
        {"hash": 0.75, "sort": 1.5, "local": 5, "heavy": 3 - merged, "sampled": 2, "merge": merged, "rest": 0, "total": 12.25}
    )
    (row,) = (row for row in found["stages"] if row["stage"] == "merge")
    assert row["how"] == "estimate" and row["roofline"] is None and row["bytes_per_s"] is None


def test_levels_that_share_a_launch_have_no_known_merge() -> None:
    found = split_of(Config(selector="sortlsh", **{**SMALL, "sinks": 0, "local_overlap": 0}), levels=1)
    assert "merge" not in times(found) and times(found)["heavy"] == pytest.approx(3)
    assert found["notes"] == ["merge is not estimated: attention took 2 launches, not one for each of the tree's 3 steps"]


def test_a_full_mask_has_no_local_part() -> None:
    blocks = split_of(Config(causal=0, **SMALL))
    assert times(blocks) == pytest.approx({"pool": 0.75, "select": 1.5, "sinks": 5.5, "heavy": 3, "sampled": 2, "rest": 0, "total": 12.75})
    assert next(row for row in blocks["stages"] if row["stage"] == "sinks")["how"] == "kernels"


def test_the_exact_path_is_one_stage() -> None:
    found = split_of(Config(**{**SMALL, "exact_below": 4096}))
    assert times(found) == pytest.approx({"exact": 10.5, "rest": 0, "total": 10.5})


def test_medians_are_taken_of_runs_in_turn() -> None:
    """Of five rounds of five calls, one call a round is slow, another one each time: no median moves."""
    slow = [9.0 if i % 6 == 0 else 1.0 for i in range(30)]
    assert times(split_of(Config(**SMALL), noise=slow)) == pytest.approx(times(split_of(Config(**SMALL))))


def test_rounds_are_as_many_as_the_time_allows_but_three() -> None:
    for seconds, rounds in ((1e6, 7), (4.2 * 44.0, 4), (1.0, 3)):
        op = FakeOperation(Config(**SMALL))
        # A round: the whole op 12.75 s, then 5, 5.5, 8.5 and 10.5.
        found = split(op, FakeRecorder(op), CEILINGS, 2, Settings(repeats=7, max_seconds=seconds))
        assert found["runs"] == rounds


def test_rates_and_the_roofline_are_work_over_time() -> None:
    found = {row["stage"]: row for row in split_of(Config(**SMALL))["stages"]}
    local = found["local"]
    # Rows meet their own block of 64 up to themselves and the one before: 4 x (64 x 65 / 2) and 3 x 64 x 64 pairs, two heads.
    assert local["flops"] == 4 * 64 * 2 * (4 * 64 * 65 // 2 + 3 * 64 * 64)
    assert local["bytes"] == 2 * 256 * (4 * 2 * 64 + 4)
    assert local["flop_per_s"] == local["flops"] / 5 and local["bytes_per_s"] == local["bytes"] / 5
    assert local["floor_s"] == max(local["flops"] / 1e12, local["bytes"] / 1e9) and local["bound"] == "memory"
    assert local["roofline"] == local["floor_s"] / 5
    heavy = found["heavy"]
    assert heavy["bound"] == "matrix" and heavy["floor_s"] == heavy["flops"] / 1e12
    select = found["select"]
    assert select["flops"] == 0 and select["int8_op_per_s"] == select["int8_ops"] / 1.5
    total = found["total"]
    works = [row for name, row in found.items() if name != "total"]
    assert total["flops"] == sum(row["flops"] for row in works) and total["bytes"] == sum(row["bytes"] for row in works)
    assert total["floor_s"] == max(total["flops"] / 1e12 + total["int8_ops"] / 2e12, total["bytes"] / 1e9)


def test_without_an_int8_ceiling_selection_has_no_share() -> None:
    bare = replace(CEILINGS, int8_ops=None)
    assert floors(Work(int8_ops=5, bytes=10**9), bare) == (None, 1.0)
    assert floors(Work(flops=10**12, bytes=10**9), bare) == (1.0, 1.0)
    assert floors(Work(flops=10**12, int8_ops=10**12, bytes=10**9), CEILINGS) == (1.5, 1.0)


def test_another_kernel_behind_a_difference_is_said() -> None:
    (note, *others) = split_of(Config(**SMALL), near=NODE)["notes"]
    assert note.startswith("local: measured with attend_kernel<float, 64, PositionWalk>") and len(others) == 2


def test_no_launch_and_launches_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    op = FakeOperation(Config(**SMALL))
    monkeypatch.setattr(op, "attend", lambda config, plan: None)
    with pytest.raises(EnvironmentFault, match="no kernel of HyperAttention"):
        split(op, FakeRecorder(op), CEILINGS, 2, Settings(repeats=3))
    op, calls = FakeOperation(Config(**SMALL)), []
    forward = op.forward
    monkeypatch.setattr(op, "forward", lambda: (calls.append(1), forward(), op.launched.pop(0) if len(calls) == 3 else None))
    with pytest.raises(EnvironmentFault, match="launched different kernels"):
        split(op, FakeRecorder(op), CEILINGS, 2, Settings(repeats=3, max_seconds=1e6))


def test_each_rung_adds_one_part() -> None:
    config = Config(**SMALL)
    bare = dict(sinks=0, num_blocks=0, sample_size=0)
    assert ladder(config, list(PARTS)) == {
        "local": replace(config, **bare),
        "sinks": replace(config, **{**bare, "sinks": 16}),
        "heavy": replace(config, sample_size=0),
        "sampled": config,
    }
    assert ladder(config, ["heavy", "sampled"]) == {"heavy": replace(config, sample_size=0), "sampled": config}
    assert ladder(config, ["exact"]) == {"exact": config} and ladder(config, []) == {}


def test_kernels_are_told_apart_by_their_names() -> None:
    assert short_name(NODE) == "attend_kernel<float, 64, NodeWalk>"
    assert short_name("Memset (Device)") == "Memset"
    blocks, paper = PRESETS["blocks"], PRESETS["paper"]
    assert [stage_of(name, blocks) for name in (POOL, SELECT, "ha::score_kernel<ha::Pools>(int)")] == ["pool", "select", "select"]
    assert [stage_of(name, paper) for name in (HASH, SORT, "Memset (Device)")] == ["hash", "sort", "sort"]


def test_launches_are_grouped_by_the_marks_before_each_call() -> None:
    mark, other = "void at::native::vectorized_elementwise_kernel<FillFunctor>(int)", "Context Sync"
    names = [POOL, mark, mark, POOL, "Memset (Device)", SELECT, other, mark, NEAR, mark]
    launches = [Launch(name, float(i), i + 0.5) for i, name in enumerate(names)]
    found = grouped(list(reversed(launches)))
    assert [[launch.name for launch in group] for group in found] == [[POOL, "Memset (Device)", SELECT][0:3], [NEAR], []]


def bench(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    with pytest.raises(SystemExit) as status:
        cli.main(["bench", *arguments])
    streams = capsys.readouterr()
    return int(status.value.code or 0), streams.out, " ".join(streams.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile"], "give it with --attention"),
        (["OUT", "--profile"], "give it with --attention"),
        (["--attention", "--profile", "--rivals", "all"], "leave --rivals out"),
        (["--attention", "--profile", "--against", "sdpa-flash"], "leave --against out"),
        (["--attention", "--profile", "--device", "cpu"], "leave --device cpu out"),
        (["--attention", "--profile", "--backend", "ort"], "leave --backend ort out"),
        (["--attention", "--head-dim", "64,128"], "it takes one, and several with --profile"),
        (["--attention", "--head-dim", "wide"], "--head-dim is 'wide'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = bench([*arguments, "--output", str(tmp_path / "made")], capsys)
    assert code == UsageError.exit_code and message in said
    assert not (tmp_path / "made").exists()


def test_without_a_cuda_device_it_fails_as_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, said = bench(["--attention", "--profile", "--output", str(tmp_path / "made")], capsys)
    assert code == EnvironmentFault.exit_code == 3 and "--profile needs a CUDA device" in said
    assert not (tmp_path / "made").exists()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CUDA device as far as the command sees one: inputs on the processor, and the fake op."""
    made: dict[str, Any] = {"ops": []}

    def operation(library: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config) -> FakeOperation:
        if q.shape[2] == 77:
            raise RuntimeError("CUDA out of memory")
        made["ops"].append(FakeOperation(config, q.shape[2], q.shape[3]))
        made["recorder"].op = made["ops"][-1]
        return made["ops"][-1]

    class Recorder(FakeRecorder):
        def __init__(self) -> None:
            super().__init__(FakeOperation(Config(**SMALL)))
            made["recorder"] = self

    class Library:
        path = Path("libhyperattention_trt.so")

    original = bench_profile_run.problem_of
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_profile_run, "problem_of", lambda options, kind: replace(original(options, kind), device="cpu"))
    monkeypatch.setattr(bench_profile_run, "CudaOperation", operation)
    monkeypatch.setattr(bench_profile_run, "CudaRecorder", Recorder)
    monkeypatch.setattr(bench_profile_run, "load_cuda", Library)
    monkeypatch.setattr(bench_profile_run, "measure_ceilings", lambda dtype: replace(CEILINGS, text=f"measured in {dtype}"))
    machine = {"machine": {"gpu": "a GPU", "processor": "a processor"}, "versions": {}, "libraries": []}
    monkeypatch.setattr(bench_profile_run.environment, "describe", lambda *arguments: machine)
    return made


TUNED = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_the_record_holds_every_preset_head_size_and_length(device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--preset", "blocks,paper", "--head-dim", "8,64", "--lengths", "256,77,128", "--heads", "2", "--repeats", "3"]
    code, out, _ = bench(["--attention", "--profile", *shape, *TUNED, "--output", str(tmp_path), "--json"], capsys)
    assert code == 0
    report = json.loads(out)
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert {**saved, "files": ["bench.json", "bench.png"]} == report
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(saved)
    cases = report["profile"]["cases"]
    assert [(c["preset"], c["head_dim"], c["length"]) for c in cases] == [
        (preset, dim, length) for dim in (8, 64) for length in (128, 256) for preset in ("blocks", "paper")
    ]
    assert [op.geometry.head_dim for op in device["ops"]] == [8, 8, 8, 8, 64, 64, 64, 64]
    assert report["kind"] == "profile" and report["rows"] == [] and report["problem"]["head_dim"] == [8, 64]
    assert report["profile"]["ceilings"]["text"] == "measured in bf16"
    assert {(left["contender"], left["length"]) for left in report["left_out"]} == {("ours-blocks", 77), ("ours-paper", 77)}
    assert "head size 8: RuntimeError: CUDA out of memory" in report["left_out"][0]["reason"]
    (axes,) = figure(report).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{c['preset']}, D={c['head_dim']}, {c['length']}" for c in cases]
    for place in range(len(cases)):
        assert sum(bar[place].get_width() for bar in axes.containers) == pytest.approx(100)
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)


def test_one_table_says_how_every_number_was_obtained(device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--lengths", "256", "--heads", "2", "--head-dim", "64", "--repeats", "3", "--full"]
    code, out, _ = bench(["--attention", "--profile", *shape, *TUNED, "--output", str(tmp_path)], capsys)
    said = " ".join(out.split())
    assert code == 0 and "full" in said
    for part in ("pool", "select", "sinks", "heavy", "sampled", "rest", "total", "CUPTI", "measured in bf16", "estimated", "of roofline"):
        assert part in said, part
    assert "12.8 s" in said and "local, sinks, heavy, sampled: differences" in said


def test_where_nothing_can_be_profiled_it_fails_with_the_reason(device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = bench(["--attention", "--profile", "--lengths", "77", "--heads", "2", *TUNED, "--output", str(tmp_path)], capsys)
    assert code == EnvironmentFault.exit_code and "CUDA out of memory" in said


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["--causal", "--full"])
def test_on_a_gpu(mask: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages are those of the selector, add up to the whole, and no share of the roofline is more than all of it."""
    shape = ["--preset", "blocks,paper", "--head-dim", "64,128", "--lengths", "2048,40000", "--heads", "8", "--kv-heads", "2", mask]
    code, out, said = bench(["--attention", "--profile", *shape, "--repeats", "5", "--output", str(tmp_path), "--json"], capsys)
    assert code == 0, said
    report = json.loads(out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate({k: v for k, v in report.items() if k != "files"})
    ceilings = report["profile"]["ceilings"]
    assert ceilings["copy_bytes"] > 2e11 and ceilings["matrix_ops"] > 2e13
    assert len(report["profile"]["cases"]) == 8 and report["left_out"] == []
    near = {"local"} if mask == "--causal" else set()
    for case in report["profile"]["cases"]:
        found = {row["stage"]: row for row in case["stages"]}
        wanted = {"exact"} if case["length"] == 2048 else near | {"heavy", "sampled"}
        if case["length"] == 40000:
            wanted |= {"pool", "select", "sinks"} if case["preset"] == "blocks" else {"hash", "sort"}
        assert set(found) - {"merge"} == wanted | {"rest", "total"}, case
        assert sum(row["share"] for name, row in found.items() if name != "total") == pytest.approx(1)
        assert 0 < found["total"]["roofline"] < 1.05 and found["total"]["seconds"] > 0
        assert all(row["seconds"] > 0 for name, row in found.items() if name in ("pool", "select", "hash", "sort", "local", "exact"))
