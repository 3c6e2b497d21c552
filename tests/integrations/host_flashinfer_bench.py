"""FlashInfer-Bench's own check of a solution, from the installed package, on ours.

How it judges what solutions compute needs PyTorch and CUDA, and no release has its rules for indexers yet: they are
written down in tests/flashinfer_rules.py, and tests/gpu/test_flashinfer_bench.py applies them.
"""

import json

import pytest

import hisa_jax as hj
from hisa_jax.integrations.flashinfer_bench import DEFINITION, entry, solution
from tests.integrations.installed import namespace

namespace("flashinfer_bench")
namespace("flashinfer_bench.data")
from flashinfer_bench.data.solution import Solution  # noqa: E402


@pytest.mark.parametrize("method", [hj.Dsa(topk=2048), hj.Hisa(), hj.Scan(topk=2048)])
def test_a_solution_is_one(method):
    made = Solution.model_validate_json(json.dumps(solution(method, author="test")))
    assert made.definition == DEFINITION and not made.spec.destination_passing_style
    assert made.get_entry_symbol() == "run"
    compile(made.get_entry_source().content, "main.py", "exec")


def test_solutions_of_different_methods_differ():
    methods = [hj.Dsa(topk=2048), hj.Hisa(), hj.Hisa(block_topk=32)]
    made = [Solution(**solution(method)) for method in methods]
    assert len({one.hash() for one in made}) == 3
    assert [one.name for one in made] == ["hisa_jax_dsa", "hisa_jax_hisa", "hisa_jax_hisa_block_topk_32"]


def test_without_pytorch_an_entry_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match="entry: the package torch is missing: pip install torch"):
        entry()
