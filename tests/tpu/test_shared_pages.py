"""Pages that emulated devices share, searched by the TPU kernels: tests/shared_pages.py, a minute a case and more."""

import pytest

from tests import emulated

PROMISES = {
    "two": ("hisa_over_two_devices",),
    "four": ("flat_over_four_devices", "hisa_over_four_devices"),
    "others": ("stripes_of_two_blocks_and_8_bits", "the_other_methods", "candidates_alone_are_exchanged"),
    "isolation": ("what_others_hold_leaves_no_trace",),
}


@pytest.mark.exhaustive  # test_pods.py compiles it, tests/context_paged.py has the promises by XLA
@pytest.mark.slow
@pytest.mark.parametrize("promises", PROMISES)
def test_pages_shared_by_emulated_devices_keep_the_contract(promises):
    emulated.assert_kept(
        "tests.shared_pages", "mosaic_tpu", *PROMISES[promises], n=len(PROMISES[promises]), timeout_s=1800
    )
