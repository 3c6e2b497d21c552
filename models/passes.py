"""The compiled passes of an engine: a chunk of prompts, a decode step that verifies proposals, copies of pages.

Tokens are taken from logits by a program of its own for each way to take them. A branch within the pass would be one in
the CUDA graph that it is launched as, and the host would wait for that graph.

Each writes the pages where they are. On a TPU that takes saying how they lie: left to itself the compiler would turn
latents of 576 numbers around, all of the cache, for each pass and back.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import hisa_jax as hj
from hisa_jax.models.cache import Cache, pages_sharding, row_after_row
from hisa_jax.models.draws import Draws, LogprobArrays, logprobs_of, take
from hisa_jax.models.modeling import Model, Output
from hisa_jax.models.replay.recorder import Rows, logprob_of, rows_of
from hisa_jax.models.sharding import size_of
from hisa_jax.models.structure import Structure

Pages = tuple[hj.IndexCache, ...]


class Trace(NamedTuple):
    """What a pass tells beside tokens: what was selected from what; what queries and routers chose, for rollouts."""

    inputs: bool
    choices: bool


class Seen(NamedTuple):
    """What a pass tells: of each layer that selects (selection, q, k, w), and its choices, if asked for."""

    layers: list
    rows: Rows | None


class Taken(NamedTuple):
    """Tokens [B, T], and what was asked for of them: log-probabilities [B, T] for rollouts, and those to show."""

    tokens: Array
    logprob: Array | None
    logprobs: LogprobArrays | None


class Formats(NamedTuple):
    """How each array of the pages lies in memory, and on which devices."""

    structure: Any
    leaves: tuple[Format, ...]

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)


def formats_of(model: Model, n_pages: int) -> Formats | None:
    """How the pages of an engine shall lie; None where the compiler leaves them as they are."""
    if jax.default_backend() != "tpu":
        return None
    where: Sharding = SingleDeviceSharding(min(model.embed[...].devices(), key=lambda device: device.id))
    if model.mesh is not None:
        where = pages_sharding(model.mesh, n_pages)
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: model.empty_pages(n_pages)))
    return Formats(structure, tuple(row_after_row(leaf, where) for leaf in leaves))


def empty(model: Model, n_pages: int, formats: Formats | None) -> Pages:
    """Pages without a token."""
    make = functools.partial(model.empty_pages, n_pages)
    return make() if formats is None else jax.jit(make, out_shardings=formats.tree)()


class _Pass:
    """A function of pages, compiled for those that lie as its argument `formats` says.

    Args:
        function: is given `pages`, whose memory its results may take.
        outs: puts the formats of the pages among those of its results, None for the others.
        static: arguments that are no arrays.
    """

    def __init__(self, function: Callable[..., Any], outs: Callable[[Any], Any], static: tuple[str, ...]):
        functools.update_wrapper(self, function)
        self.program = functools.cache(functools.partial(_program, function, outs, static))

    def __call__(self, *arrays: Any, formats: Formats | None = None, **static: Any) -> Any:
        return self.program(formats)(*arrays, **static)


def _program(
    function: Callable[..., Any], outs: Callable[[Any], Any], static: tuple[str, ...], formats: Formats | None
) -> Any:
    where = {} if formats is None else dict(out_shardings=outs(formats.tree))
    return jax.jit(function, static_argnames=static, donate_argnames="pages", **where)


def _compiled(outs: Callable[[Any], Any], *static: str) -> Callable[[Callable[..., Any]], _Pass]:
    return lambda function: _Pass(function, outs, static)


def _run(
    structure: Structure, weights: list[Array], pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array,
    trace: Trace, last_only: bool,
) -> tuple[Array, Pages, Seen]:  # fmt: skip
    """The logits after all new tokens or the last one, the pages, what was selected."""
    model, T = structure.merge(weights), ids.shape[1]
    mask = jnp.arange(T)[None, :] >= T - n_new[:, None]
    cache = Cache(layers=pages, block_tables=tables, lengths=lengths)
    out = model.run(ids, cache=cache, mask=mask, last_only=last_only, trace=any(trace))
    return out.logits, _where_they_were(model.mesh, out.cache.layers), _on_all(model.mesh, _seen(out, trace))


def _seen(out: Output, trace: Trace) -> Seen:
    layers = [layer for layer in out.layers if trace.inputs and layer.index_inputs is not None]
    told = [(layer.selection, *(layer.index_inputs or ())) for layer in layers]
    return Seen(told, rows_of(out) if trace.choices else None)


@_compiled(lambda pages: (None, pages, None), "structure", "trace")
def read(
    weights: list[Array], pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *,
    structure: Structure, trace: Trace,
) -> tuple[Array, Pages, Seen]:  # fmt: skip
    """A chunk of prompts: the logits [B, 1, V] after it, the pages, what was selected."""
    return _run(structure, weights, pages, tables, lengths, ids, n_new, trace, last_only=True)


@_compiled(lambda pages: (None, pages, None), "structure", "trace")
def verify(
    weights: list[Array], pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, *,
    structure: Structure, trace: Trace,
) -> tuple[Array, Pages, Seen]:  # fmt: skip
    """The last token and proposals: the logits [B, T, V] after each, the pages with all, what was selected."""
    return _run(structure, weights, pages, tables, lengths, ids, n_new, trace, last_only=False)


def taken(logits: Array, draws: Draws, mesh: Mesh | None, trace: Trace) -> Taken:
    """Takes tokens from the logits [B, T, V] of a pass as the host's `draws` say; waits for nothing."""
    tokens, logprob = choose(logits, draws, kind=int(draws.kind), has_logprob=trace.choices, mesh=mesh)
    return Taken(tokens, logprob, logprobs(logits, tokens, mesh=mesh) if draws.has_logprobs else None)


@functools.partial(jax.jit, static_argnames=("kind", "has_logprob", "mesh"))
def choose(
    logits: Array, draws: Draws, *, kind: int, has_logprob: bool, mesh: Mesh | None
) -> tuple[Array, Array | None]:  # fmt: skip
    """Tokens [B, T], and their log-probabilities [B, T] if wanted."""
    tokens = take(logits, draws, kind)
    return _on_all(mesh, (tokens, logprob_of(logits, tokens) if has_logprob else None))


@functools.partial(jax.jit, static_argnames="mesh")
def logprobs(logits: Array, tokens: Array, *, mesh: Mesh | None) -> LogprobArrays:
    """Log probabilities to show."""
    return _on_all(mesh, logprobs_of(logits, tokens))


@_compiled(lambda pages: (None, pages), "mesh")
def keep(
    pages: Pages, tables: Array, lengths: Array, ids: Array, n_new: Array, tokens: Array, *, mesh: Mesh | None
) -> tuple[Array, Pages]:
    """How many proposals [B] among `ids` are the token taken before them, and pages without the others."""
    T = ids.shape[1]
    is_proposal = jnp.arange(1, T)[None, :] > T - n_new[:, None]
    is_right = jnp.where(is_proposal, ids[:, 1:] == tokens[:, :-1], True)
    n_right = jnp.sum(jnp.cumprod(is_right, axis=1) * is_proposal, axis=1, dtype=jnp.int32)
    kept, over = lengths + jnp.minimum(n_new, 1 + n_right), _over(mesh)
    layers = tuple(hj.truncate(p, tables, lengths + n_new, kept, max_tokens=T - 1, **over) for p in pages)
    return _on_all(mesh, n_right), _where_they_were(mesh, layers)


@_compiled(lambda pages: pages, "mesh")
def copy(pages: Pages, source: Array, target: Array, *, mesh: Mesh | None) -> Pages:
    """Copies pages [n] of each group to others of the same device; -1 is no page."""
    return _where_they_were(mesh, tuple(hj.copy_pages(layer, source, target, **_over(mesh)) for layer in pages))


def _over(mesh: Mesh | None) -> dict[str, Any]:
    """How functions of pages split those of an engine on a mesh: arguments by name, none if nothing is split."""
    axes = {f"{axis}_axis": axis for axis in ("data", "context") if size_of(mesh, axis) > 1}
    return dict(mesh=mesh, **axes) if axes else {}


def _on_all[Tree](mesh: Mesh | None, tree: Tree) -> Tree:
    """What the host reads, whole on every device, since a process can read only what its own devices have."""
    return tree if mesh is None else lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def _where_they_were(mesh: Mesh | None, pages: Pages) -> Pages:
    """Pages on the devices that they came from, so that their memory can be taken over."""
    return pages if mesh is None else lax.with_sharding_constraint(pages, pages_sharding(mesh, pages[0].n_pages))
