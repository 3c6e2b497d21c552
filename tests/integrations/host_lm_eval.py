"""lm-eval asks a model of this library: likelihoods, answers, needles, the command, what is missing by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.__main__ import main
from hisa_jax.models.evaluate.harness import HisaLM
from hisa_jax.models.locate import locate

BYTES = locate("bytes")
TEXT = "def add(a, b):\n    return a + b"  # lm-eval gives space at its end to what comes after


@pytest.fixture(scope="module")
def model():
    return models.from_pretrained(BYTES, dtype=jnp.float32)


@pytest.fixture(scope="module")
def lm(model):
    return HisaLM(model, batch_size=2, chunk=64)


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


@pytest.fixture(scope="module")
def log_probabilities(model):
    """Text -> [bytes, V], by one pass over all of it."""
    run = jax.jit(lambda ids, mask: jax.nn.log_softmax(model.run(ids, mask=mask).logits[0], axis=-1))

    def direct(text):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(text)] = list(text.encode())
        return np.asarray(run(tokens, np.arange(64)[None] < len(text)), np.float64)[: len(text)]

    return direct


def test_it_is_registered_by_name():
    assert get_model("hisa_jax") is HisaLM


def test_likelihoods_are_those_of_a_direct_pass(lm, log_probabilities):
    pairs = [(TEXT, "\ndef sub"), (TEXT, "\n\n"), ("def", " f(x):\n    return x"), ("", "import os\n")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        before = context or "\n"  # bytes have no token that begins a text
        rows = log_probabilities(before + continuation)[len(before) - 1 : -1]
        wanted = np.array(list(continuation.encode()))
        np.testing.assert_allclose(logprob, rows[np.arange(len(wanted)), wanted].sum(), rtol=1e-4)
        assert is_greedy == bool(np.all(rows.argmax(-1) == wanted))


def test_whole_texts_are_rolled_in_windows(model, log_probabilities):
    def direct(seen, scored):
        wanted = np.array(list(scored.encode()))
        rows = log_probabilities(seen + scored)[len(seen) - 1 : -1]
        return rows[np.arange(len(wanted)), wanted].sum()

    (whole,) = HisaLM(model, chunk=64).loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))
    np.testing.assert_allclose(whole, direct("\n", TEXT), rtol=1e-4)
    (rolled,) = HisaLM(model, chunk=64, max_length=16).loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))
    # Each byte once; the last window sees as much as 16 positions hold.
    last = len(TEXT) - 16
    np.testing.assert_allclose(rolled, direct("\n", TEXT[:16]) + direct(TEXT[last - 1 : 16], TEXT[16:]), rtol=1e-4)


def test_answers_are_those_of_generate(model, lm):
    options = {"until": ["\n\n", "def"], "max_gen_toks": 24, "do_sample": False, "temperature": 1.0}
    got = lm.generate_until(asked("generate_until", (TEXT, options), (TEXT + "\n#", options)))
    sampling = models.Sampling(max_tokens=24, stop=("\n\n", "def"))
    assert got == models.generate(model, [TEXT, TEXT + "\n#"], sampling=sampling, chunk=64).texts
    drawn = {"do_sample": True, "seed": 1, "max_gen_toks": 24}
    assert lm.generate_until(asked("generate_until", (TEXT, drawn))) != lm.generate_until(
        asked("generate_until", (TEXT, drawn | {"seed": 2}))
    )
    with pytest.raises(ValueError, match="generation_kwargs has beams"):
        lm.generate_until(asked("generate_until", (TEXT, {"beams": 3})))


def test_long_contexts_lose_their_beginning_and_are_counted(model):
    lm = HisaLM(model, chunk=64, max_length=40)
    (cut,) = lm.loglikelihood(asked("loglikelihood", ("x" * 50 + TEXT, "\n")))
    (whole,) = HisaLM(model, chunk=64).loglikelihood(asked("loglikelihood", (("x" * 50 + TEXT)[-40:], "\n")))
    assert lm.cost.n_cut == 1 and cut[0] == pytest.approx(whole[0], rel=1e-4)


@pytest.fixture
def own_task(tmp_path):
    """Multiple choice, whose right answers are what the text says."""
    stated, asked = "<<key amber-finch-0{n} = 4839{n}>>\n\n", "<<ask amber-finch-0{n} ="
    rows = [{"question": (stated + asked).format(n=n), "good": f" 4839{n}>>"} for n in range(4)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path}/rows.json\n"
        "doc_to_text: \"{{question}}\"\ndoc_to_choice: \"{{[good, ' 11111>>', ' nothing']}}\"\ndoc_to_target: 0\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return tmp_path


def test_a_task_of_ones_own_by_lm_evals_own_call(own_task):
    manager = TaskManager(include_path=str(own_task), include_defaults=False)
    arguments = f"checkpoint={BYTES},indexer=hisa,dtype=float32,chunk=64"
    found = simple_evaluate("hisa_jax", arguments, tasks=["own"], task_manager=manager, bootstrap_iters=0)
    assert found["results"]["own"]["acc,none"] == 1.0 and len(found["samples"]["own"]) == 4


def test_the_command_asks_all_indexers_the_same(own_task, tmp_path, capsys):
    file = tmp_path / "found.json"
    code = main([
        "evaluate", "--checkpoint", "bytes",
        "--tasks", "needle_single,own,longbench_2wikimqa,niah_single_1,no_such_task",
        "--include", str(own_task), "--lengths", "512", "1024", "--limit", "2", "--indexers", "flat,hisa,scan",
        "--json", str(file), "--dtype", "float32", "--chunk", "256",
    ])  # fmt: skip
    said = capsys.readouterr()
    assert code == 1  # since some tasks are missing
    assert "hisa, minus flat" in said.out and "needle_single  1024" in said.out and "tokens read" in said.out
    for task in ("longbench_2wikimqa", "niah_single_1", "no_such_task"):
        assert f"not asked: {task}: " in said.out
    rows = json.loads(file.read_text())["rows"]
    assert {row["indexer"] for row in rows} == {"flat", "hisa", "scan"}
    of_needles = [row for row in rows if row["task"] == "needle_single"]
    assert sorted(row["length"] for row in of_needles) == [512] * 3 + [1024] * 3
    assert all(row["mean"] == 1.0 for row in of_needles)  # nothing is left out of 1024 tokens
    assert [row["n"] for row in rows if row["task"] == "own"] == [2] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task"], "no task can be asked"),
        (["--tasks", "needles", "--lengths", "99999"], "wanted 1 to 16384, the model's positions"),
        (["--tasks", "needles", "--indexers", "flat,flat"], "wanted different names"),
        (["--tasks", "needles", "--indexers", "flat,fast"], "--indexers: indexer is fast, wanted one of"),
        (["--tasks", "needles", "--text", "/no/such/file"], "text is /no/such/file"),
        (["--tasks", "needles", "--lengths", "64"], "length=64 leaves no text"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_weights_are_read(arguments, message, capsys):
    status = 2 if message.startswith(("wanted", "--indexers")) else 1
    assert main(["evaluate", "--checkpoint", "bytes", *arguments]) == status
    assert message in capsys.readouterr().err


def test_needles_are_left_out_where_hisa_leaves_them_out(model, capsys):
    """The table shows a difference where there is one: topk of 16 tokens find no line of 40 bytes among 2048."""
    from hisa_jax.models.evaluate import needles

    starved = HisaLM(model.with_method(hj.BlockSparse(topk=32, block_size=16)), batch_size=4, chunk=256)
    questions = needles.questions("single", checkpoint=str(BYTES), lengths=[2048], n=4)
    options = {"until": [">>"], "max_gen_toks": 12}
    answers = starved.generate_until(asked("generate_until", *((q["input"], options) for q in questions)))
    found = [needles.found_in(answer, q["outputs"]) for answer, q in zip(answers, questions, strict=True)]
    assert sum(found) < 4
