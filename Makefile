# Everything happens in .venv, which is made from the requirements files where it is not there or out of date.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test clean

test: .venv/test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests

.venv/run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache
