"""The table of python -m tests.kernels.count: what a launch asks of a GPU's memory."""

import pytest

pytest.importorskip("triton")

from tests.kernels import count
from tests.kernels.kl_cases import COMPILED_ON_CPU, NEEDS_3_7

pytestmark = pytest.mark.skipif(not COMPILED_ON_CPU, reason="for compiled kernels without a GPU")


@NEEDS_3_7
@pytest.mark.parametrize("target", count.TARGETS)
def test_logits_are_read_once_in_each_direction_and_by_whole_sectors(target):
    """Bytes per logit, and of a teacher's. The rest is two bits per logit of 13 whole tiles (0.27
    bytes), and up to six numbers per row that each of 256 threads reads; of the sectors that a
    request touches, 19 in 20 are used whole. And an exponential for each of these logits."""
    reads = 2 if "teacher" in target else 1
    rows = list(count.launches(target))
    assert [row["kernel"] for row in rows] == 2 * ["forward_kernel", "backward_kernel"]
    for row in rows:
        size = count.DTYPES[row["dtype"]].itemsize
        assert reads * size <= row["read"] <= reads * size + 0.45
        assert row["read"] / (32 * row["ld_sectors"]) > 0.95
        assert reads <= row["special"] < 1.16 * reads
        if row["kernel"] == "backward_kernel":
            assert row["wrote"] == size
            assert row["wrote"] / (32 * row["st_sectors"]) > 0.95
        else:
            assert row["wrote"] < 0.001
