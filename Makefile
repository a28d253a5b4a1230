# make demo and make test are all a new machine needs; each installs what it needs in .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test xfactor bench lint clean

help:  ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: .venv/demo  ## the experiment at two learning rates on the embedded checkpoint
	rm -rf runs/demo
	$(BIN)/python -m train.xfactor --model tiny --lr 1e-5 1e-3 --steps 150 --eval-every 15 \
		--out runs/demo

test: .venv/test  ## the whole suite; without a GPU, the compiled kernels run on the CPU
	$(BIN)/python -m pytest

xfactor: .venv/demo  ## the real thing: gpt2-medium, downloaded on first use
	$(BIN)/python -m train.xfactor

bench: .venv/demo  ## fused against unfused loss
	$(BIN)/python -m kernels.benchmark

lint: .venv/test  ## ruff, its formatter, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## remove the environment and all runs
	rm -rf .venv runs
