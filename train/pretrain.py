"""python -m train.pretrain --text FILE --held-out FILE: how the embedded checkpoint was made.

A small GPT-2 with the full vocabulary, trained from scratch by next-token cross-entropy: AdamW,
warm-up and cosine, bf16 autocast, dropout; on the CPU, where the checkpoint was made. Tokens that
the corpus lacks share a row of wte meanwhile, see train/shared_vocabulary.py.

Stop it at any time; the same command goes on from the last save, with the same batches: batch and
dropout of a step are drawn from (seed, step) alone.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model import GPT2, GPT2Config
from model.gpt2 import HEAD_DIM
from model.tokenizer import load_tokenizer
from train.shared_vocabulary import CrossEntropy, SharedVocabulary
from weights import save_weights
from weights.checkpoint import atomic_write


@dataclass
class Options:
    """What to train on, and how; the defaults are the embedded checkpoint's."""

    text: Path
    """Training text, UTF-8; <|endoftext|> ends a document."""
    held_out: Path
    """Text for the held-out loss, by which the best checkpoint is chosen."""
    out: Path = Path("runs/pretrain")
    """Folder for the best checkpoint, the state to go on from, and the log."""
    n_layer: int = 10
    """Blocks."""
    n_embd: int = 128
    """Width; 50,257 x 128 numbers in float16 are 12.9 MB."""
    n_positions: int = 256
    """Positions, and the length of a training window."""
    steps: int = 2200
    """Optimisation steps."""
    batch: int = 16
    """Windows a step."""
    lr: float = 3e-3
    """Peak learning rate; cosine to a tenth of it."""
    warmup: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices; not on biases and LayerNorms."""
    dropout: float = 0.1
    """At the embedding sum and the two residual outputs of a block."""
    eval_every: int = 250
    """Steps between held-out losses; the state is saved there too."""
    seed: int = 0
    """Names the initial weights, the batches and the dropout."""


class Pretraining:
    """The model, its optimiser and where they stand: all that one safetensors file holds."""

    def __init__(self, options: Options, corpus: Tensor, n_vocab: int) -> None:
        self.options = options
        self.vocabulary = SharedVocabulary(corpus, n_vocab)
        self.corpus = self.vocabulary.compact(corpus)
        torch.manual_seed(options.seed)
        self.model = GPT2(
            GPT2Config(
                vocab_size=self.vocabulary.size,
                n_positions=options.n_positions,
                n_embd=options.n_embd,
                n_layer=options.n_layer,
                n_head=options.n_embd // HEAD_DIM,
                embd_pdrop=options.dropout,
                resid_pdrop=options.dropout,
            )
        )
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": options.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
        # The shared column stands for n_unused equal ones: n e^z = e^(z + log n).
        self.bias = torch.zeros(self.vocabulary.size)
        self.bias[-1] = math.log(self.vocabulary.n_unused)
        rows = options.batch * options.n_positions
        self.buffer = torch.empty(rows, self.vocabulary.size, dtype=torch.bfloat16)
        self.step, self.best_loss = 0, math.inf
        self.best: dict[str, Tensor] = {}

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to a tenth of the peak."""
        o = self.options
        if self.step < o.warmup:
            return o.lr * (self.step + 1) / o.warmup
        progress = (self.step - o.warmup) / max(1, o.steps - o.warmup)
        return o.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

    def train_step(self) -> Tensor:
        """One step of AdamW; returns the loss in nats a token."""
        o = self.options
        torch.manual_seed(o.seed + self.step)  # of the batch and of the dropout
        starts = torch.randint(len(self.corpus) - o.n_positions, (o.batch, 1))
        windows = self.corpus[starts + torch.arange(o.n_positions + 1)]  # (B, T + 1)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.hidden_states(windows[:, :-1])
        loss = CrossEntropy.apply(
            hidden.flatten(0, 1),
            self.model.wte.weight,
            self.bias,
            windows[:, 1:].flatten(),
            self.buffer,
        )
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, ids: Tensor) -> float:
        """Nats a token in float32 over windows of n_positions that do not overlap, full softmax."""
        self.model.eval()
        T = self.options.n_positions
        total = 0.0
        for start in tqdm(range(0, len(ids) - 1, T), "held-out", leave=False):
            window = ids[start : start + T + 1]
            shared = self.vocabulary.compact(window)
            logits = self.model(shared[None, :-1])[0] + self.bias
            total += float(F.cross_entropy(logits, shared[1:], reduction="sum"))
            unused = int((shared[1:] == self.vocabulary.size - 1).sum())
            total += unused * math.log(self.vocabulary.n_unused)  # one of n_unused equal tokens
        return total / (len(ids) - 1)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their best values so far and AdamW's moments, by name."""
        out = {f"best.{name}": p for name, p in self.best.items()}
        for name, p in self.model.named_parameters():
            out[f"model.{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                out[f"optimizer.{key}.{name}"] = value
        return out

    def save(self, path: Path) -> None:
        """Write the state to `path`; a stop while writing leaves the one before."""
        progress = {"step": str(self.step), "best_loss": repr(self.best_loss)}
        with atomic_write(path) as temporary:
            save_file(self.tensors(), temporary, metadata=progress)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from `save`."""
        with safe_open(path, "pt") as f:
            progress = f.metadata()
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        self.step, self.best_loss = int(progress["step"]), float(progress["best_loss"])
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            self.optimizer.state[p] = {
                key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
            self.best[name] = tensors[f"best.{name}"]


def main(options: Options) -> None:
    """Train, or go on training, and keep the checkpoint with the least held-out loss."""
    tokenizer = load_tokenizer()
    corpus, held_out = (
        torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")))
        for path in (options.text, options.held_out)
    )
    run = Pretraining(options, corpus, tokenizer.n_vocab)
    options.out.mkdir(parents=True, exist_ok=True)
    state, log = options.out / "state.safetensors", options.out / "log.jsonl"
    if state.exists():
        run.load(state)
        print(f"going on from step {run.step} of {state}")
    bar = tqdm(total=options.steps, initial=run.step, unit="step", mininterval=5)
    losses = []
    while run.step < options.steps:
        losses.append(run.train_step())
        bar.update()
        if run.step % options.eval_every and run.step < options.steps:
            continue
        loss = run.held_out_loss(held_out)
        if loss < run.best_loss:
            run.best_loss = loss
            run.best = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.save(state)
        mean, losses = float(torch.stack(losses).mean()), []
        tokens = run.step * options.batch * options.n_positions
        record = {"step": run.step, "tokens": tokens, "train": mean, "held_out": loss}
        with log.open("a") as f:
            f.write(json.dumps(record) + "\n")
        bar.write(f"step {run.step}: train {mean:.4f}, held out {loss:.4f} nats a token")
    best = {name: p.half() for name, p in run.best.items()}
    best["wte.weight"] = run.vocabulary.expand(best["wte.weight"])
    save_weights(best, options.out)
    print(f"held-out loss {run.best_loss:.4f} nats a token; best checkpoint in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
