"""The table from checkpoint keys to parameters and layouts, and loading by it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from hisa_jax import checks
from hisa_jax.models.block_scaled import BlockScaled
from hisa_jax.models.config import Config, read_config
from hisa_jax.models.locate import locate
from hisa_jax.models.modeling import Model
from hisa_jax.models.plan import MethodLike
from hisa_jax.models.safetensors_io import SCALE_SUFFIX, CheckpointError, Reader
from hisa_jax.models.sharding import sharding_of

ParameterPath = tuple[Any, ...]
Layout = Callable[[np.ndarray], np.ndarray]
Values = Callable[[str, tuple[slice, ...]], np.ndarray]  # of a tensor's name, the part at an index, in the layout here

_LAYER = re.compile(r"model\.layers\.(?P<layer>\d{1,9})\.(?P<indexer>self_attn\.indexer\.)?", re.ASCII)
_MOST_NAMED = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a parameter is made of.

    Attributes:
        keys: the checkpoint's tensor; one for each expert if `is_stacked`.
        shape: of each of these as stored, [out, in] for matrices.
        layout: from stored to here; only views.
        is_stacked: whether the tensors are stacked along a new first axis.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    is_stacked: bool = False


def parameter_table(config: Config) -> dict[ParameterPath, Source]:
    """Where each parameter of a model comes from.

    Args:
        config: of the model.

    Returns: a `Source` for each path in the model's state.
    """
    return {path: source for part in _tables(config) for path, source in part.items()}


def _tables(config: Config) -> Iterator[dict[ParameterPath, Source]]:
    """The table in parts, a layer each, so that a checkpoint of another model is refused before all of it is made."""
    E, V = config.hidden_size, config.vocab_size
    table: dict[ParameterPath, Source] = {
        ("embed",): _one("model.embed_tokens.weight", (V, E), _as_stored),
        ("norm",): _one("model.norm.weight", (E,), _as_stored),
    }
    if not config.tie_word_embeddings:
        table["head",] = _one("lm_head.weight", (V, E), _transposed)
    yield table
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer: dict[ParameterPath, Source] = {
            ("attention_norm",): _one(f"{prefix}input_layernorm.weight", (E,), _as_stored),
            ("mlp_norm",): _one(f"{prefix}post_attention_layernorm.weight", (E,), _as_stored),
            **_attention(config, f"{prefix}self_attn."),
            **(_indexer(config, f"{prefix}self_attn.indexer.") if config.indexer_kinds[i] == "full" else {}),
            **(_experts if config.layer_kinds[i] == "sparse" else _dense)(config, f"{prefix}mlp."),
        }
        yield {("layers", i, *path): source for path, source in layer.items()}


def _attention(config: Config, prefix: str) -> dict[ParameterPath, Source]:
    E, N, L, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    Q, P, V = config.q_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    # Keys and values of a head lie together: two parameters are views of one tensor.
    kv_b = (f"{prefix}kv_b_proj.weight", (N * (P + V), L))
    sources = {
        "q_a": _one(f"{prefix}q_a_proj.weight", (Q, E), _transposed),
        "q_a_norm": _one(f"{prefix}q_a_layernorm.weight", (Q,), _as_stored),
        "q_b": _one(f"{prefix}q_b_proj.weight", (N * (P + R), Q), lambda x: _heads_out(x, N)),
        "kv_a": _one(f"{prefix}kv_a_proj_with_mqa.weight", (L + R, E), _transposed),
        "kv_a_norm": _one(f"{prefix}kv_a_layernorm.weight", (L,), _as_stored),
        "k_b": _one(*kv_b, lambda x: _heads_out(x, N)[..., :P]),
        "v_b": _one(*kv_b, lambda x: _heads_out(x, N)[..., P:]),
        "o": _one(f"{prefix}o_proj.weight", (E, N * V), lambda x: x.T.reshape(N, V, E)),
    }
    return {("attention", name): source for name, source in sources.items()}


def _indexer(config: Config, prefix: str) -> dict[ParameterPath, Source]:
    E, H, D, Q = config.hidden_size, config.index_n_heads, config.index_head_dim, config.q_lora_rank
    sources = {
        "q": _one(f"{prefix}wq_b.weight", (H * D, Q), lambda x: _heads_out(x, H)),
        "k": _one(f"{prefix}wk.weight", (D, E), _transposed),
        "k_norm": _one(f"{prefix}k_norm.weight", (D,), _as_stored),
        "k_norm_bias": _one(f"{prefix}k_norm.bias", (D,), _as_stored),
        "w": _one(f"{prefix}weights_proj.weight", (H, E), _transposed),
    }
    return {("attention", "indexer", name): source for name, source in sources.items()}


def _mlp(E: int, F: int, template: str, experts: int | None = None) -> dict[str, Source]:
    """gate, up and down; `template` has room for {name} and, if there are experts, {expert}."""
    shapes = {"gate": (F, E), "up": (F, E), "down": (E, F)}
    return {
        name: Source(
            keys=tuple(template.format(name=name, expert=expert) for expert in range(experts or 1)),
            shape=shape,
            layout=_transposed,
            is_stacked=experts is not None,
        )
        for name, shape in shapes.items()
    }


def _dense(config: Config, prefix: str) -> dict[ParameterPath, Source]:
    sources = _mlp(config.hidden_size, config.intermediate_size, prefix + "{name}_proj.weight")
    return {("mlp", name): source for name, source in sources.items()}


def _experts(config: Config, prefix: str) -> dict[ParameterPath, Source]:
    E, F, X = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    routed = _mlp(E, F, prefix + "experts.{expert}.{name}_proj.weight", X)
    shared = _mlp(E, F * config.n_shared_experts, prefix + "shared_experts.{name}_proj.weight")
    return {
        ("mlp", "router"): _one(f"{prefix}gate.weight", (X, E), _transposed),
        ("mlp", "router_bias"): _one(f"{prefix}gate.e_score_correction_bias", (X,), _as_stored),
        **{("mlp", name): source for name, source in routed.items()},
        **{("mlp", "shared", name): source for name, source in shared.items()},
    }


def _one(key: str, shape: tuple[int, ...], layout: Layout) -> Source:
    return Source(keys=(key,), shape=shape, layout=layout)


def _as_stored(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _heads_out(x: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, in] -> [in, heads, d]."""
    return x.reshape(heads, -1, x.shape[1]).transpose(2, 0, 1)


def from_config(
    config: Config,
    *,
    rngs: nnx.Rngs,
    method: MethodLike = None,
    dtype: DTypeLike = jnp.float32,
    weight_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Makes a model with random weights, each made where it will lie.

    Args:
        config: sizes and settings; `models.dsv32()` and the like, or `models.read_config`.
        rngs: stream "params".
        method, dtype, mesh: as for `from_pretrained`.
        weight_dtype: "float8_e4m3fn": matrices are block-scaled as published ones are; None: of `dtype`.

    Returns: the model. Under `nnx.eval_shape` it takes no memory.
    Raises: as `from_pretrained`, for method and mesh.
    """

    return Model(config, method=method, dtype=dtype, weight_dtype=weight_dtype, mesh=mesh, rngs=rngs)


def from_pretrained(
    folder: str | Path,
    method: MethodLike = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    *,
    config: Config | None = None,
    weight_dtype: DTypeLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Loads a checkpoint: config.json, and safetensors in one file or in shards with an index.

    Every parameter is read and placed by itself, each device's part straight from the file, so that the model is never
    held twice.

    Args:
        folder: where the checkpoint lies, or its name, see `models.locate`: "bytes" is the model that the repository
            ships.
        method: how layers select: `hj.Hisa`, `hj.Dsa`, `hj.Scan` or `hj.BlockSparse`, a sequence or mapping of them by
            layer, or a rule (layer, phase) -> method; None is the checkpoint's own, `config.method`.
        dtype: of weights and activations, float32 or bfloat16. Norms, router and index head weights stay float32.
        mesh: with some of the axes of `models.make_mesh`.
        config: instead of the folder's, to change a setting: `read_config(folder, overrides)`.
        weight_dtype: "float8_e4m3fn": matrices that the checkpoint has in F8_E4M3 stay so in memory, with the scales of
            their blocks, and are multiplied from there; logits are the same. None: they are brought to `dtype`.
        progress: is told what is read, how many parameters of how many, as `models.progress.Progress`.

    Returns: the model.
    Raises: TypeError: a config that is none. FileNotFoundError: a file missing. ValueError: one that does not fit, or
        a method that does not, a weight_dtype that no tensor has; as `CheckpointError`: a tensor missing, left over,
        of another shape, cut short or corrupt, by name and file.
    """
    wanted = "a Config, as models.read_config(folder, overrides) gives"
    checks.instance("from_pretrained", "config", config, Config | None, wanted)
    folder = locate(folder)
    config = read_config(folder) if config is None else config
    reader = Reader(folder, config.weight_block_size, lambda name: is_skipped(name, config))
    _check_keys(reader, config)
    table = parameter_table(config)
    # Shapes alone: no parameter takes memory before it is read.
    options: Any = dict(method=method, dtype=dtype, weight_dtype=weight_dtype, mesh=mesh)
    model = nnx.eval_shape(lambda: Model(config, **options, rngs=nnx.Rngs(0)))
    if weight_dtype is not None and not any(map(reader.is_block_scaled, reader)):
        raise ValueError(f"from_pretrained: weight_dtype={weight_dtype!r}, but {folder} holds no F8_E4M3 tensor")
    model.folder = str(folder.absolute())  # the working directory may change
    graph, state = nnx.split(model)
    parameters, loaded = list(nnx.to_flat_state(state)), list[tuple[ParameterPath, Any]]()
    for path, parameter in parameters:
        if progress is not None:
            progress("reading parameters", len(loaded), len(parameters))
        loaded.append((path, parameter.replace(_load(reader, table[path], parameter, model.mesh))))
    if progress is not None:
        progress("reading parameters", len(loaded), len(parameters))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _check_keys(reader: Reader, config: Config) -> None:
    """Every tensor that is wanted is there in the right shape, and no other one is."""
    wanted: dict[str, tuple[int, ...]] = {}
    missing: list[str] = []
    for table in _tables(config):
        shapes = {key: source.shape for source in table.values() for key in source.keys}
        missing += [key for key in shapes if key not in reader]
        if len(missing) > _MOST_NAMED:  # a config of another model, maybe of very many layers
            break
        wanted |= shapes
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0]}{more} in {reader.folder}: missing")
    for key, shape in wanted.items():
        if reader.shape(key) != shape:
            raise CheckpointError(f"{reader.where(key)}: is {list(reader.shape(key))}, wanted {list(shape)}")
    for key in reader:
        base = key.removesuffix(SCALE_SUFFIX)
        is_scale = base != key and base in wanted and reader.entries[base].dtype == "F8_E4M3"
        if key not in wanted and not is_scale:
            raise CheckpointError(f"{reader.where(key)}: unexpected, no parameter of {config.model_type} has this name")


def is_skipped(key: str, config: Config) -> bool:
    """Whether a checkpoint's tensor is left out since the model has no parameter for it.

    Args:
        key: its name.
        config: of the model.

    Returns: True for layers after the last one (for multi-token prediction, or of a model that `num_hidden_layers`
        cuts short), for the indexers of layers that share a selection, for the head of a model that has its embeddings
        in its place, and for RoPE's frequencies, which old writers stored.
    """
    if key == "lm_head.weight":
        return config.tie_word_embeddings
    if key.endswith("rotary_emb.inv_freq"):
        return True
    match = _LAYER.match(key)
    if match is None:
        return False
    layer = int(match["layer"])
    if layer >= config.num_hidden_layers:
        return True
    return match["indexer"] is not None and config.indexer_kinds[layer] == "shared"


def _load(reader: Reader, source: Source, parameter: nnx.Variable, mesh: Mesh | None) -> jax.Array | BlockScaled:
    value, axes = parameter.get_value(), parameter.get_metadata("axes")

    def place(shape: tuple[int, ...], values: Values) -> jax.Array:
        parts: dict[str, np.ndarray] = {}

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            """A device's part. Devices with the same part share one copy in host memory."""
            index = (slice(None),) * len(shape) if index is None else index
            if str(index) not in parts:
                parts[str(index)] = _part(source, index, values)
            return parts[str(index)]

        if mesh is None:
            return jnp.asarray(read(None))
        return jax.make_array_from_callback(shape, sharding_of(mesh, shape, axes), read)

    weights = functools.partial(_values, reader, source.layout, value.dtype)
    if not isinstance(value, BlockScaled) or not all(map(reader.is_block_scaled, source.keys)):
        return place(value.shape, weights)
    runs = [size // n for size, n in zip(value.shape, value.scales.shape, strict=True)]
    one_of_each_run = tuple(slice(None, None, run) for run in runs[1 if source.is_stacked else 0 :])

    def kept(key: str, index: tuple[slice, ...]) -> np.ndarray:
        weights(key, index)  # raises for what is not finite
        return np.array(source.layout(reader.raw(key))[index], order="C")

    def scales(key: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.array(source.layout(reader.scales(key))[one_of_each_run][index], order="C")

    return dataclasses.replace(value, values=place(value.shape, kept), scales=place(value.scales.shape, scales))


def _part(source: Source, index: tuple[slice, ...], values: Values) -> np.ndarray:
    if not source.is_stacked:
        return values(source.keys[0], index)
    return np.stack([values(key, index[1:]) for key in source.keys[index[0]]])


def _values(reader: Reader, layout: Layout, dtype: np.dtype, key: str, index: tuple[slice, ...]) -> np.ndarray:
    # A copy even where nothing is converted: an array must not change with the file it was read from.
    with np.errstate(over="ignore"):  # refused below
        values = np.array(layout(reader.tensor(key))[index], dtype, order="C")
    if not np.isfinite(values).all():
        raise CheckpointError(f"{reader.where(key)}: holds numbers that are not finite: corrupt")
    return values
