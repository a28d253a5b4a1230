"""What the targets and both losses refuse: by name, what was got and what was expected."""

import math

import pytest
import torch

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from tests.kernels.kl_cases import DEVICE, LOSSES, hidden_and_head, random_logits, two_level

SOME = torch.arange(10) < 3
TOKENS, EVEN = two_level(8), torch.full((8,), 1 / 8, device=DEVICE)
T = random_logits(2, 8)
H, W = random_logits(2, 3), random_logits(8, 3)
WEIGHTS = torch.ones(2, device=DEVICE)
from_hidden = TeacherTarget.from_hidden

CALLS = [
    (TypeError, "bool", lambda: TwoLevelTarget(SOME.float())),
    (TypeError, r"got list; .*index_fill", lambda: TwoLevelTarget([1, 2, 3])),
    (TypeError, r"\(V,\), got torch.bool \(1, 10\)", lambda: TwoLevelTarget(SOME[None])),
    (ValueError, "got 0 of 10", lambda: TwoLevelTarget(SOME & False)),
    (ValueError, "got 10 of 10", lambda: TwoLevelTarget(SOME | True)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, 1.0, 1.0)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, 1.0, -0.1)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, math.nan, 0.0)),
    (ValueError, "alpha > beta", lambda: TwoLevelTarget(SOME, math.inf, 0.0)),
    (TypeError, "floating-point", lambda: TeacherTarget(T.long())),
    (TypeError, r"\(\.\.\., V\)", lambda: TeacherTarget(T.sum())),
    (TypeError, r"tilt must be \(TwoLevelTarget, G\)", lambda: TeacherTarget(T, TOKENS)),
    (TypeError, "tilt must be", lambda: TeacherTarget(T, (TOKENS.mask, 5.0))),
    (TypeError, "tilt must be", lambda: TeacherTarget(T, (TOKENS, "5"))),
    (ValueError, "the tilt must be of 7", lambda: TeacherTarget(T[:, 1:], (TOKENS, 5.0))),
    (ValueError, r"below \+inf", lambda: TeacherTarget(T, (TOKENS, math.inf))),
    (ValueError, r"below \+inf", lambda: TeacherTarget(T, (TOKENS, math.nan))),
    (ValueError, r"a tensor \(\)", lambda: TeacherTarget(T, (TOKENS, T[0]))),
    (TypeError, "the teacher's weight", lambda: from_hidden(H, [W])),
    (ValueError, "for fused_linear_kl_div", lambda: fused_kl_div(T, from_hidden(H, W))),
    (
        ValueError,
        "the teacher's hidden must be .* autocast .* got torch.bfloat16",
        lambda: fused_linear_kl_div(H, W, from_hidden(H.bfloat16(), W)),
    ),
    (ValueError, r"weight \(V, C\)", lambda: fused_linear_kl_div(H, W.t(), TOKENS)),
    (ValueError, "got torch.bfloat16", lambda: fused_linear_kl_div(H.bfloat16(), W, TOKENS)),
    (TypeError, "floating-point", lambda: fused_linear_kl_div(H.long(), W, TOKENS)),
    (ValueError, "chunk_rows", lambda: fused_linear_kl_div(H, W, TOKENS, chunk_rows=0)),
    (ValueError, "chunk_rows", lambda: fused_linear_kl_div(H, W, TOKENS, chunk_rows=2.5)),
    (TypeError, r"logits must be .* \(\.\.\., V\)", lambda: fused_kl_div(T.long(), TOKENS)),
    (TypeError, r"logits must be .* \(\.\.\., V\)", lambda: fused_kl_div([[0.0]], TOKENS)),
    (TypeError, r"logits must be .* \(\.\.\., V\)", lambda: fused_kl_div(T.sum(), TOKENS)),
    (ValueError, 'pass "batchmean"', lambda: kl_div(T, TOKENS, "mean")),
]


@pytest.mark.parametrize(("error", "message", "call"), CALLS)
def test_bad_arguments_are_refused_by_name(error, message, call):
    """Of the targets, and of one of the losses."""
    with pytest.raises(error, match=message):
        call()


FITS = r"fit logits of shape \(2, 8\)"
OF_BOTH = [  # target and options
    (ValueError, 'pass "batchmean" for the mean', TOKENS, {"reduction": "mean"}),
    (ValueError, FITS, two_level(9), {}),
    (ValueError, FITS, EVEN[None], {}),
    (ValueError, FITS, TeacherTarget(EVEN), {}),
    (ValueError, FITS, EVEN.to("meta"), {}),
    (TypeError, "TwoLevelTarget", TOKENS.mask, {}),
    (TypeError, "TwoLevelTarget", None, {}),
    (TypeError, "to_dense", T.to_sparse(), {}),
    (ValueError, "impl must be", TOKENS, {"impl": "cuda"}),
    (TypeError, "TwoLevelTarget only", EVEN, {"impl": "triton-simple"}),
    (ValueError, r"per row; got torch.float32 \(1,\)", TOKENS, {"row_weights": WEIGHTS[:1]}),
    (ValueError, "real", TOKENS, {"row_weights": WEIGHTS.to(torch.complex64)}),
    (ValueError, "meta", TOKENS, {"row_weights": WEIGHTS.to("meta")}),
    (ValueError, "float", TOKENS, {"row_weights": 2.0}),
    (ValueError, "detach", TOKENS, {"row_weights": WEIGHTS.clone().requires_grad_()}),
]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bad_arguments_of_both_losses_are_refused_by_name(loss):
    """A target that does not fit, a path that is none or cannot, bad weights of rows."""
    hidden, weight = hidden_and_head(2, vocab=8)
    for error, message, target, options in OF_BOTH:
        with pytest.raises(error, match=message):
            loss(hidden, weight, target, **options)
    with pytest.raises(TypeError, match="no float64"):
        loss(hidden.double(), weight.double(), TOKENS, impl="triton")
