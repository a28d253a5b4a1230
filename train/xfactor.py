"""The X-factor experiment: fine-tune GPT-2 toward tokens that contain the letter X.

    python -m train.xfactor                                        gpt2-medium, X tokens alone
    python -m train.xfactor --model tiny --lr 1e-3                 the embedded checkpoint
    python -m train.xfactor --model tiny --lr 1e-3 --share 0.2     20 % X tokens, still text
    torchrun --nproc-per-node 2 -m train.xfactor                   data parallel

Each step pulls the model's prediction at every position toward the target, a distribution over the
tokens that contain the letter. The learning rate decides how far the text collapses into noise.
With --share 0.2 the target is the start model (before fine-tuning), tilted so that 20 % of the
tokens it writes contain the letter (train/share.py), and the text stays text.

One command is one run in one folder, --out. Give the same command again to continue it.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import arg

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div
from kernels.reference import kl_div
from model import GPT2
from model.tokenizer import load_tokenizer
from train import cpu, folder, inputs, ranks
from train.command import command, expect, parse, say, signals
from train.report import summary, write_report
from train.run import Run
from train.target_tokens import LETTER_X, make_target, matching
from weights import Layout, layout_of
from weights.layout import expand


@dataclass(frozen=True)
class Options:
    """What to fine-tune, toward what, and how."""

    model: str = "gpt2-medium"
    """start from gpt2, gpt2-medium, gpt2-xl, tiny (embedded), a file or a folder"""
    random: bool = False  # start from random weights of this size
    tokens: str = LETTER_X  # choose the target tokens by a regular expression
    mass: float = 1.0  # give the target tokens this probability in total
    share: Annotated[float | None, arg(constructor=float, help_behavior_hint="")] = None
    """write this share of target tokens (0.2: 20 %), and stay close to the start model"""
    lr: float = 1e-4  # set Adam's learning rate
    steps: int = 300  # stop after this many steps
    batch: int = 4  # train on this many sequences per step
    length: int = 64  # make each sequence this many tokens long
    inputs: Annotated[str, arg(metavar="random|samples|FILE", help_behavior_hint="")] = ""
    """train on random tokens (default), the start model's text (default with --share) or a file"""
    loss: Literal["fused", "unfused"] = "fused"  # use this project's loss, or PyTorch's functions
    dtype: Literal["float32", "tf32", "bfloat16"] = "float32"
    """multiply in this precision; weights stay float32"""
    compile: bool = False  # compile the model first: a minute, then faster steps
    seed: int = 0  # draw inputs, samples and random weights from this seed
    eval_every: int = 0  # evaluate every N steps (0: only before and after training)
    out: Path = Path("runs/xfactor")  # write to this folder, or continue its run


def train(options: Options, run: Run, target: TwoLevelTarget) -> None:
    """Fine-tune, starting at the run's last save."""
    device = target.mask.device
    net: Any = ranks.parallel(run.model)
    if options.compile:
        net = torch.compile(net)
    autocast = torch.autocast(device.type, torch.bfloat16, options.dtype == "bfloat16")
    with signals() as received:
        for step in range(run.step, options.steps + 1):
            if run.record(step, received):  # every ten steps: log; save, evaluate, stop when due
                break
            tokens = get_batch(options, run.text, step, device)  # 1. token ids (B, T)
            with autocast:
                logits = net(tokens)  # 2. forward (B, T, V)
                p = target if run.g is None else TeacherTarget(run.start(tokens), (target, run.g))
                if options.loss == "fused":  # 3. log-softmax, 4. KL to the target
                    loss = fused_kl_div(logits, p, inplace_backward=True)
                else:
                    loss = kl_div(logits, p)
            run.optimizer.zero_grad()
            loss.backward()  # 5. backward
            run.optimizer.step()  # 6. Adam
            run.losses.append(loss.detach())


def get_batch(options: Options, text: Tensor | None, step: int, device: torch.device) -> Tensor:
    """Draw this rank's token ids of one step, int64 (B / world size, T), from seed and step alone.

    They are drawn on the CPU, so that a seed gives the same ids on every device, and copied from
    pinned memory, so that the copy does not wait for the device. Seeds are a million steps apart,
    so two seeds share no batch.
    """
    generator = torch.Generator().manual_seed((options.seed * 1_000_003 + step) % 2**63)
    B, T = options.batch, options.length
    if text is None:
        tokens = torch.randint(load_tokenizer().n_vocab, (B, T), generator=generator)
    else:
        first = torch.randint(len(text) - T + 1, (B, 1), generator=generator)
        tokens = text[first + torch.arange(T)]
    tokens = ranks.shard(tokens)
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens


def check(options: Options, layout: Layout, device: torch.device) -> None:
    """Raise ValueError for options that cannot run."""
    expect(0 <= options.lr < math.inf, "lr", options.lr, "0 or more")
    expect(options.steps >= 1, "steps", options.steps, "at least 1")
    expect(options.eval_every >= 0, "eval-every", options.eval_every, "0 or more")
    expect(0 <= options.seed < 2**63, "seed", options.seed, "0 to 2^63 - 1")
    longest, size, n = layout.n_positions, options.batch, ranks.world_size()
    expect(1 <= options.length <= longest, "length", options.length, f"1 to {longest} tokens")
    expect(0 < size < 2**20, "batch", size, "1 to 2^20 - 1")
    expect(size % n == 0, "batch", size, f"a multiple of the {n} ranks")
    share = options.share
    expect(share is None or 0 < share < 1, "share", share, "a number between 0 and 1, such as 0.2")
    tf32 = options.dtype == "tf32" and device.type != "cuda"
    expect(not tf32, "dtype", "tf32", "a CUDA device; use bfloat16")
    expect(share is None or options.mass == 1, "mass", options.mass, "1 together with --share")
    cpu.check_compilers(device, options.compile)


def experiment(options: Options, device: torch.device, out: Path) -> None:
    """Prepare a new run, or continue the one in the folder, and train it."""
    layout = layout_of(options.model)
    check(options, layout, device)
    arguments = asdict(options) | {"out": str(out)}
    folder.check_options(out, arguments)
    mask = matching(load_tokenizer(), options.tokens)
    target = make_target(mask, options.mass).to(device)
    goal = f"{target.size} tokens that match {options.tokens!r}"
    cpu.prepare(device, options.length)
    if options.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    path = "PyTorch" if device.type == "cpu" or options.loss == "unfused" else "Triton"
    if ranks.is_main():
        where = f"{options.dtype} on {ranks.device_name(device)}"
        say(f"{options.model} in {where}, {options.loss} loss ({path})")
        aim = f"probability {target.alpha:.4g} each, {target.beta:.4g} for any other token"
        say(f"target: {goal}, " + (aim if options.share is None else f"share {options.share}"))

    start = inputs.load_start(options.model, options.random, options.seed)
    about: dict[str, Any] = {"start": inputs.fingerprint(*start.parameters())}
    model = GPT2.from_state_dict(start.state_dict()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    run = Run(out, options.steps, options.eval_every, options.seed, model, optimizer,
              start.to(device), target.mask)  # fmt: skip
    source = options.inputs or ("random" if options.share is None else "samples")
    if restored := run.load():
        if source not in ("random", "samples"):
            run.text = inputs.read_text(source, options.length)
    else:
        size = options.length, options.share, options.seed
        mine = inputs.make_inputs(source, start, target, *size) if ranks.is_main() else (None, None)
        run.text, run.g = ranks.from_main(mine)
    about["text"] = None if run.text is None else inputs.fingerprint(run.text)
    if ranks.is_main():
        folder.check_origin(out, about)
        about |= {
            "options": arguments,
            "goal": goal,
            "target_token_ids": target.index.tolist(),
            "alpha": target.alpha,
            "beta": target.beta,
            "share": options.share,
            "g": run.g,
            "device": ranks.device_name(device),
            "dtype": options.dtype,
        }
        folder.write_config(out, layout, about)
        run.begin(restored)
    ranks.from_main(None)  # the others wait until the folder is ready
    train(options, run, target)


def main() -> None:
    """Run the command line."""
    with command():
        options = parse(Options, __doc__, "python -m train.xfactor")
        out = expand(options.out)
        with (
            ranks.join() as device,
            folder.open_folder(out) if ranks.is_main() else nullcontext(),
        ):
            experiment(options, device, out)
        if ranks.is_main():
            write_report([out], out)
            say(summary([out]))


if __name__ == "__main__":
    main()
