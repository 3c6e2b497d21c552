"""Which folder a checkpoint's name means. No model is loaded but the headers of the shipped one."""

import json
import sys
import types
from pathlib import Path

import pytest

from hisa_jax import models
from hisa_jax.models import locate as module
from hisa_jax.models.locate import locate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def as_from_a_wheel(monkeypatch, tmp_path):
    """The package lies elsewhere and has no weights beside it."""
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages/hisa_jax/models/locate.py"))


def test_a_folder_is_itself_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").mkdir()
    (tmp_path / "org/name").mkdir(parents=True)
    assert locate("bytes") == Path("bytes") and locate("org/name") == Path("org/name")
    assert locate(tmp_path) == tmp_path and locate("nowhere") == Path("nowhere")


def test_the_shipped_model_has_a_name_that_works_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("bytes").resolve() == ROOT / "models/bytes"
    assert models.read_config(locate("bytes")).vocab_size == 256


@pytest.mark.parametrize("here", [".", "checkout", "checkout/docs", "beside", "elsewhere/deep"])
def test_from_a_wheel_it_is_found_in_and_beside_a_checkout_and_else_it_is_said_where_to_get_it(
    here, tmp_path, monkeypatch, as_from_a_wheel
):
    folder = tmp_path / "checkout/models/bytes"
    for made in (folder, tmp_path / "checkout/docs", tmp_path / "beside", tmp_path / "elsewhere/deep"):
        made.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("")
    (tmp_path / "checkout/pyproject.toml").write_text('[project]\nname = "hisa_jax"\n')
    monkeypatch.chdir(tmp_path / here)
    if here == "elsewhere/deep":
        with pytest.raises(
            FileNotFoundError, match="the wheel holds no weights. Clone that and run in it, or give the"
        ):
            models.from_pretrained("bytes")
    else:
        assert locate("bytes") == folder
    (tmp_path / "checkout/pyproject.toml").write_text('[project]\nname = "another"\n')
    with pytest.raises(FileNotFoundError, match="there is no models/bytes here"):
        locate("bytes")


def hub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", download and types.SimpleNamespace(snapshot_download=download))


def test_a_name_on_the_hub_without_its_package_says_what_loads(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, None)
    with pytest.raises(
        FileNotFoundError, match=r"'org/name' is no folder here.*pip install huggingface_hub.*deepseek_v32"
    ):
        models.from_pretrained("org/name")


def test_a_name_on_the_hub_is_fetched_if_its_model_is_built_and_its_weights_only_then(monkeypatch, tmp_path):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, download)
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        locate("org/name")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'org/name': model_type is 'llama', wanted one of deepseek_v32, glm_moe_dsa"):
        locate("org/name")
    assert asked == [("org/name", False)] * 2
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm_moe_dsa"}))
    assert locate("org/name") == tmp_path and asked[2:] == [("org/name", False), ("org/name", True)]


def test_a_hub_that_does_not_answer_is_said_in_a_line(monkeypatch, tmp_path):
    def download(name, *, allow_patterns):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, download)
    with pytest.raises(
        FileNotFoundError, match=r"is no folder here, and the Hugging Face Hub did not give it: no route$"
    ):
        locate("org/name")
