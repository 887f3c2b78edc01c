# Everything runs in .venv, made on first use. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test reliability lint bench clean

demo: .venv/installed  ## train, kill it in mid-save, resume, compare bit for bit, and measure what saving costs
	$(BIN)/python examples/demo.py

test: .venv/installed lint  ## lint, types, all tests
	$(BIN)/python -m pytest

reliability: .venv/installed  ## every gate with its full figure, an hour or two; needs Linux, root and FUSE
	ASYNCCKPT_FULL=1 $(BIN)/python -m pytest tests/reliability tests/image/test_kinds.py tests/service/test_remote_writer.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## side by side with torch.save, DCP, s3fs and obstore; writes benchmarks/RESULTS.md and REMOTE.md
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks --part remote

clean:
	rm -rf .venv build dist

# torch first: the newest build that a bare requirement would pull is gigabytes larger.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[s3,gcs,azure,sftp,bench,cli,test,dev]"
	touch $@
