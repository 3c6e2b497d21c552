"""Every argument of every public call: what it cannot be is refused by name, in all forms of a call alike.

The table has a valid call of each and what kind of thing each argument is; a kind has its bad values.
"""

import dataclasses
import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.page_pool import PagePool
from tests.arguments import (
    DSA,
    MESH_OF_ONE,
    batch,
    copies,
    grouped,
    grouped_paged,
    ints,
    lost_tokens,
    mla,
    mla_paged,
    new_tokens,
    over_context,
    paged,
)  # fmt: skip

F32 = jnp.float32


class Kind(NamedTuple):
    """Bad values of an argument: functions of a good one."""

    bad: tuple


def other_shapes(x):
    """One axis more, and one entry less."""
    return np.asarray(x)[None], np.asarray(x)[..., :-1]


def cast(dtype):
    return lambda x: np.asarray(x).astype(dtype)


def constants(*values):
    return tuple(lambda _, value=value: value for value in values)


def first_of(change):
    """Of what `other_shapes` gives."""
    return lambda x: other_shapes(x)[change]


def other_order(x):
    """Bytes as no machine that runs JAX has them."""
    return np.asarray(x).astype(np.asarray(x).dtype.newbyteorder(">"))


def described(x):
    return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)


NOT_ARRAYS = (lambda x: np.asarray(x).tolist(), *constants(None, 3.0, "x"), np.ma.masked_array, described)
OPTIONAL = (NOT_ARRAYS[0], *constants(3.0, "x"))  # None means the default
NOT_INT32 = (*map(cast, (np.float32, bool, np.uint32, np.int64, np.int16)), other_order)
NOT_FLOAT = (*map(cast, (np.float64, np.float16, np.int32, bool)), other_order)
SHAPES = first_of(0), first_of(1)
AXIS_MORE = SHAPES[:1]  # where an axis may have any size

INT32 = Kind((*NOT_ARRAYS, *NOT_INT32, *SHAPES))
OPTIONAL_INT32 = Kind((*OPTIONAL, *NOT_INT32, *SHAPES))
LIST_INT32 = Kind((*NOT_ARRAYS, *NOT_INT32, *AXIS_MORE))  # of any length
FLOAT = Kind((*NOT_ARRAYS, *NOT_FLOAT, *SHAPES))
QUERIES = Kind((*NOT_ARRAYS, *NOT_FLOAT, *AXIS_MORE))
OPTIONAL_FLOAT = Kind((*OPTIONAL, *NOT_FLOAT, *SHAPES))
WEIGHTS = Kind((*FLOAT.bad, cast(ml_dtypes.bfloat16)))
OPTIONAL_WEIGHTS = Kind((*OPTIONAL_FLOAT.bad, cast(ml_dtypes.bfloat16)))
TO_QUANTIZE = Kind((*NOT_ARRAYS, *NOT_FLOAT, cast(np.int8), lambda x: np.asarray(x).reshape(-1)[0].reshape(())))
METHOD = Kind(constants(None, "hisa", hj.Hisa, 64))
FLAG = Kind(constants(None, 1, "yes", np.ones(2)))
IMPLEMENTATION = Kind(constants(None, "cuda", ["xla"], 1))
TILES = Kind(constants(8, (8, 128), "xla"))
MESH = Kind(constants(None, "mesh"))
AXIS = Kind(constants("nowhere", 3, None))
OPTIONAL_AXIS = Kind(constants("nowhere", 3))
NOT_INTS = constants(1.5, "2", True, np.ones(1, np.int32))
INT = Kind((*NOT_INTS, *constants(None, 0, -1, 2**31)))
OPTIONAL_INT = Kind((*NOT_INTS, *constants(-1, 2**31)))
SIZE = Kind((*NOT_INTS, *constants(None, -1)))  # or 0
NUMBER = Kind(constants(None, "0.1", True, np.nan, np.inf, 1e39, -(10**400), np.ones(1)))
CACHE = Kind((
    *constants(None, {}, np.ones((4, 16, 8))),
    lambda cache: dataclasses.replace(cache, keys=None),
    lambda cache: dataclasses.replace(cache, counts=cache.counts[:1]),
    lambda cache: dataclasses.replace(cache, sums=np.float64(cache.sums)),
    lambda cache: dataclasses.replace(cache, latents=np.ones((4, 15, 8), np.float32)),
))  # fmt: skip
DTYPE = Kind(constants("float16", np.int32, "no dtype", 3))
SELECTION = Kind(constants(None, np.ones((2, 3))))
ANYTHING = Kind(())

OPTIONS = dict(return_scores=FLAG, return_blocks=FLAG, tiles=TILES, implementation=IMPLEMENTATION, method=METHOD)


class Case(NamedTuple):
    """A public function, arguments of a valid call, and the kind of each."""

    function: Any
    valid: dict
    kinds: dict

    @property
    def name(self):
        return self.function.__qualname__ + (" on a mesh" if "mesh" in self.valid else "")


OVER = dict(mesh=MESH, context_axis=AXIS)
ALONE = dict(mesh=Kind(constants("mesh")), context_axis=OPTIONAL_AXIS)  # on one device
LISTS = Kind(constants(
    3, np.zeros((2, 3, 2), np.int32), hj.CandidateBlocks(None), hj.CandidateBlocks(np.zeros((2, 3, 2))),
    hj.CandidateBlocks(np.zeros((7, 3, 2), np.int32)), hj.CandidateBlocks(np.zeros((2, 3, 0), np.int32)),
    hj.CandidateBlocks(np.zeros((2, 3, 2), np.int32), 0), hj.CandidateBlocks(np.zeros((2, 3, 2), np.int32), "8"),
))  # fmt: skip
LIMITS = dict(candidates=LISTS, budget=OPTIONAL_INT32)
BATCH = dict(
    q=QUERIES, k=FLOAT, w=OPTIONAL_WEIGHTS, **LIMITS, query_positions=OPTIONAL_INT32, lengths=OPTIONAL_INT32, **OPTIONS
)
TABLES = dict(cache=CACHE, block_tables=Kind((*NOT_ARRAYS, *NOT_INT32, *AXIS_MORE)), lengths=INT32)
GROUPS = dict(data_axis=OPTIONAL_AXIS)
PAGED = dict(q=QUERIES, w=OPTIONAL_WEIGHTS, **LIMITS, cu_seqlens_q=INT32, **TABLES, **OPTIONS, **GROUPS)
MLA_OPTIONS = dict(scale=NUMBER, value_dim=INT, sink=OPTIONAL_FLOAT, return_lse=FLAG, implementation=IMPLEMENTATION)
MLA = dict(q=QUERIES, kv=FLOAT, indices=LIST_INT32, **MLA_OPTIONS)
MLA_PAGED = dict(q=FLOAT, cache=CACHE, indices=LIST_INT32, block_tables=TABLES["block_tables"], cu_seqlens_q=INT32,
                 head_axis=OPTIONAL_AXIS, **MLA_OPTIONS, **GROUPS)  # fmt: skip
GROUPED = dict(q=QUERIES, k=FLOAT, v=QUERIES, indices=Kind((*NOT_ARRAYS, *NOT_INT32)), scale=NUMBER, block_size=INT,
               query_positions=OPTIONAL_INT32, sink=OPTIONAL_FLOAT, return_lse=FLAG,
               implementation=IMPLEMENTATION)  # fmt: skip
GROUPED_PAGED = GROUPED | dict(block_tables=TABLES["block_tables"], cu_seqlens_q=INT32)
APPEND = dict(implementation=IMPLEMENTATION, k=FLOAT, cu_seqlens=INT32, latents=Kind(constants(np.ones((5, 8)), 3)),
              **TABLES, **GROUPS)  # fmt: skip
TRUNCATE = dict(new_lengths=INT32, max_tokens=INT, **TABLES, **GROUPS)
COPIES = dict(cache=CACHE, source=LIST_INT32, target=INT32, **GROUPS)
positions = dict(query_positions=np.zeros((2, 3), np.int32), lengths=ints(40, 7), budget=np.ones((2, 3), np.int32))
sink = dict(sink=np.ones((4,), np.float32))


def lighthouse():
    q, k = np.ones((2, 32, 4, 8), np.float32), np.ones((2, 32, 2, 8), np.float32)
    return dict(q=q, k=k, v=k, method=hj.Lighthouse(levels=2, pool=2, topk=4, tile=4))


LIGHTHOUSE = dict(q=QUERIES, k=FLOAT, v=Kind((*OPTIONAL, *NOT_FLOAT, *AXIS_MORE)), method=METHOD,
                  implementation=IMPLEMENTATION, data_axis=OPTIONAL_AXIS)  # fmt: skip


def pool():
    made = PagePool(4, 16)
    made.add("a")
    made.extend("a", 20)
    return made


NAMES = Kind(constants("nobody"))
TAKEN = Kind(constants("a"))


def cases():
    q2, k2 = np.ones((1, 2, 4, 8), np.float32), np.ones((1, 5, 8), np.float32)
    yield Case(hj.select, batch() | positions, BATCH | ALONE | dict(data_axis=OPTIONAL_AXIS))
    yield Case(hj.select, batch() | positions | over_context(),
               BATCH | OVER | dict(data_axis=OPTIONAL_AXIS))  # fmt: skip
    yield Case(
        hj.select_packed,
        dict(q=np.ones((3, 4, 16), np.float32), k=np.ones((40, 16), np.float32), w=np.ones((3, 4), np.float32),
             cu_seqlens_q=ints(0, 1, 3), cu_seqlens_k=ints(0, 20, 40), method=DSA, lengths=ints(20, 20),
             budget=ints(1, 1, 1)),
        dict(q=QUERIES, k=FLOAT, w=OPTIONAL_WEIGHTS, cu_seqlens_q=LIST_INT32, cu_seqlens_k=INT32,
             lengths=OPTIONAL_INT32, **LIMITS, **OPTIONS),
    )  # fmt: skip
    yield Case(hj.select_paged, paged(), PAGED | ALONE | dict(query_axis=OPTIONAL_AXIS, stripe=OPTIONAL_INT))
    yield Case(hj.select_paged, paged() | over_context(),
               PAGED | OVER | dict(query_axis=OPTIONAL_AXIS, stripe=OPTIONAL_INT))  # fmt: skip
    yield Case(hj.sparse_mla, mla() | sink, MLA | ALONE | dict(data_axis=OPTIONAL_AXIS))
    yield Case(hj.sparse_mla, mla() | sink | over_context(), MLA | OVER | dict(data_axis=OPTIONAL_AXIS))
    yield Case(hj.sparse_mla_paged, mla_paged() | sink, MLA_PAGED | ALONE)
    yield Case(hj.sparse_mla_paged, mla_paged() | sink | over_context(), MLA_PAGED | OVER)
    yield Case(hj.sparse_attention, grouped() | sink, GROUPED)
    yield Case(hj.sparse_attention_paged, grouped_paged() | sink, GROUPED_PAGED)
    yield Case(hj.append, new_tokens(), APPEND | ALONE)
    yield Case(hj.append, new_tokens() | over_context(), APPEND | OVER)
    yield Case(hj.truncate, lost_tokens(), TRUNCATE | ALONE)
    yield Case(hj.truncate, lost_tokens() | over_context(), TRUNCATE | OVER)
    yield Case(hj.copy_pages, copies(), COPIES | ALONE)
    yield Case(hj.copy_pages, copies() | over_context(), COPIES | OVER)
    yield Case(hj.init_cache,
               dict(n_pages=4, page_size=16, D=8, dtype=F32, sketch="int4", latent_dim=8,
                    latent_dtype=jnp.float8_e4m3fn, latent_value_dim=4, block_size=32),
               dict(n_pages=INT, page_size=Kind((*INT.bad, *constants(24, 512))), D=SIZE, dtype=DTYPE,
                    entry_size=Kind((*INT.bad, *constants(4))),  # beside latents
                    sketch=Kind(constants("int8", 4, ["int4"], True)),
                    latent_dim=Kind((*NOT_INTS, *constants(0, -1))), latent_dtype=DTYPE,
                    latent_value_dim=Kind((*NOT_INTS, *constants(0, -1, 9))),
                    block_size=Kind((*NOT_INTS, *constants(8, 24, 512)))))  # fmt: skip
    yield Case(hj.quantize_keys, dict(k=np.ones((3, 4), np.float32)),
               dict(k=TO_QUANTIZE, dtype=DTYPE, scale=Kind(constants("e8m0", None, ["ue8m0"]))))  # fmt: skip
    yield Case(hj.quantize_latents, dict(latents=np.ones((3, 4), np.float32), value_dim=4),
               dict(latents=TO_QUANTIZE, value_dim=Kind((*NOT_INTS, *constants(0, -1, 5, 129))),
                    scale=Kind(constants("e8m0", None, ["ue8m0"]))))  # fmt: skip
    yield Case(hj.quantize_queries, dict(q=np.ones((3, 4), np.float32), w=np.ones((3,), np.float32)),
               dict(q=TO_QUANTIZE, w=WEIGHTS, dtype=DTYPE, scale=Kind(constants("e8m0", None, ["ue8m0"]))))  # fmt: skip
    yield Case(hj.indexer_kl, dict(q=q2, k=k2, w=np.ones((1, 2, 4), np.float32), attention_q=q2, attention_kv=k2,
                                   scale=1.0, indices=np.zeros((1, 2, 3), np.int32)),
               dict(q=QUERIES, k=FLOAT, w=WEIGHTS, attention_q=QUERIES, attention_kv=FLOAT, scale=NUMBER,
                    indices=Kind((*OPTIONAL, *NOT_INT32, *AXIS_MORE))))  # fmt: skip
    given, only = lighthouse(), dict(mesh=MESH_OF_ONE(), context_axis="context")
    selection = hj.lighthouse_select(given["q"], given["k"], given["method"])
    more = dict(selection=selection, positions=np.zeros((2, 32), np.int32), rope_theta=1e4)
    kinds = LIGHTHOUSE | dict(v=QUERIES, selection=Kind(SELECTION.bad[1:]), positions=OPTIONAL_INT32,
                              rope_theta=Kind(NUMBER.bad[1:]))  # fmt: skip
    for axes, kind in ((only, OVER), ({}, ALONE)):
        yield Case(hj.lighthouse_select, given | axes, LIGHTHOUSE | kind)
        yield Case(hj.lighthouse_attention, given | more | axes, kinds | kind)
    chosen = hj.select(**batch())
    yield Case(hj.compare, dict(selection=chosen, reference=chosen), dict(selection=SELECTION, reference=SELECTION))
    questions = Kind((*NOT_ARRAYS[1:-1], *map(cast, (np.float16, np.int32, bool)), *AXIS_MORE))
    yield Case(hj.implementations, {name: x for name, x in batch().items() if name != "w"},
               dict(q=questions, k=questions, method=METHOD))  # fmt: skip
    yield Case(hj.checked, dict(function=hj.select), dict(function=Kind(constants(None, 3))))
    yield Case(hj.check_processes, dict(call="step"), dict(call=ANYTHING, arrays=ANYTHING))
    yield Case(PagePool, dict(n_pages=4, page_size=16),
               dict(n_pages=INT, page_size=INT, n_devices=Kind((*INT.bad, *constants(3))),
                    stripe=Kind((*OPTIONAL_INT.bad, *constants(24, 0))),
                    n_groups=Kind((*INT.bad, *constants(3)))))  # fmt: skip
    made, group = pool(), Kind((*SIZE.bad, *constants(1)))
    yield Case(made.add, dict(request="b"), dict(request=TAKEN, group=group))
    yield Case(made.n_free_on, dict(group=0), dict(group=group))
    yield Case(made.n_on, dict(pages=[0, 1], group=0), dict(pages=ANYTHING, group=group))
    yield Case(made.n_needed_on, dict(n_tokens=1), dict(n_tokens=SIZE))
    yield Case(made.fork, dict(request="a", new="c", length=3),
               dict(request=NAMES, new=TAKEN, length=Kind((*OPTIONAL_INT.bad, *constants(21)))))  # fmt: skip
    yield Case(made.extend, dict(request="a", n_tokens=1), dict(request=NAMES, n_tokens=SIZE))
    yield Case(made.truncate, dict(request="a", length=1),
               dict(request=NAMES, length=Kind((*SIZE.bad, *constants(21)))))  # fmt: skip
    yield Case(made.table, dict(requests=["a"], max_pages=2),
               dict(requests=Kind(constants(["a", "nobody"])), max_pages=Kind((*SIZE.bad, *constants(1)))))  # fmt: skip
    yield Case(made.copy, {}, {})
    for method in (made.pages, made.n_own, made.n_own_on, made.group, made.free):
        yield Case(method, dict(request="a"), dict(request=NAMES))


CASES = {case.name: case for case in cases()}
# Arguments that messages call otherwise.
CALLED = {"requests": "request", "new": "request"}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_argument_is_refused_by_name(name):
    function, valid, kinds = CASES[name]
    wrong = []
    for argument, kind in kinds.items():
        for change in kind.bad:
            value = change(valid.get(argument))
            given = f"{argument}={type(value).__name__} {str(value)[:40]}"
            try:
                function(**valid | {argument: value})
            except (TypeError, ValueError) as error:
                message = re.match(
                    rf"{re.escape(function.__qualname__)}: .*\b{CALLED.get(argument, argument)}\b.*wanted", str(error)
                )
                if not message:
                    wrong.append(f"{given}: {str(error)[:150]}")
            except Exception as error:
                wrong.append(f"{given}: {type(error).__name__}: {str(error)[:150]}")
            else:
                wrong.append(f"{given} was accepted")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_every_public_call_and_argument():
    public = {name for name in hj.__all__ if inspect.isfunction(getattr(hj, name))}
    public |= {f"PagePool.{name}" for name, method in vars(PagePool).items()
               if inspect.isfunction(method) and not name.startswith("_") and name != "check"}  # fmt: skip
    named = {case.function.__qualname__ for case in CASES.values()}
    assert public - named == set() and named - public == {"PagePool"}
    for case in CASES.values():
        assert set(inspect.signature(case.function).parameters) == set(case.kinds), case.name
