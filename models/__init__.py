"""DeepSeek-V3.2, GLM-5 and GLM-5.2 in Flax NNX, with the indexer of their sparse attention as an argument."""

from models.cache import Cache
from models.checkpoint import restore, save
from models.config import Config, Yarn, config_from_keys, read_config
from models.engine import Engine
from models.generate import Generation, generate
from models.modeling import Model, Output
from models.params import from_config, from_pretrained
from models.plan import Plan
from models.published import dsv32, glm5, glm52
from models.safetensors_io import CheckpointError
from models.sharding import make_mesh

__all__ = [
    "Cache",
    "CheckpointError",
    "Config",
    "Engine",
    "Generation",
    "Model",
    "Output",
    "Plan",
    "Yarn",
    "config_from_keys",
    "dsv32",
    "from_config",
    "from_pretrained",
    "generate",
    "glm5",
    "glm52",
    "make_mesh",
    "read_config",
    "restore",
    "save",
]
