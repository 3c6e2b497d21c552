"""What every implementation of the sparse attention promises about lists of chosen tokens, whatever holds the latents.

A `Form` calls the attention with latents in one piece, in pages or over a mesh, and knows in NumPy which rows of the
latents are meant. The float64 oracle judges the numbers; that a row leaves no trace is an equality of bits.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax import dispatch_stage
from tests import draw, oracle

OUTSIDE = (np.iinfo(np.int32).min, -128, -2, np.iinfo(np.int32).max)
POISON = (np.nan, np.inf, -np.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of an attention: K entries a list, `rows` of latents; `tolerance` of outputs."""

    K: int
    N: int
    Dk: int
    value_dim: int
    rows: int = 320  # no multiple of 128, of 1, 16, 32 and 64
    dtype: str = "bfloat16"
    tolerance: float = 2e-2
    only: tuple[int, ...] = ()  # some of the lists, for an interpreter that is slow

    @property
    def options(self) -> dict:
        # A scale may be negative; those of other tests are positive.
        return dict(scale=-(self.Dk**-0.5), value_dim=self.value_dim, return_lse=True)

    def arrays(self, T: int, rows: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Queries [T, N, Dk], and latents [rows, Dk], zeros where no list names a row."""
        rng = np.random.default_rng(seed)
        q, latents = (rng.normal(size=shape) for shape in ((T, self.N, self.Dk), (self.rows, self.Dk)))
        latents[unselected(rows, self.rows)] = 0
        return draw.cast(q, self.dtype), draw.cast(latents, self.dtype)

    def lists(self, S: int, seed: int = 0) -> np.ndarray:
        """[T, K] lists of tokens of a sequence of S; tokens 0, 1 and a third of the others are in none."""
        rng = np.random.default_rng(seed)
        tokens = np.array([s for s in range(2, S) if s % 3])
        outside = np.array([*OUTSIDE, S, S + 1, S + 127, 128 * S])
        lists = np.full((8, self.K), -1, np.int32)
        # A few tokens again and again, in any order, with holes, and others that are outside.
        lists[0] = rng.choice(tokens[-40:], self.K)
        lists[0, rng.random(self.K) < 0.2] = -1
        lists[0, rng.permutation(self.K)[: len(outside)]] = outside
        # In any order, with holes; backwards; one token more often than a block has tokens, others among it.
        n = min(self.K, len(tokens)) * 3 // 4
        lists[1, rng.permutation(self.K)[:n]] = rng.permutation(tokens)[:n]
        lists[2, -n:] = tokens[::-1][:n]
        lists[3], lists[3, ::50] = tokens[3], tokens[-1]
        # From block to block and back.
        blocks = [tokens[tokens // 128 == block] for block in range(3)]
        turns = np.stack([block[: min(map(len, blocks))] for block in blocks], axis=1).reshape(-1)[: self.K]
        lists[4, : len(turns)] = turns
        # Ascending, as a selection has them; of nothing; of one token.
        lists[5, :n] = np.sort(rng.permutation(tokens)[:n])
        lists[7, -1] = tokens[-1]
        return lists[list(self.only)] if self.only else lists


@dataclasses.dataclass(frozen=True)
class Form:
    """Where the latents are.

    Attributes:
        length: tokens of a sequence, of `rows` of latents.
        attend: (q [T, N, Dk], latents [rows, Dk], lists [T, K], **options) -> out, lse.
        rows_of: lists -> the rows they mean, -1 for none.
    """

    name: str
    length: Callable[[int], int]
    attend: Callable
    rows_of: Callable[[np.ndarray, int], np.ndarray]

    def __str__(self) -> str:
        return self.name


def forms(page_sizes: tuple[int, ...], with_mesh: bool = True) -> list[Form]:
    whole = functools.partial(_whole, hj.sparse_mla)
    piece = [Form("one_piece", lambda rows: rows, whole, lambda lists, rows: np.where(lists < rows, lists, -1))]
    mesh = [dataclasses.replace(piece[0], name="mesh", attend=_over_a_mesh)] if with_mesh else []
    return piece + [_pages(size) for size in page_sizes] + mesh


def _whole(attend: Callable, q, latents, lists, **options):
    return jax.tree.map(lambda x: x[0], attend(q[None], latents[None], lists[None], **options))


def _over_a_mesh(q, latents, lists, **options):
    mesh = jax.make_mesh((1,), ("context",))
    attend = functools.partial(hj.sparse_mla, mesh=mesh, context_axis="context")
    return _whole(attend, q, latents, lists, **options)


def _pages(size: int) -> Form:
    """Two requests whose tables name most pages, in any order, each its own; the last query is of neither."""

    def tables(rows: int) -> np.ndarray:
        rng, n, P = np.random.default_rng(size), rows // size, length(rows) // size
        table = np.stack([rng.permutation(n)[:P] for _ in range(2)]).astype(np.int32)
        if P > 4:
            table[0, -1], table[1, -2:] = -1, (n, np.iinfo(np.int32).max)  # lacking
        return table

    def length(rows: int) -> int:
        return max(rows * 4 // 5 // size * size, size)

    def offsets(T: int) -> np.ndarray:
        return np.array([0, T // 2, T - 1], np.int32)

    def rows_of(lists: np.ndarray, rows: int) -> np.ndarray:
        out, table = np.full_like(lists, -1), tables(rows)
        start, middle, end = offsets(len(lists))
        for t, k in np.argwhere((lists >= 0) & (lists < length(rows))):
            page = table[int(t >= middle)][lists[t, k] // size]
            if start <= t < end and 0 <= page < rows // size:
                out[t, k] = page * size + lists[t, k] % size
        return out

    def attend(q, latents, lists, **options):
        rows, Dk = latents.shape
        cache = hj.init_cache(rows // size, size, 0, "float32", latent_dim=Dk, latent_dtype=latents.dtype)
        cache = dataclasses.replace(cache, latents=latents.reshape(-1, size, Dk))
        cu_seqlens = jnp.asarray(offsets(len(lists)))
        return hj.sparse_mla_paged(q, cache, lists, jnp.asarray(tables(rows)), cu_seqlens, **options)

    return Form(f"pages_of_{size}", length, attend, rows_of)


def interpreted(monkeypatch, name: str, **options) -> None:
    """Lets the public functions run the kernel of a backend, interpreted."""
    attend = functools.partial(dispatch_stage.attention(name), **options)
    monkeypatch.setattr(dispatch_stage, "attention_reasons", lambda device, problem: {name: None})
    monkeypatch.setattr(dispatch_stage, "attention", lambda name: attend)


def unselected(rows: np.ndarray, n: int) -> np.ndarray:
    """The rows that no list names."""
    return np.setdiff1d(np.arange(n), rows)


def run(case: Case, form: Form, q, latents, lists, implementation: str, **options) -> tuple[np.ndarray, np.ndarray]:
    out, lse = form.attend(
        jnp.asarray(q),
        jnp.asarray(latents),
        jnp.asarray(lists),
        implementation=implementation,
        **case.options,
        **options,
    )
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    return np.asarray(out), np.asarray(lse)


def check_any_order(case: Case, form: Form, implementation: str = "auto") -> None:
    """Any order, -1 anywhere, what is outside as -1, twice counts twice; nothing gives zeros and -inf."""
    lists = case.lists(form.length(case.rows))
    rows = form.rows_of(lists, case.rows)
    q, latents = case.arrays(len(lists), rows)
    out, lse = run(case, form, q, latents, lists, implementation)
    wanted, wanted_lse = (
        x[0] for x in oracle.sparse_mla(q[None], latents[None], rows[None], case.value_dim, case.options["scale"])
    )
    np.testing.assert_allclose(lse, wanted_lse, atol=case.tolerance / 10)
    # Of a token listed many times the rounded probabilities are all wrong in the same way.
    np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=case.tolerance, atol=case.tolerance)
    of_nothing = (rows < 0).all(axis=1)
    assert of_nothing.any() and not out[of_nothing].astype(np.float32).any() and np.isneginf(lse[of_nothing]).all()


def check_counts(case: Case, form: Form, implementation: str = "auto") -> None:
    """Worked by hand: all logits are 0, the values of token 3 are 1, those of all others 0."""
    lists = np.full((8, case.K), -1, np.int32)
    lists[0, :3] = 3, 200, 7
    lists[1, [0, 5, 6, 9]] = 7, 200, 3, 201
    lists[2, [0, 2, -1]] = 3, 200, 3
    latents, q = np.zeros((case.rows, case.Dk)), np.zeros((8, case.N, case.Dk))
    latents[form.rows_of(lists, case.rows)[0, 0], : case.value_dim] = 1
    out, lse = run(case, form, draw.cast(q, case.dtype), draw.cast(latents, case.dtype), lists, implementation)
    for t, (share, n) in enumerate(((1 / 3, 3), (1 / 4, 4), (2 / 3, 3))):
        np.testing.assert_allclose(out[t].astype(np.float32), share, rtol=4e-3)
        np.testing.assert_allclose(lse[t], np.log(n), rtol=1e-5)


def check_no_trace(case: Case, form: Form, implementation: str = "auto") -> None:
    """NaN and Inf in rows that nobody selects change no bit; in a row that some select, none of the others' bits.

    Who selects it gets NaN, and a logsumexp that says so: -inf would let a merge drop it.
    """
    lists = case.lists(form.length(case.rows))
    rows = form.rows_of(lists, case.rows)
    q, latents = case.arrays(len(lists), rows)
    attend = lambda latents: run(case, form, q, latents, lists, implementation)  # noqa: E731
    wanted = attend(latents)
    others = unselected(rows, case.rows)
    assert {0, 1} <= set(others.tolist()) or form.name != "one_piece"
    poisoned = latents.copy()
    poisoned[others] = np.resize(POISON, len(others))[:, None].astype(latents.dtype)
    same_bits(attend(poisoned), wanted)
    row = rows[rows >= 0][0]
    poisoned[row] = np.nan
    has_it = (rows == row).any(axis=1)
    assert not has_it.all()
    got = attend(poisoned)
    same_bits(*([x[~has_it] for x in result] for result in (got, wanted)))
    assert all(np.isnan(x[has_it].astype(np.float32)).all() for x in got)


def same_bits(got, wanted) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert x.tobytes() == y.tobytes(), np.argwhere(x != y)[:9]
