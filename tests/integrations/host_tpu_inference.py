"""tpu-inference's own tests of streamindex_topk, from the installed package, with ours in place of theirs.

`import tpu_inference` wants vLLM; the folder of the indexer needs jax alone, so the package is entered as a namespace.
"""

import pytest

from tests.integrations import conformance
from tests.integrations.installed import load_tests, namespace, run_example

namespace("tpu_inference")
from tpu_inference.kernels.experimental.deepseek_v4.indexer import streamindex_topk as theirs  # noqa: E402

from hisa_jax.integrations.streamindex import streamindex_topk  # noqa: E402

theirs.streamindex_topk = streamindex_topk
globals().update(load_tests("tests/kernels/deepseek_v4/test_streamindex_topk.py"))


def test_the_example_of_the_documentation_runs(monkeypatch):
    monkeypatch.setattr(theirs, "streamindex_topk", None)  # put back after it
    run_example("tpu_inference")
    assert theirs.streamindex_topk.func is streamindex_topk


@pytest.mark.filterwarnings("ignore")  # NaN and infinity are in the inputs
def test_what_conformance_md_says_of_theirs_holds():
    assert not conformance.surprises("tpu_inference")
