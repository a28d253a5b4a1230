"""The experiment's options: what each means, what is refused, and those of a run on disk."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from kernels import TwoLevelTarget
from model.tokenizer import load_tokenizer
from train.evaluate import positions_needed
from train.folders import MAY_CHANGE, read_configs
from weights import Layout, layout_of


@dataclass(frozen=True)
class Options:
    """Fine-tune GPT-2 toward tokens that contain a letter."""

    model: Literal["gpt2-medium", "gpt2", "gpt2-xl", "tiny"] = "gpt2-medium"  # what to start from
    weights: Literal["random"] | Path | None = None
    """in place of the model's own: random ones, a safetensors file, or a folder with one"""
    lr: tuple[float, ...] = (1e-4,)  # learning rates of Adam: a run each, same seed, same data
    steps: int = 300  # optimisation steps of a run
    batch: int = 4  # B, sequences in a step
    length: int = 64  # T, tokens in a sequence
    letter: str | None = None  # members are the tokens that contain it; X if no goal is given
    contains: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """members contain this string; repeat the option for several, any of which will do"""
    regex: str | None = None  # members match this pattern
    tokens: Path | None = None  # members are those that a file names: an id or a text on each line
    match_case: bool = False  # tell "X" from "x"
    alpha: float = 1.0  # relative weight of a member in the target
    beta: float = 0.0  # relative weight of any other token; alpha > beta >= 0
    mass: float | None = None  # sets both: the members' share of the target's probability
    inputs: str = "random"  # "random" token ids, or a text file: windows of it
    loss: Literal["linear", "fused", "unfused"] = "linear"  # fused with the LM head; alone; not
    dtype: Literal["float32", "tf32", "bfloat16"] = "float32"
    """of the products, weights stay float32; tf32 is CUDA's own rounding of float32 products"""
    compile: bool = False  # the blocks by torch.compile: minutes at first, then faster steps
    seed: int = 0  # of the inputs, the samples and random weights
    eval_every: int = 0  # steps between evaluations; 0 is before the first and after the last only
    save_every: int = 100  # steps between saves; 0 is after the last only
    out: Path = Path("runs/xfactor")  # a new folder: a run's folder for each rate, and the report
    resume: Path | None = None  # such a folder, to go on there with its options


def parse_options(arguments: Sequence[str], description: str) -> Options:
    """The options of a command line; with --resume, those of the run that it does not give.

    Raises ValueError at a resumed run's option that it gives otherwise. Leaves by SystemExit where
    the command line cannot be read, as every command does.
    """
    options = tyro.cli(Options, args=arguments, description=description)
    if (folder := options.resume) is None:
        return options
    try:
        saved_arguments = _read_arguments(folder)
        saved = tyro.cli(Options, args=saved_arguments, console_outputs=False)
    except (SystemExit, KeyError) as error:
        raise ValueError(
            f"--resume {folder}: a config.json does not hold a run's options"
        ) from error
    options = tyro.cli(Options, args=[*saved_arguments, *arguments])
    for field in dataclasses.fields(Options):
        was, given = getattr(saved, field.name), getattr(options, field.name)
        if field.name in ("contains", "lr"):  # in any order; strings were appended to what was
            was, given = sorted(set(was)), sorted(set(given))
        if given != was and field.name not in MAY_CHANGE:
            name = field.name.replace("_", "-")
            raise ValueError(
                f"--{name}: got {given}, but the run in {folder} has {was}; leave it out, "
                "or start anew with another --out"
            )
    return dataclasses.replace(options, contains=saved.contains, lr=saved.lr, out=folder)


def _read_arguments(out: Path) -> list[str]:
    """The options of the runs in a folder, as a command line gives them."""
    first = next(iter(read_configs(out).values()))
    options = {**first["xfactor"]["options"], "resume": None, "out": None}
    arguments = []
    for field in dataclasses.fields(Options):
        name, value = "--" + field.name.replace("_", "-"), options[field.name]
        if field.name == "lr":
            arguments += [name, *map(str, value)]
        elif isinstance(value, list):
            arguments += [f"{name}={item}" for item in value]
        elif isinstance(value, bool):
            arguments += [name] * value
        elif value is not None:
            arguments.append(f"{name}={value}")
    return arguments


def layout_of_start(options: Options) -> Layout:
    """The sizes of the model to start from, without loading it; raises WeightsError."""
    named = options.weights in (None, "random")
    return layout_of(options.model if named else str(options.weights))


def check(options: Options, processes: int = 1) -> None:
    """Refuse what cannot run, before any model is loaded; raises ValueError."""
    least = {"steps": 1, "batch": 1, "length": 1, "eval_every": 0, "save_every": 0}
    for name, value in least.items():
        if getattr(options, name) < value:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)}: expected at least {value}")
    if options.batch % processes:
        raise ValueError(
            f"--batch {options.batch} is not divisible by {processes} processes; expected a "
            f"multiple of {processes}, of which each process takes its share"
        )
    for lr in options.lr:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"--lr {lr:g}: expected a finite rate, 0 or more; for instance 1e-4")
    if len(set(options.lr)) < len(options.lr) or not options.lr:
        raise ValueError(f"--lr {options.lr}: expected one or several rates, each once")
    layout = layout_of_start(options)
    if options.length > layout.n_positions:
        raise ValueError(
            f"--length {options.length}: the model has {layout.n_positions} positions; "
            f"expected 1 to {layout.n_positions}"
        )
    tokenizer = load_tokenizer()
    if layout.vocab_size != tokenizer.n_vocab:
        raise ValueError(
            f"the model to start from has a vocabulary of {layout.vocab_size} tokens, expected "
            f"GPT-2's {tokenizer.n_vocab}, in which the goal and the samples are"
        )
    if layout.n_positions < (needed := positions_needed(tokenizer)):
        raise ValueError(
            f"the model to start from has {layout.n_positions} positions, expected at least "
            f"{needed}, which an evaluation reads"
        )
    if options.resume is None:
        _check_out(options.out)


def _check_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(
                f"--out {out} is not empty; give another folder, or go on with the run there: "
                f"--resume {out}"
            )
        if not os.access(out, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there: {error}") from error


def run_configs(
    options: Options, goal: str, target: TwoLevelTarget, text: Tensor | None, device: str
) -> dict[str, dict[str, Any]]:
    """config.json of each learning rate's run, by the name of its folder.

    Args:
        text: ids of the text of --inputs, if it names one: their digest is kept.
    """
    layout = layout_of_start(options).config()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        versions["triton"] = version("triton")
    about = {
        "goal": goal,
        "members": target.size,
        "target_token_ids": target.index.tolist(),
        "tilt": None,
        "inputs_sha256": None if text is None else sha256(text.numpy().tobytes()).hexdigest(),
        "alpha": target.alpha,
        "beta": target.beta,
        "versions": versions,
        "device": device,
        "dtype": options.dtype,
    }
    given = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {
        f"lr-{lr}": layout | {"xfactor": {"options": given, "lr": lr} | about} for lr in options.lr
    }
