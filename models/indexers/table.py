"""What the published indexers are made of: a row a model. A newer model is a new row.

Sizes are read by the names that config.json has for them, or by those of `SIZES`, which the rows share.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import hisa_jax as hj
from hisa_jax.models.json_object import shown

# Our name of a size -> the names that configs have for it; the first that is there counts. Ours comes last: in a config
# `head_dim` is the attention's.
SIZES = {
    "topk": ("index_topk",),
    "head_dim": ("index_head_dim", "indexer_head_dim", "sparse_index_dim"),
    "rope_dim": ("qk_rope_head_dim",),
    "eps": ("rms_norm_eps",),
    "pool": ("index_kpool", "indexer_compress_ratio", "compress_rate_csa"),
    "tail": ("index_kpool_always_select_tail",),
    "budget": ("indexer_budget",),
    "block_size": ("index_block_size", "sparse_block_size"),
    "blocks_kept": ("index_topk_blocks", "sparse_topk_blocks"),
    "local_blocks": ("index_local_blocks", "sparse_local_block"),
    "use_rope": (),
    "interleaved": ("indexer_rope_interleave",),
}
# Objects inside of a config that hold sizes, too: of models that see, and MiniMax-M3's.
_INNER = ("text_config", "sparse_attention_config")
_FLAGS = ("tail", "use_rope", "interleaved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What an indexer is made of.

    Attributes:
        title: the models that have it.
        published: its sizes there, in words.
        queries: what they are made of: "latents", the residual of the query's low-rank projection; "hidden" states;
            "normed", hidden states after a LayerNorm, with a scale by position and head after the projection.
        query_norm: of each head: "unit", RMSNorm by 1 + weight; None: none.
        key_norm: "layer" (LayerNorm), "unit", "rms"; of the pooled key where `pooled` says so.
        eps: of the norms, unless the sizes say it; `fixed_eps`: whatever they say.
        rope: which dims of a head turn, the "first", the "last" or None; and pairs of them: "halves" (i, i + n / 2),
            "neighbours" (2i, 2i + 1), which stay where they are, or "parted": neighbours, then all first ones and all
            second ones, as public code leaves them.
        pooled: how tokens become a key: None, one each; "gated", "windows" or "mean", see pieces.py.
        weighs: whether heads have weights; `weights_scaled`: whether D**-0.5 is in them, else it is beside them.
        tensors: our parameter -> the names that checkpoints have for it.
        method: sizes -> how it selects.
        note: where transformers does otherwise than the contract.
    """

    title: str
    published: str
    queries: Literal["latents", "hidden", "normed"] = "latents"
    query_norm: Literal["unit"] | None = None
    key_norm: Literal["layer", "unit", "rms"] = "layer"
    eps: float = 1e-6
    fixed_eps: bool = True
    rope: Literal["first", "last"] | None = "first"
    pairs: Literal["halves", "neighbours", "parted"] = "halves"
    pooled: Literal["gated", "windows", "mean"] | None = None
    weighs: bool = True
    weights_scaled: bool = False
    tensors: Mapping[str, tuple[str, ...]]
    method: Callable[[Mapping[str, Any]], hj.Method]
    note: str = ""


def sizes_of(model_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Our names -> the sizes that are given, by ours or a config's. Raises ValueError: one of a wrong value.

    Other keys say other things of the model, and are not read.
    """
    objects = [given]
    for name in _INNER:
        objects += [inner for each in objects if isinstance(inner := each.get(name), Mapping)]
    found = {}
    for name, others in SIZES.items():
        for key, values in ((key, values) for key in (*others, name) for values in objects):
            if values.get(key) is not None:
                found[name] = _size(model_type, name, key, values[key])
                break
    if "pool" not in found and (pool := _pool_of_layers(objects)) is not None:
        found["pool"] = _size(model_type, "pool", "compress_rates", pool)
    if "rope_dim" not in found and (turned := _turned_dims(objects)) is not None:
        found["rope_dim"] = turned
    return found


def _size(model_type: str, name: str, key: str, value: Any) -> int | float:
    """A size that a key has. Raises ValueError: of a wrong value."""
    if name in _FLAGS:
        fits, wanted = isinstance(value, bool | int) and value in (0, 1), "true or false"
    elif name == "eps":
        fits, wanted = isinstance(value, int | float) and 0 < value < 1, "a number between 0 and 1"
    else:
        least = 0 if name in ("local_blocks", "rope_dim") else 1
        fits, wanted = isinstance(value, int) and not isinstance(value, bool) and value >= least, f"an int from {least}"
    if not fits:
        raise ValueError(f"from_weights: {model_type}: {key} is {shown(value)}, wanted {wanted}")
    return value


def _turned_dims(objects: list[Mapping[str, Any]]) -> int | None:
    """How many dims turn where configs say which part of the attention's heads does; None: they do not."""
    for values in objects:
        ropes = values.get("rope_parameters"), values
        shares = [rope.get("partial_rotary_factor") for rope in ropes if isinstance(rope, Mapping)]
        share, head_dim = next((share for share in shares if share is not None), None), values.get("head_dim")
        if isinstance(share, int | float) and isinstance(head_dim, int):
            return int(head_dim * share)
    return None


def _pool_of_layers(objects: list[Mapping[str, Any]]) -> Any:
    """How many tokens DeepSeek-V4 pools where it has an indexer, as its configs say it; None: they do not."""
    for values in objects:
        rates, ratios = values.get("compress_rates"), values.get("compress_ratios")
        if isinstance(rates, Mapping) and "compressed_sparse_attention" in rates:
            return rates["compressed_sparse_attention"]
        if isinstance(ratios, list | tuple) and 4 in ratios:  # of each layer: 4 with an indexer, 128 or 0 without
            return 4
    return None


def demand(model_type: str, sizes: Mapping[str, Any], *names: str) -> list[int]:
    """Some of the sizes. Raises ValueError: one is missing."""
    for name in names:
        if name not in sizes:
            raise ValueError(f"from_weights: {model_type}: sizes lack {' or '.join((name, *SIZES[name]))}")
    return [sizes[name] for name in names]


def _tokens(model_type: str) -> Callable[[Mapping[str, Any]], hj.Method]:
    def method(sizes: Mapping[str, Any]) -> hj.Method:
        (topk,) = demand(model_type, sizes, "topk")
        return hj.Dsa(topk=topk)

    return method


def _pools(sizes: Mapping[str, Any]) -> hj.Method:
    topk, pool = demand("glm5_next", sizes, "topk", "pool")
    return _of_pools(topk // pool, pool, bool(sizes.get("tail", True)))


def _means(sizes: Mapping[str, Any]) -> hj.Method:
    (pool,) = demand("qwen4_exp", sizes, "pool")
    if "blocks_kept" in sizes:
        return _of_pools(sizes["blocks_kept"], pool, True)
    (budget,) = demand("qwen4_exp", sizes, "budget")
    return _of_pools(budget // pool, pool, True)


def _of_pools(topk: int, pool: int, tail: bool) -> hj.Method:
    return hj.Dsa(topk=topk, entry_size=pool, tail="open" if tail and pool > 1 else None)


def _windows(sizes: Mapping[str, Any]) -> hj.Method:
    topk, pool = demand("deepseek_v4", sizes, "topk", "pool")
    return hj.Dsa(topk=topk, entry_size=pool, returns="entries" if pool > 1 else "tokens")


def _blocks(sizes: Mapping[str, Any]) -> hj.Method:
    block_size, kept = demand("minimax_m3", sizes, "block_size", "blocks_kept")
    return hj.BlockSparse(
        topk=block_size * kept, block_size=block_size, keep_first=0, keep_last=sizes.get("local_blocks", 1),
        scored_by="max", activation=None, per_head=True,
    )  # fmt: skip


_LIGHTNING = {
    "wq": ("wq_b.weight",),
    "wk": ("wk.weight",),
    "k_norm": ("k_norm.weight",),
    "k_norm_bias": ("k_norm.bias",),
    "w": ("weights_proj.weight",),
}


def _lightning(model_type: str, title: str, published: str, **others: Any) -> Family:
    """DeepSeek-V3.2's indexer, and what others changed of it."""
    return Family(title=title, published=published, tensors=_LIGHTNING, method=_tokens(model_type), **others)


FAMILIES: dict[str, Family] = {
    "deepseek_v32": _lightning("deepseek_v32", "DeepSeek-V3.2", "64 heads of 128, 2048 tokens"),
    "glm_moe_dsa": _lightning("glm_moe_dsa", "GLM-5, 5.1 and 5.2", "32 heads of 128, 2048 tokens", pairs="parted"),
    "axk2": _lightning("axk2", "A.X-K2", "16 heads of 128, 2048 tokens"),
    "dots3_note": _lightning("dots3_note", "dots3-note", "64 heads of 128, 2048 tokens", pairs="parted"),
    "hy_v4": _lightning(
        "hy_v4",
        "HunYuan V4",
        "16 heads of 128, 2048 tokens",
        rope="last",
        eps=1e-5,
        fixed_eps=False,
        weights_scaled=True,
    ),
    "mistral_large4": dataclasses.replace(
        _lightning(
            "mistral_large4", "Mistral Large 4", "32 heads of 128, 2048 tokens", queries="normed", pairs="parted"
        ),
        tensors=_LIGHTNING
        | {
            "q_input_norm": ("q_input_norm.weight",),
            "q_input_norm_bias": ("q_input_norm.bias",),
            "q_scale": ("softmax_scaling.scale", "ssmax_scaling.s"),
            "q_bias": ("softmax_scaling.bias", "ssmax_scaling.b"),
        },
        note="layers whose `no_rope_layers` is 0 have no RoPE: sizes with use_rope=0.",
    ),
    "glm5_next": Family(
        title="GLM-5.3-Flash",
        published="32 heads of 128, 2048 tokens in pools of 4",
        rope=None,
        pooled="gated",
        tensors=_LIGHTNING | {"ape": ("index_kpool_compress_ape",), "gate": ("index_kpool_compress_gate",)},
        method=_pools,
        note="there the tail has a fixed place at the end of a list, so that -1 may stand before it.",
    ),
    "deepseek_v4": Family(
        title="DeepSeek-V4 (compressed sparse attention)",
        published="64 heads of 128, 512 windows of 4 tokens",
        key_norm="rms",
        fixed_eps=False,
        rope="last",
        pairs="neighbours",
        pooled="windows",
        tensors={
            "wq": ("wq_b.weight", "q_b_proj.weight"),
            "wk": ("compressor.wkv.weight", "kv_proj.weight"),
            "gate": ("compressor.wgate.weight", "gate_proj.weight"),
            "ape": ("compressor.ape", "position_bias"),
            "k_norm": ("compressor.norm.weight", "kv_norm.weight"),
            "w": ("weights_proj.weight", "scorer.weights_proj.weight"),
        },
        method=_windows,
        note="`cos` and `sin` are those of the compressed layers, whose theta is their own.",
    ),
    "qwen4_exp": Family(
        title="Qwen4 (QSA)",
        published="4 heads of 128, 2048 tokens in pools of 4",
        queries="hidden",
        query_norm="unit",
        key_norm="unit",
        fixed_eps=False,
        pooled="mean",
        weighs=False,
        tensors={
            "wqk": ("index_qk_proj.weight",),
            "q_norm": ("q_layernorm.weight",),
            "k_norm": ("k_layernorm.weight",),
        },
        method=_means,
    ),
    "minimax_m3": Family(
        title="MiniMax-M3",
        published="4 heads of 128, one a group of key heads, 16 blocks of 128",
        queries="hidden",
        query_norm="unit",
        key_norm="unit",
        fixed_eps=False,
        weighs=False,
        tensors={
            "wq": ("q_proj.weight", "index_q_proj.weight"),
            "wk": ("k_proj.weight", "index_k_proj.weight"),
            "q_norm": ("q_norm.weight", "index_q_norm.weight"),
            "k_norm": ("k_norm.weight", "index_k_norm.weight"),
        },
        method=_blocks,
        note="there blocks are anchored at slots, so that padding on the left moves them; here they begin with the "
        "sequence. Lists there are [B, H, T, m], the best block first; here `blocks` are [B, T, H, m] and ascend.",
    ),
}
# Names that configs have for the same indexer.
ALIASES = {
    "minimax_m3_vl": "minimax_m3", "minimax_m3_vl_text": "minimax_m3", "dots3_note_text": "dots3_note",
    "glm5_next_text": "glm5_next", "qwen4_exp_text": "qwen4_exp", "mistral_large4_text": "mistral_large4",
    "hy_v4_vl": "hy_v4", "hy_v4_vl_text": "hy_v4",
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """The row of a model type. Raises ValueError: there is none."""
    name = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"from_weights: model_type is {shown(model_type)}, wanted one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
