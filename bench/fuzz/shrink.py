"""Makes a failing scene small: one request, one query, few keys, heads and features, plain numbers, tight arrays.

A step is kept if the same judge still finds something wrong. Shapes stay, so that no step compiles anything, until the
last one, which cuts the arrays to what is left.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.fuzz.judges import Judge, Verdict
from bench.fuzz.mla import MlaScene
from bench.fuzz.scene import Array, Scene


class Shrinking:
    """A failing scene on its way to a small one.

    Attributes:
        scene, verdict: the smallest that still fails, and what is wrong with it.
        until: when to stop, by `time.monotonic`.
    """

    def __init__(self, scene: Any, form: str, judge: Judge, seconds: float) -> None:
        self.scene, self.form, self.judge = scene, form, judge
        self.until = time.monotonic() + seconds
        self.verdict = judge.judge(scene, form)
        self.n_taken = 0
        assert self.verdict.wrong

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def takes(self, candidate: Any) -> bool:
        """Whether a candidate still fails; it is the scene from then on."""
        if self.is_over or self.form not in candidate.forms or not self.judge.applies(candidate, self.form):
            return False
        try:
            verdict = self.judge.judge(candidate, self.form)
        except ValueError:  # the call does not take such shapes
            return False
        if not verdict.wrong:
            return False
        self.scene, self.verdict = candidate, verdict
        self.n_taken += 1
        return True


def shrink(scene: Any, form: str, judge: Judge, seconds: float) -> tuple[Any, Verdict]:
    """The smallest scene found within some seconds, and what is wrong with it."""
    state, before = Shrinking(scene, form, judge, seconds), -1
    # A step may make an earlier one possible, so all are repeated until none is taken.
    while before != state.n_taken and not state.is_over:
        before = state.n_taken
        for step in _SCENE if isinstance(scene, Scene) else _MLA:
            step(state)
    # Tight arrays compile anew, for which there is time of its own.
    state.until = time.monotonic() + seconds
    any(state.takes(tight) for tight in _tight(state.scene, *state.verdict.wrong[0][:2]))
    return state.scene, state.verdict


def _only_request(state: Shrinking) -> None:
    scene, r = state.scene, state.verdict.wrong[0].r
    others = np.arange(scene.setup.R) != r
    if r >= 0 and (scene.n_k[others] != 0).any():
        positions = None if scene.positions is None else np.where(others[:, None], np.int32(-1), scene.positions)
        n_q, n_k = (np.where(others, np.int32(0), x) for x in (scene.n_q, scene.n_k))
        state.takes(dataclasses.replace(scene, n_q=n_q, n_k=n_k, positions=positions))


def _fewer_queries(state: Shrinking) -> None:
    """The wrong query alone, or some of them."""
    r, t, _ = state.verdict.wrong[0]
    if r < 0:
        return
    scene = state.scene
    if scene.positions is not None:
        is_it = (np.arange(scene.setup.R) == r)[:, None] & (np.arange(scene.setup.T) == t)
        if ((scene.positions != -1) & ~is_it).any():
            state.takes(dataclasses.replace(scene, positions=np.where(is_it, scene.positions, np.int32(-1))))
        return
    n = int(scene.n_q[r])
    for start, end in ((t, t + 1), (n // 2, n), (0, n // 2), (1, n), (0, n - 1)):
        if 0 <= start < end and end - start < n:
            starts, ends = np.zeros(scene.setup.R, np.int32), scene.n_q.copy()
            starts[r], ends[r] = start, end
            if state.takes(scene.chunk(starts, ends)):
                return


def _fewer_keys(state: Shrinking) -> None:
    """Without some tokens; those after them move up."""
    r, S = state.verdict.wrong[0].r, state.scene.setup.S
    if r < 0:
        return

    def count() -> int:
        return min(max(int(state.scene.n_k[r]), 0), S)

    # All at once, then halves, quarters, down to single tokens.
    size = count()
    while size:
        start = 0
        while start + size <= count() and not state.is_over:
            if not state.takes(_without_keys(state.scene, r, start, size)):
                start += size
        size //= 2


def _without_keys(scene: Scene, r: int, start: int, size: int) -> Scene:
    S = scene.setup.S
    # What is left out goes to the end, past the new length, so that shapes stay.
    order = np.concatenate([np.arange(start), np.arange(start + size, S), np.arange(start, start + size)])
    k, scales, n_k, positions = scene.k.copy(), scene.scales, scene.n_k.copy(), scene.positions
    k[r], n_k[r] = k[r, order], min(max(int(n_k[r]), 0), S) - size
    if scales is not None:
        scales = scales.copy()
        scales[r] = scales[r, order]
    if positions is not None:
        positions = positions.copy()
        positions[r] -= np.where(positions[r] >= start + size, size, 0).astype(np.int32)
    return dataclasses.replace(scene, k=k, scales=scales, n_k=n_k, positions=positions)


def _fewer_heads(state: Shrinking) -> None:
    for h in range(state.scene.setup.H):
        q, w = state.scene.q.copy(), state.scene.w.copy()
        q[:, :, h], w[:, :, h] = 0, 0
        _takes_other(state, q=q, w=w)


def _fewer_features(state: Shrinking) -> None:
    for d in range(state.scene.setup.D):
        q, k = state.scene.q.copy(), state.scene.k.copy()
        q[..., d], k[..., d] = 0, 0
        _takes_other(state, q=q, k=k)


def _takes_other(state: Shrinking, **arrays: Array) -> bool:
    """Takes the scene with other arrays, if they are others."""
    before = [getattr(state.scene, name) for name in arrays]
    is_other = any((x.view(np.uint8) != y.view(np.uint8)).any() for x, y in zip(before, arrays.values(), strict=True))
    return is_other and state.takes(dataclasses.replace(state.scene, **arrays))


def _plain_numbers(state: Shrinking) -> None:
    """Ones and whole numbers instead of what they were; a 0 stays, or steps would undo each other without end."""
    for name in ("scales", "w", "q", "k", "kv", "sink"):
        x = getattr(state.scene, name, None)
        if x is not None:
            wide = x.astype(np.float32)
            for plain in (np.abs(np.sign(wide)), np.sign(wide), np.rint(wide)):
                if _takes_other(state, **{name: np.where(np.isfinite(wide), plain.astype(x.dtype), x)}):
                    break


def _only_list(state: Shrinking) -> None:
    r, t, _ = state.verdict.wrong[0]
    indices = np.full_like(state.scene.indices, -1)
    indices[r, t] = state.scene.indices[r, t]
    _takes_other(state, indices=indices)


def _shorter_list(state: Shrinking) -> None:
    size = K = state.scene.setup.K
    while size:
        for start in range(0, K, size):
            indices = state.scene.indices.copy()
            indices[:, :, start : start + size] = -1
            _takes_other(state, indices=indices)
        size //= 2


def _no_lost_pages(state: Shrinking) -> None:
    _takes_other(state, is_lost=np.zeros_like(state.scene.is_lost))


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
    # Devices have equal numbers of whole units.
    if setup.is_split:
        S = -(-S // (setup.devices * setup.unit)) * setup.devices * setup.unit
    S = min(S, setup.S)
    heads = np.flatnonzero(scene.w[r].any(0) | scene.q[r].any((0, 2)))
    features = np.flatnonzero(scene.q[r].any((0, 1)) | scene.k[r].any(0))
    if not len(rows):
        return
    # Heads and features of zeros go, if the fault stays without them.
    for h, d in ((heads, features), (np.arange(setup.H), np.arange(setup.D))):
        h, d = (x if len(x) else np.arange(1) for x in (h, d))

        def cut(x: Array | None, *axes: Array) -> Any:
            return None if x is None else x[r][np.ix_(*axes)][None]

        sizes = dict(R=1, T=len(rows), S=S, H=len(h), D=len(d))
        positions = None if scene.positions is None else cut(scene.positions, rows)
        yield dataclasses.replace(
            scene, setup=dataclasses.replace(setup, **sizes),
            q=cut(scene.q, rows, h, d), k=cut(scene.k, np.arange(S), d), scales=cut(scene.scales, np.arange(S)),
            w=cut(scene.w, rows, h), n_q=scene.n_q[r : r + 1], n_k=scene.n_k[r : r + 1], positions=positions,
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
