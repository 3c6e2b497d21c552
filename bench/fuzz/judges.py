"""What must hold of a selection: the oracle's choice within the contract's tolerance, and equalities to the bit.

A judge takes a scene and a form and gives a `Verdict`. It draws what it needs from the scene's seed, so that the same
scene is always judged alike: that is what makes a wrong row shrink.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.fuzz.scene import Array, Found, Scene, by_request, call_of, made, run, run_again
from hisa_jax.methods import flat_of, least_blocks
from tests import oracle

# Relative to the scale of a query's scores. Kernels round block means to the keys' dtype.
TOLERANCE, KERNEL_TOLERANCE = 1e-5, 2e-2
# Scores below the least normal float32 have no digits, and may be 0.
_LEAST_SCALE = 1e-37


class Wrong(NamedTuple):
    """A wrong query, request r and row t of it, and what is wrong. -1: no query's."""

    r: int
    t: int
    why: str


class Verdict(NamedTuple):
    """How many queries were judged, and those that were wrong."""

    rows: int
    wrong: list[Wrong]


def _always(scene: Any, form: str) -> bool:
    return True


class Judge(NamedTuple):
    """`judge(scene, form)` and whether it has anything to say of them; `share`: of cases that it judges."""

    judge: Callable[[Any, str], Verdict]
    applies: Callable[[Any, str], bool] = _always
    share: float = 1.0


def contract(scene: Scene, form: str) -> Verdict:
    """The oracle's tokens, scores and blocks, up to near-ties; padding selects nothing."""
    found, is_row = run(scene, form), scene.is_row
    reference, tolerance = with_tolerances(scene, scene.reference())
    wrong = []
    if _why_not(found, reference, tolerance, ...):
        for r, t in np.argwhere(is_row):
            why = _why_not(found, reference, tolerance, (slice(r, r + 1), slice(t, t + 1)))
            if why:
                wrong.append(Wrong(int(r), int(t), why))
    if found.leaked:
        wrong.append(Wrong(-1, -1, f"{found.leaked} rows of padding select something"))
    return Verdict(int(is_row.sum()), wrong)


def with_tolerances(scene: Scene, reference: oracle.OracleSelection) -> tuple[oracle.OracleSelection, float]:
    """The reference, its scales such that one tolerance allows what either score needs."""
    is_xla = scene.setup.implementation == "xla"
    tolerance = TOLERANCE if is_xla else KERNEL_TOLERANCE
    tokens = np.maximum(reference.token_scale, _LEAST_SCALE / tolerance)
    blocks = np.maximum(reference.block_scale, _LEAST_SCALE / tolerance)
    return dataclasses.replace(
        reference,
        token_scale=np.zeros_like(tokens) if scene.exact_tokens else tokens,
        block_scale=np.zeros_like(blocks) if scene.exact_blocks and is_xla else blocks,
        scanned=_each(reference.scanned, lambda one: _with_digits(one, tolerance)),
    ), 0.0 if scene.exact_tokens and scene.exact_blocks and is_xla else tolerance


def _with_digits(scanned: Any, tolerance: float) -> Any:
    """A scan of which a product that float32 may take for 0 leaves open whether its head is."""
    if scanned is None:
        return None
    return scanned._replace(product_bounds=np.maximum(scanned.product_bounds, _LEAST_SCALE / tolerance))


def _each(objects: Array, change: Callable[[Any], Any]) -> Array:
    made = np.empty_like(objects)
    for at in np.ndindex(objects.shape):
        made[at] = change(objects[at])
    return made


def _why_not(found: Found, reference: oracle.OracleSelection, tolerance: float, at: Any) -> str:
    part = dataclasses.replace(
        reference,
        **{f.name: getattr(reference, f.name)[at] for f in dataclasses.fields(reference) if f.name != "method"},
    )
    # Padding has position -1 in the reference.
    indices = np.where(part.visible[..., None] > 0, found.indices[at], -1)
    count = np.where(part.visible > 0, found.counts[at], 0).astype(np.int32)
    if (found.counts[at] != count).any():
        return "a query that sees nothing selects something"
    blocks = found.blocks if found.blocks is None else np.where(part.visible[..., None] > 0, found.blocks[at], -1)
    try:
        oracle.assert_same_selection(indices, count, part, tolerance, scores=found.scores[at], blocks=blocks)
    except AssertionError as error:
        return str(error)
    return ""


def all_forms_alike(scene: Scene, form: str) -> Verdict:
    """The same bits as `select` over the same keys."""
    return _compare(scene, run(scene, form), run(scene, "select"), scene.is_row, "select")


def chunks(scene: Scene, form: str) -> Verdict:
    """Some of the queries, when they were the last: the same bits as in one shot."""
    rng = np.random.default_rng(scene.seed)
    start = rng.integers(0, scene.n_q + 1)
    length = np.where(rng.random(len(start)) < 0.5, 1, scene.setup.T)
    end = np.minimum(start + length, scene.n_q)
    chunk = scene.chunk(start, end)
    whole, part = run(scene, form), run(chunk, form)
    of_whole = Found._make([*(None if x is None else _rows_from(x, start) for x in whole[:4]), 0])
    verdict = _compare(chunk, part, of_whole, chunk.is_row, "the same query in one shot")
    return Verdict(verdict.rows, [w._replace(t=int(w.t + start[w.r])) for w in verdict.wrong])


def _rows_from(x: Array, start: Array) -> Any:
    T = x.shape[1]
    return np.stack([np.concatenate([x[r, s:], x[r, :s]]) if s else x[r] for r, s in enumerate(start)])[:, :T]


def poison(scene: Scene, form: str) -> Verdict:
    """NaN, infinity or a huge number in all that no query sees changes no bit."""
    rng = np.random.default_rng(scene.seed)
    filler = float(rng.choice([np.nan, np.inf, -np.inf, 1e30]))
    if scene.k.dtype.itemsize == 1 or scene.q.dtype.itemsize == 1:
        filler = np.nan
    return _compare(scene, run(scene, form, filler), run(scene, form), scene.is_row, f"without {filler} elsewhere")


def future(scene: Scene, form: str) -> Verdict:
    """NaN in all keys from some token on changes no bit of the queries before it."""
    rng = np.random.default_rng(scene.seed)
    cut = rng.integers(0, np.clip(scene.n_k, 0, scene.setup.S) + 1)
    is_after = np.arange(scene.setup.S) >= cut[:, None]
    k, scales = scene.k.copy(), scene.scales
    k[is_after] = np.asarray(127 if k.dtype == np.int8 else np.nan).astype(k.dtype)
    if scales is not None:
        scales = np.where(is_after, np.float32(np.nan), scales)
    poisoned = dataclasses.replace(scene, k=k, scales=scales)
    rows = scene.is_row & (scene.visible <= cut[:, None])
    return _compare(scene, run(poisoned, form), run(scene, form), rows, "without NaN in what it does not see")


def repeat(scene: Scene, form: str) -> Verdict:
    """The same call gives the same bits."""
    return _compare(scene, run_again(scene, form), run(scene, form), scene.is_row, "the same call before")


def page_order(scene: Scene, form: str) -> Verdict:
    """Other pages, another life of the cache: the same bits."""
    other = dataclasses.replace(scene, seed=scene.seed + 1)
    return _compare(scene, run(other, form), run(scene, form), scene.is_row, "over other pages")


def flat(scene: Scene, form: str) -> Verdict:
    """Hisa and Scan are the flat indexer where every visible block, or unit, is kept."""
    method: Any = scene.setup.method
    rows = scene.is_row & (scene.visible <= least_blocks(method) * method.block_size)
    wanted = run(scene, form, method=flat_of(method))._replace(blocks=None)
    got = run(scene, form)._replace(blocks=None)
    if scene.setup.implementation != "xla":  # scores are given twice, each by other products
        got, wanted = got._replace(scores=got.counts), wanted._replace(scores=wanted.counts)
    return _compare(scene, got, wanted, rows, "the flat indexer")


def everything(scene: Scene, form: str) -> Verdict:
    """Where no more tokens are visible than are to be chosen, all are."""
    found, visible, topk = run(scene, form), scene.visible, scene.setup.method.topk
    rows = scene.is_row & (visible <= topk)
    every = np.arange(topk)
    wanted = np.where(every < visible[..., None], every, -1)
    wrong = [
        Wrong(int(r), int(t), f"of {visible[r, t]} visible tokens chose {found.indices[r, t, : found.counts[r, t]]}")
        for r, t in np.argwhere(rows & (found.indices != wanted).any(-1))
    ]
    return Verdict(int(rows.sum()), wrong)


def ties(scene: Scene, form: str) -> Verdict:
    """Of equal keys the first are chosen, of equal blocks the first are kept, whatever rounding does to scores."""
    method: Any = scene.setup.method
    found, wrong, n_judged = run(scene, form), [], 0
    alike = [_alike(scene, r) for r in range(scene.setup.R)]
    for r, t in np.argwhere(scene.is_row):
        visible = int(scene.visible[r, t])
        tokens = np.arange(visible)
        if found.blocks is not None:
            size = method.block_size
            kept = found.blocks[r, t][found.blocks[r, t] >= 0]
            tokens = tokens[np.isin(tokens // size, kept)]
            whole = np.arange(method.keep_first, max(visible // size, method.keep_first))
            whole = whole[whole < -(-visible // size) - method.keep_last]
            blocks = alike[r][: visible // size * size].reshape(-1, size)
            broken = _out_of_order(
                np.unique(blocks, axis=0, return_inverse=True)[1].ravel()[whole], np.isin(whole, kept)
            )
            if broken is not None:
                wrong.append(
                    Wrong(int(r), int(t), f"block {whole[broken[1]]} was kept, the equal {whole[broken[0]]} not")
                )
                continue
        broken = _out_of_order(alike[r][tokens], np.isin(tokens, found.indices[r, t, : found.counts[r, t]]))
        if broken is not None:
            wrong.append(
                Wrong(int(r), int(t), f"token {tokens[broken[1]]} was chosen, the equal {tokens[broken[0]]} not")
            )
        n_judged += 1
    return Verdict(n_judged, wrong)


def _alike(scene: Scene, r: int) -> Array:
    """[S]: a number a token, the same for the same bits of key and scale."""
    keys = scene.k[r].view(np.uint8).reshape(scene.setup.S, -1)
    if scene.scales is not None:
        keys = np.concatenate([keys, scene.scales[r, :, None].view(np.uint8)], axis=1)
    return np.unique(keys, axis=0, return_inverse=True)[1].ravel()


def _out_of_order(groups: Array, chosen: Array) -> tuple[int, int] | None:
    """Two of one group of which the first was left out and the second chosen."""
    order = np.argsort(groups, kind="stable")
    same = groups[order][1:] == groups[order][:-1]
    broken = np.flatnonzero(same & ~chosen[order][:-1] & chosen[order][1:])
    return (int(order[broken[0]]), int(order[broken[0] + 1])) if len(broken) else None


def lacking_pages(scene: Scene, form: str) -> Verdict:
    """A request whose table names a wrong page selects nothing, the others what they did."""
    rng, call = np.random.default_rng(scene.seed), call_of(scene, form)
    tables, n_pages, size = call.args[2].copy(), call.options["n_pages"], scene.setup.page_size
    able = np.flatnonzero((scene.n_k > 0) & (scene.n_q > 0))
    if not len(able):
        return Verdict(0, [])
    r = int(rng.choice(able))
    nth = int(rng.integers(-(-scene.n_k[r] // size)))
    # No page, one that was copied elsewhere or that no request has, or another of its own.
    own = tables[1, r, nth - 1 if nth else 1]
    tables[1, r, nth] = rng.choice([-1, n_pages, 2**31 - 1, own if own != tables[1, r, nth] else -1])
    args = (*call.args[:2], tables, *call.args[3:])
    got, wanted = by_request(scene, form, made(call._replace(args=args))), run(scene, form)
    others = scene.is_row & (np.arange(scene.setup.R) != r)[:, None]
    verdict = _compare(scene, got, wanted, others, "the request where another's table is right")
    wrong = [
        Wrong(r, int(t), f"page {nth} is not in the table, and yet it selects {_short(got, r, int(t))}")
        for t in np.flatnonzero(scene.is_row[r] & (got.counts[r] > 0))
    ]
    return Verdict(int(scene.is_row.sum()), verdict.wrong + wrong)


def bad_offsets(scene: Scene, form: str) -> Verdict:
    """Offsets that fall or lie outside reach nothing outside, and every list is one: ascending, then -1."""
    rng, call = np.random.default_rng(scene.seed), call_of(scene, form)
    names = (4, 5) if form == "select_packed" else (3,)
    args = list(call.args)
    for at in names:
        args[at] = rng.permutation(args[at])
        args[at][rng.integers(len(args[at]))] += np.int32(rng.choice([-40, 0, 500, 2**30]))
    got = made(call._replace(args=tuple(args)))
    most = args[1].shape[0] if form == "select_packed" else scene.setup.S
    rank = np.arange(got.indices.shape[-1])
    indices, is_real = got.indices, rank < got.count[:, None]
    is_list = np.where(is_real, (indices >= 0) & (indices < most), indices == -1).all(-1)
    is_list &= ((np.diff(indices, axis=-1) > 0) | ~is_real[:, 1:]).all(-1)
    wrong = [Wrong(-1, int(t), f"row {t}: {indices[t]}, count {got.count[t]}") for t in np.flatnonzero(~is_list)]
    return Verdict(len(is_list), wrong)


def _compare(scene: Scene, got: Found, wanted: Found, rows: Array, what: str) -> Verdict:
    """Bit equality of some rows [R, T]."""
    differs = np.zeros(rows.shape, bool)
    for x, y in zip(got[:4], wanted[:4], strict=True):
        if x is not None and y is not None:
            # Bits, so that -0 is not 0; a NaN there would be a fault of its own, which the oracle sees.
            bits = (x.view(np.int32) != y.view(np.int32)).reshape(*rows.shape, -1)
            differs |= bits.any(-1)
    wrong = [
        Wrong(int(r), int(t), f"{_short(got, r, t)} is not {_short(wanted, r, t)}, that of {what}")
        for r, t in np.argwhere(differs & rows)
    ]
    return Verdict(int(rows.sum()), wrong)


def _short(found: Found, r: int, t: int) -> str:
    tokens = np.array2string(found.indices[r, t, : found.counts[r, t]], threshold=40)
    return f"{tokens}, scores {np.array2string(found.scores[r, t], threshold=8, precision=9)}"


def _is_xla(scene: Scene, form: str) -> bool:
    return scene.setup.implementation == "xla"


JUDGES: dict[str, Judge] = {
    "oracle": Judge(contract),
    "as select": Judge(all_forms_alike, lambda scene, form: _is_xla(scene, form) and form != "select"),
    "chunks": Judge(chunks, lambda scene, form: _is_xla(scene, form) and scene.positions is None, 0.4),
    "poison": Judge(poison, share=0.4),
    "future": Judge(future, share=0.3),
    "repeat": Judge(repeat, share=0.1),
    "pages": Judge(page_order, lambda scene, form: "paged" in form, 0.3),
    "lacking pages": Judge(lacking_pages, lambda scene, form: "paged" in form, 0.3),
    "bad offsets": Judge(bad_offsets, lambda scene, form: "pa" in form, 0.2),
    "flat": Judge(flat, lambda scene, form: scene.setup.kind in ("Hisa", "Scan") and form == "select", 0.4),
    "everything": Judge(everything),
    "ties": Judge(ties, lambda scene, form: "equal" in scene.data or "repeated" in scene.data),
}
