"""Inputs for the promises: small, from a fixed seed, of sizes that the function under test takes."""

import dataclasses
from typing import Any

import numpy as np

from hisa_jax.methods import Dsa, Method, Scan
from hisa_jax.testing.form import DTYPES, Case, Form


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws cases for a function of this form and method."""

    form: Form
    method: Method
    seed: int = 0

    @property
    def wide(self) -> int:
        """So many tokens that the method has to choose, and that no size divides them."""
        method = self.method
        least = 4 * method.topk + 3
        if isinstance(method, Scan):
            assert method.candidates is not None
            least = max(least, 3 * method.candidates + 3)
        elif not isinstance(method, Dsa):
            least = max(least, (method.block_topk + 4) * method.block_size + 3)
        return least

    def takes(self, *keywords: str) -> bool:
        """Whether the function has these keywords."""
        return set(keywords) <= set(self.form.takes)

    def case(
        self, *, B: int = 2, T: int = 5, S: int | None = None, H: int = 3, D: int = 16, whole: bool = False
    ) -> Case:
        """Normal numbers and head weights of both signs, or whole numbers, whose scores are exact and often tie."""
        size = self.form.size
        B, T, H, D = size("B", B), size("T", T), size("H", H), size("D", D)
        S = size("S", self.wide if S is None else S)
        rng = np.random.default_rng(self.seed)
        if whole:
            q, k, w = rng.integers(-1, 2, (B, T, H, D)), rng.integers(-1, 2, (B, S, D)), rng.integers(-2, 3, (B, T, H))
        else:
            q, k, w = (rng.normal(size=shape) for shape in ((B, T, H, D), (B, S, D), (B, T, H)))
        dtype = DTYPES[self.form.dtype]
        return Case(q=q.astype(dtype), k=k.astype(dtype), w=w.astype(np.float32))

    def lengths(self, case: Case, *lengths: int) -> Case:
        """The case with these lengths, in turn."""
        B = len(case.q)
        return dataclasses.replace(case, lengths=np.resize(lengths, B).astype(np.int32))

    def positions(self, case: Case, *positions: int) -> Case:
        """The case with these query positions, in turn; each sequence begins with another one."""
        B, T = case.q.shape[:2]
        rows = [np.resize(np.roll(positions, -b), T) for b in range(B)]
        return dataclasses.replace(case, query_positions=np.stack(rows).astype(np.int32))

    def usual(self, **sizes: Any) -> list[Case]:
        """Queries at the end, sequences of several lengths, queries anywhere: what the function takes of these."""
        case = self.case(**sizes)
        S, topk = case.k.shape[1], self.method.topk
        cases = [case]
        if self.takes("lengths"):
            cases.append(self.lengths(case, S // 2 + 1, S))
        if self.takes("query_positions"):
            cases.append(self.positions(case, S // 2, min(topk, S - 1), min(topk, S) - 1, 0, S - 1))
        if self.takes("query_positions", "lengths"):
            cases.append(self.lengths(cases[-1], S // 2 + 3, max(1, topk - 1)))
        return cases

    @property
    def extremes(self) -> list[float]:
        """Numbers of the dtype that spoil whatever they are part of: the largest, NaN, infinity."""
        largest = 448.0 if self.form.dtype == "float8_e4m3fn" else 1e6
        return [largest, -largest, np.nan, *([] if self.form.dtype == "float8_e4m3fn" else [np.inf])]


def with_keys(case: Case, k: np.ndarray) -> Case:
    """The case with other keys."""
    return dataclasses.replace(case, k=k)
