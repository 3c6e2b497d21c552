"""The methods that the lab compares, by name, at a number of chosen tokens."""

import hisa_jax as hj
from bench.smollm2 import sketches
from bench.smollm2.filters import Apart, Method, Misa, Sketched, SubBlocks, Threshold, TwoHeads

FLAT = "flat"


def core(topk: int) -> dict[str, Method]:
    """Ways to find candidates, the flat indexer first."""
    k = topk
    found: dict[str, Method] = {FLAT: hj.Dsa(topk=k)}
    for size in (128, 32, 8):
        if 4 * k >= 2 * size:
            found[f"HISA, blocks of {size}, 4 k"] = hj.Hisa(topk=k, block_size=size, block_topk=4 * k // size)
    for times in (1.25, 1.5, 2, 3):
        found[f"scan, {times:g} k"] = scan(k, times)
    for unit in (2, 4, 8):
        for times in (3, 4):
            found[f"scan, units of {unit}, {times:g} k"] = scan(k, times, unit)
    for times in (1.5, 2, 3):
        found[f"scan, plain slopes, {times:g} k"] = scan(k, times, slopes="plain")
    for times in (1.5, 2):
        found[f"scan above a threshold, {times:g} k"] = Threshold(topk=k, candidates=int(times * k))
    found["MISA, two stages, 4 k"] = Misa(topk=k, candidates=4 * k)
    for size in (128, 32):
        if 4 * k >= 2 * size:
            name = f"blocks of {size} by the best mean of 8, 4 k"
            found[name] = SubBlocks(topk=k, block_size=size, block_topk=4 * k // size)
    if k >= 64:
        found["block-sparse, blocks of 32"] = hj.BlockSparse(topk=k, block_size=32)
    return found


def sketched(topk: int) -> dict[str, Method]:
    """The scan of each sketch of the keys."""
    k = topk
    found: dict[str, Method] = {}
    for name in sketches.NAMES:
        unit = 4 if name == "means of 4" else 1
        for times in (2, 4, 8) if name in ("signs", "means of 4") else (1.5, 2, 3):
            found[f"scan of {name}, {times:g} k"] = Sketched(
                topk=k, candidates=int(times * k) // unit * unit, sketch=name, unit=unit
            )
    for first in (4, 8):
        found[f"signs to {first} k, scan to 2 k"] = Sketched(topk=k, candidates=2 * k, sketch="signs", first=first * k)
    return found


def repaired(topk: int) -> dict[str, Method]:
    """What helps where one virtual head does not follow the indexer, and what does not."""
    k = topk
    found: dict[str, Method] = {"HISA, blocks of 8, 8 k": hj.Hisa(topk=k, block_size=8, block_topk=k)}
    for times in (1.5, 2, 3):
        for n in (0, 1, 2, 4, 8, 12, 16):
            name = f"scan, {n} heads apart, {times:g} k" if n else f"scan, slopes of the best 32, {times:g} k"
            found[name] = Apart(topk=k, candidates=int(times * k), n_heads=n)
        found[f"scan, 4 heads apart by bend, {times:g} k"] = Apart(
            topk=k, candidates=int(times * k), n_heads=4, n_best=16, by="bend"
        )
        found[f"scan, two virtual heads, {times:g} k"] = TwoHeads(topk=k, candidates=int(times * k))
    for unit in (2, 4):
        found[f"scan, 8 heads apart, units of {unit}, 3 k"] = Apart(topk=k, candidates=3 * k, n_heads=8, unit=unit)
    for best in (8, 48, 64):
        name = f"scan, slopes of the best {best}, 2 k"
        found[name] = Apart(topk=k, candidates=2 * k, n_heads=0, n_best=best)
    found["scan, 4 k"], found["scan, 8 k"] = scan(k, 4), scan(k, 8)
    return found


def scan(topk: int, times: float, unit: int = 1, slopes: hj.methods.Slopes = "sampled") -> hj.Scan:
    """The scan with `times` topk candidates, in whole units."""
    return hj.Scan(topk=topk, candidates=-(-int(times * topk) // unit) * unit, unit=unit, slopes=slopes)


def fitting(found: dict[str, Method], H: int, T: int) -> dict[str, Method]:
    """Those that mean something for so many heads and tokens."""
    return {
        name: method
        for name, method in found.items()
        if getattr(method, "candidates", 0) <= T // 2 and getattr(method, "n_heads", 0) < H
    }


def answering(topk: int) -> dict[str, Method]:
    """The methods whose text and answers are measured, a run of the model each; by how much each is wanted."""
    everything = {**core(topk), **sketched(topk), **repaired(topk)}
    names = (
        FLAT, "scan, 2 k", "HISA, blocks of 128, 4 k", "scan, 8 heads apart, 2 k", "scan, slopes of the best 32, 2 k",
        "scan, 1.5 k", "HISA, blocks of 8, 4 k", "scan, 4 heads apart, 2 k", "scan, 4 k", "HISA, blocks of 32, 4 k",
        "scan, units of 4, 3 k", "scan, units of 8, 4 k", "scan, plain slopes, 2 k", "scan above a threshold, 2 k",
        "MISA, two stages, 4 k", "blocks of 32 by the best mean of 8, 4 k", "signs to 8 k, scan to 2 k",
        "scan of 4 bits, 2 k", "scan, 1.25 k", "scan of 64 directions, 4 bits, 2 k", "block-sparse, blocks of 32",
    )  # fmt: skip
    return {name: everything[name] for name in names if name in everything}
