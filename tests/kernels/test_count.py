"""The table of python -m tests.kernels.count: what a launch asks of a GPU's memory."""

from itertools import takewhile

import pytest

from tests.kernels.kl_cases import COMPILED_ON_CPU, NEEDS_3_7

pytestmark = pytest.mark.skipif(not COMPILED_ON_CPU, reason="for compiled kernels without a GPU")
pytest.importorskip("triton")


@NEEDS_3_7
def test_logits_are_read_once_in_each_direction_and_by_whole_sectors():
    """Two-level targets: the rest is two bits per logit of 13 whole tiles (0.27 bytes), and up to
    six numbers per row that each of 256 threads reads; of the sectors that a request touches, 19
    in 20 are used whole."""
    from tests.kernels import count

    logits = count.ROWS * count.VOCAB
    rows = list(takewhile(lambda row: row[0].startswith("two-level"), count.launches()))
    assert len(rows) == 2 * 2 * 2
    for name, dtype, kernel, counts in rows:
        size = count.DTYPES[dtype].itemsize
        backward = counts.stores.bytes > logits
        assert size <= counts.loads.bytes / logits <= size + 0.45, (name, dtype, kernel)
        assert counts.stores.bytes == logits * size if backward else counts.stores.bytes < 100
        for traffic in (counts.loads, counts.stores) if backward else (counts.loads,):
            assert traffic.bytes / (32 * traffic.sectors) > 0.95, (name, dtype, kernel)
