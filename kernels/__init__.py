"""Fused log-softmax + KL divergence over a large vocabulary. Importing this needs no Triton."""

from kernels.target import TwoLevelTarget

__all__ = ["TwoLevelTarget"]
