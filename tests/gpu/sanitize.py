"""NVIDIA's compute-sanitizer over one small test of each kernel: `python -m tests.gpu.sanitize [WORD ...]`.

It needs a GPU, and CUDA's `compute-sanitizer` on the path. A run takes 15 to 60 s, most of it on the CPU; many share
the GPU. With words, only tests that have one of them in their name. Exit status 1: a run is not clean. The tool itself
ends in a segmentation fault (exit status -11) in some runs, others each time: it says nothing of the kernel.

What no tool sees is a copy engine that fills a slot of shared memory too early: tests/gpu/test_slots.py is for that.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MEMCHECK, RACECHECK, SYNCCHECK = TOOLS = "memcheck", "racecheck", "synccheck"
FOLDER = "tests/gpu/test_"
# The tests of each kernel, and the tools that run them.
TESTS = {
    # HISA and the flat indexer: prefill, decoding, pages.
    "device.py::test_ragged_batch_with_short_and_empty_rows[mosaic_gpu]": TOOLS,
    "device.py::test_head_and_block_sizes[mosaic_gpu-32-128-128-bf16]": TOOLS,
    "isolation.py::test_in_pages[mosaic_gpu-hisa-float8_e4m3fn-prefill_and_decode]": TOOLS,
    "isolation.py::test_in_pages[mosaic_gpu-hisa_two_pages_a_block-float8_e4m3fn-decode]": TOOLS,
    "isolation.py::test_in_pages[mosaic_gpu-dsa-float8_e4m3fn-decode]": TOOLS,
    "flat.py::test_merge_on_the_device[8192-13824-2048]": TOOLS,
    "refine_few.py::test_on_the_device[34-64-128-128-64-float8_e4m3fn-64]": TOOLS,
    "refine_few.py::test_on_the_device[67-64-128-128-64-bfloat16-None]": TOOLS,
    # Selections of few rows: by one CTA, by groups, by clusters of CTAs.
    "topk_few.py": (MEMCHECK, RACECHECK),
    "select_groups.py::test_on_the_device[3-40000-1000]": TOOLS,
    "select_groups.py::test_on_the_device[3-69632-1000]": TOOLS,
    "select_groups.py::test_on_the_device[1-131072-2048]": TOOLS,
    # The scan: of many queries, of few, and what it lists.
    "scan_device.py::test_results_do_not_depend_on_the_batch[mosaic_gpu]": TOOLS,
    "scan_few.py::test_long_rows_are_listed_on_the_device[131072]": TOOLS,
    "scan_slopes.py::test_on_the_device[64_heads]": TOOLS,
    "listed_loop.py::test_on_the_device[16-True-True-2]": TOOLS,
    # The attention.
    "sparse_mla_lists.py": (MEMCHECK,),
    "sparse_mla_mosaic.py": (MEMCHECK,),
    "device.py::test_sparse_mla": (RACECHECK, SYNCCHECK),
    # By Triton: the compiler places its barriers.
    "pool_scores.py": (MEMCHECK,),
    "append.py::test_on_the_device[float32-16-128-float8_e4m3fn]": (MEMCHECK,),
    "sparse_attention.py": (MEMCHECK,),
}
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)")
PASSED = re.compile(r"\b\d+ passed")


def run(tool: str, test: str, log: Path, seconds: float) -> tuple[bool, str]:
    """Whether a test passed under a tool that found nothing, and what to say of it."""
    start = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", FOLDER + test]
    # An array an allocation: in a pool of all arrays an index beyond one is still within the pool.
    env = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--print-limit", "20", *pytest]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            ended = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the test, too
            ended = f"stopped after {seconds:.0f} s"
    text = log.read_text(errors="replace")
    summary, passed = SUMMARY.search(text), PASSED.search(text)
    found = summary is None or re.search(r"[1-9]\d* (?:errors?|hazards?|warnings?)\b", summary[1])
    is_clean = ended == "exit status 0" and bool(passed) and not found
    said = [passed[0] if passed else "no test passed", summary[1] if summary else "no summary", ended]
    return is_clean, f"{'; '.join(said)}; {time.monotonic() - start:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only tests that have one of these in their name")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), metavar="N")
    parser.add_argument("--seconds", type=float, default=300, metavar="N", help="a run ends after these (default: 300)")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitize"), metavar="DIR")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    runs = [
        (tool, test)
        for test, tools in TESTS.items()
        for tool in tools
        if tool in args.tools and (not args.words or any(word in test for word in args.words))
    ]
    if not runs:
        parser.error("no test has one of the words in its name")

    def one(numbered: tuple[int, tuple[str, str]]) -> bool:
        number, (tool, test) = numbered
        is_clean, said = run(tool, test, args.logs / f"{number}_{tool}.log", args.seconds)
        print(f"{'clean' if is_clean else 'NOT CLEAN'}  {number}_{tool}  {test}: {said}", flush=True)
        return is_clean

    with ThreadPoolExecutor(args.workers) as pool:
        clean = list(pool.map(one, enumerate(runs)))
    print(f"{sum(clean)} of {len(clean)} runs are clean; logs are in {args.logs}")
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
