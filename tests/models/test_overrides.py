"""Settings as servers take them: HISA's keys and those of shared selections, in a config.json or in its place.

About 2 s: one small model is loaded.
"""

import argparse
import json
import shutil

import pytest

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.__main__ import main
from hisa_jax.models.methods import make_method, read_methods
from hisa_jax.models.options import add_model, method_of

from . import golden

KEYS = {"use_hisa": True, "hisa_k_block_size": 4, "hisa_block_topk": 3}
HISA = hj.Hisa(topk=8, block_size=4, block_topk=3)


def kinds(config):
    return "".join(kind[0].upper() for kind in config.indexer_kinds)


@pytest.fixture
def published(tmp_path):
    """A folder whose config.json is as published, with what a test adds."""

    def write(case="glm5", **more):
        shutil.copytree(golden.FOLDER / case, tmp_path / case, dirs_exist_ok=True)
        keys = json.loads((golden.FOLDER / case / "config_published.json").read_text())
        (tmp_path / case / "config.json").write_text(json.dumps(keys | more))
        return tmp_path / case

    return write


def test_a_mapping_json_and_a_file_say_the_same_as_the_checkpoint_itself(published, tmp_path):
    own = models.read_config(published(**KEYS))
    file = tmp_path / "override.json"
    file.write_text(json.dumps(KEYS))
    for given in (KEYS, json.dumps(KEYS), file):
        assert models.read_config(published(), given) == own
    assert own.method == HISA and models.read_config(published(), {}).method == hj.Dsa(topk=8)


def test_the_paper_s_sizes_are_those_that_are_not_given(published):
    assert models.read_config(published(index_topk=2048), {"use_hisa": True}).method == hj.Hisa(topk=2048)


def test_use_hisa_must_be_true_for_its_sizes_to_count(published):
    sizes = {"use_hisa": False, "hisa_k_block_size": 1, "hisa_block_topk": 1}
    assert models.read_config(published(**sizes)).method == hj.Dsa(topk=8)


def test_a_model_selects_and_shares_as_its_settings_say(published):
    """The checkpoint has an indexer in every layer; those of layers that share are left."""
    folder = published()
    config = models.read_config(folder, KEYS | {"index_topk_pattern": "FSS"})
    model = models.from_pretrained(folder, config=config)
    assert model.plan.layers == (HISA,) * 3
    assert [layer.attention.indexer is None for layer in model.layers] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "said", "want"),
    [
        ({"indexer_types": ["full", "shared", "full"]}, {"index_topk_freq": 1}, "FFF"),
        ({"indexer_types": ["full", "shared", "full"]}, {"index_topk_pattern": "FSS"}, "FSS"),
        ({"index_topk_pattern": "FSS"}, {"indexer_types": ["full", "full", "shared"]}, "FFS"),
        ({"index_topk_pattern": "FSS"}, {"index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSF"),
        ({"index_topk_pattern": "FSS"}, {"index_topk_pattern": None}, "FFF"),
        ({"index_topk_pattern": "FSS"}, {"index_topk": 4}, "FSS"),
    ],
)
def test_one_word_on_shared_layers_replaces_all_that_the_checkpoint_says_of_them(published, given, said, want):
    assert kinds(models.read_config(published(**given), said)) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_hiza": True}, "overrides: 'use_hiza' is no setting of config.json that is read; the nearest one is"),
        ({1: 2}, "overrides: 1 is no setting of config.json that is read$"),
        ({"use_hisa": 1}, "overrides: use_hisa is 1, wanted true or false"),
        ({"hisa_k_block_size": 0}, "overrides: hisa_k_block_size is 0, wanted an integer from 1 to"),
        ({"hisa_block_topk": 64.0}, r"overrides: hisa_block_topk is 64\.0, wanted an integer from 1 to"),
        (KEYS | {"hisa_block_topk": 1}, "with overrides: .*hisa_block_topk=1.*must be at least 2: the first block and"),
        (KEYS | {"hisa_k_block_size": 2}, "hisa_block_topk=3.*must be at least 4: kept blocks of 2 hold index"),
        ({"index_topk_freq": 0}, "overrides: index_topk_freq is 0, wanted an integer from 1 to"),
        ({"index_topk_pattern": "FXF"}, r"overrides: index_topk_pattern is 'FXF', wanted letters F \(full\) or S"),
        ({"index_topk_pattern": "FS"}, "with overrides: index_topk_pattern is 'FS', wanted an entry for each of"),
        ({"indexer_types": ["shared", "full", "full"]}, "with overrides: .*must be 'full' at layer 0"),
        ({"indexer_types": ["full", "none", "full"]}, "overrides: indexer_types is .* wanted a list of one of full"),
        ('{"use_hisa": tru}', "overrides: not JSON"),
        ("[]", "overrides: holds a list, wanted an object"),
        ('{"use_hisa": true, "use_hisa": false}', "overrides: key 'use_hisa' is there twice"),
    ],
)
def test_overrides_that_are_wrong_are_refused_by_name(published, given, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(published(), given)


def test_what_is_no_override_is_refused(tmp_path, published):
    with pytest.raises(TypeError, match="overrides is list, wanted a mapping, JSON as a str, or a file's Path"):
        models.read_config(published(), [])
    with pytest.raises(FileNotFoundError):
        models.read_config(published(), tmp_path / "none.json")
    with pytest.raises(TypeError, match="from_pretrained: config is dict, wanted a Config, as models.read_config"):
        models.from_pretrained(published(), config={"use_hisa": True})


def test_stop_tokens_of_overrides_count_before_those_of_the_generation_config(published):
    folder = published()
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert models.read_config(folder).eos_token_ids == (7,)
    assert models.read_config(folder, {"eos_token_id": 5}).eos_token_ids == (5,)


def test_commands_choose_by_the_checkpoints_method_unless_told_otherwise(published, tmp_path):
    folder, other = str(published()), tmp_path / "layers.json"
    other.write_text('{"1": {"indexer": "dsa"}}')
    config = models.read_config(folder, KEYS)
    parser = argparse.ArgumentParser()
    add_model(parser)
    for more, want in [
        ([], HISA), (["--indexer", "hisa"], HISA), (["--indexer", "dsa"], hj.Dsa(topk=8)),
        (["--block-topk", "5"], hj.Hisa(topk=8, block_size=4, block_topk=5)),
    ]:  # fmt: skip
        assert method_of(parser.parse_args(["--checkpoint", folder, *more]), config) == want
    assert read_methods(other, config) == (HISA, hj.Dsa(topk=8), HISA)
    assert make_method("hisa", models.read_config(folder, {"index_topk": 2048})) == hj.Hisa(topk=2048)


@pytest.mark.exhaustive
def test_the_command_takes_an_override(published, capsys):
    command = ["generate", "--checkpoint", str(published()), "--prompt-ids", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16"]
    outputs = []
    for more in (["--indexer", "hisa", "--block-size", "4", "--block-topk", "3"], ["--override", json.dumps(KEYS)]):
        assert main([*command, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert main([*command, "--override", '{"use_hiza": true}']) == 1
    assert "error: overrides: 'use_hiza' is no setting" in capsys.readouterr().err
