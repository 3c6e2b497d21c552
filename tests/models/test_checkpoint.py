"""Saving and restoring by Orbax."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
from hisa_jax import models

from . import golden


@pytest.mark.oldest("dsv32")
@pytest.mark.parametrize("case", ["dsv32", "glm52"])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, case):
    model = golden.model(case)
    models.save(model, tmp_path / "saved")
    restored = models.restore(tmp_path / "saved", hj.Hisa(topk=8, block_size=4, block_topk=3))
    assert restored.config == model.config and isinstance(restored.plan.layers[0], hj.Hisa)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(restored))


def test_the_dtype_is_that_of_the_saved_model_unless_given(tmp_path):
    models.save(models.from_pretrained(golden.FOLDER / "glm5", dtype=jnp.bfloat16), tmp_path)
    for dtype, want in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        restored = models.restore(tmp_path, dtype=dtype)
        assert restored.layers[0].attention.q_a[...].dtype == want
        assert restored.norm[...].dtype == jnp.float32
    with pytest.raises(FileExistsError, match="holds a saved model already"):
        models.save(golden.model("glm5"), tmp_path)


def test_a_folder_without_a_saved_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no hisa_config\.json"):
        models.restore(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.update(more=1), "unexpected keyword argument 'more'"),
        (lambda keys: keys.pop("vocab_size"), "missing 1 required keyword-only argument: 'vocab_size'"),
        (lambda keys: keys.update(vocab_size="97"), r"Config\(vocab_size='97'\): must be an integer from 1 to"),
        (lambda keys: keys["yarn"].update(factor=0), r"Yarn\(factor=0\): must be a number from 1 to"),
        (lambda keys: keys.update(yarn=3), r"Config\(yarn=3\): must be a Yarn or None"),
        (
            lambda keys: keys.update(layer_kinds=[[]] * 3),
            r"Config\(layer_kinds=\(\[\], \[\], \[\]\)\): must be a list of",
        ),
    ],
)
def test_a_config_that_save_did_not_write_is_named(tmp_path, change, message):
    keys = dataclasses.asdict(golden.model("dsv32").config)
    change(keys)
    (tmp_path / "hisa_config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=rf"hisa_config\.json: .*{message}"):
        models.restore(tmp_path)
    (tmp_path / "hisa_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"hisa_config\.json: not JSON"):
        models.restore(tmp_path)


def test_a_saved_model_without_its_weights_is_refused_by_name(tmp_path):
    models.save(golden.model("glm5"), tmp_path)
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"weights holds no weights that can be read"):
        models.restore(tmp_path)
