"""Random problems on the CUDA kernels against the dense oracle (tests/random_cases.py), one process a core.

    PYTHONPATH=. python tests/gpu/random_run.py --cases 2000 --json OUT/random.json [--seed-from 0] [--jobs N]
    PYTHONPATH=. python tests/gpu/random_run.py --seed N        one problem again, with its traceback

The exit code is 1 if any problem failed; the seeds that did are printed and written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from random_cases import check_random_case

from hyperattention.library import load_cuda


def failure(seed: int) -> str:
    """What is wrong with one problem; empty when nothing."""
    torch.set_num_threads(1)
    try:
        check_random_case(load_cuda(), seed, "cuda")
    except Exception:
        return traceback.format_exc()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many seeds in a row")
    parser.add_argument("--seed-from", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one problem alone")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, help="file for the counts")
    given = parser.parse_args()
    if given.seed is not None:
        text = failure(given.seed)
        print(text or f"seed {given.seed} passes")
        return bool(text)
    seeds = range(given.seed_from, given.seed_from + given.cases)
    start, failed = time.perf_counter(), {}
    # The oracle's products are on the processor; a library's own threads would only get in each other's way.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for seed, text in zip(seeds, pool.map(failure, seeds, chunksize=8), strict=True):
            if text:
                failed[seed] = text.strip()[-1500:]
                if len(failed) <= 10:
                    print(f"--- seed {seed}\n{text}", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    if given.json:
        record = {"seeds": [seeds.start, seeds.stop - 1], "passed": len(seeds) - len(failed), "failed": failed, "seconds": seconds}
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"seeds {seeds.start} to {seeds.stop - 1}: {len(seeds)} problems, {len(failed)} failed {sorted(failed)[:50]} in {seconds:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
