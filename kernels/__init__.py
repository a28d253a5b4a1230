"""Fused log-softmax + KL divergence over a large vocabulary. Importing this needs no Triton."""

from kernels.linear import fused_linear_kl_div
from kernels.ops import fused_kl_div
from kernels.target import TwoLevelTarget

__all__ = ["TwoLevelTarget", "fused_kl_div", "fused_linear_kl_div"]
