"""The entry for FlashInfer-Bench, judged by its rules; 8 s, most of it compiling. tests/gpu runs it on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.integrations import flashinfer_bench
from hisa_jax.integrations.flashinfer_bench import dsa_topk_indexer
from tests import flashinfer_rules as rules

SMALL = dict(H=4, D=32, size=8)
FLAT = hj.Dsa(topk=16)


def arrays(inputs):
    return [jnp.asarray(x) for x in inputs]


def test_by_the_flat_method_the_rules_of_the_definition_are_kept():
    inputs = rules.draw([2600, 64, 2049, 1], 100, drift=1.0)
    ids = dsa_topk_indexer(*arrays(inputs))
    rules.judge(ids, inputs, 2048)


@pytest.mark.check
def test_every_length_keeps_them_also_one_without_tokens():
    inputs = rules.draw([0, 1, 8, 15, 16, 17, 63, 64], 40, **SMALL)
    rules.judge(dsa_topk_indexer(*arrays(inputs), method=FLAT), inputs, 16)


@pytest.mark.gate("hisa")
@pytest.mark.parametrize(
    ("method", "least"),
    [
        (hj.Hisa(topk=16, block_size=8, block_topk=8), 0.8),
        (hj.Hisa(topk=16, block_size=8, block_topk=32), 1.0),  # keeps all blocks
        (hj.Scan(topk=16, candidates=48, exact_heads=1), 0.9),
        (hj.BlockSparse(topk=16, block_size=8), 0.1),
    ],
    ids=["hisa", "hisa-all-blocks", "scan", "block-sparse"],
)
def test_the_other_methods_are_judged_by_recall(method, least):
    inputs = rules.draw([200, 130, 249], 100, drift=2.0, **SMALL)
    ids = dsa_topk_indexer(*arrays(inputs), method=method)
    assert rules.recall(ids, inputs, 16) >= least


def test_a_page_may_be_of_several_requests_at_several_places():
    inputs = rules.draw([24, 24, 24, 24, 16], 14, **SMALL)
    table = inputs.block_table.copy()
    table[1], table[2] = table[0, ::-1], [table[3, 1], *table[0, :2]]
    inputs = inputs._replace(block_table=table)
    rules.judge(dsa_topk_indexer(*arrays(inputs), method=FLAT), inputs, 16)


def test_a_request_without_one_of_its_pages_gets_nothing_and_the_others_all():
    inputs = rules.draw([24, 24, 24, 24, 16], 14, **SMALL)
    table = inputs.block_table.copy()
    table[0, 1], table[1, 2], table[4, 2] = -1, 14, -1  # the last one is not needed
    lengths = np.array([24, 24, 25, -1, 16], np.int32)
    bad = inputs._replace(block_table=table, seq_lens=lengths)
    ids = np.asarray(dsa_topk_indexer(*arrays(bad), method=FLAT))
    assert (ids[:4] == -1).all()
    rules.judge(ids[4:], rules.Inputs(bad[0][4:], bad[1], *(x[4:] for x in bad[2:])), 16)
    with pytest.raises(jax.experimental.checkify.JaxRuntimeError, match="block_table lacks pages of requests"):
        hj.checked(dsa_topk_indexer)(*arrays(bad), method=FLAT)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q_index_fp8", lambda x: x.astype(jnp.float32), TypeError, "q_index_fp8 is float32, wanted float8_e4m3fn"),
        (
            "k_index_cache_fp8",
            lambda x: x[..., :-4],
            ValueError,
            r"wanted \[num_pages, page_size, 1, 36\]: D = 32 bytes",
        ),
        ("weights", lambda x: x[:, 1:], ValueError, r"weights is \[2, 3\], wanted \[2, 4\]"),
        ("seq_lens", lambda x: x[1:], ValueError, r"seq_lens is \[1\], wanted \[2\]: one length a request"),
        ("block_table", lambda x: x.reshape(-1), ValueError, r"block_table is \[6\], wanted \[2, P\]: a row a request"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(name, change, error, message):
    inputs = rules.Inputs(*arrays(rules.draw([24, 24], 6, **SMALL)))
    with pytest.raises(error, match=f"dsa_topk_indexer: .*{message}"):
        dsa_topk_indexer(*inputs._replace(**{name: change(getattr(inputs, name))}), method=FLAT)


@pytest.mark.parametrize("method", [hj.Dsa(topk=2048), hj.Hisa(), hj.Scan(topk=2048)])
def test_a_solution_s_source_makes_the_entry_of_its_method(method, monkeypatch):
    (source,) = flashinfer_bench.solution(method)["sources"]
    given = []
    monkeypatch.setattr(flashinfer_bench, "entry", given.append)
    exec(compile(source["content"], source["path"], "exec"), {})
    assert given == [method]


def test_a_solution_that_the_definition_or_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="wanted topk = 2048, as the definition has it"):
        flashinfer_bench.solution(FLAT)
    with pytest.raises(ValueError, match="wanted one without functions"):
        flashinfer_bench.solution(hj.Dsa(topk=2048, token_score=jnp.dot))
    for function in (flashinfer_bench.solution, flashinfer_bench.entry):
        with pytest.raises(TypeError, match="method is 2048, wanted a Hisa"):
            function(2048)
