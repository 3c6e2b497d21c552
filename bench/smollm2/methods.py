"""The methods that the lab compares, by name, at a number k of chosen tokens; names end with how many candidates."""

import hisa_jax as hj
from bench.smollm2 import sketches
from bench.smollm2.filters import Method, Misa, SubBlocks, Threshold, TwoHeads, Varied

FLAT = "flat"


def core(topk: int) -> dict[str, Method]:
    """The methods of the library and those of others, the flat indexer first."""
    k = topk
    found: dict[str, Method] = {FLAT: hj.Dsa(topk=k)}
    for size in (128, 32, 8):
        if 4 * k >= 2 * size:
            found[f"HISA, blocks of {size}, 4 k"] = hj.Hisa(topk=k, block_size=size, block_topk=4 * k // size)
    found["HISA, blocks of 8, 8 k"] = hj.Hisa(topk=k, block_size=8, block_topk=k)
    for times in (1.5, 2, 3, 4):
        for heads in (0, 1, 2, 4, 8, 16):
            found[scan_name(times, heads)] = scan(k, times, heads)
    for unit in (2, 4, 8):
        for times in (4, 8):
            found[f"scan, 4 exact heads, units of {unit}, {times} k"] = scan(k, times, 4, unit)
    for heads in (0, 4):
        for times in (1.5, 2, 3, 4):
            name = f"scan, {_exact(heads)}, plain slopes, {times:g} k"
            found[name] = hj.Scan(topk=k, candidates=int(times * k), exact_heads=heads, slopes="plain")
    for times in (2, 4):
        found[f"scan above a threshold, 4 exact heads, {times} k"] = Threshold(topk=k, candidates=times * k)
    found["MISA, two stages, 4 k"] = Misa(topk=k, candidates=4 * k)
    for size in (128, 32):
        if 4 * k >= 2 * size:
            name = f"blocks of {size} by the best mean of 8, 4 k"
            found[name] = SubBlocks(topk=k, block_size=size, block_topk=4 * k // size)
    if k >= 64:
        found["block-sparse, blocks of 32, k"] = hj.BlockSparse(topk=k, block_size=32)
    return found


def sketched(topk: int) -> dict[str, Method]:
    """The scan of each sketch of the keys, with the library's number of exact heads."""
    k = topk
    found: dict[str, Method] = {}
    for name in sketches.NAMES:
        unit = 4 if name == "means of 4" else 1
        for times in (2, 4, 8):
            found[f"scan of {name}, 4 exact heads, {times} k"] = Varied(
                topk=k, candidates=times * k, exact_heads=4, sketch=name, unit=unit
            )
    found["scan of int4, 4 exact heads, 4 k"] = hj.Scan(topk=k, candidates=4 * k, sketch="int4")
    for times in (2, 4):
        name = f"scan of signs to 8 k, then of the keys, 4 exact heads, {times} k"
        found[name] = Varied(topk=k, candidates=times * k, exact_heads=4, sketch="signs", first=8 * k)
    return found


def varied(topk: int) -> dict[str, Method]:
    """The scan with one thing changed."""
    k = topk
    found: dict[str, Method] = {}
    for times in (1.25, 1.5, 2, 3, 4, 8):
        found[f"scan, one head, 16 samples, {times:g} k"] = Varied(topk=k, candidates=int(times * k), n_best=16)
    for unit in (2, 4, 8):
        for times in (3, 4):
            found[f"scan, one head, 16 samples, units of {unit}, {times} k"] = Varied(
                topk=k, candidates=times * k // unit * unit, n_best=16, unit=unit
            )
    for times in (1.5, 2):
        found[f"scan above a threshold, one head, 16 samples, {times:g} k"] = Threshold(
            topk=k, candidates=int(times * k), exact_heads=0, n_best=16
        )
    for best in (8, 48, 64):
        found[f"scan, one head, {best} samples, 2 k"] = Varied(topk=k, candidates=2 * k, n_best=best)
    for heads in (2, 4, 8):
        for times in (1.25, 1.5, 2):
            found[f"scan, {heads} exact heads by bend, 16 samples, {times:g} k"] = Varied(
                topk=k, candidates=int(times * k), exact_heads=heads, by="bend", n_best=16
            )
    for times in (1.25, 1.5, 2):
        found[f"scan, two virtual heads, 16 samples, {times:g} k"] = TwoHeads(topk=k, candidates=int(times * k))
    for name in sketches.NAMES:
        unit = 4 if name == "means of 4" else 1
        for times in (2, 4, 8) if name in ("signs", "means of 4") else (1.5, 2, 3):
            found[f"scan of {name}, one head, 16 samples, {times:g} k"] = Varied(
                topk=k, candidates=int(times * k) // unit * unit, n_best=16, sketch=name, unit=unit
            )
    for first in (4, 8):
        found[f"scan of signs to {first} k, then of the keys, one head, 16 samples, 2 k"] = Varied(
            topk=k, candidates=2 * k, n_best=16, sketch="signs", first=first * k
        )
    return found


def scan_name(times: float, heads: int) -> str:
    return f"scan, {_exact(heads)}, {times:g} k"


def _exact(heads: int) -> str:
    return f"{heads} exact head{'s' * (heads > 1)}" if heads else "one head"


def scan(topk: int, times: float, heads: int, unit: int = 1) -> hj.Scan:
    """The scan with `times` topk candidates, in whole units."""
    return hj.Scan(topk=topk, candidates=-(-int(times * topk) // unit) * unit, exact_heads=heads, unit=unit)


def fitting(found: dict[str, Method], H: int, T: int) -> dict[str, Method]:
    """Those that mean something for so many heads and tokens."""

    def fits(method: Method) -> bool:
        heads = max(getattr(method, name, 0) for name in ("exact_heads", "n_heads"))
        return heads < H and getattr(method, "candidates", 0) <= T // 2

    return {name: method for name, method in found.items() if fits(method)}


def opposed(topk: int) -> dict[str, Method]:
    """The methods that meet heads with nothing in common, the flat indexer first."""
    everything = core(topk)
    scans = [scan_name(times, heads) for times in (2, 4) for heads in (0, 4, 8, 16)]
    names = (FLAT, "HISA, blocks of 128, 4 k", "HISA, blocks of 8, 4 k", "MISA, two stages, 4 k", *scans)
    return {name: everything[name] for name in names if name in everything}


def answering(topk: int) -> dict[str, Method]:
    """The methods whose text and answers are measured, a run of the model each; those wanted most come first."""
    everything = {**core(topk), **sketched(topk), **varied(topk)}
    names = (
        FLAT, scan_name(4, 4), "HISA, blocks of 128, 4 k", scan_name(2, 0), scan_name(2, 8), scan_name(2, 4),
        "HISA, blocks of 8, 4 k", scan_name(4, 0), scan_name(3, 4), "MISA, two stages, 4 k", "HISA, blocks of 32, 4 k",
        "scan of int4, 4 exact heads, 4 k", "scan, 4 exact heads, units of 2, 4 k",
        "scan, 4 exact heads, units of 4, 8 k",
        "scan, 4 exact heads, plain slopes, 4 k", "scan above a threshold, 4 exact heads, 4 k",
        "scan of signs to 8 k, then of the keys, 4 exact heads, 4 k", "blocks of 32 by the best mean of 8, 4 k",
        "block-sparse, blocks of 32, k",
    )  # fmt: skip
    return {name: everything[name] for name in names if name in everything}
