# Everything runs in .venv, made on first use. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/installed  ## train a small GPT, saving as it goes, and compare what each way of saving costs
	$(BIN)/python examples/train_gpt.py --compare

test: .venv/installed lint  ## lint, types, all tests
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## side by side with torch.save and DCP; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist

# torch first: the newest build that a bare requirement would pull is gigabytes larger.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[bench,test,dev]"
	touch $@
