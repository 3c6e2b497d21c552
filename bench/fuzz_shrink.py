"""Makes a failing scene small: one request, one query, few keys, heads and features, plain numbers, tight arrays.

A step is kept if the same judge still finds something wrong. Shapes stay, so that no step compiles anything, until the
last one, which cuts the arrays to what is left.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.fuzz_judges import Judge, Verdict
from bench.fuzz_mla import MlaScene
from bench.fuzz_scene import Array, Scene
from bench.fuzz_setups import Setup


def shrink(scene: Any, form: str, judge: Judge, seconds: float) -> tuple[Any, Verdict]:
    """The smallest scene found within some seconds, and what is wrong with it."""
    verdict, until = judge.judge(scene, form), time.monotonic() + seconds
    assert verdict.wrong

    def smaller(scene: Any, verdict: Verdict, steps: Callable[..., Iterator[Any]]) -> tuple[Any, Verdict, bool]:
        """Takes every step that still fails; the next ones are taken from there."""
        is_smaller, tried = False, 0
        candidates = steps(scene, verdict.wrong[0])
        while time.monotonic() < until and (candidate := next(candidates, None)) is not None:
            tried += 1
            found = _judged(candidate, form, judge)
            if found and found.wrong:
                scene, verdict, is_smaller = candidate, found, True
                candidates = _after(steps(scene, verdict.wrong[0]), 0 if steps in _RESTART else tried - 1)
                tried = 0 if steps in _RESTART else tried - 1
        return scene, verdict, is_smaller

    is_smaller = True
    while is_smaller and time.monotonic() < until:
        is_smaller = False
        for steps in _SCENE if isinstance(scene, Scene) else _MLA:
            scene, verdict, some = smaller(scene, verdict, steps)
            is_smaller |= some
    for tight in _tight(scene, *verdict.wrong[0][:2]):
        found = _judged(tight, form, judge)
        if found and found.wrong:
            return tight, found
    return scene, verdict


def _judged(scene: Any, form: str, judge: Judge) -> Verdict | None:
    """None where the call does not take such shapes, or the judge has nothing to say."""
    if form not in scene.forms or not judge.applies(scene, form):
        return None
    try:
        return judge.judge(scene, form)
    except ValueError:
        return None


def _after(candidates: Iterator[Any], n: int) -> Iterator[Any]:
    for _ in range(n):
        next(candidates, None)
    return candidates


def _only_request(scene: Scene, wrong: Any) -> Iterator[Scene]:
    others = np.arange(scene.setup.R) != wrong.r
    if wrong.r >= 0 and (scene.n_k[others] > 0).any():
        positions = None if scene.positions is None else np.where(others[:, None], np.int32(-1), scene.positions)
        n_q, n_k = (np.where(others, np.int32(0), x) for x in (scene.n_q, scene.n_k))
        yield dataclasses.replace(scene, n_q=n_q, n_k=n_k, positions=positions)


def _fewer_queries(scene: Scene, wrong: Any) -> Iterator[Scene]:
    """The wrong query alone, or half of them."""
    r, t, T = wrong.r, wrong.t, scene.setup.T
    if r < 0:
        return
    if scene.positions is not None:
        alone = np.where(np.arange(T) == t, scene.positions, np.int32(-1))
        if (scene.positions[r] >= 0).sum() > 1:
            yield dataclasses.replace(scene, positions=np.where((np.arange(len(alone)) == r)[:, None], alone, np.int32(-1)))
        return
    n = int(scene.n_q[r])
    for start, end in ((t, t + 1), (n // 2, n), (0, n // 2), (1, n), (0, n - 1)):
        if 0 <= start < end and end - start < n:
            starts, ends = np.zeros(scene.setup.R, np.int32), scene.n_q.copy()
            starts[r], ends[r] = start, end
            yield scene.chunk(starts, ends)


def _fewer_keys(scene: Scene, wrong: Any) -> Iterator[Scene]:
    """Without some tokens; what stood behind them moves up."""
    r, S = wrong.r, scene.setup.S
    n = min(max(int(scene.n_k[r]), 0), S)
    size = n if r >= 0 else 0
    while size:
        for start in range(0, n - size + 1, size):
            order = np.concatenate([np.arange(start), np.arange(start + size, S), np.arange(start, start + size)])
            k, scales, n_k = scene.k.copy(), scene.scales, scene.n_k.copy()
            k[r], n_k[r] = k[r, order], n - size
            if scales is not None:
                scales = scales.copy()
                scales[r] = scales[r, order]
            positions = scene.positions
            if positions is not None:
                positions = positions.copy()
                positions[r] -= np.where(positions[r] >= start + size, size, 0)
            yield dataclasses.replace(scene, k=k, scales=scales, n_k=n_k, positions=positions)
        size //= 2


def _fewer_heads(scene: Scene, wrong: Any) -> Iterator[Scene]:
    for h in range(scene.setup.H):
        if scene.w[:, :, h].any() or scene.q[:, :, h].any():
            q, w = scene.q.copy(), scene.w.copy()
            q[:, :, h], w[:, :, h] = 0, 0
            yield dataclasses.replace(scene, q=q, w=w)


def _fewer_features(scene: Scene, wrong: Any) -> Iterator[Scene]:
    for d in range(scene.setup.D):
        if scene.q[..., d].any() or scene.k[..., d].any():
            q, k = scene.q.copy(), scene.k.copy()
            q[..., d], k[..., d] = 0, 0
            yield dataclasses.replace(scene, q=q, k=k)


def _plain_numbers(scene: Any, wrong: Any) -> Iterator[Any]:
    """Ones and whole numbers instead of what they were."""
    for name in ("scales", "w", "q", "k", "kv", "sink"):
        x = getattr(scene, name, None)
        if x is None:
            continue
        for plain in (np.ones_like(x), np.sign(x.astype(np.float32)), np.rint(x.astype(np.float32))):
            plain = np.where(np.isfinite(x.astype(np.float32)), plain.astype(x.dtype), x)
            if (plain != x).any() and np.isfinite(x.astype(np.float32)).any():
                yield dataclasses.replace(scene, **{name: plain})


def _only_list(scene: MlaScene, wrong: Any) -> Iterator[MlaScene]:
    indices = np.full_like(scene.indices, -1)
    indices[wrong.r, wrong.t] = scene.indices[wrong.r, wrong.t]
    if (indices != scene.indices).any():
        yield dataclasses.replace(scene, indices=indices)


def _shorter_list(scene: MlaScene, wrong: Any) -> Iterator[MlaScene]:
    K = size = scene.setup.K
    while size:
        for start in range(0, K, size):
            indices = scene.indices.copy()
            indices[:, :, start : start + size] = -1
            if (indices != scene.indices).any():
                yield dataclasses.replace(scene, indices=indices)
        size //= 2


def _no_lost_pages(scene: MlaScene, wrong: Any) -> Iterator[MlaScene]:
    if scene.is_lost.any():
        yield dataclasses.replace(scene, is_lost=np.zeros_like(scene.is_lost))


_RESTART = (_fewer_queries, _fewer_keys)  # what is left is numbered anew after each step
_SCENE = (_only_request, _fewer_queries, _fewer_keys, _fewer_heads, _fewer_features, _plain_numbers)
_MLA = (_no_lost_pages, _only_list, _shorter_list, _plain_numbers)


def _tight(scene: Any, r: int, t: int) -> Iterator[Any]:
    """The scene in arrays that it fills, the tightest first."""
    if isinstance(scene, MlaScene):
        yield from _tight_lists(scene, r, t)
        return
    if r < 0:
        return
    setup = scene.setup
    rows = np.flatnonzero(scene.query_positions[r] >= 0) if scene.positions is not None else np.arange(scene.n_q[r])
    S = min(max(int(scene.n_k[r]), 1), setup.S)
    if setup.is_split:
        S = -(-S // (setup.devices * setup.unit)) * setup.devices * setup.unit
    S = min(S, setup.S)
    heads = np.flatnonzero(scene.w[r].any(0) | scene.q[r].any((0, 2)))
    features = np.flatnonzero(scene.q[r].any((0, 1)) | scene.k[r].any(0))
    if not len(rows):
        return
    for h, d in ((heads, features), (np.arange(setup.H), np.arange(setup.D))):
        h, d = (x if len(x) else np.arange(1) for x in (h, d))

        def cut(x: Array | None, *axes: Array) -> Any:
            return None if x is None else x[r][np.ix_(*axes)][None]

        sizes = dict(R=1, T=len(rows), S=S, H=len(h), D=len(d))
        positions = None if scene.positions is None else cut(scene.positions, rows)
        yield dataclasses.replace(
            scene, setup=dataclasses.replace(setup, **sizes), q=cut(scene.q, rows, h, d), k=cut(scene.k, np.arange(S), d),
            scales=cut(scene.scales, np.arange(S)), w=cut(scene.w, rows, h), n_q=scene.n_q[r : r + 1],
            n_k=scene.n_k[r : r + 1], positions=positions,
        )  # fmt: skip


def _tight_lists(scene: MlaScene, r: int, t: int) -> Iterator[MlaScene]:
    """The wrong query alone, its list without the holes."""
    one, indices = slice(r, r + 1), scene.indices[r, t]
    for listed in (indices[indices != -1], indices):
        listed = listed if len(listed) else indices[:1]
        yield dataclasses.replace(
            scene, setup=dataclasses.replace(scene.setup, R=1, T=1, K=len(listed)), q=scene.q[one, t : t + 1],
            kv=scene.kv[one], indices=listed[None, None], n_q=np.ones(1, np.int32), is_lost=scene.is_lost[one],
        )  # fmt: skip
