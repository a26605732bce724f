# Two commands: `make demo` and `make test`. Each makes .venv on its first run and installs nothing on its second.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint docs-results clean help

help:
	@echo "make demo   from nothing to a report: a small world, its model, distillations of it, and a judge"
	@echo "make test   the whole test suite, under ten minutes on two cores"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv and runs/"

demo: $(INSTALLED)
	$(BIN)/muybridge demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp, not the folder: an install that broke half-way is taken up again.
$(INSTALLED): pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" sh tools/install.sh .venv
	@touch $@

clean:
	rm -rf .venv runs
