"""A model that is written as a published checkpoint is the one that is loaded again."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hisa_jax import models
from hisa_jax.models.checkpoint import by_name
from hisa_jax.models.config import Yarn, config_from_keys
from hisa_jax.models.export import config_to_keys, save_pretrained
from tests.models.golden import FOLDER


@pytest.mark.parametrize("folder", ["dsv32", "glm5"])
def test_every_parameter_comes_back_bit_for_bit(folder, tmp_path):
    model = models.from_pretrained(FOLDER / folder, dtype=jnp.bfloat16)
    save_pretrained(model, tmp_path / "new")
    again = models.from_pretrained(tmp_path / "new", dtype=jnp.bfloat16)
    assert again.config == model.config
    wanted, got = by_name(nnx.state(model)), by_name(nnx.state(again))
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert wanted[name].dtype == got[name].dtype, name
        np.testing.assert_array_equal(wanted[name], got[name], err_msg=name)


@pytest.mark.parametrize("make", [models.dsv32, models.glm5, models.glm52])
def test_a_config_survives_its_keys(make):
    config = make()
    assert config_from_keys(config_to_keys(config)) == config
    changed = dataclasses.replace(
        config, yarn=Yarn(factor=2.0, original_max_position_embeddings=64), weight_block_size=(64, 64),
        eos_token_ids=(1, 2), index_key_dtype="int8",
    )  # fmt: skip
    assert config_from_keys(config_to_keys(changed)) == changed


def test_a_checkpoint_is_not_replaced_unasked(tmp_path):
    model = models.from_pretrained(models.__path__[0] + "/bytes")
    save_pretrained(model, tmp_path)
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, overwrite=True)


def test_the_trained_model_is_small_enough_to_ship_and_as_large_as_its_card_says():
    folder = models.__path__[0] + "/bytes"
    model = models.from_pretrained(folder, dtype=jnp.bfloat16)
    size = sum(math.prod(x.shape) for x in by_name(nnx.state(model)).values())
    assert 15e6 <= size <= 40e6 and f"{size / 1e6:.1f} M parameters" in (Path(folder) / "README.md").read_text()
