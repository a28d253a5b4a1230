"""The benchmark against transformers: both contenders do the same work, and the table is whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train import benchmark
from train.benchmark import CONTENDERS, NEW_TOKENS, Options
from weights import layout_of


@pytest.fixture
def options(small_start: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Sizes that take seconds: those of the small model."""
    monkeypatch.setattr(benchmark, "layout_of", lambda name: layout_of(small_start))
    return Options(model="tiny", batch=1, length=8, repetitions=2, device="cpu")


def test_both_contenders_train_on_the_same_loss_and_write_the_same_text(small_start: Path) -> None:
    """Two steps' losses and a greedy text, each against the other's."""
    tokens = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(0))
    both = [make(str(small_start), torch.device("cpu")) for make in CONTENDERS.values()]
    text, other = (contender.generate(tokens[:1]) for contender in both)
    assert torch.equal(text, other)
    assert text.shape == (1, 8 + NEW_TOKENS)
    steps = [contender.train(tokens, "float32") for contender in both]
    for _ in range(2):
        ours, theirs = (next(s) for s in steps)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_table_is_whole_and_ends_in_json(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every quantity for both contenders, each a positive number."""
    benchmark.benchmark(replace(options, repetitions=1))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len(results) == 6
    for quantity, values in results.items():
        assert set(values) == {"ours", "transformers"}, quantity
        assert all(value > 0 for value in values.values()), quantity


def test_each_repetition_measures_everything_in_a_process_of_its_own(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two repetitions of two contenders in turn; the table has the median of each."""
    values = iter([1.0, 10.0, 3.0, 20.0])
    asked = []

    class Process:
        """Stands for an executor: a new one per measurement."""

        def __init__(self, *_: object) -> None:
            self.used = False

        def __enter__(self) -> "Process":
            return self

        def __exit__(self, *_: object) -> None:
            assert self.used

        def submit(self, function: object, name: str, *_: object) -> "Process":
            assert not self.used
            self.used = True
            asked.append(name)
            return self

        def result(self) -> dict[str, float]:
            return {"load, ms": next(values)}

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Process)
    benchmark.benchmark(options)
    assert asked == ["ours", "transformers"] * 2
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert results == {"load, ms": {"ours": 2.0, "transformers": 15.0}}


def test_a_gpu_that_is_not_there_is_one_line(options: Options, monkeypatch) -> None:
    """Before anything is measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--device cuda: got a machine without CUDA, .*$"):
        benchmark.benchmark(replace(options, device="cuda"))


def test_without_transformers_the_command_says_what_to_install(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, before anything is measured."""
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^transformers is not installed; run: pip install .*$"):
        benchmark.benchmark(options)
