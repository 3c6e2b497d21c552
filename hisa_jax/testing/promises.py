"""The contract's promises (docs/contract.md), one by one: a sentence, the cases that could break it, the judgement."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.testing import broken
from hisa_jax.testing.draw import Draw, with_keys
from hisa_jax.testing.form import Case, Form
from hisa_jax.testing.trial import Trial

# The cases.


def _usual(draw: Draw) -> list[Case]:
    return draw.usual()


def _short(draw: Draw) -> list[Case]:
    topk = draw.method.topk
    return [case for S in (topk, topk // 2 + 1) for case in draw.usual(T=min(5, S), S=S)]


def _of_every_kind(draw: Draw) -> list[Case]:
    return [*draw.usual(), *draw.usual(B=1, T=1, H=1), *draw.usual(T=3, S=draw.wide + 13, H=8, D=64), *_long(draw)]


def _long(draw: Draw, **options: bool) -> list[Case]:
    """More tokens than small sorts and tiles take."""
    return [draw.case(B=1, T=2, S=draw.wide + 400, **options)]


def _negative(draw: Draw) -> list[Case]:
    return [dataclasses.replace(case, w=-np.abs(case.w)) for case in draw.usual()]


def _equal(draw: Draw) -> list[Case]:
    whole = [*draw.usual(whole=True), *_long(draw, whole=True)]
    return [*whole, *(with_keys(case, np.broadcast_to(case.k[:, :1], case.k.shape).copy()) for case in whole)]


def _nan(draw: Draw) -> list[Case]:
    cases = []
    for case in draw.usual():
        S, few = case.k.shape[1], case.k.copy()
        few[:, [S // 50, S // 4, S // 2, S - 1]] = np.nan
        most = case.k.copy()
        most[:, draw.method.topk // 2 + 1 :] = np.nan
        cases += [with_keys(case, few), with_keys(case, most)]
    return cases


def _infinite(draw: Draw) -> list[Case]:
    cases = []
    for value in (np.inf, -np.inf) if draw.form.dtype != "float8_e4m3fn" else ():
        for case in draw.usual():
            few, most = case.k.copy(), case.k.copy()
            few[:, :: max(1, few.shape[1] // 7), 0] = value
            most[:, draw.method.topk // 2 + 1 :, 0] = value
            cases += [with_keys(case, few), with_keys(case, most)]
    return cases


def _with_lengths(draw: Draw) -> list[Case]:
    return [case for case in draw.usual() if case.lengths is not None]


def _in_a_buffer(draw: Draw) -> list[Case]:
    case = draw.case(S=2 * draw.wide)
    return [draw.lengths(case, draw.form.size("S", draw.wide))] if draw.takes("lengths") else []


def _padding(draw: Draw) -> list[Case]:
    case, cases = draw.case(), []
    if draw.takes("query_positions"):
        cases.append(draw.positions(case, -1, case.k.shape[1] - 1, -1, 3, 0))
    if draw.takes("lengths"):
        cases += [draw.lengths(case, case.k.shape[1], case.q.shape[1] - 2), draw.lengths(case, 0, 1)]
    return cases


def _impossible(draw: Draw) -> list[Case]:
    # By negative weights the zeros in unused places would be the best.
    case, limits, cases = draw.case(), np.iinfo(np.int32), []
    case = dataclasses.replace(case, w=-np.abs(case.w))
    S = case.k.shape[1]
    if draw.takes("query_positions"):
        cases.append(draw.positions(case, -7, limits.min, limits.max, S, S + 1))
    if draw.takes("lengths"):
        cases.append(draw.lengths(case, S + 5000, -3))
    return cases


def _batches(draw: Draw) -> list[Case]:
    cases = draw.usual(B=3)
    return cases if len(cases[0].q) > 1 else []


def _long_enough_to_cut(draw: Draw) -> list[Case]:
    def can_be_cut(case: Case) -> bool:
        T = case.q.shape[1]
        return any(draw.form.takes_size("T", n) and draw.form.takes_size("T", T - n) for n in range(1, T))

    return [case for case in draw.usual(B=1, T=6) if can_be_cut(case)]


def _losing_first_block(draw: Draw) -> list[Case]:
    cases = []
    for case in draw.usual():
        k = case.k.copy()
        first = k[:, : getattr(draw.method, "block_size", 1)]
        first[...] = (-4 * np.abs(first.astype(np.float32))).astype(k.dtype)
        cases.append(with_keys(case, k))
    return cases


def _all_fits(draw: Draw) -> list[Case]:
    method = draw.method
    assert not isinstance(method, Dsa)
    fits = method.block_topk * method.block_size
    return [case for case in draw.usual(S=fits) if case.k.shape[1] <= fits]


# Which are not asked of some forms and methods.


def _unless_masked(form: Form, method: Method) -> str | None:
    return "what a query does not see fills up its row" if form.padding == "masked" else None


def _if_ascending(form: Form, method: Method) -> str | None:
    return "its order is any" if form.order == "any" else None


def _if_it_has_lengths(form: Form, method: Method) -> str | None:
    return None if "lengths" in form.takes else "it takes no lengths"


def _if_it_can_be_padding(form: Form, method: Method) -> str | None:
    return None if form.takes else "it takes neither query_positions nor lengths"


def _if_there_is_infinity(form: Form, method: Method) -> str | None:
    return "float8_e4m3fn has no infinity" if form.dtype == "float8_e4m3fn" else None


def _if_it_has_blocks(form: Form, method: Method) -> str | None:
    return None if isinstance(method, Hisa | BlockSparse) else f"{type(method).__name__} has no blocks"


def _if_it_can_be_flat(form: Form, method: Method) -> str | None:
    can_be = isinstance(method, Scan) or (isinstance(method, Hisa) and method.block_ratio == 1)
    return None if can_be else "it is not made of this method"


class Promise(NamedTuple):
    """One promise.

    Attributes:
        sentence: what is promised.
        cases: inputs that could break it.
        broken: None, or how a case breaks it.
        why_not: None, or why it is not asked of functions of a form and method.
    """

    sentence: str
    cases: Callable[[Draw], Iterable[Case]]
    broken: Callable[[Trial, Case], str | None]
    why_not: Callable[[Form, Method], str | None] = lambda form, method: None


# Those that say why come before those that only notice: the first broken one is named.
PROMISES = {
    "int32": Promise("indices and counts are int32", _usual, broken.wrong_dtype),
    "causality": Promise("no token after the query is chosen", _usual, broken.not_visible, _unless_masked),
    "bounds": Promise("nothing outside of the sequence is chosen", _usual, broken.outside, _unless_masked),
    "no_duplicates": Promise("no token is chosen twice", _usual, broken.twice),
    "order": Promise("positions ascend", _usual, broken.not_ascending, _if_ascending),
    "padding": Promise("what fills up a row comes after all tokens", _usual, broken.hole, _unless_masked),
    "padding_queries": Promise(
        "a query of no token selects nothing", _padding, broken.something, _if_it_can_be_padding
    ),
    "count": Promise("exactly min(topk, visible candidates) are chosen, and count says so", _usual, broken.wrong_count),
    "short_contexts": Promise("up to topk visible tokens, all are chosen", _short, broken.not_all),
    "repeat": Promise("the same call gives the same bits", _usual, broken.not_repeated),
    "future": Promise("no token after a query decides anything", _usual, broken.future_decides),
    "missing": Promise(
        "no key beyond the length decides anything", _with_lengths, broken.missing_decide, _if_it_has_lengths
    ),
    "capacity": Promise(
        "a longer buffer of keys changes nothing", _in_a_buffer, broken.buffer_decides, _if_it_has_lengths
    ),
    "batch": Promise("a selection does not depend on the batch", _batches, broken.batch_decides),
    "chunks": Promise(
        "a selection does not depend on the cutting of queries into calls", _long_enough_to_cut, broken.chunks_decide
    ),
    "best": Promise("the tokens of the highest scores are chosen", _of_every_kind, broken.judged),
    "negative_weights": Promise("head weights may be negative", _negative, broken.judged),
    "ties": Promise("ties go to the lower position", _equal, broken.judged_exactly),
    "nan": Promise("a NaN score counts as -inf, and -inf is chosen when nothing better is left", _nan, broken.judged),
    "infinity": Promise("keys may hold infinity", _infinite, broken.judged, _if_there_is_infinity),
    "kept_blocks": Promise(
        "the first and the last blocks are kept", _losing_first_block, broken.judged, _if_it_has_blocks
    ),
    "flat_if_all_fits": Promise(
        "where all candidates fit, it is the flat indexer", _all_fits, broken.judged_as_flat, _if_it_can_be_flat
    ),
    "clipping": Promise(
        "impossible lengths and positions mean the nearest possible", _impossible, broken.judged, _if_it_can_be_padding
    ),
}
