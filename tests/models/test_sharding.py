"""The models split over 8 emulated devices compute what one device does."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hisa_jax import models

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(["tensor_and_data_parallel", "explicit_mesh_of_one_axis"], marks=pytest.mark.oldest),
        pytest.param(["save_here_restore_there"], marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        ["many_tokens_read_gathered_pages"],
        pytest.param(
            ["many_tokens_of_8_bits_read_gathered_pages_and_few_read_them_where_they_lie"], marks=pytest.mark.exhaustive
        ),
        pytest.param(
            ["tensor_and_data_parallel_where_heads_stay_whole", "explicit_mesh_of_the_batch"],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(["quantised_keys_and_hisa", "the_self_check"], marks=pytest.mark.exhaustive),
        pytest.param(["generation"], marks=pytest.mark.exhaustive),  # test_engine_meshes.py makes tokens on a mesh
        pytest.param(["replayed_rollouts"], marks=pytest.mark.exhaustive),
    ],
    ids="+".join,
)
def test_eight_devices_give_what_one_gives(checks):
    """tests/models/sharded.py says what each check promises."""
    command = [sys.executable, "-W", "error", "-m", "tests.models.sharded", json.dumps(checks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"passed {name}" for name in checks]


def test_every_check_is_there():
    """Most of them are exhaustive: two once had a name that nothing ran under."""
    (cases,) = (
        mark.args[1] for mark in test_eight_devices_give_what_one_gives.pytestmark if mark.name == "parametrize"
    )
    asked = {name for case in cases for name in (case.values[0] if hasattr(case, "values") else case)}
    functions = {x.name for x in ast.parse((ROOT / "tests/models/sharded.py").read_text()).body if hasattr(x, "name")}
    assert asked <= functions, asked - functions


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"make_mesh\(data=4096, model=2, context=1\): wanted at least 1 of each, there are"
    ):
        models.make_mesh(4096, 2)
    with pytest.raises(ValueError, match=r"mesh has the axes \('tp',\), wanted 'data', 'model' and 'context' or some"):
        models.from_pretrained(ROOT / "tests/golden/glm5", mesh=jax.make_mesh((1,), ("tp",)))
