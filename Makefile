# make demo and make test are all a new machine needs; each installs what it needs in .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test xfactor bench lint clean

help:  ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: .venv/demo  ## ask for 5, 20 and 50 % X tokens; and what the original target does
	$(BIN)/python -m train.xfactor --model tiny --lr 1e-4 --steps 120 --eval-every 10 --out runs/demo/lr-1e-4
	$(BIN)/python -m train.xfactor --model tiny --lr 3e-4 --steps 60 --eval-every 5 --out runs/demo/lr-3e-4
	$(call share,0.05,5)
	$(call share,0.2,20)
	$(call share,0.5,50)
	$(BIN)/python -m train.report runs/demo/* --out runs/report

define share
	$(BIN)/python -m train.xfactor --model tiny --lr 1e-3 --steps 120 --batch 16 --share $(1) --out runs/demo/share-$(2)
endef

test: .venv/test  ## the whole suite; without a GPU, the compiled kernels run on the CPU
	$(BIN)/python -m pytest -n 2 --dist worksteal

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
