"""An indexer of the table as a Flax module: what it makes of hidden states, and what it selects by that."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import hisa_jax as hj
from hisa_jax import checks
from hisa_jax.models.cache import packing
from hisa_jax.models.indexers import pieces
from hisa_jax.models.indexers.cache import IndexerCache
from hisa_jax.models.indexers.pieces import Rows
from hisa_jax.models.indexers.table import Family, demand, family_of, sizes_of

_FLOATS = ("bfloat16", "float32")
_LARGEST_WINDOW = 2**16
# What stands before a tensor's own name: the indexer's module, or where it is none, all before "index_".
_IN_INDEXER = re.compile(r".*(indexer\.|\.(?=index_))")


class Indexed(NamedTuple):
    """What an indexer makes and selects.

    Attributes:
        q: [B, T, H, D] queries as they are multiplied.
        k: [B, S, D] keys in the order of the sequence, or of entries; with a cache the new keys alone, [B, T, D], an
            entry's at its last token.
        w: [B, T, H] float32 head weights, without the factor `Indexer.scale`; None if it has none.
        selection: of each token, in the order of `hidden`.
        cache: with the new tokens, if one was given.
    """

    q: Array
    k: Array
    w: Array | None
    selection: hj.Selection
    cache: IndexerCache | None


class Indexer(nnx.Module):
    """The indexer of a published model, by its row of the table.

    Attributes:
        family: the row.
        method: how the model selects; its `topk` and blocks count entries.
        scale: by which products of queries and keys are multiplied beside the weights.
        head_dim, rope_dim, eps: sizes; `rope_dim` None: as wide as `cos`, which then has each number twice.
    """

    def __init__(self, family: Family, sizes: Mapping[str, Any], method: hj.Method, weights: Mapping[str, Array]):
        if "interleaved" in sizes and family.pairs != "neighbours":
            family = dataclasses.replace(family, pairs="parted" if sizes["interleaved"] else "halves")
        self.family, self.method = family, method
        self.head_dim, self.rope_dim = sizes["head_dim"], sizes.get("rope_dim")
        self.rope = family.rope if sizes.get("use_rope", True) and self.rope_dim != 0 else None
        self.eps = float(family.eps if family.fixed_eps else sizes.get("eps", family.eps))
        self.scale = 1.0 if family.weights_scaled else self.head_dim**-0.5
        self.weights = nnx.Dict({name: nnx.Param(jnp.asarray(value)) for name, value in weights.items()})

    def init_cache(self, batch: int, capacity: int, *, page_size: int = 16, room: int = 0) -> IndexerCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens.

        Args:
            page_size: keys of a page.
            room: tokens that `IndexerCache.truncate` may take back at a time.
        """
        window = pieces.window(self.family.pooled, self.method.entry_size)
        row = jax.eval_shape(
            lambda hidden, table: self._rows(hidden, table, table),
            jax.ShapeDtypeStruct((batch, 1, self._hidden_size), self._dtype),
            jax.ShapeDtypeStruct((batch, 1, self._table_size), jnp.float32),
        )
        sizes: Any = dict(entry_size=self.method.entry_size, page_size=page_size, D=self.head_dim, dtype=self._dtype)
        kept = row if self.family.pooled else {}
        return IndexerCache.empty(batch, capacity, kept, window - 1 + room, room=room, **sizes)

    def __call__(
        self,
        hidden: Array,
        q_resid: Array | None = None,
        cos: Array | None = None,
        sin: Array | None = None,
        positions: Array | None = None,
        *,
        method: hj.Method | None = None,
        cache: IndexerCache | None = None,
        return_scores: bool = False,
        implementation: str = "auto",
    ) -> Indexed:
        """Selects for each token.

        Args:
            hidden: [B, T, E] hidden states as the attention gets them.
            q_resid: [B, T, Q] latents of the attention's queries, for indexers whose queries are made of them.
            cos, sin: [1 or B, T, n], of each token's position, a number a pair of dims, twice in a row, as public code
                has them; where `rope_dim` is known also once. For indexers with RoPE.
            positions: [B, T] int32, each token's number in its sequence; -1 is padding, on either side. Default, and
                what they must be but for padding: 0, 1, 2, ..., with a cache from its lengths on; `hj.checked` checks.
            method: how to select; None: as the model does. It must be of the same entries, and for each head or not.
            cache: the sequences so far; None: these tokens are all.
            return_scores, implementation: as for `hj.select`.

        Returns: `Indexed`. Blocks are returned where the method has them.
        Raises: TypeError: no arrays of bfloat16 or float32, or positions of another kind than int32. ValueError:
            shapes that do not fit; an input that is missing; a method that does not fit.
        """
        call, family = "Indexer", self.family
        checks.dtype(call, "hidden", hidden, _FLOATS)
        checks.shape(call, "hidden", hidden, ("B", "T", self._hidden_size))
        B, T, _ = hidden.shape
        if positions is None:
            start = jnp.zeros((B,), jnp.int32) if cache is None else cache.lengths
            positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        checks.dtype(call, "positions", positions, ("int32", "int64"))
        checks.shape(call, "positions", positions, (B, T))
        positions = jnp.asarray(positions, jnp.int32)
        _check_positions(call, positions, None if cache is None else cache.lengths)
        if family.queries == "latents":
            if q_resid is None:
                raise ValueError(f"{call}: q_resid is None, wanted [B, T, Q]: of {family.title} queries are made of it")
            checks.dtype(call, "q_resid", q_resid, _FLOATS)
            checks.shape(call, "q_resid", q_resid, (B, T, self.weights["wq"].shape[1]))
        table = self._table(call, cos, sin, B, T)
        if cache is not None and "cos" in cache.rows and cache.rows["cos"].shape[-1] != table[0].shape[-1]:
            raise ValueError(
                f"{call}: cos turns {2 * table[0].shape[-1]} dims, wanted {self.head_dim} as the cache has: of fewer "
                "from_weights has to know, by rope_dim in its sizes"
            )
        method = self._method(call, method)
        q, w = self._queries(hidden, q_resid, positions, *table), self._weights(hidden)
        factors = self._factors(w, q)
        options: Any = dict(return_scores=return_scores, return_blocks=method.has_blocks, implementation=implementation)
        rows = self._rows(hidden, *table)
        if cache is None:
            k, lengths = self._all_keys(rows, positions), jnp.max(positions, axis=1, initial=-1) + 1
            options |= dict(query_positions=positions, lengths=lengths)
            return Indexed(q, k, w, hj.select(q, k, factors, method, **options), None)
        order = packing(positions)
        local = jnp.where(positions >= 0, positions - cache.lengths[:, None], -1)
        window = pieces.window(family.pooled, self.method.entry_size)
        cache, k = cache.appended(rows, local, self._keys, order, window)
        found = hj.select_paged(
            order.pack(q), None if factors is None else order.pack(factors), cache.pages, cache.tables,
            order.cu_seqlens, cache.lengths, method, **options,
        )  # fmt: skip
        return Indexed(q, k, w, jax.tree.map(order.unpack, found), cache)

    @property
    def _hidden_size(self) -> int:
        return int(self.weights["wqk" if "wqk" in self.weights else "wk"].shape[1])

    @property
    def _dtype(self) -> Any:
        return self.weights["wqk" if "wqk" in self.weights else "wk"].dtype

    @property
    def _table_size(self) -> int:
        return (self.rope_dim or self.head_dim) // 2

    def _method(self, call: str, method: hj.Method | None) -> hj.Method:
        own = self.method
        if method is None:
            return own
        same = ("entry_size", "activation", "per_head")
        if any(getattr(method, name) != getattr(own, name) for name in same):
            raise ValueError(f"{call}: method is {method}, wanted {', '.join(same)} as {own} has them")
        return method

    def _table(self, call: str, cos: Array | None, sin: Array | None, B: int, T: int) -> tuple[Array, Array]:
        """cos and sin of each pair of dims, [B, T, n / 2]."""
        if self.rope is None:
            return jnp.zeros((B, T, 0), jnp.float32), jnp.zeros((B, T, 0), jnp.float32)
        tables = []
        for name, x in (("cos", cos), ("sin", sin)):
            if x is None:
                raise ValueError(f"{call}: {name} is None, wanted [B, T, n]: {self.family.title}'s indexer has RoPE")
            checks.dtype(call, name, x, (*_FLOATS, "float64"))
            checks.shape(call, name, x, ("1 or B", T, "n"))
            n = x.shape[-1] if self.rope_dim is None else self.rope_dim
            if x.shape[0] not in (1, B) or x.shape[-1] not in (n // 2, n) or n % 2 or n > self.head_dim:
                wide = f"an even number up to {self.head_dim}" if self.rope_dim is None else f"{n // 2} or {n}"
                raise ValueError(f"{call}: {name} is {checks.axes_of(x)}, wanted [1 or {B}, {T}, {wide}]")
            tables.append(jnp.broadcast_to(x[..., : n // 2].astype(jnp.float32), (B, T, n // 2)))
        return tables[0], tables[1]

    def _queries(self, hidden: Array, q_resid: Array | None, positions: Array, cos: Array, sin: Array) -> Array:
        family, weights, D = self.family, self.weights, self.head_dim
        x = q_resid if family.queries == "latents" else hidden
        assert x is not None
        if family.queries == "normed":
            x = pieces.norm(x, "layer", weights["q_input_norm"][...], weights["q_input_norm_bias"][...], self.eps)
        projection = weights["wq"][...] if "wq" in weights else weights["wqk"][...][:-D]
        q = (x @ projection.T).reshape(*x.shape[:2], projection.shape[0] // D, D)
        if family.queries == "normed":
            at = jnp.log(jnp.maximum(positions + 1, 1).astype(jnp.float32)).astype(q.dtype)
            scale = weights["q_scale"][...].astype(q.dtype)[None, None, :] * at[:, :, None]
            q = q * (scale + weights["q_bias"][...].astype(q.dtype)[None, None, :])[..., None]
        if family.query_norm:
            q = pieces.norm(q, family.query_norm, weights["q_norm"][...], None, self.eps)
        if self.rope is None:
            return q
        return pieces.turn(q, cos[:, :, None, :], sin[:, :, None, :], self.rope, family.pairs)

    def _weights(self, hidden: Array) -> Array | None:
        if not self.family.weighs:
            return None
        w = self.weights["w"][...]
        heads = (hidden.astype(w.dtype) @ w.T).astype(jnp.float32) * w.shape[0] ** -0.5
        return heads * self.head_dim**-0.5 if self.family.weights_scaled else heads

    def _factors(self, w: Array | None, q: Array) -> Array | None:
        """What `select` gets for head weights."""
        if self.method.per_head:
            return None
        w = jnp.ones(q.shape[:3], jnp.float32) if w is None else w
        return w * self.scale

    def _rows(self, hidden: Array, cos: Array, sin: Array) -> Rows:
        """What each token brings to its key, [B, T, n] each."""
        weights = self.weights
        projection = weights["wk"][...] if "wk" in weights else weights["wqk"][...][-self.head_dim :]
        key = hidden @ projection.T
        if self.family.pooled not in ("mean", "windows"):
            bias = weights["k_norm_bias"][...] if "k_norm_bias" in weights else None
            key = pieces.norm(key, self.family.key_norm, weights["k_norm"][...], bias, self.eps)
        rows = {"key": key}
        if self.rope is not None:
            rows |= {"cos": cos, "sin": sin}
        return rows | ({"gate": hidden @ weights["gate"][...].T} if "gate" in weights else {})

    def _keys(self, rows: Rows, is_there: Array) -> Array:
        """Keys of windows of rows, [..., window, n] each: [..., D]."""
        family, r = self.family, self.method.entry_size
        first = {name: x[..., -r, :] for name, x in rows.items()}  # the entry's first token
        if family.pooled:
            ape = self.weights["ape"][...] if "ape" in self.weights else None
            key = pieces.pool(family.pooled, rows, is_there, ape)
            if family.pooled != "gated":
                key = pieces.norm(key, family.key_norm, self.weights["k_norm"][...], None, self.eps)
        else:
            key = first["key"]
        return key if self.rope is None else pieces.turn(key, first["cos"], first["sin"], self.rope, family.pairs)

    def _all_keys(self, rows: Rows, positions: Array) -> Array:
        """[B, T // r, D]: the keys of whole entries, of sequences that begin at position 0."""
        r, T = self.method.entry_size, positions.shape[1]
        window = pieces.window(self.family.pooled, r)
        ends = (jnp.arange(T // r, dtype=jnp.int32) + 1) * r
        members = ends[:, None] - window + jnp.arange(window, dtype=jnp.int32)[None, :]
        ordered = pieces.in_order(rows, positions, T)
        taken = {name: x[:, jnp.maximum(members, 0)] for name, x in ordered.items()}
        return self._keys(taken, jnp.broadcast_to(members >= 0, (positions.shape[0], *members.shape)))


def from_weights(model_type: str, sizes: Mapping[str, Any], weights: Mapping[str, Any]) -> Indexer:
    """The indexer of a published model, from a checkpoint's tensors.

    Args:
        model_type: of config.json: a name of `FAMILIES`.
        sizes: what config.json says, or our names of it: topk, head_dim, rope_dim, pool, block_size, blocks_kept, ...
            (`table.SIZES`). Other keys are not read. The number of heads follows from the tensors.
        weights: the tensors of one layer's indexer by the names that checkpoints have, `wq_b.weight` [H * D, Q] for
            instance; what stands before them up to `indexer.` does not matter. [out, in], as checkpoints have them.

    Returns: the module, with the weights in the dtypes that they have.
    Raises: TypeError: sizes or weights that are no mapping, a tensor of no float or of 8 bits. ValueError: an unknown
        model type, a size or a tensor that is missing or of another shape, a tensor that the indexer does not have.
    Source: transformers 5.24, read and checked against its outputs.
    Example:
        >>> import numpy as np
        >>> from hisa_jax.models import indexers
        >>> shapes = {"q_proj.weight": (32, 40), "k_proj.weight": (16, 40), "q_norm.weight": 16, "k_norm.weight": 16}
        >>> weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        >>> sizes = dict(head_dim=16, block_size=8, blocks_kept=3)
        >>> indexer = indexers.from_weights("minimax_m3", sizes, weights)
        >>> table = jnp.ones((1, 20, 16))
        >>> indexer(jnp.ones((1, 20, 40)), cos=table, sin=table).selection.blocks.shape
        (1, 20, 2, 3)
    """
    call = "from_weights"
    checks.instance(call, "sizes", sizes, Mapping, "a mapping")
    checks.instance(call, "weights", weights, Mapping, "a mapping")
    family, found = family_of(model_type), sizes_of(model_type, sizes)
    named = {_IN_INDEXER.sub("", name): value for name, value in weights.items()}
    if len(named) < len(weights):
        raise ValueError(f"{call}: {model_type}: weights have a name twice, as of several layers, wanted one indexer's")
    tensors: dict[str, Any] = {}
    for ours, theirs in family.tensors.items():
        name = next((name for name in theirs if name in named), None)
        if name is None:
            raise ValueError(f"{call}: {model_type}: weights lack {' or '.join(theirs)}")
        tensors[ours] = named.pop(name)
    if named:
        raise ValueError(f"{call}: {model_type}: weights have {', '.join(sorted(named))}, which its indexer has not")
    method = family.method(found)
    if method.entry_size > _LARGEST_WINDOW:
        raise ValueError(f"{call}: {model_type}: entries of {method.entry_size} tokens, wanted at most 65536")
    found.setdefault("head_dim", np.shape(tensors["k_norm"])[0])
    if family.pairs == "neighbours":  # whose public tables have a number a pair, so that their width does not tell
        demand(model_type, found, "rope_dim")
    D, turned = found["head_dim"], found.get("rope_dim", 0)
    _check_shapes(call, model_type, family, D, method.entry_size, tensors)
    if family.rope and (turned % 2 or turned > D):
        raise ValueError(f"{call}: {model_type}: RoPE of {turned} dims, wanted an even number up to head_dim = {D}")
    return Indexer(family, found, method, tensors)


def _check_positions(call: str, positions: Array, lengths: Array | None) -> None:
    """Under `hj.checked` raises unless the positions of each row [B, T] are adjacent, from its length on."""
    if not checks.checks_values():
        return
    B, T = positions.shape
    last = jnp.iinfo(jnp.int32).max
    ascending = jnp.sort(jnp.where(positions >= 0, positions, last), axis=1)
    start = jnp.zeros((B,), jnp.int32) if lengths is None else lengths
    checks.value(
        (ascending == last) | (ascending == start[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]),
        f"{call}: positions are {{positions}}, wanted adjacent ones from {{start}} on, and -1",
        positions=positions,
        start=start,
    )


def _check_shapes(call: str, model_type: str, family: Family, D: int, r: int, tensors: Mapping[str, Any]) -> None:
    """Raises TypeError unless the tensors are floats to compute with, ValueError unless they fit each other."""
    name = "wqk" if "wqk" in tensors else "wq"
    rows, n_in = np.shape(tensors[name]) if np.ndim(tensors[name]) == 2 else (0, 0)
    H = rows // D - (name == "wqk")
    E = np.shape(tensors["wk"])[-1] if "wk" in tensors else n_in
    width = 2 * D if family.pooled == "windows" else D
    Q = n_in if family.queries == "latents" else E
    wanted: dict[str, tuple[int, ...]] = {
        "wq": (H * D, Q), "wqk": ((H + 1) * D, E), "wk": (width, E), "k_norm": (D,), "k_norm_bias": (D,), "w": (H, E),
        "q_norm": (D,), "q_input_norm": (E,), "q_input_norm_bias": (E,), "q_scale": (H,), "q_bias": (H,),
        "ape": (r, width), "gate": (width, E),
    }  # fmt: skip
    for ours, value in tensors.items():
        dtype = str(getattr(value, "dtype", type(value).__name__))
        if not dtype.endswith(("bfloat16", "float16", "float32", "float64")):
            raise TypeError(
                f"{call}: {model_type}: {family.tensors[ours][0]} is {dtype}, wanted floats of 16 bits or more"
            )
        if H < 1 or np.shape(value) != wanted[ours]:
            raise ValueError(
                f"{call}: {model_type}: {family.tensors[ours][0]} is {list(np.shape(value))}, wanted "
                f"{list(wanted[ours]) if H > 0 else f'a multiple of head_dim = {D} rows'}"
            )
