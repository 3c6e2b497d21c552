"""The decoder: embedding, layers of DSA attention and MLP or experts, logits. One for V3.2, GLM-5 and GLM-5.2."""

import dataclasses
import itertools
import math
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

import hisa_jax as hj
from hisa_jax.models.block_scaled import VALUE_DTYPE
from hisa_jax.models.cache import (
    Cache,
    Kept,
    empty_cache,
    empty_pages,
    kept_for,
    page_size_of,
    pages_sharding,
    stripe_of,
)
from hisa_jax.models.config import Config
from hisa_jax.models.dsa import Attention, Form, IndexInputs, Table
from hisa_jax.models.layers import Init, Mlp, rms_norm
from hisa_jax.models.moe import Moe
from hisa_jax.models.plan import MethodLike, Phase, make_plan
from hisa_jax.models.rope import rope_table
from hisa_jax.models.sharding import automatic, check_axes_around, constrain

HIDDEN = ("batch", None, None)
"""Axes of hidden states [B, T, E], as `constrain` takes them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What happened in one layer, for tests and reports.

    Attributes:
        attention, mlp: [B, T, E], the two branches' outputs.
        hidden: [B, T, E], the layer's output.
        selection: the tokens attended to; another layer's, if this one shares it.
        index_inputs: index queries [B, T, H, D], index keys [B, T, D], head weights [B, T, H] of these tokens; None if
            shared.
        experts, expert_weights: [B, T, K]; None in dense layers.
    """

    attention: Array
    mlp: Array
    hidden: Array
    selection: hj.Selection
    index_inputs: IndexInputs | None
    experts: Array | None
    expert_weights: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a forward pass returns.

    Attributes:
        logits: [B, T, V] float32, or [B, 1, V] of the last token.
        cache: with the new tokens.
        slots: [B, T] int32, each token's number in its sequence, -1 for padding.
        layers: a `LayerTrace` a layer if asked for, else empty.
    """

    logits: Array
    cache: Cache
    slots: Array
    layers: tuple[LayerTrace, ...]


class Layer(nnx.Module):
    """Attention, then MLP or experts, each on the normed hidden state and added to it."""

    def __init__(self, config: Config, layer: int, init: Init):
        self.config = config
        self.attention_norm = init.constant((config.hidden_size,), 1.0)
        self.attention = Attention(config, layer, init)
        self.mlp_norm = init.constant((config.hidden_size,), 1.0)
        if config.layer_kinds[layer] == "dense":
            self.mlp: Mlp | Moe = Mlp(config, config.intermediate_size, init)
        else:
            self.mlp = Moe(config, init)

    def __call__(
        self, x: Array, *, table: Table, slots: Array, lengths: Array, pages: hj.IndexCache, block_tables: Array,
        method: hj.Method, selection: hj.Selection | None, form: Form, mesh: Mesh | None, stripe: int | None = None,
    ) -> tuple[hj.IndexCache, LayerTrace]:  # fmt: skip
        eps = self.config.rms_norm_eps
        attention, pages, selection, inputs = self.attention(
            rms_norm(x, self.attention_norm[...], eps), table=table, slots=slots, lengths=lengths, pages=pages,
            block_tables=block_tables, method=method, selection=selection, form=form, mesh=mesh, stripe=stripe,
        )  # fmt: skip
        x = constrain(x + attention, mesh, HIDDEN)
        normed, experts, expert_weights = rms_norm(x, self.mlp_norm[...], eps), None, None
        if isinstance(self.mlp, Moe):
            mlp, experts, expert_weights = self.mlp(normed, mesh)
        else:
            mlp = self.mlp(normed)
        trace = LayerTrace(
            attention=attention, mlp=mlp, hidden=constrain(x + mlp, mesh, HIDDEN), selection=selection,
            index_inputs=inputs, experts=experts, expert_weights=expert_weights,
        )  # fmt: skip
        return pages, trace


class Model(nnx.Module):
    """A DSA language model; `folder` is where it was loaded from, None if it was made otherwise.

    Args:
        config: sizes and settings.
        method: how layers select, see `make_plan`; None is the checkpoint's own, `config.method`.
        dtype: of weights and activations. Norms, router, index head weights and logits are float32 always.
        weight_dtype: "float8_e4m3fn": all matrices but embedding, router and head are block-scaled and stay so in
            memory, see `models.block_scaled`; None: they are of `dtype`.
        mesh: to split the model, its inputs and caches over, with some of the axes of `models.make_mesh`; None for
            one device.
        rngs: for random weights, stream "params".
    """

    def __init__(
        self, config: Config, *, method: MethodLike = None, dtype: DTypeLike = jnp.float32,
        weight_dtype: DTypeLike | None = None, mesh: Mesh | None = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"Model: dtype is {jnp.dtype(dtype)}, wanted float32 or bfloat16")
        if weight_dtype is not None and jnp.dtype(weight_dtype) != VALUE_DTYPE:
            raise ValueError(f"Model: weight_dtype is {jnp.dtype(weight_dtype)}, wanted {VALUE_DTYPE} or None")
        self.config = config
        self.folder: str | None = None
        self._page_size: int | None = None
        self.plan = make_plan(method, config)
        self.mesh = automatic(mesh)
        V, E = config.vocab_size, config.hidden_size
        init = Init(rngs, dtype, self.mesh, None if weight_dtype is None else math.gcd(*config.weight_block_size))
        self.embed = init.weight((V, E), ("vocab", None))
        self.layers = nnx.List([Layer(config, i, init) for i in range(config.num_hidden_layers)])
        self.norm = init.constant((E,), 1.0)
        self.head = None if config.tie_word_embeddings else init.weight((E, V), (None, "vocab"))

    def with_method(self, method: MethodLike) -> Self:
        """The same model with another method; the two share their weights."""
        other = nnx.merge(*nnx.split(self))  # other modules around the same arrays
        other.plan = make_plan(method, self.config)
        return other

    def with_page_size(self, page_size: int) -> Self:
        """The same model with pages of so many tokens in its caches, by default up to 64; the two share their weights.

        Raises: ValueError: no power of two up to 256, or a method's blocks are no whole pages.
        """
        other = nnx.merge(*nnx.split(self))
        other._page_size = page_size_of(itertools.chain(*self._methods()), page_size)
        return other

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache with room for at least `capacity` tokens in each of `batch` rows, for the methods of all phases."""
        dtype = self.embed[...].dtype
        return empty_cache(self.config, batch, capacity, dtype, self.page_size, self.mesh, self._kept, self.stripe)

    def empty_pages(self, n_pages: int) -> tuple[hj.IndexCache, ...]:
        """Pages of every layer, for the methods of all phases; on a mesh equal parts on the devices of each group."""

        def make() -> tuple[hj.IndexCache, ...]:
            return empty_pages(self.config, n_pages, self.page_size, self.embed[...].dtype, self._kept)

        return make() if self.mesh is None else jax.jit(make, out_shardings=pages_sharding(self.mesh, n_pages))()

    @property
    def page_size(self) -> int:
        """Tokens of a page that every method can read."""
        return page_size_of(itertools.chain(*self._methods()), self._page_size)

    @property
    def stripe(self) -> int:
        """Tokens of a row one after the other that one device has, where several share its pages."""
        return stripe_of(itertools.chain(*self._methods()), self.page_size)

    @property
    def _kept(self) -> tuple[Kept, ...]:
        """What each layer's pages keep for its methods."""
        return tuple(map(kept_for, self._methods()))

    def _methods(self) -> list[list[hj.Method]]:
        """Of each layer, those of all phases."""
        phases: tuple[Phase, ...] = get_args(Phase)
        return [[self.plan(i, phase) for phase in phases] for i in range(self.config.num_hidden_layers)]

    def __call__(self, input_ids: Array, positions: Array | None = None, mask: Array | None = None) -> Array:
        """Logits of whole sequences.

        Args:
            input_ids: [B, T] int32.
            positions: [B, T] int32 for RoPE, -1 where there is padding. Default: count the tokens of each row.
            mask: [B, T], 0 or False where there is padding, on either side. Default: what `positions` says.

        Returns: [B, T, V] float32; those of padding mean nothing.
        Raises: TypeError: ids or positions that are not integers. ValueError: shapes that do not fit.
        """
        return self.run(input_ids, positions=positions, mask=mask).logits

    def run(
        self, input_ids: Array, *, cache: Cache | None = None, positions: Array | None = None,
        mask: Array | None = None, phase: Phase = "prefill", form: Form = "auto", last_only: bool = False,
        trace: bool = False,
    ) -> Output:  # fmt: skip
        """Runs tokens that come after those in the cache.

        Args:
            input_ids: [B, T] int32. One outside the vocabulary is NaN to all that see it, and to no other row; those
                of padding do not matter.
            cache: what came before. Default: nothing.
            positions, mask: as for a call of the model; tokens in the cache count.
            phase: for methods that are a rule: "prefill", "last_prefill" or "decode".
            form: "expanded" or "absorbed" attention, which compute the same; "auto" takes the cheaper one.
            last_only: whether to compute the logits of the last column alone.
            trace: whether to return what happened in each layer.

        Returns: `Output`.
        Raises: TypeError: ids or positions that are not integers. ValueError: shapes that do not fit, an
            unknown `form` or `phase`.
        """
        input_ids = jnp.asarray(input_ids)
        positions, mask = (x if x is None else jnp.asarray(x) for x in (positions, mask))
        _check_tokens(input_ids, cache, positions, mask, phase, form)
        B, T = input_ids.shape
        if cache is None:
            cache = self.empty_cache(B, T)
        if mask is None:
            mask = jnp.ones((B, T), bool) if positions is None else positions >= 0
        is_real = mask.astype(bool)
        # Padding may be on either side: a token's number counts the real ones up to it, and those in the cache.
        lengths = cache.lengths + jnp.sum(is_real, axis=1, dtype=jnp.int32)
        slots = cache.lengths[:, None] + jnp.cumsum(is_real, axis=1, dtype=jnp.int32) - 1
        slots = jnp.where(is_real, slots, -1)
        table = rope_table(self.config, slots if positions is None else positions)

        check_axes_around(self.mesh)
        x = constrain(self.embedded(input_ids, is_real), self.mesh, HIDDEN)
        every: Any = dict(table=table, slots=slots, lengths=lengths, form=form, mesh=self.mesh, stripe=self.stripe)
        x, pages, traces = self._through_layers(x, cache, phase, trace, every)
        x = rms_norm(x[:, -1:] if last_only else x, self.norm[...], self.config.rms_norm_eps)
        return Output(
            logits=self.logits(x),
            cache=Cache(layers=tuple(pages), block_tables=cache.block_tables, lengths=lengths), slots=slots,
            layers=tuple(traces),
        )  # fmt: skip

    def _through_layers(
        self, x: Array, cache: Cache, phase: Phase, trace: bool, every: Any
    ) -> tuple[Array, list[hj.IndexCache], list[LayerTrace]]:
        """Hidden states after the last layer, the pages of all, and what happened in each if asked for.

        `every` is what each layer is told alike.
        """
        selection, pages, traces = None, [], []
        for i, layer in enumerate(self.layers):
            layer_pages, layer_trace = layer(
                x, pages=cache.layers[i], block_tables=cache.block_tables, method=self.plan(i, phase),
                selection=selection, **every,
            )  # fmt: skip
            # A layer without an indexer attends to what the last one before it selected.
            x, selection = layer_trace.hidden, layer_trace.selection
            pages.append(layer_pages)
            if trace:
                traces.append(layer_trace)
        return x, pages, traces

    def embedded(self, input_ids: Array, is_real: Array) -> Array:
        """Token ids [B, T] and which of them are no padding [B, T] -> [B, T, E]."""
        wide = input_ids.astype(jnp.int32) if input_ids.dtype.itemsize < 4 else input_ids
        ids = jnp.where(is_real, wide, 0)
        # JAX would clamp an id that is too large, and count a negative one from the end.
        ids = jnp.where(ids < 0, self.config.vocab_size, ids)
        return self.embed[...].at[ids].get(mode="fill", fill_value=jnp.nan)

    def logits(self, x: Array) -> Array:
        """Normed hidden states [B, T, E] -> [B, T, V] float32."""
        logits = jnp.einsum("bte,ve->btv", x, self.embed[...]) if self.head is None else x @ self.head[...]
        return logits.astype(jnp.float32)


def _check_tokens(
    input_ids: Array, cache: Cache | None, positions: Array | None, mask: Array | None, phase: str, form: str
) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"Model: input_ids is {list(input_ids.shape)}, wanted [B, T]")
    for name, array in (("input_ids", input_ids), ("positions", positions)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"Model: {name} is {array.dtype}, wanted int32")
    for name, array in (("positions", positions), ("mask", mask)):
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(f"Model: {name} is {list(array.shape)}, wanted that of input_ids, {list(input_ids.shape)}")
    if cache is not None and cache.lengths.shape[0] != input_ids.shape[0]:
        raise ValueError(f"Model: cache has {cache.lengths.shape[0]} rows, wanted input_ids' {input_ids.shape[0]}")
    if phase not in ("prefill", "last_prefill", "decode"):
        raise ValueError(f"Model: phase is {phase!r}, wanted 'prefill', 'last_prefill' or 'decode'")
    if form not in ("auto", "expanded", "absorbed"):
        raise ValueError(f"Model: form is {form!r}, wanted 'auto', 'expanded' or 'absorbed'")
