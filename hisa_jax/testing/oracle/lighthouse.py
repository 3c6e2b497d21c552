"""Lighthouse attention, written from its specification: a literal streaming selection and a dense form with a mask.

One sequence and one key head at a time: q [T, D] (of the head's group, [T, R, D]), k [T, D], v [T, V], all float64. A
method is read by attribute: `levels`, `pool`, `topk`, `tile`, `prefix`, `rope`. Entries are pairs (level, number).
"""

import numpy as np


def last_position(entry, pool) -> int:
    level, number = entry
    return (number + 1) * pool**level - 1


def pyramid(x, method) -> list[np.ndarray]:
    """[T, ...] -> the means over windows of each level."""
    return [x.reshape(-1, width, *x.shape[1:]).mean(axis=1) for width in widths(method)]


def widths(method) -> list[int]:
    return [method.pool**level for level in range(method.levels)]


def scores(q, k) -> tuple[np.ndarray, np.ndarray]:
    """q [T, R, D], k [T, D] -> what orders as the norms: of queries the best of the group, of keys; NaN below all."""
    a, b = np.sum(q**2, axis=-1), np.sum(k**2, axis=-1)
    return np.where(np.isnan(a), -1, a).max(axis=-1), np.where(np.isnan(b), -1, b)


def stream(candidates, a, b, half) -> list[int]:
    """The candidates that are left in two sorted buffers of `half` each, when as many at a time have come by.

    Who does not stay in the first buffer, by a, goes on to the second, by b; who does not stay there is not picked.
    """
    first: list[int] = []
    second: list[int] = []
    for at in range(0, len(candidates), half):
        first = sorted([*first, *candidates[at : at + half]], key=lambda i: (-a[i], i))
        second = sorted([*second, *first[half:]], key=lambda i: (-b[i], i))[:half]
        first = first[:half]
    return sorted(first + second)


def present(a, b, method) -> list[tuple[int, int]]:
    """Scores [T] of tokens -> the present entries, in order: by last position, then level."""
    T, top = len(a), method.levels - 1
    levels = [(a.reshape(-1, width).max(axis=1), b.reshape(-1, width).max(axis=1)) for width in widths(method)]
    n_tiles = method.topk // method.tile
    found = {(top, number) for number in range(T // method.pool**top)}
    for tile in range(n_tiles):
        n = T // method.pool**top // n_tiles
        candidates = list(range(tile * n, (tile + 1) * n))
        for level in range(top, 0, -1):
            picked = stream(candidates, *levels[level], method.tile // 2)
            candidates = [number * method.pool + child for number in picked for child in range(method.pool)]
            found |= {(level - 1, number) for number in candidates}
    if method.prefix == "keep":
        found |= {(0, number) for number in range(method.pool**top - 1)}
    return sorted(found, key=lambda entry: (last_position(entry, method.pool), entry[0]))


def released_order(entries, method) -> list[tuple[int, int]]:
    """The same by the released code's key: the end of a picked window less a trifle, the start of any other.

    A picked window is known by its children, which are all present.
    """
    there = set(entries)

    def key(entry):
        level, number = entry
        is_parent = level > 0 and (level - 1, number * method.pool) in there
        end = last_position(entry, method.pool) + 1
        return end - 2.0**-level if is_parent else end - method.pool**level

    return sorted(entries, key=key)


def rotate(x, positions, theta) -> np.ndarray:
    """[n, ..., D] by [n]: pairs (i, i + D / 2)."""
    D = x.shape[-1]
    angles = positions.reshape(-1, *[1] * (x.ndim - 1)) * theta ** (-np.arange(0, D, 2) / D)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    turned = [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    return np.concatenate(turned, axis=-1)


def attention(q, k, v, entries, method, theta=None) -> np.ndarray:
    """q [T, R, D], k [T, D], v [T, V] and the present entries -> [T, R, V]: every entry of the pyramid, masked."""
    T, positions = len(k), np.arange(len(k))
    if theta is not None and method.rope == "before":
        q, k = (rotate(x, positions, theta) for x in (q, k))
    levels = [pyramid(x, method) for x in (q, k, v)]
    every = [(level, number) for level in range(method.levels) for number in range(T // method.pool**level)]
    q, k, v = (np.concatenate(level) for level in levels)
    ends = np.array([last_position(entry, method.pool) for entry in every])
    if theta is not None and method.rope == "last":
        q, k = (rotate(x, ends, theta) for x in (q, k))
    there = set(entries)
    is_present = np.array([entry in there for entry in every])
    order = ends * method.levels + np.array([level for level, _ in every])
    sees = is_present[None, :] & (order[None, :] <= order[:, None])
    out = np.zeros((T, q.shape[1], v.shape[1]))
    for at, (level, _) in enumerate(every):
        if is_present[at]:
            logits = q[at] @ k[sees[at]].T * k.shape[1] ** -0.5  # [R, entries]
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[ends[at] : ends[at] + method.pool**level] += (p / p.sum(axis=1, keepdims=True) @ v[sees[at]])[None]
    return out
