"""Pretrain a small GPT-2 from scratch: how the embedded checkpoint was made.

    python -m train.pretrain --text corpus.txt --held-out heldout.txt

Next-token cross-entropy over all 50,257 tokens, AdamW, warm-up and cosine, bf16 autocast, dropout;
on the CPU. Stop it at any time: the same command resumes from the last save, with the same batches,
because the batch and the dropout of a step are drawn from seed + step alone.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from annotated_types import Ge, Le, Lt, MultipleOf
from pydantic import FiniteFloat
from torch import Tensor
from tqdm import tqdm

from model import GPT2, GPT2Config
from model.gpt2 import HEAD_DIM
from model.tokenizer import load_tokenizer
from train.checkpoint import is_due, read_tensors, write_tensors
from train.console import command, progress, say, validated
from weights import save_weights
from weights.layout import expand

Count = Annotated[int, Ge(1), Le(65_536)]
Steps = Annotated[int, Ge(0), Le(10**9)]
NonNegative = Annotated[FiniteFloat, Ge(0)]


@dataclass(frozen=True)
class Options:
    """The corpus and the recipe; the defaults are those of the embedded checkpoint."""

    text: Path  # training text, UTF-8; <|endoftext|> ends a document
    held_out: Path  # text for the held-out loss, by which the best checkpoint is chosen
    out: Path = Path("runs/pretrain")  # folder for the best checkpoint, the state and the log
    n_layer: Count = 10  # blocks
    n_embd: Annotated[Count, MultipleOf(HEAD_DIM)] = 128  # width, a multiple of 64
    n_positions: Count = 256  # positions, and the length of a training window
    steps: Annotated[Steps, Ge(1)] = 2200  # optimisation steps
    batch: Count = 16  # windows per step
    lr: NonNegative = 3e-3  # peak learning rate; the cosine ends at a tenth of it
    warmup: Steps = 200  # steps of linear warm-up
    weight_decay: NonNegative = 0.1  # of matrices; biases and LayerNorms have none
    dropout: Annotated[NonNegative, Lt(1)] = 0.1  # of the embedding sum and a block's two outputs
    eval_every: Steps = 250  # between held-out losses and saves; 0: after the last step only
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0  # of initial weights, batches and dropout


def read_ids(path: Path, length: int) -> Tensor:
    """Return the ids of a text file, (n,); ValueError if it cannot be read or is too short."""
    try:
        ids = load_tokenizer().encode(expand(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a text file in UTF-8") from error
    if len(ids) <= length:
        raise ValueError(f"{path}: got {len(ids)} tokens, expected more than {length}")
    return torch.tensor(ids)


def share(corpus: Tensor, n_vocab: int) -> tuple[Tensor, Tensor]:
    """Renumber the tokens of a corpus from 0; all other tokens share the last id.

    A corpus of 2 million tokens uses some 19,000 of the 50,257. The row of wte of a token that
    never occurs is only ever pushed away from the hidden states, as is every other such row, so all
    of them share one, which counts once per unused token in the softmax:

        sum over V of e^z = sum over used tokens of e^z + n_unused e^z_unused

    This is exactly the full softmax, at 37 % of the work. In the end each unused token gets a copy.

    Returns the new id of every token, (n_vocab,), and what is added to the logits, (size,): zeros,
    and for the shared id log n_unused, as n_unused e^z = e^(z + log n_unused).
    """
    used = corpus.unique()
    shared = len(used)
    new_ids, bias = torch.full((n_vocab,), shared), torch.zeros(shared + 1)
    new_ids[used] = torch.arange(shared)
    bias[shared] = torch.tensor(float(n_vocab - shared)).log()  # -inf if every token occurs
    return new_ids, bias


def make_model(options: Options, vocab_size: int) -> tuple[GPT2, torch.optim.AdamW]:
    """Return a model with random weights, and AdamW with weight decay on the matrices only."""
    o = options
    config = GPT2Config(vocab_size, o.n_positions, o.n_embd, o.n_layer, o.n_embd // HEAD_DIM)
    torch.manual_seed(o.seed)
    model = GPT2(replace(config, embd_pdrop=o.dropout, resid_pdrop=o.dropout))
    matrices, vectors = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    optimizer = torch.optim.AdamW(vectors, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    optimizer.add_param_group({"params": matrices, "weight_decay": o.weight_decay})
    return model, optimizer


def named_state(model: GPT2, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return every tensor that training changes, always in place: the weights and AdamW's state."""
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros(()), **moments}
        state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def resume(path: Path, state: dict[str, Tensor]) -> list[dict[str, float]]:
    """Restore the last save, if any, and return its log; ValueError if it does not fit."""
    if not path.exists():
        return []
    try:
        tensors, metadata = read_tensors(path, state)
        log = json.loads(metadata["log"])
        say(f"resuming after step {log[-1]['step']}, the last one saved in {path.parent}")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: {error}; expected a save of the same command") from error
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return log


def learning_rate(options: Options, step: int) -> float:
    """Return the rate of a step, from 0: linear warm-up, then half a cosine down to a tenth."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * done))


@torch.no_grad()
def held_out_loss(model: GPT2, bias: Tensor, ids: Tensor) -> float:
    """Return nats per token of GPT-2 on shared ids (n,), in float32, over windows side by side."""
    model.eval()
    T, total = model.config.n_positions, 0.0
    for start in tqdm(range(0, len(ids) - 1, T), "held-out loss", leave=False, disable=None):
        window = ids[start : start + T + 1]  # (T + 1,)
        logits = model(window[None, :-1])[0] + bias  # (T, size)
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        total += float(bias[window[1:]].sum())  # an unused token is one of n_unused
    return total / (len(ids) - 1)


def pretrain(options: Options) -> None:
    """Train, or resume training, and keep the weights with the least held-out loss.

    Raises ValueError for texts or a save that cannot be used, and for a loss of NaN.
    """
    B, T, out = options.batch, options.n_positions, expand(options.out)
    text, held_out = read_ids(options.text, T), read_ids(options.held_out, 1)
    new_ids, bias = share(text, load_tokenizer().n_vocab)
    corpus, held_out = new_ids[text], new_ids[held_out]
    model, optimizer = make_model(options, len(bias))
    state = named_state(model, optimizer)
    log = resume(out / "state.safetensors", state)
    losses = []
    out.mkdir(parents=True, exist_ok=True)
    with progress("pretrain", int(log[-1]["step"]) if log else 0, options.steps) as bar:
        for step in range(bar.n, options.steps):
            model.train()
            torch.manual_seed(options.seed + step)  # of the batch and the dropout
            starts = torch.randint(len(corpus) - T, (B, 1))
            windows = corpus[starts + torch.arange(T + 1)]  # (B, T + 1)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.hidden_states(windows[:, :-1])  # (B, T, C)
                logits = F.linear(hidden, model.wte.weight, bias).float()  # (B, T, size)
                loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            optimizer.step()
            bar.update()
            if not is_due(done := step + 1, options.eval_every, options.steps):
                continue
            mean, nats = torch.stack(losses).mean(), held_out_loss(model, bias, held_out)
            losses.clear()
            bar.clear()
            if not math.isfinite(nats):
                raise ValueError(f"step {done}: the held-out loss is {nats}; try a smaller --lr")
            if nats < min((record["held_out"] for record in log), default=math.inf):
                best = {name: p.half() for name, p in model.state_dict().items()}
                save_weights(best | {"wte.weight": best["wte.weight"][new_ids]}, out)
            log.append({"step": done, "training": mean.item(), "held_out": nats})
            write_tensors(out / "state.safetensors", state, {"log": json.dumps(log)})
            (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
            say(f"step {done}: training {mean:.4f}, held out {nats:.4f} nats per token")
    say(f"the checkpoint with the least held-out loss is in {out}")


def main() -> None:
    with command():
        options = tyro.cli(Options, prog="python -m train.pretrain", description=__doc__)
        pretrain(validated(Options, asdict(options)))


if __name__ == "__main__":
    main()
