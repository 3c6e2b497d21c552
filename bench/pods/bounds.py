"""What a step may exchange, from the model's sizes, and what is wrong with one that was compiled."""

from collections.abc import Sequence

from bench.pods.hlo import Collective
from bench.pods.rows import Row
from hisa_jax import models

_SLACK = 1.25
KERNELS = ("hisa_block_filter", "hisa_refine", "sparse_mla")


def most_moved_bytes(row: Row, config: models.Config) -> float:
    """That a device may send in a step: new tokens and what they chose, never weights or what the cache holds."""
    E, L, R = config.hidden_size, config.kv_lora_rank, config.qk_rope_head_dim
    n_all, n_pages, n_data = row.model_axis * row.context_axis, row.context_axis, row.data
    T = row.tokens // row.data  # of a group
    N = config.num_attention_heads // row.model_axis

    def gathered(n: int, size: int) -> float:
        return size * (n - 1) / n

    # Between attention and experts: two sums of hidden states, a query's latent (twice), its index queries.
    layer = 2 * gathered(n_all, 2 * 2 * T * E)
    layer += gathered(n_all, 2 * T * (2 * config.q_lora_rank + config.index_n_heads * config.index_head_dim))
    # What was selected: sort key and position of each candidate and what is kept of them, blocks likewise; on ranks
    # that share queries the selection.
    chosen = config.index_topk + row.method.block_topk
    layer += gathered(n_pages, 3 * 4 * T // row.model_axis * chosen) + gathered(row.model_axis, 4 * T * chosen)
    # Queries of all heads to the devices with the pages, and a sum of values a query and head back, a weight with it.
    layer += gathered(n_pages, 2 * T * N * (L + R)) + 2 * gathered(n_pages, 4 * T * N * (L + 2))
    # All new tokens to the experts, and their sums back. The compiler cuts a sum in pieces of eight tokens, so where a
    # group's are no multiple of that it is added up on all devices.
    sums = 1 if T % 8 == 0 else 2
    experts = gathered(n_data, row.tokens * (2 * E + 8 * config.num_experts_per_tok + sums * 4 * E))
    experts += 2 * gathered(n_all, 4 * T * E)
    n_sparse = config.layer_kinds.count("sparse")
    outer = 2 * gathered(n_all, 2 * T * E) + 64 * row.tokens
    return _SLACK * (config.num_hidden_layers * layer + n_sparse * experts + outer)


def problems(
    row: Row, config: models.Config, found: Sequence[Collective], kernels: set[str], used_bytes: float, hbm_bytes: int
) -> list[str]:
    """Sentences, none where all is well.

    Args:
        found: the step's exchanges.
        kernels: names of those it calls.
        used_bytes: of a device's memory, of `hbm_bytes`.
    """
    said = []
    if used_bytes > hbm_bytes:
        said.append(f"takes {used_bytes / (1 << 30):.1f} GiB of a device's {hbm_bytes / (1 << 30):.0f}")
    wanted = {*KERNELS, *(["hisa_merge"] if row.context_axis > 1 else [])}
    if lacking := wanted - kernels:
        said.append(f"does not call {', '.join(sorted(lacking))}")
    moved, most = sum(x.moved_bytes for x in found), most_moved_bytes(row, config)
    if moved > most:
        said.append(f"a device sends {moved / 1e6:.0f} MB a step, wanted at most {most / 1e6:.0f}")
    # One layer's latents of one request on one device, or one expert's matrix, would be larger than these.
    T, N = row.tokens // row.data, config.num_attention_heads // row.model_axis
    widest = max(row.tokens * config.hidden_size, T * N * (config.kv_lora_rank + config.qk_rope_head_dim))
    said += [f"{x.kind} of {x.elements} {x.dtype}, wanted at most {widest}" for x in found if x.elements > widest]
    return said
