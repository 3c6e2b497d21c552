"""DeepSeek-V3.2, GLM-5 and GLM-5.2 in Flax NNX, with the indexer of their sparse attention as an argument."""

from hisa_jax.checks import optional_packages

with optional_packages():
    from hisa_jax.models.async_engine import AsyncEngine
    from hisa_jax.models.cache import Cache
    from hisa_jax.models.checkpoint import restore, save
    from hisa_jax.models.config import Config, Yarn, config_from_keys, read_config
    from hisa_jax.models.engine import Engine
    from hisa_jax.models.generate import Generation, generate
    from hisa_jax.models.modeling import Model, Output
    from hisa_jax.models.params import from_config, from_pretrained
    from hisa_jax.models.plan import Plan
    from hisa_jax.models.published import dsv32, glm5, glm52
    from hisa_jax.models.replay.forward import TrainingOutput, training_forward
    from hisa_jax.models.replay.packing import pack_rollouts
    from hisa_jax.models.replay.record import Rollout
    from hisa_jax.models.replay.report import ReplayReport, replay_report
    from hisa_jax.models.safetensors_io import CheckpointError
    from hisa_jax.models.sampling import Sampling
    from hisa_jax.models.sharding import make_mesh

__all__ = [
    "AsyncEngine",
    "Cache",
    "CheckpointError",
    "Config",
    "Engine",
    "Generation",
    "Model",
    "Output",
    "Plan",
    "ReplayReport",
    "Rollout",
    "Sampling",
    "TrainingOutput",
    "Yarn",
    "config_from_keys",
    "dsv32",
    "from_config",
    "from_pretrained",
    "generate",
    "glm5",
    "glm52",
    "make_mesh",
    "pack_rollouts",
    "read_config",
    "replay_report",
    "restore",
    "save",
    "training_forward",
]
