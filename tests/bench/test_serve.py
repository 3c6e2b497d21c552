"""The server bench: it runs, and its check can fail."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import hisa_jax as hj
from bench.__main__ import main
from bench.gpu.span import Event
from bench.serve import contexts, nvlink
from bench.serve.check import Recorder
from bench.serve.small import CONFIG, METHOD, METHODS, traffic
from bench.serve.timeline import lines, timeline
from hisa_jax.models.engine import Report, Step, Traced


@pytest.mark.slow
def test_a_small_run_is_right_and_leaks_nothing(tmp_path):
    out = tmp_path / "serve.json"
    assert main(["serve", "--requests", "3", "--verify", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert (row["indexer"], row["finished"]) == ("hisa", 3)
    assert row["mismatches"] == row["leaked_pages"] == 0 < row["selections_checked"]


@pytest.mark.exhaustive  # tests/models/test_engine_faults.py injects each of them
def test_a_small_run_is_right_and_leaks_nothing_whatever_faults_are_injected(tmp_path, capsys):
    out = tmp_path / "serve.json"
    assert main(["serve", "--requests", "7", "--pages", "30", "--verify", "--faults", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row["finished"] == 7 and row["mismatches"] == row["leaked_pages"] == 0 < row["selections_checked"]
    assert row["peak_pages"] <= 30 and len(row["faults"]) == 29
    shown = capsys.readouterr().out
    assert "selections against the oracle: 0 mismatches" in shown and "one page twice" in shown


@pytest.mark.exhaustive  # tests/models/test_engine.py serves by a scan, too
def test_a_small_run_by_the_scan_is_right_and_leaks_nothing(tmp_path):
    out = tmp_path / "serve.json"
    scan = ["--indexer", "scan", "--sketch", "int4"]
    assert main(["serve", "--requests", "5", *scan, "--verify", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert (row["indexer"], row["sketch"], row["page_size"], row["finished"]) == ("scan", "int4", 64, 5)
    assert row["mismatches"] == row["leaked_pages"] == 0 < row["selections_checked"]


def step(request, start, n_kept, rng, wrong=False):
    """One forward pass of two tokens of one request, one layer."""
    q, k, w = (rng.normal(size=s).astype(np.float32) for s in ((1, 2, 2, 8), (1, 2, 8), (1, 2, 2)))
    selection = hj.Selection(
        indices=np.tile(np.arange(24, dtype=np.int32), (1, 2, 1)), count=np.array([[start + 1, start + 2]], np.int32)
    )
    selection.indices[selection.indices >= selection.count[..., None]] = -1
    if wrong:
        selection.indices[0, 1, start + 1] = start + 2
    return Step(
        phase="decode", requests=[request], rows=[0], starts=[start], n_new=[2], n_kept=[n_kept],
        layers=(Traced(0, selection, q, k, w),),
    )  # fmt: skip


def test_the_recorder_follows_forks_and_rejections_and_sees_a_wrong_token():
    recorder, rng = Recorder(METHOD), np.random.default_rng(0)
    recorder.check(Report(forks=[], steps=[step(0, 0, 2, rng), step(0, 2, 1, rng)], finished={}), [0])
    recorder.check(Report(forks=[(1, 0, 2)], steps=[step(1, 2, 2, rng), step(0, 3, 2, rng)], finished={}), [0, 1])
    assert recorder.n_checked == 8 and recorder.mismatches == []
    recorder.check(Report(forks=[], steps=[step(1, 4, 2, rng, wrong=True)], finished={}), [1])
    (mismatch,) = recorder.mismatches
    assert mismatch.startswith("request 1, layer 0, decode: query (b=0, t=1)") and "token 6 is not visible" in mismatch
    with pytest.raises(AssertionError):  # request 0 is forgotten: it no longer was alive
        recorder.check(Report(forks=[], steps=[step(0, 5, 2, rng)], finished={}), [])


def test_traffic_shares_prefixes_and_is_the_same_for_a_seed():
    requests = traffic(50, seed=3)
    assert requests == traffic(50, seed=3) != traffic(50, seed=4)
    starts = {tuple(prompt[:12]) for prompt, _ in requests}
    assert len(starts) < 10


@pytest.mark.exhaustive  # tests/models/meshes.py serves on meshes, too; half a minute of CPU
def test_a_small_run_on_emulated_devices_is_right_and_leaks_nothing(tmp_path):
    out = tmp_path / "serve.json"
    run = ["serve", "--mesh", "data=2,context=2", "--requests", "5", "--rows", "2", "--cancels", "20", "--verify"]
    command = [sys.executable, "-m", "bench", *run, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(out.read_text())
    assert row["mesh"] == {"data": 2, "model": 1, "context": 2} and row["finished"] + row["cancelled"] == 5
    assert row["mismatches"] == row["leaked_pages"] == 0 < row["selections_checked"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data=2,x=3"], "'data=2,x=3', wanted sizes of data, model, context"),
        (["--mesh", "data=0"], "'data=0', wanted sizes of"),
        (["--mesh", "data=512,model=8"], "--mesh: make_mesh(data=512, model=8, context=1): wanted at least 1 of each"),
        (["--config", "glm-5", "--verify"], "--config with --verify or --faults, wanted them without"),
        (["--config", "glm-5", "--layers", "79"], "--layers=79, wanted 1 to 78"),
        (["--config", "glm-5", "--page-size", "96"], "--page-size: invalid choice: 96 (choose from 64, 128)"),
        (["--page-size", "128"], "--page-size=128 without --config"),
        (["--attention-only"], "--attention-only without --config"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options, message, capsys):
    jax.devices()  # started with the devices that there are
    try:
        assert main(["serve", *options]) != 0
    except SystemExit as error:
        assert error.code == 2
    assert message in " ".join("".join(capsys.readouterr()).split())


def test_the_first_layers_of_a_published_model_are_served_as_servers_have_them():
    config = contexts.cut(contexts.CONFIGS["deepseek-v3.2"](), 4, 200_000)
    assert config.max_position_embeddings == 200_000
    assert config.layer_kinds == ("dense", "dense", "dense", "sparse") and config.index_key_dtype == "float8_e4m3fn"
    assert (config.index_n_heads, config.index_head_dim, config.num_attention_heads) == (64, 128, 128)


@pytest.mark.exhaustive  # three engines of a tiny model
@pytest.mark.parametrize("options", [[], ["--attention-only", "--rows", "1"]])
def test_every_method_is_measured_at_every_context(options, tmp_path, monkeypatch):
    monkeypatch.setitem(contexts.CONFIGS, "glm-5", lambda: dataclasses.replace(CONFIG, index_topk=24))
    monkeypatch.setattr(contexts, "make_method", lambda name, config: METHODS.get(name, hj.Dsa(topk=24)))
    out = tmp_path / "rows.json"
    sizes = ["--layers", "2", "--contexts", "320", "256", "--rows", "2", "--chunk", "32", "--new", "5", *options]
    assert main(["serve", "--config", "glm-5", *sizes, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["context"], row["indexer"]) for row in rows] == [
        (context, method) for method in ("dsa", "hisa", "scan") for context in (320, 256)
    ]
    assert all(row["time_to_first_token_s"] > row["time_per_output_token_s"] > 0 for row in rows)
    assert [row["shared_tokens_of_a_turn"] - row["prompt_tokens"] for row in rows] == [-32] * 6
    assert all(row["attention_only"] == bool(options) and row["prompt_tokens"] < row["context"] for row in rows)


def test_a_timeline_says_what_kernels_are_for_and_where_it_waits():
    names = ["hisa_scores_mosaic_gpu_kernel", "nvjet_tst_256x128", "hisa_append", "sparse_mla_x", "loop_add_fusion_6"]
    starts = [(0, 4), (3, 7), (7, 8), (10, 12), (12, 13)]  # the second begins before the first ends
    seen = timeline([Event(start * 1e6, end * 1e6, name) for (start, end), name in zip(starts, names, strict=True)])
    assert seen.parts == {
        "selection": 4, "products": 4, "attention": 2, "between kernels": 2, "pages": 1, "fusions": 1
    }  # fmt: skip
    assert seen.gaps == [(2.0, "hisa_append", "sparse_mla_x")] and list(seen.kernels)[-1] == "loop_add_fusion_6"
    assert "2.00 from hisa_append to sparse_mla_x" in "".join(lines("a step", seen._asdict()))
    assert timeline([]).kernels == {} and lines("a step", timeline([])._asdict()) == []


def test_sent_bytes_are_those_of_all_links(monkeypatch):
    said = "GPU 0: NVIDIA H200\n\t Link 0: Data Tx: 3 KiB\n\t Link 0: Data Rx: 9 KiB\n\t Link 1: Data Tx: 4 KiB\n"
    monkeypatch.setattr(nvlink, "_COMMAND", ("echo", said))
    assert nvlink.sent_bytes() == 7 * 1024
    monkeypatch.setattr(nvlink, "_COMMAND", ("no such program",))
    assert nvlink.sent_bytes() is None and nvlink.difference(1, None) is None and nvlink.difference(1, 7, 2) == 3
