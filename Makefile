# make demo and make test are all a new machine needs; each installs what it needs in .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test xfactor bench lint clean

help:  ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: .venv/demo  ## two learning rates and two settings of the dial, on the embedded checkpoint
	@if [ -f runs/demo/report.html ]; then \
		echo "runs/demo is complete: starting anew"; \
		rm -rf runs/demo-old; mv runs/demo runs/demo-old && rm -rf runs/demo-old; fi
	$(call run,runs/demo/rates,--lr 1e-5 1e-3)
	$(call run,runs/demo/dial,--lr 1e-3 --tilt 3 5)
	$(BIN)/python -m train.report runs/demo/rates runs/demo/dial --out runs/demo

# Start the runs in a folder; after an interruption, resume them.
define run
	@set -- --model tiny --steps 120 --eval-every 60 $(2) --out $(1); \
	ls $(1)/*/config.json >/dev/null 2>&1 && set -- --resume $(1); \
	echo python -m train.xfactor "$$@"; exec $(BIN)/python -m train.xfactor "$$@"
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
