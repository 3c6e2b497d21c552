"""The entry for FlashInfer-Bench at its definition's sizes, on a GPU, judged by its rules."""

import jax.numpy as jnp
import pytest

import hisa_jax as hj
from hisa_jax.integrations.flashinfer_bench import DEFINITION, dsa_topk_indexer, entry
from tests import flashinfer_rules as rules

pytestmark = pytest.mark.gpu
# Some that fit into topk, some that end within a page, the longest of its traces' kind.
LENGTHS = [1, 63, 2048, 2049, 2500, 4096, 5800, 5823]


def test_the_sizes_are_those_of_the_definition():
    assert DEFINITION.endswith("_h64_d128_topk2048_ps64")
    inputs = rules.draw(LENGTHS, 400)
    assert inputs.q_index_fp8.shape[1:] == (64, 128) and inputs.k_index_cache_fp8.shape == (400, 64, 1, 132)


@pytest.mark.parametrize("implementation", ["auto", "triton", "xla"])
@pytest.mark.parametrize("drift", [0.0, 2.0])
def test_the_flat_method_keeps_the_rules(implementation, drift):
    inputs = rules.draw(LENGTHS, 400, drift=drift)
    ids = dsa_topk_indexer(*map(jnp.asarray, inputs), implementation=implementation)
    rules.judge(ids, inputs, 2048)


@pytest.mark.parametrize(
    ("method", "least"),
    [
        (hj.Hisa(topk=2048, block_size=64, block_topk=64), 0.95),
        (hj.Hisa(topk=2048, block_size=128, block_topk=46), 1.0),  # keeps all blocks
        (hj.Scan(topk=2048, candidates=4096), 0.99),
    ],
)
def test_the_other_methods_are_judged_by_recall(method, least):
    inputs = rules.draw(LENGTHS, 400, drift=2.0)
    ids = dsa_topk_indexer(*map(jnp.asarray, inputs), method=method)
    assert rules.recall(ids, inputs, 2048) >= least


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_pytorchs_tensors_go_in_and_come_out(device):
    """Needs PyTorch beside JAX; XLA_PYTHON_CLIENT_PREALLOCATE=false leaves it memory."""
    torch = pytest.importorskip("torch")
    inputs = rules.draw(LENGTHS, 400, drift=1.0)
    q, *others = inputs
    tensors = [torch.from_numpy(q.view("uint8")).view(torch.float8_e4m3fn), *map(torch.from_numpy, others)]
    ids = entry()(*(tensor.to(device) for tensor in tensors))
    assert ids.device.type == device and ids.dtype == torch.int32
    rules.judge(ids.cpu().numpy(), inputs, 2048)
