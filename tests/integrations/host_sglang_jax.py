"""sglang-jax's own tests of streamindex_topk, from its repository, with ours in place of theirs.

They skip themselves on a CPU, where their kernel has no interpreter; ours has no need of one.
"""

import sys
from unittest import mock

import jax

from hisa_jax.integrations.streamindex import streamindex_topk
from tests.integrations import conformance
from tests.integrations.installed import SOURCE, load_tests

sys.path.insert(0, str(SOURCE / "python"))
from sgl_jax.srt.kernels.dsa import streamindex_topk as theirs

theirs.streamindex_topk = streamindex_topk
with mock.patch.object(jax, "default_backend", return_value="tpu"):
    globals().update(load_tests("test/srt/kernels/dsa/test_streamindex_topk.py", SOURCE))


def test_what_conformance_md_says_of_theirs_holds():
    assert not conformance.surprises("sglang_jax")
