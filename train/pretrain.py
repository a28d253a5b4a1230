"""Pretrain a small GPT-2 from scratch: how the embedded checkpoint was made.

    python -m train.pretrain --text corpus.txt --held-out heldout.txt

On the CPU: next-token cross-entropy over all 50,257 tokens, AdamW, warm-up and cosine, bf16
autocast, dropout. Stop it at any time. The same command resumes from the last save, with the same
batches, because the batch and the dropout of a step are drawn from seed + step alone.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT2, GPT2Config
from model.gpt2 import HEAD_DIM
from model.tokenizer import load_tokenizer
from train.command import command, expect, parse, progress, say
from weights import save_weights
from weights.checkpoint import atomic_write
from weights.layout import expand


@dataclass(frozen=True)
class Options:
    """The corpus and the recipe; the defaults made the embedded checkpoint."""

    text: Path  # train on this text, UTF-8; <|endoftext|> ends a document
    held_out: Path  # keep the checkpoint with the least loss on this text
    out: Path = Path("runs/pretrain")  # write the best checkpoint, the state and the log here
    n_layer: int = 10  # use this many blocks
    n_embd: int = 128  # make them this wide, a multiple of 64
    n_positions: int = 256  # learn this many positions; windows are as long
    steps: int = 2200  # stop after this many steps
    batch: int = 16  # train on this many windows per step
    lr: float = 3e-3  # set the peak learning rate; the cosine ends at a tenth of it
    warmup: int = 200  # raise the rate linearly over this many steps
    weight_decay: float = 0.1  # decay matrices by this; biases and LayerNorms not at all
    dropout: float = 0.1  # drop from the embedding sum and a block's two outputs
    eval_every: int = 250  # measure the held-out loss and save every N steps
    seed: int = 0  # draw initial weights, batches and dropout from this seed


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

    A corpus of 2 million tokens uses some 19,000 of the 50,257. Training only pushes the wte row of
    an unused token away from the hidden states, and all such rows in the same way. So they share
    one row, which counts once per unused token in the softmax:

        sum over V of e^z = sum over used tokens of e^z + n_unused e^z_unused

    This is exactly the full softmax, at 37 % of the work. In the end each unused token gets a copy.

    Returns the new id of every token, (n_vocab,), and a bias for the logits, (size,): log n_unused
    for the shared id, because n_unused e^z = e^(z + log n_unused), and 0 for the others.
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


def resume(path: Path, model: GPT2, optimizer: torch.optim.AdamW) -> list[dict[str, Any]]:
    """Restore the last save, if any, and return its log; ValueError if it does not fit."""
    if not path.exists():
        return []
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, LookupError, UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path}: {reason}; expected a save of the same command") from error
    say(f"continuing after step {state['log'][-1]['step']}, the last one saved in {path.parent}")
    return state["log"]


def learning_rate(options: Options, step: int) -> float:
    """Return the rate of a step, from 0: linear warm-up, then half a cosine down to a tenth."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * done))


@torch.no_grad()
def held_out_loss(model: GPT2, bias: Tensor, ids: Tensor) -> float:
    """Return the nats per token on shared ids (n,), in float32, over adjacent windows."""
    model.eval()
    T, total = model.config.n_positions, 0.0
    starts = range(0, len(ids) - 1, T)
    for start in progress(starts, "held-out loss", len(starts)):
        window = ids[start : start + T + 1]  # (T + 1,)
        logits = model(window[None, :-1])[0] + bias  # (T, size)
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        total += float(bias[window[1:]].sum())  # an unused token is one of n_unused
    return total / (len(ids) - 1)


def pretrain(options: Options) -> None:
    """Train or resume, and keep the weights with the least held-out loss.

    Raises ValueError for texts or a save that cannot be used, and for a loss of NaN.
    """
    B, T, out = options.batch, options.n_positions, expand(options.out)
    expect(options.n_embd % HEAD_DIM == 0, "n-embd", options.n_embd, "a multiple of 64")
    for name in ("steps", "batch", "eval_every"):
        value = getattr(options, name)
        expect(value > 0, name.replace("_", "-"), value, "at least 1")
    expect(0 <= options.dropout < 1, "dropout", options.dropout, "0 or more, below 1")
    text, held_out = read_ids(options.text, T), read_ids(options.held_out, 1)
    new_ids, bias = share(text, load_tokenizer().n_vocab)
    corpus, held_out = new_ids[text], new_ids[held_out]
    model, optimizer = make_model(options, len(bias))
    log = resume(out / "state.pt", model, optimizer)
    losses = []
    out.mkdir(parents=True, exist_ok=True)
    steps = range(int(log[-1]["step"]) if log else 0, options.steps)
    for step in progress(steps, "pretrain", len(steps)):
        model.train()
        torch.manual_seed(options.seed + step)  # for the batch and the dropout
        starts = torch.randint(len(corpus) - T, (B, 1))
        windows = corpus[starts + torch.arange(T + 1)]  # (B, T + 1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden_states(windows[:, :-1])  # (B, T, C)
            logits = F.linear(hidden, model.wte.weight, bias).float()  # (B, T, size)
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        optimizer.step()
        done = step + 1
        if done % options.eval_every and done < options.steps:
            continue
        mean, nats = torch.stack(losses).mean(), held_out_loss(model, bias, held_out)
        losses.clear()
        if not math.isfinite(nats):
            raise ValueError(f"step {done}: the held-out loss is {nats}; try a smaller --lr")
        if nats < min((record["held_out"] for record in log), default=math.inf):
            best = {name: p.half() for name, p in model.state_dict().items()}
            save_weights(best | {"wte.weight": best["wte.weight"][new_ids]}, out)
        log.append({"step": done, "training": mean.item(), "held_out": nats})
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
        with atomic_write(out / "state.pt") as temporary:
            torch.save(state, temporary)
        (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        say(f"step {done}: training {mean:.4f}, held out {nats:.4f} nats per token")
    say(f"the checkpoint with the least held-out loss is in {out}")


def main() -> None:
    """Run the command line."""
    with command():
        pretrain(parse(Options, __doc__, "python -m train.pretrain"))


if __name__ == "__main__":
    main()
