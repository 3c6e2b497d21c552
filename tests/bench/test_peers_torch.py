"""The peers' compositions on a CPU, with fake kernels in torch; skipped without torch. 5 s."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bench.peers.glue import Glue  # noqa: E402
from bench.peers.packages import Peers, _torch_topk  # noqa: E402
from bench.peers.theirs import Theirs  # noqa: E402
from tests.bench.peers_fakes import FakeDeepGemm  # noqa: E402

MODEL = types.SimpleNamespace(topk=96, block_size=128, block_topk=3)
S, H, D, E4M3 = 1024, 4, 16, torch.float8_e4m3fn


@pytest.fixture
def theirs():
    peers = Peers(torch, FakeDeepGemm(torch), None, {"torch.topk": _torch_topk(torch)}, ())
    made = Theirs(peers)
    made.glue = Glue(torch, compiled=False)
    made.tensor = lambda x: x
    return made


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    return dict(
        q=torch.randn(1, 5, H, D).to(E4M3),
        k=torch.randn(1, S, D).to(E4M3),
        scales=torch.rand(1, S) + 0.5,
        w=torch.randn(1, 5, H),
        positions=torch.tensor([[1023, 1000, 500, 130, 40]], dtype=torch.int32),
    )


def scores_of(q, k, w):
    return (np.maximum(k.float().numpy() @ q.float().numpy().T, 0) * w.numpy()).sum(1)


def wanted(drawn, keep_blocks, t):
    """The tokens of query t, all in NumPy."""
    values = drawn["k"][0].float() * drawn["scales"][0][:, None]
    seen = int(drawn["positions"][0, t]) + 1
    tokens = np.arange(seen)
    if keep_blocks:
        n = -(-seen // 128)
        means = values.view(-1, 128, D).mean(1)[:n]
        scores = scores_of(drawn["q"][0, t], means, drawn["w"][0, t])
        scores[[0, n - 1]] = np.inf
        kept = np.argsort(-scores)[: MODEL.block_topk]
        tokens = tokens[np.isin(tokens // 128, kept)]
    scores = scores_of(drawn["q"][0, t], values[tokens], drawn["w"][0, t])
    return np.sort(tokens[np.argsort(-scores)[: MODEL.topk]])


def check(lists, drawn, keep_blocks):
    for t, row in enumerate(np.asarray(lists)):
        got, right = np.sort(row[row >= 0]), wanted(drawn, keep_blocks, t)
        assert len(got) == len(right) and len(np.intersect1d(got, right)) >= 0.9 * len(right), t


@pytest.mark.parametrize("part", ["flat", "hisa"])
def test_prefill_chooses_as_numpy_does(theirs, drawn, part):
    (call,) = getattr(theirs, part)(tuple(drawn.values()), MODEL).values()
    check(call(), drawn, part == "hisa")


@pytest.mark.parametrize("part", ["flat_decode", "hisa_decode"])
def test_decoding_chooses_as_numpy_does(theirs, drawn, part):
    """Each query is a request of its own, whose table names the same pages."""
    cache = types.SimpleNamespace(keys=drawn["k"].view(-1, 64, D), scales=drawn["scales"].view(-1, 64))
    tables = torch.arange(S // 64, dtype=torch.int32).expand(5, -1).contiguous()
    operands = drawn["q"][0], drawn["w"][0], drawn["positions"][0] + 1, cache, tables, None
    (call,) = getattr(theirs, part)(operands, MODEL).values()
    check(call(), drawn, part == "hisa_decode")
