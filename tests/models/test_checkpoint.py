"""Saving and restoring by Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
import models

from . import golden


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
