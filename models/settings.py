"""What every key of a config.json may be: one table, checked in one place before anything is made of the values.

A key whose value is null is absent, whichever it is. Ranges keep what is made of a number small until it has been
compared with the tensors that are there; published models are far inside of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from hisa_jax.models.json_object import shown


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
        wanted: in words.
        holds: whether a value is that.
    """

    wanted: str
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    """An int from low to high: neither 48.0 nor true."""
    return Rule(f"an integer from {low} to {high}", lambda x: type(x) is int and low <= x <= high)


def number(low: float, high: float) -> Rule:
    """A finite number from low to high, an int too."""
    return Rule(
        f"a number from {low:g} to {high:g}",
        lambda x: type(x) in (int, float) and (type(x) is int or math.isfinite(x)) and low <= x <= high,
    )


def one_of(*choices: str) -> Rule:
    """One of some strings."""
    return Rule(f"one of {', '.join(choices)}", lambda x: isinstance(x, str) and x in choices)


def only(value: Any) -> Rule:
    """A setting of which one value is built: another would load and compute something different in silence."""
    return Rule(f"{value!r}: no other is built", lambda x: type(x) is type(value) and x == value)


def list_of(rule: Rule, length: int | None = None) -> Rule:
    """A list, or tuple, of values of one rule."""
    return Rule(
        f"a list of {'' if length is None else f'{length} values, each '}{rule.wanted}",
        lambda x: isinstance(x, list | tuple) and length in (None, len(x)) and all(map(rule.holds, x)),
    )


def either(first: Rule, second: Rule) -> Rule:
    """What either of two rules takes."""
    return Rule(f"{first.wanted}, or {second.wanted}", lambda x: first.holds(x) or second.holds(x))


FLAG = Rule("true or false", lambda x: isinstance(x, bool))
OBJECT = Rule("an object", lambda x: isinstance(x, Mapping))
INT32 = 2**31 - 1
_SIZE, _EPS = integer(1, 2**24), number(1e-20, 1.0)
_THETA = number(1.001, 1e15)
_COUNT = integer(0, 4096)
_LETTERS = list_of(one_of("F", "S"))

# Keys of the object itself. Those with the name of a field of `Config` bound that field, too.
SETTINGS = {
    "model_type": one_of("deepseek_v32", "glm_moe_dsa"),
    "vocab_size": integer(1, INT32),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "moe_intermediate_size": _SIZE,
    "num_hidden_layers": integer(1, 4096),
    "num_attention_heads": _SIZE,
    "q_lora_rank": _SIZE,
    "kv_lora_rank": _SIZE,
    "qk_nope_head_dim": _SIZE,
    "qk_rope_head_dim": integer(2, 2**16),
    "v_head_dim": _SIZE,
    "index_n_heads": _SIZE,
    "index_head_dim": _SIZE,
    "index_topk": integer(1, 2**20),
    "n_routed_experts": integer(1, 2**16),
    "n_shared_experts": integer(1, 2**10),
    "num_experts_per_tok": integer(1, 2**16),
    "n_group": integer(1, 2**16),
    "topk_group": integer(1, 2**16),
    "routed_scaling_factor": number(1e-6, 1e6),
    "rms_norm_eps": _EPS,
    "rope_theta": _THETA,
    "max_position_embeddings": integer(1, INT32),
    "norm_topk_prob": FLAG,
    "rope_interleave": FLAG,
    "indexer_rope_interleave": FLAG,
    "tie_word_embeddings": FLAG,
    "lora_norm_eps": _EPS,
    "index_norm_eps": _EPS,
    "index_key_dtype": one_of("float8_e4m3fn", "int8"),
    "latent_dtype": one_of("float8_e4m3fn"),
    "index_key_scale": one_of("float32", "ue8m0"),
    "index_hadamard": FLAG,
    "use_hisa": FLAG,
    "hisa_k_block_size": integer(1, 2**20),
    "hisa_block_topk": integer(1, 2**20),
    "num_nextn_predict_layers": _COUNT,
    # Of which `Config` has something else made.
    "mlp_layer_types": list_of(one_of("dense", "sparse")),
    "first_k_dense_replace": _COUNT,
    "indexer_types": list_of(one_of("full", "shared")),
    "index_topk_pattern": either(
        Rule("letters F (full) or S (shared)", lambda x: isinstance(x, str) and set(x) <= {*"FS"}), _LETTERS
    ),
    "index_topk_freq": integer(1, 4096),
    "index_skip_topk_offset": _COUNT,
    "eos_token_id": either(integer(0, INT32), list_of(integer(0, INT32))),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "quantization_config": OBJECT,
    # Of which one value is built.
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "scoring_func": only("sigmoid"),
    "topk_method": only("noaux_tc"),
    "moe_layer_freq": only(1),
}

# Keys of `rope_scaling` and `rope_parameters`.
ROPE = {
    "rope_type": one_of("default", "yarn"),
    "type": one_of("default", "yarn"),
    "rope_theta": _THETA,
    "factor": number(1.0, 1e6),
    "original_max_position_embeddings": integer(1, 2**24),
    "beta_fast": number(1e-6, 1e6),
    "beta_slow": number(1e-6, 1e6),
    "mscale": number(0.0, 1e3),
    "mscale_all_dim": number(0.0, 1e3),
    "attention_factor": number(1e-6, 1e6),
    "truncate": FLAG,
}

QUANTIZATION = {
    "quant_method": only("fp8"),
    "fmt": only("e4m3"),
    "weight_block_size": list_of(_SIZE, 2),
    "scale_fmt": one_of("float32", "ue8m0"),
}

# Fields of `Config` that no key has the name of.
FIELDS = SETTINGS | {
    "layer_kinds": SETTINGS["mlp_layer_types"],
    "indexer_kinds": SETTINGS["indexer_types"],
    "weight_block_size": QUANTIZATION["weight_block_size"],
    "eos_token_ids": list_of(integer(0, INT32)),
}


def present(keys: Mapping[str, Any], rules: Mapping[str, Rule], source: str) -> dict[str, Any]:
    """The keys that have a rule and are not null, each checked.

    Args:
        keys: of a file.
        rules: by key.
        source: what error messages call the file, and where in it the keys stand.

    Returns: their values.
    Raises: ValueError: a value that its rule does not take.
    """
    found = {name: keys[name] for name in rules if keys.get(name) is not None}
    for name, value in found.items():
        if not rules[name].holds(value):
            raise ValueError(f"{source}: {name} is {shown(value)}, wanted {rules[name].wanted}")
    return found
