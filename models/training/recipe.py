"""What is trained and how: the model's sizes and the stages of DeepSeek Sparse Attention's recipe, as frozen values."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import hisa_jax as hj
from models.config import Config

Attention = Literal["dense", "warm_up", "sparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps that have everything in common.

    Attributes:
        name: for curves and logs.
        attention: "dense" trains all but the indexer, on all tokens; "warm_up" the indexer alone, towards the dense
            attention; "sparse" everything, on selected tokens, the indexer towards the attention over these.
        context: tokens of a sequence.
        rows: sequences of a step, on all devices together.
        accumulate: passes that a step's sequences are divided into.
        steps: how many.
        learning_rate: the highest, reached after `rise` steps and lowered to `end_rate` by half a cosine.
        synthetic_share: of sequences that are long-range tasks in text, the others being text alone.
        method: what selects in the sparse stage; None for the config's own flat indexer. `hj.Hisa` trains the indexer
            under the block filter that it will run with.
    """

    name: str
    attention: Attention
    context: int
    rows: int
    accumulate: int = 1
    steps: int
    learning_rate: float
    end_rate: float
    rise: int = 20
    synthetic_share: float
    method: hj.Method | None = None

    def __post_init__(self) -> None:
        if self.attention not in ("dense", "warm_up", "sparse"):
            raise ValueError(f"Stage: attention is {self.attention!r}, wanted 'dense', 'warm_up' or 'sparse'")
        for name in ("context", "rows", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage: {name} is {getattr(self, name)}, wanted 1 or more")
        if self.rows % self.accumulate:
            raise ValueError(f"Stage: rows is {self.rows}, wanted a multiple of accumulate = {self.accumulate}")
        if not 0 <= self.synthetic_share <= 1:
            raise ValueError(f"Stage: synthetic_share is {self.synthetic_share}, wanted 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training.

    Attributes:
        config: of the model; vocabulary of 256 bytes, an indexer in each layer.
        stages: in order. Each begins with a fresh optimiser.
        answer_weight: weight in the loss of a byte that answers a question of a task; all others weigh 1.
        weight_decay: of matrices.
        seed: of weights and data.
    """

    config: Config
    stages: tuple[Stage, ...]
    answer_weight: float = 8.0
    weight_decay: float = 0.1
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Which stage step number `step` belongs to, and its number in that stage."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        raise ValueError(f"Recipe: step {step} is beyond the last")

    def to_json(self) -> str:
        """All of it, methods by their class's name, for the run's folder."""
        return json.dumps(_plain(self), indent=1) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"method": type(value).__name__, **fields} if isinstance(value, hj.Method) else fields
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    return value


def byte_config(context: int = 16384) -> Config:
    """18.9 M parameters: 8 layers of width 384 on bytes, 256 tokens selected.

    With blocks of 16, of which 64 are kept, 256 tokens of 16K are what 2048 of 128K are with blocks of 128.
    """
    layers = 8
    return Config(
        model_type="deepseek_v32",
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1280,
        moe_intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=256,
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        rms_norm_eps=1e-6,
        rope_theta=1e5,
        max_position_embeddings=context,
        layer_kinds=("dense",) * layers,
        indexer_kinds=("full",) * layers,
    )
