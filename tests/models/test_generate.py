"""Generation and its command."""

import json
import re
import runpy
import sys

import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.__main__ import main
from hisa_jax.models.draws import likeliest
from hisa_jax.models.generate import _decode, _room, pad_left
from hisa_jax.models.methods import make_method, read_methods
from hisa_jax.models.tokens import Bytes, load_tokenizer

from . import golden, serving

FOLDER = golden.FOLDER / "glm5"
ONE_LAYER = ("glm5", (2,))  # with experts
PROMPTS = [[5, 17, 30, 41, 52, 63, 74, 85, 96, 7, 18, 29, 40], [90, 80, 70, 60, 50, 40, 30, 20, 10]]


@pytest.fixture(scope="module")
def greedy():
    return models.generate(golden.some_layers(*ONE_LAYER), PROMPTS, 3, chunk=8)


@pytest.mark.slow
def test_a_batch_of_unequal_prompts_continues_each_as_if_alone(greedy):
    for prompt, tokens in zip(PROMPTS, greedy.tokens, strict=True):
        alone = models.generate(golden.some_layers(*ONE_LAYER), [prompt], 3, chunk=8)
        assert alone.tokens == [tokens] and len(tokens) == 3


def test_it_counts_and_times(greedy):
    assert greedy.prompt_tokens == 22 and greedy.recall == {}
    assert greedy.prefill_rate > 0 and greedy.decode_rate > 0


def test_another_number_of_new_tokens_runs_the_same_programs(greedy):
    found, programs = {}, set()
    for n in (3, 2):
        found[n] = models.generate(golden.some_layers(*ONE_LAYER), PROMPTS, n, chunk=8).tokens
        programs.add(_decode._cache_size())
    assert found == {3: greedy.tokens, 2: [row[:2] for row in greedy.tokens]} and len(programs) == 1
    assert [_room(n, False) for n in (1, 32, 33, 100, 1000)] == [32, 32, 64, 128, 1024]
    assert [_room(n, True) for n in (1, 33, 65, 513)] == [32, 64, 96, 544]


@pytest.mark.slow
def test_a_stop_token_ends_its_row_alone(greedy):
    first, second = greedy.tokens
    stop, at = next((token, i) for i, token in enumerate(first) if i and token not in (*first[:i], *second))
    stopped = models.generate(golden.some_layers(*ONE_LAYER), PROMPTS, 3, chunk=8, stop_ids=[stop])
    assert stopped.tokens == [first[: at + 1], second]


def test_a_token_is_taken_from_logits_with_a_finite_maximum_alone():
    inf, nan = np.inf, np.nan
    logits = np.array([[0, 2, 1], [nan, 1, 2], [2, 1, nan], [inf, 0, 0], [-inf, -inf, -inf], [-inf, 0, 1]], np.float32)
    assert likeliest(logits).tolist() == [1, -1, -1, -1, -1, 2]


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_the_temperature_alone(greedy):
    def draw(seed, temperature):
        return models.generate(
            golden.some_layers(*ONE_LAYER), PROMPTS, 3, chunk=8, temperature=temperature, seed=seed
        ).tokens

    assert draw(0, 1.0) == draw(0, 1.0) != draw(1, 1.0)
    assert draw(0, 1e-4) == greedy.tokens


@pytest.mark.slow
@pytest.mark.exhaustive
def test_recall_is_full_for_the_flat_indexer_and_not_for_few_blocks():
    prompts = golden.ids("glm52")[:, :30].tolist()
    few = hj.Hisa(topk=8, block_size=4, block_topk=2)
    model = golden.model("glm52").with_method(dict.fromkeys(range(1, 7), few))
    result = models.generate(model, prompts, 4, chunk=16, report_recall=True)
    for phase in ("prefill", "decode"):
        flat, *others = result.recall[phase]
        assert flat == 1
        assert [value is not None for value in others] == [golden.selects("glm52", i) for i in range(1, 7)]
        assert all(0 < value < 1 for value in others if value is not None)


def test_prompts_are_padded_on_the_left_to_whole_chunks():
    ids, mask = pad_left([[1, 2, 3], [4]], 2)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]] and mask.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert pad_left([[1, 2, 3]], 512)[0].shape == (1, 3)


@pytest.mark.parametrize("temperature", [1e-46, 1e-39, 1e-38])
def test_a_tiny_temperature_draws_the_likeliest_tokens(temperature):
    """Divided by such numbers, logits would be infinite, those that are alike too."""
    drawn = models.generate(golden.some_layers(*ONE_LAYER), PROMPTS, 3, chunk=8, temperature=temperature).tokens
    assert drawn == models.generate(golden.some_layers(*ONE_LAYER), PROMPTS, 3, chunk=8).tokens


@pytest.mark.exhaustive
def test_a_chunk_larger_than_the_model_takes_no_more_memory_than_its_positions():
    assert models.generate(golden.some_layers(*ONE_LAYER), [[1, 2]], 1, chunk=10**12).prompt_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[101]]}, r"prompts\[0\]\[0\] is 101, wanted an int from 0 to 100"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 256}, "make 257 tokens, the model has 256 positions"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": True}, "chunk=True, wanted an int of at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan, wanted a number of at least 0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"seed": 1.5}, r"seed=1\.5, wanted an int"),
        ({"seed": None}, "seed=None, wanted an int"),
        ({"seed": True}, "seed=True, wanted an int"),
        ({"seed": 2**63}, "seed=9223372036854775808, wanted an int"),
        ({"max_new_tokens": 10**5000}, "prompt and max_new_tokens make a int tokens"),
        ({"prompts": None}, "prompts is None, wanted a sequence of at least one prompt"),
        ({"prompts": "text"}, r"prompts is 'text', wanted a list of prompts, as \['text'\]"),
        ({"prompts": [1, 2]}, r"prompts\[0\] is 1, wanted a sequence of ints"),
        ({"prompts": np.ones((1, 2))}, r"prompts\[0\]\[0\] is 1\.0, wanted an int"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.generate(golden.some_layers(*ONE_LAYER), **{"prompts": [[1]], "max_new_tokens": 1} | arguments)


@pytest.mark.parametrize("request_", serving.BAD_REQUESTS, ids=lambda request: request[-1])
def test_prompts_and_stop_tokens_are_checked_as_an_engine_checks_them(request_):
    prompt, n_new, *stop_ids, message = request_
    name = rf"prompts\[1\]{message[6:]}" if message.startswith("prompt") else message
    with pytest.raises(ValueError, match=f"^generate: {name}"):
        models.generate(serving.model(), [[1], prompt], n_new, **dict(zip(["stop_ids"], stop_ids, strict=False)))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, True, None])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match=r"^generate: seed=.*, wanted an int"):
        models.generate(serving.model(), [[1]], 1, seed=seed)


def command(*arguments, tokens=3):
    return main(
        [
            "generate",
            "--checkpoint",
            str(FOLDER),
            "--max-new-tokens",
            str(tokens),
            "--dtype",
            "float32",
            "--chunk",
            "16",
            *arguments,
        ]
    )


@pytest.mark.slow
def test_the_command_continues_text_byte_by_byte(capsys):
    assert command("--prompt", "HISA 2026", "--warm-up", "--checkpoint", str(golden.folder_of(*ONE_LAYER))) == 0
    out, err = capsys.readouterr()
    want = models.generate(golden.some_layers(*ONE_LAYER), [list(b"HISA 2026")], 3, chunk=16).tokens[0]
    assert out == Bytes(101).decode(want) + "\n"
    assert "tokens/s" in err and "compilation" not in err and "recall" not in err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_command_continues_ids_with_any_indexer(capsys, tmp_path):
    ids = ",".join(map(str, golden.ids("glm5")[0, :20].tolist()))
    layers = tmp_path / "layers.json"
    layers.write_text(
        json.dumps({"default": {"indexer": "hisa", "block_size": 4, "block_topk": 10}, "0": {"indexer": "dsa"}})
    )
    blocks = ["--block-size", "4"]
    printed = {}
    for name, options in {
        "dsa": [],
        "hisa": [*blocks, "--block-topk", "9", "--block-ratio", "3"],
        "scan": ["--candidates", "10", "--unit", "2", "--exact-heads", "1", "--slopes", "plain", "--sketch", "int4"],
        "block-sparse": blocks,
        layers: [],
    }.items():
        report = ["--report-recall"] if name in ("hisa", "scan") else []
        assert command("--prompt-ids", ids, "--indexer", str(name), *options, *report) == 0
        printed[name] = capsys.readouterr()
    assert len({out for out, _ in printed.values()}) > 1
    # All blocks kept: the flat indexer by another way.
    assert printed[layers].out == printed["dsa"].out
    for name in ("hisa", "scan"):
        rows = [line.split() for line in printed[name].err.splitlines()[-3:]]
        assert [row[0] for row in rows] == ["0", "1", "2"] and all(0 < float(row[1]) < 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "lower case"], "prompt holds byte 108, but the vocabulary has only 101 tokens"),
        (
            ["--prompt", "A", "--indexer", "full"],
            "indexer is full, wanted one of dsa, hisa, scan, block-sparse or a file",
        ),
        (["--prompt", "A", "--indexer", "dsa", "--block-size", "4"], "--block-size 4: --indexer dsa has none, --ind"),
        (["--prompt", "A", "--indexer", "scan", "--block-topk", "4"], "--block-topk 4: .* --indexer hisa has$"),
        (["--prompt", "A", "--indexer", "scan", "--candidates", "4"], r"--indexer: Scan\(candidates=4\): must be at"),
        (
            ["--prompt", "A", "--model-parallel", "99"],
            r"make_mesh\(data=1, model=99, context=1\): wanted at least 1 of each, there are 1 devices",
        ),
        (["--prompt", "A", "--checkpoint", "nowhere"], r"wanted a folder with a config\.json"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, arguments, message):
    assert command(*arguments) == (2 if "--indexer" in arguments else 1)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and re.search(message, err)


def test_the_command_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "hisa_jax.models.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["hisa_jax.models", "generate", "--help"])
    with pytest.raises(SystemExit) as status:
        runpy.run_module("hisa_jax.models", run_name="__main__", alter_sys=True)
    assert status.value.code == 0 and "--report-recall" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ('{"0": 1}', "wanted an object of objects"),
        ('{"3": {"indexer": "dsa"}}', "names layer '3', wanted 'default' or one from '0' to '2'"),
        ('{"0": {"indexer": "flat"}}', "0: indexer is 'flat', wanted one of dsa, hisa, scan, block-sparse"),
        ('{"0": {"indexer": "dsa", "topk": 0}}', r"0: Dsa\(topk=0\)"),
        ('{"0": {"topk": 8}}', "0: indexer is None"),
        ('{"0": {"indexer": ["dsa"]}}', r"layers\.json: 0: indexer is \['dsa'\]"),
        ('{"0": {"indexer": "dsa", "config": 1}}', r"layers\.json: 0: .*unexpected keyword argument 'config'"),
        ('{"0": {"indexer": "dsa", "topk": "8"}}', r"layers\.json: 0: Dsa\(topk='8'\)"),
        ('{"0": {"indexer": "dsa"}, "0": {"indexer": "hisa"}}', r"layers\.json: key '0' is there twice"),
        ('{"0": ' + "[" * 100_000, r"layers\.json: not JSON that can be read: nested too deeply"),
    ],
)
def test_a_per_layer_file_that_is_none_is_refused(tmp_path, text, message):
    file = tmp_path / "layers.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_methods(file, golden.model("glm5").config)


def test_methods_take_topk_from_the_checkpoint_unless_given():
    config = golden.model("glm5").config
    assert make_method("dsa", config) == hj.Dsa(topk=8)
    assert make_method("hisa", config, topk=4) == hj.Hisa(topk=4)
    assert make_method("scan", config) == hj.Scan(topk=8)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    for text in ("", "{}", '{"model": 1}', "[" * 1000):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: "):
            load_tokenizer(tmp_path, 300)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"tokenizer\.json: is no file"):
        load_tokenizer(tmp_path, 300)


def test_the_folders_tokenizer_is_used_if_there_is_one(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, 300), Bytes)
    assert Bytes(300).decode(Bytes(300).encode("grüße")) == "grüße"
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 300)
    assert tokenizer.encode("world hello") == [1, 0] and tokenizer.decode(np.array([0, 1]).tolist()) == "hello world"


def test_a_prompt_is_encoded_whole_whatever_the_tokenizers_writer_padded_and_cut_to(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_padding(length=8)
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, 300).encode("world hello") == [1, 0]
    words.no_padding()
    words.enable_truncation(1)
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, 300).encode("world hello") == [1, 0]


def test_a_tokenizer_that_fails_at_a_text_says_so_by_name(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0}, unk_token="nowhere"))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 300)
    for text in ("world", "\udcff"):
        with pytest.raises(ValueError, match=r"tokenizer\.json: cannot encode the prompt: "):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt-ids", "1,x"], "--prompt-ids: '1,x', wanted token ids"),
        (["--prompt-ids", "1", "--data-parallel", "0"], "--data-parallel 0: wanted at least 1"),
        (
            ["--prompt-ids", "1", "--data-parallel", "-1", "--model-parallel", "-1"],
            "--data-parallel -1: wanted at least 1",
        ),
        (["--prompt-ids", "1", "--seed", str(2**64)], "Sampling: seed="),
    ],
)
def test_the_command_refuses_options_by_name(capsys, options, message):
    assert command(*options) == 2
    assert message in capsys.readouterr().err
