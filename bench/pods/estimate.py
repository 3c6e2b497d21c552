"""How long a step may take: an estimate from rates that are published and the compiler's schedule; nothing was run.

Four parts, added up as if none overlapped: the weights (read from memory once, or multiplied with, whichever takes
longer), the selection likewise, the attention's kernel by its schedule, and what is exchanged at the rate of all links.
Latencies, of which decoding has many, are in none of them.
"""

import dataclasses
from collections.abc import Sequence

from bench import shapes
from bench.pods.hlo import Collective
from bench.pods.rows import Row
from bench.pods.step import Step
from bench.tpu import cost
from bench.tpu.chips import CHIPS, Chip
from hisa_jax import models

_FEW = 256  # tokens up to which an expert multiplies all of them, as models/moe.py does
_STEP = 1024  # tokens that the attention's kernel takes at a time


def estimate_ms(row: Row, config: models.Config, step: Step, found: Sequence[Collective]) -> dict[str, float]:
    """Milliseconds of each part."""
    chip = CHIPS[row.chip]
    seconds = {
        "weights": _weights(row, config, step, chip),
        "selection": _selection(row, config, chip),
        "attention": _attention(row, config, step, chip),
        "exchange": sum(x.moved_bytes for x in found) / chip.ici_bytes_per_s,
    }
    return {name: 1e3 * x for name, x in seconds.items()}


def _weights(row: Row, config: models.Config, step: Step, chip: Chip) -> float:
    X, n_sparse = config.n_routed_experts, config.layer_kinds.count("sparse")
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    itemsize = 1 if row.weights == "e4m3" else 2
    own_experts = n_sparse * X * expert / row.n_devices
    others = (step.weight_bytes / itemsize) - own_experts
    times = row.tokens if row.tokens <= _FEW else row.tokens * config.num_experts_per_tok / X
    flop = 2 * (others * row.tokens / row.data + own_experts * times)
    return max(step.weight_bytes / _hbm(chip), flop / _bf16(chip))


def _selection(row: Row, config: models.Config, chip: Chip) -> float:
    """Means of all blocks and keys of those that are kept, read or multiplied with index queries."""
    kept, n_blocks = row.method.block_topk * row.method.block_size, row.context // row.method.block_size
    own = row.tokens / row.data / (row.model_axis * row.context_axis)  # queries, as if of the whole context
    flop = 2 * own * config.index_n_heads * config.index_head_dim * (kept + n_blocks)
    requests = row.batch / row.data / row.context_axis
    read = 2 * config.index_head_dim * (own * kept + requests * 2 * n_blocks)
    return config.num_hidden_layers * max(read / _hbm(chip), flop / _bf16(chip))


def _attention(row: Row, config: models.Config, step: Step, chip: Chip) -> float:
    """Of blocks of 128 tokens that hold the chosen ones, as many on each device of `context`."""
    blocks = max(row.method.block_topk // row.context_axis, _STEP // row.method.block_size)
    model = dataclasses.replace(
        shapes.DSV32, mla_heads=config.num_attention_heads // row.model_axis, block_topk=blocks,
        mla_dim=config.kv_lora_rank + config.qk_rope_head_dim, mla_value_dim=config.kv_lora_rank,
    )  # fmt: skip
    (kernel,) = cost.sparse_mla_kernels(chip, model, row.tokens // row.data)
    schedule = next(schedule for schedule in step.program.schedules if schedule.name == kernel.name)
    cycles, *_ = kernel.cycles(schedule)
    return config.num_hidden_layers * max(cycles / chip.clock_hz, kernel.moved_bytes / chip.hbm_bytes_per_s)


def _hbm(chip: Chip) -> float:
    return chip.hbm_bytes_per_s * chip.cores_per_device


def _bf16(chip: Chip) -> float:
    return chip.bf16_flops * chip.cores_per_device
