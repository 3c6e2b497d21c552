"""A small server: a model of random weights, its engine, and requests that begin alike."""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.engine import Draft, Engine, lookup

METHOD = hj.Hisa(topk=24, block_size=16, block_topk=4)
METHODS: dict[str, hj.Method] = {
    "hisa": METHOD,
    "scan": hj.Scan(topk=METHOD.topk, candidates=48, exact_heads=1, unit=2),
}
CONFIG = models.Config(
    model_type="glm_moe_dsa", vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
    num_hidden_layers=3, num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, index_n_heads=4, index_head_dim=32, index_topk=METHOD.topk, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, rms_norm_eps=1e-6,
    rope_theta=10000.0, max_position_embeddings=4096, layer_kinds=("dense", "sparse", "dense"),
    indexer_kinds=("full", "shared", "full"), index_hadamard=True,
)  # fmt: skip
_PREFIXES, _PREFIX_TOKENS, _OWN_TOKENS, _NEW_TOKENS = 6, (24, 120), (4, 24), (6, 24)
_MAX_LENGTH, _CHUNK = 176, 32


def make_engine(
    seed: int, keys: str, rows: int, n_pages: int, n_draft: int, *, trace: bool, method: hj.Method = METHOD,
    mesh: Mesh | None = None,
) -> Engine:  # fmt: skip
    """`rows` and `n_pages` are those of each group of the mesh's devices."""
    config = CONFIG if keys == "float32" else dataclasses.replace(CONFIG, index_key_dtype=cast(Any, keys))
    model = models.from_config(config, rngs=nnx.Rngs(seed), method=method, dtype=jnp.float32, mesh=mesh)
    draft, n_groups = lookup if n_draft else None, 1 if mesh is None else mesh.shape["data"]
    sizes: Any = dict(n_pages=n_pages * n_groups, rows=rows * n_groups, max_length=_MAX_LENGTH, chunk=_CHUNK)
    sizes |= dict(prefill_rows=2 * n_groups)
    return Engine(model, **sizes, draft=draft, n_draft=n_draft, trace=trace)


def small_server(seed: int) -> tuple[Callable[..., Engine], list[list[int]], int]:
    """What to inject faults into: engines with few pages, prompts of even tokens, new tokens of each."""
    model = models.from_config(CONFIG, rngs=nnx.Rngs(seed), method=METHOD, dtype=jnp.float32)
    sizes: dict[str, Any] = dict(n_pages=14, rows=4, max_length=_MAX_LENGTH, chunk=16, n_draft=3)

    def make(model: models.Model = model, draft: Draft = lookup) -> Engine:
        return Engine(model, draft=draft, **sizes)

    # Short prompts that begin alike, so that 14 pages hold a few and not all of them.
    prompts = [prompt[:28] + prompt[-8:] for prompt, _ in traffic(8, seed)]
    return make, [[token // 2 * 2 for token in prompt] for prompt in prompts], 8


def traffic(n_requests: int, seed: int) -> deque[tuple[list[int], int]]:
    """(prompt, new tokens) of each request; prompts begin with one of a few prefixes, cut anywhere."""
    rng = np.random.default_rng(seed)

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return rng.integers(0, CONFIG.vocab_size, rng.integers(*bounds, endpoint=True)).tolist()

    prefixes = [tokens(_PREFIX_TOKENS) for _ in range(_PREFIXES)]
    requests: deque[tuple[list[int], int]] = deque()
    for _ in range(n_requests):
        prefix = prefixes[rng.integers(_PREFIXES)]
        shared = prefix[: rng.integers(len(prefix) // 2, len(prefix), endpoint=True)]
        requests.append((shared + tokens(_OWN_TOKENS), int(rng.integers(*_NEW_TOKENS, endpoint=True))))
    return requests
