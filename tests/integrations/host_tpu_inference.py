"""tpu-inference's own tests of streamindex_topk, from the installed package, with ours in place of theirs.

`import tpu_inference` wants vLLM; the folder of the indexer needs jax alone, so the package is entered as a namespace.
"""

from tests.integrations.installed import namespace, tests_of

namespace("tpu_inference")
from hisa_jax.integrations.streamindex import streamindex_topk  # noqa: E402
from tpu_inference.kernels.experimental.deepseek_v4.indexer import streamindex_topk as theirs  # noqa: E402

theirs.streamindex_topk = streamindex_topk
globals().update(tests_of("tests/kernels/deepseek_v4/test_streamindex_topk.py"))
