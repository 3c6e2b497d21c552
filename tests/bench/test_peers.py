"""The comparison with peers, its logic by fake ones; no GPU, no torch. 3 s in the gate."""

import importlib
import importlib.util
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from bench import UserError
from bench.__main__ import main
from bench.gpu.row import Row
from bench.gpu.rows import rows
from bench.gpu.span import Span
from bench.peers import compare, packages, report
from bench.peers.compare import Side, agreement, kind_of, measure

LIST = np.arange(200).reshape(2, 100)


def row(**fields):
    """A row of ours that gives a list a query."""

    def make():
        return lambda x: (x, x[:, 0]), (jnp.asarray(LIST),), check

    def check(out):
        np.testing.assert_array_equal(out[0], LIST)

    return Row(**{**dict(row="hisa", make=make, shape="dsv32", context=8192, queries=2), **fields})


def sides(**results):
    """Peers that give these results; an error is raised."""

    def make(result):
        if isinstance(result, Exception):
            raise result
        return Side(lambda: result, result)

    return lambda operands: {name: lambda result=result: make(result) for name, result in results.items()}


def timer(calls):
    """Ours takes 3 ms, the n-th peer n."""
    n = len(calls) // compare._ROUNDS
    return [Span(ms=[3.0 if i % n == 0 else float(i % n)] * 5, kernels={"k": 1.0}) for i in range(len(calls))]


def test_a_row_has_the_best_peer_that_chooses_as_we_do_and_why_others_are_not_timed():
    other = LIST + 1000
    result = measure(row(), sides(wrong=other, broken=RuntimeError("no such kernel"), good=LIST, better=LIST), timer)
    assert result["best"] == "good" and result["ratio"] == 3.0 and result["peers_ms"] == {"good": 1.0, "better": 2.0}
    assert result["failed"] == {
        "wrong": "agrees to 0.0000, wanted 0.9",
        "broken": "RuntimeError: no such kernel",
    }
    assert "broken not timed: RuntimeError: no such kernel" in report.line(result)
    assert "| hisa dsv32 8K | 3000.0 | 1000.0 | 3.00 | good |" in report.table([result])


def test_a_row_without_a_peer_left_fails():
    with pytest.raises(RuntimeError, match="no peer is left"):
        measure(row(), sides(wrong=LIST + 1000), timer)


def test_our_own_result_is_checked_first():
    def make():
        _, operands, check = row().make()
        return lambda x: (x + 1, x[:, 0]), operands, check

    with pytest.raises(AssertionError):
        measure(row(make=make), sides(good=LIST), timer)


def test_agreement_of_lists_and_of_attention():
    half = np.where(np.arange(100)[None] < 50, LIST, -1)
    assert agreement(LIST, LIST[:, ::-1]) == 1 and agreement(LIST, half) == 0.5 and agreement(half, LIST) == 0.5
    assert agreement(LIST, LIST[:, :50]) == 0.0
    x = np.ones((2, 3), np.float32)
    assert agreement(x, 1.5 * x) == pytest.approx(0.5)


def test_rows_that_are_compared_are_named_and_have_a_peer():
    parts = {"hisa": "hisa", "flat": "flat", "decode32_paged": "hisa_decode", "flat_decode1_paged": "flat_decode"}
    parts |= {"sparse_mla": "sparse_mla", "sparse_mla_decode128": "sparse_mla"}
    parts |= {"sparse_mla_decode32_8bit": "sparse_mla_8bit"}
    found = {x.row: kind.part for x in rows() if (kind := kind_of(x))}
    assert parts.items() <= found.items() and "scan" not in found and "hisa_clustered" not in found
    assert kind_of(row(implementation="triton")) is None and kind_of(row(dtype="bf16")) is None


def test_packages_that_are_missing_are_named_with_how_to_get_them(monkeypatch):
    installed = {"torch": types.SimpleNamespace()}

    def import_module(name):
        if name == "deep_gemm":
            raise AssertionError("no CUDA_HOME")
        return installed[name]

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in ("torch", "deep_gemm") else None)
    peers = packages.load(None)
    assert list(peers.selectors) == ["torch.topk"] and peers.deep_gemm is None and peers.flash_mla is None
    assert len(peers.notes) == 4 and sum("pip install" in note for note in peers.notes) == 3
    assert "does not import: deep_gemm" in peers.notes[0] and "no CUDA_HOME" in peers.notes[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torch.*pip install torch"):
        packages.load(None)


def test_a_machine_without_a_gpu_is_a_clear_error(capsys):
    assert main(["peers"]) == 2
    assert "needs an NVIDIA GPU, this machine has cpu" in capsys.readouterr().err


def test_the_report_of_rows_measured_before_has_table_and_plot(tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([measure(row(), sides(good=LIST), timer)]))
    assert main(["peers", "--report", str(file), "--plot", str(tmp_path / "ratios.png")]) == 0
    assert (tmp_path / "ratios.png").stat().st_size > 5_000 and "ours / peer" in capsys.readouterr().out
    assert main(["peers", "--report", "nowhere.json"]) == 2
