"""Fused log-softmax + KL divergence over a large vocabulary. Importing this needs no Triton."""

from kernels.fused_kl_div import fused_kl_div
from kernels.fused_linear_kl_div import fused_linear_kl_div
from kernels.target import TwoLevelTarget

__all__ = ["TwoLevelTarget", "fused_kl_div", "fused_linear_kl_div"]
