"""Fused log-softmax + KL divergence over a large vocabulary. Importing this needs no Triton."""

from .fused_kl_div import fused_kl_div
from .fused_linear_kl_div import fused_linear_kl_div
from .target import TeacherTarget, TwoLevelTarget

__all__ = ["TeacherTarget", "TwoLevelTarget", "fused_kl_div", "fused_linear_kl_div"]
