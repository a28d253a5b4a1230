"""Samples as the report shows them: which ones, and their text token by token."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.tokenizer import load_tokenizer
from train.results import RunRecord, Sample


class Piece(NamedTuple):
    """A token's text, or a part of it where only a part is a member's or a sign."""

    text: str
    member: bool
    sign: bool  # stands for a character that cannot be seen


@dataclass(frozen=True)
class Specimen:
    """A sample as the page shows it."""

    run: RunRecord
    when: str  # "before", "during", "after"
    step: int
    pieces: list[Piece]
    members: int  # how many of its tokens are members
    tokens: int  # how many it has


def choose(runs: Sequence[RunRecord]) -> dict[str, list[Specimen]]:
    """By prompt: each run's first sample before, during and after.

    "During" is the evaluation whose R lies closest to half-way between the first and the last.
    Where several runs start with the same sample, only the first of them shows it.
    """
    chosen: dict[str, list[Specimen]] = {}
    starts: set[Sample] = set()
    for run in runs:
        for step, when in _moments(run).items():
            firsts: dict[str, Sample] = {}
            for sample in run.samples[step]:
                firsts.setdefault(sample.prompt, sample)
            for prompt, sample in firsts.items():
                if when == "before":
                    if sample in starts:
                        continue
                    starts.add(sample)
                members = sum(i in run.members for i in sample.ids)
                shown = pieces(sample.ids, run.members)
                specimen = Specimen(run, when, step, shown, members, len(sample.ids))
                chosen.setdefault(prompt, []).append(specimen)
    return chosen


def _moments(run: RunRecord) -> dict[int, str]:
    moments = {0: "before"}
    last = max(run.evaluations)
    if between := [step for step in run.evaluations if 0 < step < last]:
        middle = (run.evaluations[0].r + run.evaluations[last].r) / 2
        moments[min(between, key=lambda step: abs(run.evaluations[step].r - middle))] = "during"
    return moments | ({last: "after"} if last else {})


def pieces(ids: Sequence[int], members: frozenset[int]) -> list[Piece]:
    """The text of `ids`, token by token, with the members marked.

    A character may be spread over several tokens: it is shown with the first of them, and marked if
    any of them is a member. Bytes that are no UTF-8 become U+FFFD.
    """
    tokens = [load_tokenizer().token_bytes(i) for i in ids]
    owners = [i for i, token in enumerate(tokens) for _ in token]
    position, owned = 0, []
    for character in b"".join(tokens).decode("utf-8", errors="surrogateescape"):
        lone_byte = "\udc80" <= character <= "\udcff"
        length = 1 if lone_byte else len(character.encode("utf-8"))
        of_tokens = owners[position : position + length]
        position += length
        member = any(ids[i] in members for i in of_tokens)
        visible = "\ufffd" if lone_byte else _visible(character)
        owned.append((of_tokens[0], Piece(visible, member, visible != character)))
    groups = itertools.groupby(owned, key=lambda o: (o[0], o[1].member, o[1].sign))
    return [
        Piece("".join(piece.text for _, piece in group), member, sign)
        for (_, member, sign), group in groups
    ]


def _visible(character: str) -> str:
    """The character, or a sign for one that cannot be seen or would turn the text around it."""
    if character in "\n\t":
        return {"\n": "↵", "\t": "⇥"}[character]
    return character if character.isprintable() else f"U+{ord(character):04X}"
