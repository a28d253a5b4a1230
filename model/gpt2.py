"""GPT-2, top to bottom.

    tokens -> wte + wpe -> n_layer times (x + attn(ln_1(x)), x + mlp(ln_2(x))) -> ln_f -> wte^T

Glossary
    B  batch: sequences side by side          C  n_embd: width of the residual stream
    T  tokens of each sequence in this call   H  n_head: attention heads
    S  positions attended to: past + T        D  C / H = 64: width of one head
    V  vocab_size                             x  always the residual stream, (B, T, C)
    wte, wpe  token and position embeddings   ln, attn  LayerNorm and attention

"The paper" is Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): its
section 2.3 describes the model. Parameters have the names and layouts of OpenAI's gpt-2 repository,
so a checkpoint loads by name.
"""

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state_dict import official_parameters

HEAD_DIM = 64  # in every size of GPT-2, so the width determines the number of heads


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2, named as in OpenAI's config.json; the defaults are gpt2-medium."""

    vocab_size: int = 50257  # 50,000 merges + 256 bytes + <|endoftext|>
    n_positions: int = 1024  # positions are learned: there is no embedding for a 1,025th
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 16
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0  # pre-training used dropout 0.1 in these three places; off by default
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")


class KVCache:
    """Keys and values of one block for the tokens so far, (B, H, length, D); allocated once."""

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest keys and values, (B, H, T, D), and return all of them, (B, H, S, D)."""
        if self.length == 0:
            B, H, _, D = k.shape
            self._keys = k.new_empty(B, H, self.max_positions, D)  # more than S: for later tokens
            self._values = torch.empty_like(self._keys)
        past = self.length
        self.length += k.shape[2]
        self._keys[:, :, past : self.length] = k
        self._values[:, :, past : self.length] = v
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]  # (B, H, S, D)


class Affine(nn.Module):
    """x W + b, W stored (in, out), the transpose of nn.Linear's. transformers calls it Conv1D."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))  # (in, out)
        self.bias = nn.Parameter(torch.empty(n_out))  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(D) + mask) v in each of H heads.

    Vaswani et al., "Attention Is All You Need" (2017), equation (1) and section 3.2.3 on the mask.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Affine(C, 3 * C)  # q, k and v in one product, in that order
        self.c_proj = Affine(C, C)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Without a mask, tokens attend causally, and a single token to everything in the cache. Any
        other case needs a mask: bool, broadcast to (B, H, T, S), True where a query sees a key.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (
            y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for y in (q, k, v)
        )
        is_causal = mask is None and (cache is None or cache.length == 0)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """gelu(x W1 + b1) W2 + b2, four times as wide inside.

    gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, "Gaussian Error
    Linear Units" (2016), in their approximate form, which GPT-2 was trained with. The exact one,
    x/2 (1 + erf(x / sqrt(2))), differs from it by up to 5e-4.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Affine(config.n_embd, 4 * config.n_embd)  # C -> 4C
        self.c_proj = Affine(4 * config.n_embd, config.n_embd)  # 4C -> C
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), each position on its own."""
        y = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class Block(nn.Module):
    """Two residual halves, x + f(ln(x)): attention, then the MLP.

    Pre-norm: the paper (2.3) moved LayerNorm from the output of each half to its input.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); cache and mask go to the attention."""
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT2(nn.Module):
    """The language model. Its parameters have exactly the checkpoint's names and layouts."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)  # (V, C), also the head
        self.wpe = _embedding(config.n_positions, config.n_embd)  # (n_positions, C)
        self.embd_dropout = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self._init_parameters()

    def hidden_states(
        self, tokens: Tensor, cache: list[KVCache] | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Return the normalised output of the last block, (B, T, C); logits = hidden @ wte^T.

        Args:
            tokens: ids, int64 (B, T). Callers check that they lie in the vocabulary, because a
                check here would wait for the device.
            cache: from `new_cache`; the tokens then follow those already in it.
            padding: int64 (B,), how many tokens at the start of each row are padding, so that
                prompts of different lengths end together.

        Raises:
            ValueError: tokens have a wrong rank or dtype, are empty, or pass the last position.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise ValueError(
                f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, expected torch.int64 "
                "of shape (B, T), neither of them 0; one sequence is tokens[None]"
            )
        T = tokens.shape[1]
        past = cache[0].length if cache else 0
        limit = min(self.config.n_positions, cache[0].max_positions if cache else math.inf)
        if past + T > limit:
            raise ValueError(
                f"tokens: got T = {T} after {past} cached positions, expected at most "
                f"{limit - past}: there are {limit} positions; crop the sequence"
            )
        positions = torch.arange(past, past + T, device=tokens.device)  # (T,)
        mask = None
        if padding is not None or (past and T > 1):
            keys = torch.arange(past + T, device=tokens.device)  # (S,)
            mask = keys <= positions[:, None]  # (T, S)
            if padding is not None:
                # A padding token sees itself alone: a softmax over no key at all would be NaN.
                mask = mask & (keys >= padding.view(-1, 1, 1, 1)) | (keys == positions[:, None])
                positions = (positions - padding[:, None]).clamp(min=0)  # (B, T); mask (B, 1, T, S)
        x = self.embd_dropout(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None, mask)
        return self.ln_f(x)  # (B, T, C)

    def forward(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Return the logits of the token after each position: int64 (B, T) -> (B, T, V)."""
        hidden = self.hidden_states(tokens, cache)  # (B, T, C)
        return F.linear(hidden, self.wte.weight)  # (B, T, V): no bias, no scale

    def new_cache(self, max_positions: int) -> list[KVCache]:
        """Return an empty cache for `max_positions` positions: one KVCache per block."""
        return [KVCache(max_positions) for _ in self.h]

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """Draw weights to train from scratch: N(0, 0.02), biases 0, gains 1.

        c_proj is divided by sqrt(2 n_layer), because 2 n_layer of them add up in x (the paper,
        2.3). wpe gets 0.02 as in transformers; OpenAI's code has 0.01.
        """
        if self.wte.weight.is_meta:
            return  # there is nothing to draw, and trying would import torch's compiler: seconds
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith(".bias"):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(0.0, 0.02)  # LayerNorm gains are 1 already

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], assign: bool = False) -> "GPT2":
        """Return a model with these weights; their shapes determine its configuration.

        Args:
            state_dict: tensors in the official layouts, of any floating dtype; the parameters are
                float32. Prefixes of transformers, torch.compile, DDP and Lightning are stripped;
                causal masks and a tied head are dropped.
            assign: use float32 tensors as the parameters, without a copy. The model then owns them,
                so do not build another from the same state dict. The default copies everything.

        Raises:
            ValueError: a name is missing or unexpected, or a shape or dtype is wrong.
        """
        named = official_parameters(state_dict)
        V, C = named["wte.weight"].shape
        if C % HEAD_DIM:
            raise ValueError(f"wte.weight: got width {C}, expected a multiple of {HEAD_DIM}")
        n_layer = len({name.split(".")[1] for name in named if name.startswith("h.")})
        config = GPT2Config(V, len(named["wpe.weight"]), C, n_layer, n_head=C // HEAD_DIM)
        with torch.device("meta"):  # no memory, and no random draw that would be overwritten
            model = cls(config)
        weights = {
            name: tensor.to(torch.float32, copy=not assign).contiguous()
            for name, tensor in named.items()
        }
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # names or shapes; up to one line for each of them
            message = f"not the weights of a GPT-2: {error}"
            raise ValueError(textwrap.shorten(message, 400)) from error
        return model


def _embedding(count: int, width: int) -> nn.Embedding:
    """Return nn.Embedding(count, width) without its N(0, 1) draw, which would be overwritten."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)
