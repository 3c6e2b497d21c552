"""What a checkpoint's config.json says, as one frozen value: the only thing in which the model families differ."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import hisa_jax as hj
from hisa_jax.models import settings
from hisa_jax.models.generation_config import read_stop_ids
from hisa_jax.models.json_object import read_object, shown
from hisa_jax.models.overrides import Overrides, parse_overrides, with_overrides

LayerKind = Literal["dense", "sparse"]
IndexerKind = Literal["full", "shared"]

# Which families rotate the indexer's dims in neighbouring pairs; the key `indexer_rope_interleave` overrides it.
_FAMILIES = {"deepseek_v32": False, "glm_moe_dsa": True}

_LARGEST_FILE = 4 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), under the names of config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _demand_rules(self, settings.ROPE)

    @property
    def rope_scale(self) -> float:
        """Multiplier of cos and sin; 1 where mscale equals mscale_all_dim, as published."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_scale(self) -> float:
        """Multiplier of the attention's softmax scale."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters of a DSA model. Names are those of config.json; what it leaves out has the default given here.

    Attributes:
        layer_kinds: one of "dense", "sparse" (mixture of experts) for each layer.
        indexer_kinds: one of "full", "shared" (reuses the selection of the last full layer) for each layer.
        rope_interleave, indexer_rope_interleave: whether RoPE turns dims (2i, 2i + 1) or (i, i + d / 2).
        yarn: context extension, or None for plain RoPE.
        lora_norm_eps: eps of the norms of the query and key-value latents. Published code has 1e-6 here whatever
            `rms_norm_eps` says; some servers pass `rms_norm_eps` instead.
        index_norm_eps: eps of the LayerNorm of the index keys.
        index_key_dtype: "float8_e4m3fn" or "int8" quantises index queries and keys, None leaves them as they are.
        index_key_scale: "ue8m0" rounds their scales up to powers of two, "float32" does not.
        index_hadamard: whether index queries and keys are rotated by a Hadamard matrix, which spreads outliers before
            they are quantised and changes nothing else.
        latent_dtype: "float8_e4m3fn" keeps the cache's latents in 8 bits, rope keys in bfloat16 (`QuantizedLatents`);
            None keeps them as they are.
        weight_block_size: rows and columns that share a scale in block-scaled F8_E4M3 weights.
        use_hisa: whether the checkpoint's own method is HISA, as servers are told it; else it is the flat indexer.
        hisa_k_block_size, hisa_block_topk: HISA's tokens a block and blocks kept, its `block_size` and `block_topk`.
        num_nextn_predict_layers: multi-token-prediction layers after the last one, left out; None if unsaid.
        eos_token_ids: what ends a generated row, unless its caller says otherwise.

    Raises: ValueError: values of another type or out of range (`settings.py` has the table), sizes that do not fit
        together, settings that are not built.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    layer_kinds: tuple[LayerKind, ...]
    indexer_kinds: tuple[IndexerKind, ...]
    yarn: Yarn | None = None
    norm_topk_prob: bool = True
    rope_interleave: bool = True
    indexer_rope_interleave: bool = False
    tie_word_embeddings: bool = False
    lora_norm_eps: float = 1e-6
    index_norm_eps: float = 1e-6
    index_key_dtype: Literal["float8_e4m3fn", "int8"] | None = None
    index_key_scale: Literal["float32", "ue8m0"] = "float32"
    index_hadamard: bool = False
    latent_dtype: Literal["float8_e4m3fn"] | None = None
    use_hisa: bool = False
    hisa_k_block_size: int = 128
    hisa_block_topk: int = 64
    weight_block_size: tuple[int, int] = (128, 128)
    num_nextn_predict_layers: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def demand(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise ValueError(f"Config({name}={shown(getattr(self, name))}): must be {wanted}")

        _demand_built(self.model_type, "Config")
        _demand_rules(self, settings.FIELDS)
        demand(self.yarn is None or isinstance(self.yarn, Yarn), "yarn", "a Yarn or None")

        layers, dim = self.num_hidden_layers, self.index_head_dim
        demand(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even, since RoPE turns pairs")
        demand(dim >= self.qk_rope_head_dim, "index_head_dim", f"at least qk_rope_head_dim = {self.qk_rope_head_dim}")
        demand(len(self.layer_kinds) == layers, "layer_kinds", f"num_hidden_layers = {layers} entries")
        demand(len(self.indexer_kinds) == layers, "indexer_kinds", f"num_hidden_layers = {layers} entries")
        demand(self.indexer_kinds[0] == "full", "indexer_kinds", "'full' at layer 0: there is nothing to share yet")
        demand(self.n_routed_experts % self.n_group == 0, "n_group", f"a divisor of {self.n_routed_experts} experts")
        demand(1 <= self.topk_group <= self.n_group, "topk_group", f"from 1 to n_group = {self.n_group}")
        room = self.topk_group * self.n_routed_experts // self.n_group
        demand(self.num_experts_per_tok <= room, "num_experts_per_tok", f"at most the {room} experts in kept groups")
        demand(not self.index_hadamard or dim & (dim - 1) == 0, "index_hadamard", "False unless index_head_dim is 2^n")
        whole_groups = self.kv_lora_rank < 128 or self.kv_lora_rank % 128 == 0
        demand(self.latent_dtype is None or whole_groups, "latent_dtype", "None unless 128 divides kv_lora_rank")
        if self.use_hisa:
            kept, size = self.hisa_block_topk, self.hisa_k_block_size
            demand(kept >= 2, "hisa_block_topk", "at least 2: the first block and the query's own are always kept")
            least = f"at least {-(-self.index_topk // size)}: kept blocks of {size} hold index_topk = {self.index_topk}"
            demand(kept * size >= self.index_topk, "hisa_block_topk", f"{least} tokens")
        are_tokens = all(type(id) is int and 0 <= id < self.vocab_size for id in self.eos_token_ids)
        demand(are_tokens, "eos_token_ids", f"tokens from 0 to {self.vocab_size - 1}")

    @property
    def qk_head_dim(self) -> int:
        """Dims of an attention query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by before the softmax."""
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)

    @property
    def method(self) -> hj.Dsa | hj.Hisa:
        """The checkpoint's own: the flat indexer, or HISA if it says so."""
        if not self.use_hisa:
            return hj.Dsa(topk=self.index_topk)
        return hj.Hisa(topk=self.index_topk, block_size=self.hisa_k_block_size, block_topk=self.hisa_block_topk)


def read_config(folder: str | Path, overrides: Overrides | None = None) -> Config:
    """Reads a checkpoint's config.json, and the stop tokens of its generation_config.json if it has one.

    Args:
        folder: where the checkpoint lies.
        overrides: settings in the place of the file's, a mapping, JSON as a str, or a file's `Path`; as servers take
            them: '{"use_hisa": true, "hisa_k_block_size": 128, "hisa_block_topk": 64}'. null takes a setting away. One
            that says which layers share a selection (`index_topk_freq`, `index_topk_pattern`, `indexer_types`) replaces
            all that the file says of it.

    Returns: its `Config`.
    Raises: FileNotFoundError: no config.json, no file of overrides. TypeError: overrides of another type. ValueError:
        not JSON, a key twice, an override that is no setting; as `config_from_keys`.
    """
    given = {} if overrides is None else parse_overrides(overrides)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"read_config: folder is {folder}, wanted a folder with a config.json")
    keys = with_overrides(read_object(path, _LARGEST_FILE), given)
    config = config_from_keys(keys, f"{path} with overrides" if given else str(path))
    stop_ids = None if "eos_token_id" in given else read_stop_ids(folder, config.vocab_size)
    return config if stop_ids is None else dataclasses.replace(config, eos_token_ids=stop_ids)


def _demand_built(model_type: Any, source: str) -> None:
    """Raises ValueError for a model of which the indexer is built alone, and says which module that is."""
    # Its package imports this file.
    from hisa_jax.models.indexers.table import ALIASES, FAMILIES

    name = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else None
    if name in FAMILIES and name not in _FAMILIES:
        built = ", ".join(_FAMILIES)
        raise ValueError(
            f"{source}: model_type is {model_type!r}, wanted one of {built}: of {FAMILIES[name].title} its indexer is "
            f"built alone, models.indexers.from_weights('{name}', sizes, weights)"
        )


def config_from_keys(keys: Mapping[str, Any], source: str = "config") -> Config:
    """Makes a `Config` of the keys of a config.json, in the style of published ones or of the transformers package.

    Args:
        keys: the object in config.json. Keys that do not bear on the forward pass are ignored, null counts as absent.
        source: what error messages call it.

    Returns: the `Config`.
    Raises: ValueError: a key missing or of a value that `settings.py` does not have it take, sizes that do not fit
        together, a setting that is not built.
    """
    _demand_built(keys.get("model_type"), source)
    values = settings.present(keys, settings.SETTINGS, source)
    if "model_type" not in values:
        raise ValueError(f"{source}: lacks model_type")
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in values.items() if name in names}
    given.setdefault("indexer_rope_interleave", _FAMILIES[given["model_type"]])
    quantization = settings.present(
        values.get("quantization_config", {}), settings.QUANTIZATION, f"{source}: quantization_config"
    )
    if "weight_block_size" in quantization:
        given["weight_block_size"] = tuple(quantization["weight_block_size"])
    if quantization.get("scale_fmt") == "ue8m0":
        given["index_key_scale"] = "ue8m0"
    # One token or several.
    eos = values.get("eos_token_id", ())
    given["eos_token_ids"] = (eos,) if isinstance(eos, int) else tuple(eos)
    given |= _rope(values, source)
    if "num_hidden_layers" in given:
        given["layer_kinds"] = _layer_kinds(values, given["num_hidden_layers"], source)
        given["indexer_kinds"] = _indexer_kinds(values, given["num_hidden_layers"], source)
    missing = [
        field.name
        for field in dataclasses.fields(Config)
        if field.default is dataclasses.MISSING and field.name not in given
    ]
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing)}")
    try:
        return Config(**given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _demand_rules(value: Any, rules: Mapping[str, settings.Rule]) -> None:
    """Each field of a dataclass is what its rule wants, or None where that is its default."""
    for field in dataclasses.fields(value):
        rule, given = rules.get(field.name), getattr(value, field.name)
        if rule is not None and not rule.holds(given) and (given is not None or field.default is not None):
            raise ValueError(f"{type(value).__name__}({field.name}={shown(given)}): must be {rule.wanted}")


def _rope(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Theta and YaRN from either `rope_parameters` or `rope_theta` with `rope_scaling`."""
    # The transformers package writes `rope_parameters`, which then has theta, too.
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= settings.present(values.get(name, {}), settings.ROPE, f"{source}: {name}")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    given = {} if theta is None else {"rope_theta": theta}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return given
    named = {field.name: rope[field.name] for field in dataclasses.fields(Yarn) if field.name in rope}
    if "max_position_embeddings" in values:
        named.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    for needed in ("factor", "original_max_position_embeddings"):
        if needed not in named:
            raise ValueError(f"{source}: rope type is 'yarn', but it lacks {needed}")
    return given | {"yarn": Yarn(**named)}


def _layer_kinds(values: Mapping[str, Any], layers: int, source: str) -> tuple[LayerKind, ...]:
    """From a list, else the number of dense layers."""
    if "mlp_layer_types" in values:
        return _first(values, "mlp_layer_types", layers, source)
    dense = values.get("first_k_dense_replace", 0)
    return tuple("dense" if i < dense else "sparse" for i in range(layers))


def _indexer_kinds(values: Mapping[str, Any], layers: int, source: str) -> tuple[IndexerKind, ...]:
    """From a list, else a pattern such as "FFSSF", else by frequency and offset."""
    if "indexer_types" in values:
        return _first(values, "indexer_types", layers, source)
    if "index_topk_pattern" in values:
        letters = _first(values, "index_topk_pattern", layers, source)
        return tuple("full" if letter == "F" else "shared" for letter in letters)
    return indexer_kinds(layers, values.get("index_topk_freq", 1), values.get("index_skip_topk_offset", 2))


def _first(values: Mapping[str, Any], name: str, layers: int, source: str) -> tuple:
    """Those of the layers there are: a model that `num_hidden_layers` cuts short keeps its longer lists."""
    if len(values[name]) < layers:
        raise ValueError(
            f"{source}: {name} is {shown(values[name])}, wanted an entry for each of num_hidden_layers = {layers}"
        )
    return tuple(values[name][:layers])


def indexer_kinds(layers: int, frequency: int, offset: int) -> tuple[IndexerKind, ...]:
    """GLM-5.2's rule: full in the first `offset` layers, then in every `frequency`-th, counted from the last of them.

    Args:
        layers: how many layers there are.
        frequency: `index_topk_freq`.
        offset: `index_skip_topk_offset`.

    Returns: "full" or "shared" for each layer.
    """
    return tuple("full" if max(i - offset + 1, 0) % frequency == 0 else "shared" for i in range(layers))
