"""Choose the samples that are shown, and write their text token by token."""

from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

from model.tokenizer import load_tokenizer
from train.report.runs import Evaluation, Run, Sample


class Piece(NamedTuple):
    """The text of a token, or the part of it that is a target token's or a sign."""

    text: str
    target: bool
    sign: bool  # stands for a character that cannot be seen


def moments(runs: Sequence[Run]) -> list[tuple[Run, Evaluation]]:
    """List what is shown side by side: each distinct start ahead of its first run, each run's end.

    Starts with the same samples are one: their numbers may differ in the last digits. A start is
    told from an end by `evaluation is run.before`.
    """
    shown: list[tuple[Run, Evaluation]] = []
    for run in runs:
        if all(run.before.samples != evaluation.samples for _, evaluation in shown):
            shown.append((run, run.before))
        shown.append((run, run.after))
    return shown


def typical(run: Run, evaluation: Evaluation) -> list[Sample]:
    """Pick per prompt the sample whose share of target tokens is nearest R, not the best one."""
    return [
        min(samples, key=lambda s: abs(count(s, run) / len(s.ids) - evaluation.r))
        for _, samples in groupby(evaluation.samples, key=lambda s: s.prompt)
    ]


def count(sample: Sample, run: Run) -> int:
    """Count the target tokens in a sample."""
    return sum(i in run.target_token_ids for i in sample.ids)


def pieces(ids: Sequence[int], targets: frozenset[int]) -> list[Piece]:
    """Split the text of `ids` into its tokens, with the target tokens marked.

    A character may be spread over several tokens: it is shown with the first of them, and marked if
    any of them is a target token. Bytes that are not UTF-8 become U+FFFD.
    """
    tokens = [load_tokenizer().token_bytes(i) for i in ids]
    owners = iter([at for at, token in enumerate(tokens) for _ in token])  # of each byte
    owned = []
    for character in b"".join(tokens).decode("utf-8", errors="surrogateescape"):
        of_tokens = [*islice(owners, len(character.encode("utf-8", errors="surrogateescape")))]
        target, visible = any(ids[at] in targets for at in of_tokens), _visible(character)
        owned.append((of_tokens[0], Piece(visible, target, visible != character)))
    groups = groupby(owned, key=lambda o: (o[0], o[1].target, o[1].sign))
    return [
        Piece("".join(piece.text for _, piece in group), target, sign)
        for (_, target, sign), group in groups
    ]


def opening(sample: Sample, run: Run, words: int = 10) -> list[Piece]:
    """Return the first ten words of a sample, fewer where they are long: "XXXX..." is one."""
    text, kept = "", list[Piece]()
    for piece in pieces(sample.ids, run.target_token_ids):
        text += " " if piece.sign else piece.text
        if len(text.split()) > words or len(text) > 7 * words:
            return [*kept, Piece(" …", False, False)]
        kept.append(piece)
    return kept


def _visible(character: str) -> str:
    """Return a character, or a sign for one that is invisible or reverses the text around it."""
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return "\ufffd"
    sign = {"\n": "↵", "\t": "⇥"}.get(character, f"U+{ord(character):04X}")
    return character if character.isprintable() else sign
