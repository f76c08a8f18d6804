# Everything is set up in .venv, and nothing outside of it.
PYTHON ?= python3
PY := .venv/bin/python
CONSTRAINTS := $(shell test -e /proc/driver/nvidia/version || echo -c constraints-cpu.txt)
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)
# Fully typed; above these, Any lives where transformers begins.
STRICT := errors.py settings.py spans.py version.py wire memory bus

.PHONY: demo test lint bench-quick clean

demo: .venv/.server
	.venv/bin/djinn demo

test: .venv/.test
	$(PY) -m pytest

# Every baseline, figure and decomposition on a small scale; its figures are in bench-quick/figures.
bench-quick: .venv/.test
	$(PY) -m bench.quick --output-dir bench-quick

lint: .venv/.test
	$(PY) -m ruff check .
	$(PY) -m mypy --strict --follow-imports=silent $(addprefix djinn_zmq/,$(STRICT))

# --without-pip: some systems ship python3 without ensurepip; the pip that is there fills in.
$(PY):
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(PY) install --quiet --disable-pip-version-check pip

.venv/.server: $(PY) setup.cfg pyproject.toml constraints-cpu.txt
	@echo "setting up .venv: a minute or two, torch is large"
	$(INSTALL) -e '.[server]'
	@touch $@

.venv/.test: .venv/.server
	$(INSTALL) -e '.[server,pull,bench,test,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
