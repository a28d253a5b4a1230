"""OpenAI's gpt2-medium against recorded values, where its file is in the local cache.

The values come from public sources; no machine that this was written on had the file. Without it
the test is skipped: it is 1.5 GB, and tests download nothing. To get it, run
`python -m weights.official gpt2-medium`.
"""

import pytest
import torch

from model import GPT2
from weights import load_weights
from weights.official import cached

LOGITS_IDS = [
    [39034, 27045, 44597, 40054, 24661, 41841, 8465, 33276, 35866, 18887],
    [26572, 5959, 49293, 30135, 37706, 44578, 4191, 59, 26215, 12706],
]


@torch.no_grad()
def test_logits_are_the_recorded_ones() -> None:
    """Three corners of the logits of two random sequences, mean difference below 1e-3."""
    if cached("gpt2-medium") is None:
        pytest.skip("gpt2-medium is not cached: python -m weights.official gpt2-medium")
    model = GPT2.from_state_dict(load_weights("gpt2-medium"), assign=True).eval()
    logits = model(torch.tensor(LOGITS_IDS))
    for got, recorded in (
        (logits[0, 0, :6], [-82.46401, -81.35242, -85.97414, -89.01976, -86.47252, -85.04256]),
        (logits[1, 9, :4], [-53.020767, -53.85416, -54.717762, -55.654854]),
        (logits[1, 9, -3:], [-61.43402, -60.38213, -53.74377]),
    ):
        assert (got - torch.tensor(recorded)).abs().mean() < 1e-3
