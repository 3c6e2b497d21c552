"""Makes a case that breaks a promise small: fewer sequences, queries, tokens, heads, features; plainer numbers."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from hisa_jax.testing.form import Case, Form
from hisa_jax.testing.trial import chunk, cut

Broken = Callable[[Case], str | None]


def shrink(case: Case, why: str, broken: Broken, form: Form, seconds: float) -> tuple[Case, str]:
    """The smallest case found that is still broken, and how; each step is kept if it is.

    Args:
        case, why: the case to begin with, and what is wrong with it.
        broken: None, or what is wrong with a case.
        form: whose sizes are kept to.
        seconds: after which no more is tried.
    """
    end = time.monotonic() + seconds
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(case, form):
            if time.monotonic() > end:
                return case, why
            if smaller_why := broken(smaller):
                case, why, is_smaller = smaller, smaller_why, True
                break
    return case, why


def _smaller(case: Case, form: Form) -> Iterator[Case]:
    (B, T, H, D), S = case.q.shape, case.k.shape[1]
    for n in _sizes(form, "B", B):
        yield from (cut(case, b=slice(b, b + n)) for b in range(0, B - n + 1, n))
    for n in _sizes(form, "T", T):
        # Without positions the queries are the last tokens, so that only the last of them mean the same alone.
        firsts = range(0, T - n + 1, n) if case.query_positions is not None else (T - n,)
        yield from (cut(case, t=slice(t, t + n)) for t in firsts)
        if (first := chunk(case, slice(n), form)) is not None:
            yield first
    for n in _sizes(form, "S", S):
        if all(np.all((value < n) | (value > S)) for value in case.keywords.values()):
            yield dataclasses.replace(case, k=case.k[:, :n])  # what was possible must not become impossible
        yield _fewer_keys(case, slice(n))
        yield _fewer_keys(case, slice(S - n, S))
    for n in _sizes(form, "H", H):
        yield dataclasses.replace(case, q=case.q[:, :, :n], w=case.w[:, :, :n])
    for n in _sizes(form, "D", D):
        yield dataclasses.replace(case, q=case.q[..., :n], k=case.k[..., :n])
    for name in "wqk":
        array = getattr(case, name)
        for plainer in _plainer(array):
            if not np.array_equal(plainer, array, equal_nan=True):
                yield dataclasses.replace(case, **{name: plainer})


def _sizes(form: Form, axis: str, size: int) -> list[int]:
    """Smaller sizes to try: half, three quarters, one less, or those that the function takes; the least first."""
    sizes = set(form.sizes.get(axis, {1, size // 2, size - size // 4, size - 1}))
    return sorted(n for n in sizes if 0 < n < size)


def _fewer_keys(case: Case, at: slice) -> Case:
    """Positions and lengths that point beyond stay as far beyond."""
    S, fewer = case.k.shape[1], case.k[:, at]
    gone = S - fewer.shape[1]
    keywords = {
        name: np.where(value >= 0, np.maximum(np.asarray(value, np.int64) - gone, 0), value).astype(np.int32)
        for name, value in case.keywords.items()
    }
    return dataclasses.replace(case, k=fewer, **keywords)


def _plainer(array: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ones_like(array)
    values = array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for digits in (0, 1):
            yield np.round(values, digits).astype(array.dtype)
