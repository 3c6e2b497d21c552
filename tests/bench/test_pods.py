"""`python -m bench pods`: what is read from a program, what a step may exchange, and the tables of docs/pods.md.

Programs are compiled in tests/tpu/test_pod_steps.py.
"""

import json
import pathlib

import pytest

from bench.pods import bounds, command, hlo
from bench.pods.rows import rows
from bench.pods.step import config_of
from bench.tpu.chips import CHIPS

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
%started (p: bf16[2,8]) -> bf16[8,8] {
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=mesh['data'=4,'model'=2] {'data'}
}

%goes_on (p: bf16[2,8]) -> bf16[8,8] {
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), replica_groups=mesh['data'=4,'model'=2] {'data'}
}

%layer (p: bf16[2,8]) -> bf16[2,8] {
  %async-collective-start.1 = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%started
  %fusion.2 = bf16[8,8]{1,0} fusion(%p), kind=kOutput, calls=%goes_on
  %x = (f32[4]{0}, s32[2]{0}) all-reduce(%a, %b), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %sparse_mla.3 = bf16[2,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
}

ENTRY %main (p: bf16[2,8]) -> bf16[2,8] {
  %while.1 = bf16[2,8]{1,0} while(%p), condition=%less, body=%layer
  ROOT %y = f32[3]{0} reduce-scatter(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_exchanges_are_counted_once_for_each_layer():
    """An exchange that goes on while other operations run is written in each of them; rings send what they send."""
    found = hlo.collectives(PROGRAM, 8, (1, 58))
    assert sorted((x.kind, x.dtype, x.elements, x.devices, x.times, x.moved_bytes) for x in found) == [
        ("all-gather", "bf16", 64, 4, 58, 58 * 128 * 3 / 4),
        ("all-reduce", "f32", 4, 2, 58, 58 * 24 * 2 * 1 / 2),
        ("reduce-scatter", "f32", 3, 4, 1, 12 * 3),
    ]
    assert hlo.kernels(PROGRAM) == {"sparse_mla"}
    with pytest.raises(ValueError, match=r"has 1 loops over layers, wanted one for each of \[3, 58\]"):
        hlo.collectives(PROGRAM, 8, (3, 58))


def test_what_is_wrong_with_a_step_is_said():
    row = next(row for row in rows() if row.row == "dsv32-bf16-decode-v5e")
    config, kernels = config_of(row), {*bounds.KERNELS, "hisa_merge"}
    cache = hlo.Collective("all-gather", "bf16", 1 << 30, 16, 58, 1e12)
    assert not bounds.problems(row, config, [], kernels, 1, 2)
    assert bounds.problems(row, config, [cache], kernels - {"hisa_merge"}, 3 << 30, 2 << 30) == [
        "takes 3.0 GiB of a device's 2",
        "does not call hisa_merge",
        f"a device sends 1000000 MB a step, wanted at most {bounds.most_moved_bytes(row, config) / 1e6:.0f}",
        "all-gather of 1073741824 bf16, wanted at most 917504",
    ]


def test_every_model_has_both_steps_on_every_chip():
    found = {(row.model, row.weights, row.phase, row.chip): row for row in rows()}
    assert len(found) == 3 * 2 * len(CHIPS)
    for row in found.values():
        assert row.n_devices == CHIPS[row.chip].pod_chips * CHIPS[row.chip].devices_per_chip
        assert row.batch % row.data == 0 and config_of(row).num_attention_heads % (16 * row.model_axis) == 0


def test_the_tables_of_the_page_are_those_of_the_file():
    results = json.loads((ROOT / "bench/results/pods.json").read_text())["rows"]
    page = (ROOT / "docs/pods.md").read_text()
    assert not [problem for row in results for problem in row["problems"]]
    for title, table in command.tables(results).items():
        assert table in page, title
