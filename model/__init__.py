"""GPT-2 by hand: `gpt2.py` is the architecture, the first file to read."""

from .gpt2 import GPT2, GPT2Config

__all__ = ["GPT2", "GPT2Config"]
