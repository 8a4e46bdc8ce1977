# Everything happens in .venv, which is made from the requirements files where it is not there or out of date.
PYTHON ?= python3
BIN := .venv/bin

DEMO ?= demo
PY = $(BIN)/python
PYTEST = $(PY) -m pytest -q -n 2 --dist worksteal
demo test prove: export HF_HUB_OFFLINE = 1
MODEL ?= sample/model
TUNE = --model $(MODEL) --data sample/intents14 --lr 2e-4 --batch-size 64

.PHONY: demo claims bench test prove clean

# Both phases on the sample. Each line can be run by hand; run again, the whole goes on where it stopped.
demo: .venv/run
	$(PY) extract.py --model $(MODEL) --data sample/intents --out $(DEMO)/features
	$(PY) grid_search.py --features $(DEMO)/features --out $(DEMO)/grid
	$(PY) train.py $(TUNE) --out $(DEMO)/runs/baseline --head pooler
	$(PY) train.py $(TUNE) --out $(DEMO)/runs/mc-bert --layers-from $(DEMO)/grid/best.json
	$(PY) train.py $(TUNE) --out $(DEMO)/runs/mc-bert-wf --layers-from $(DEMO)/grid/best.json --freeze-layers 9 11 12 --freeze-epoch 2
	$(PY) evaluate.py $(DEMO)/runs/baseline $(DEMO)/runs/mc-bert $(DEMO)/runs/mc-bert-wf --data sample/intents14 --out $(DEMO)/results
	$(PY) plot.py grid $(DEMO)/grid --out $(DEMO)/figures
	$(PY) plot.py confusion $(DEMO)/grid --out $(DEMO)/figures
	$(PY) plot.py training $(DEMO)/runs/baseline $(DEMO)/runs/mc-bert $(DEMO)/runs/mc-bert-wf --out $(DEMO)/figures
	$(PY) plot.py differences $(DEMO)/results --out $(DEMO)/figures

# The paper's eight conclusions. On XNLI: make claims DATA=data/xnli MODEL=bert-base-multilingual-uncased OUT=claims/xnli FLAGS=
DATA ?= sample/intents14
OUT ?= claims/sample
FLAGS ?= --lr 2e-4 --batch-size 64
claims: .venv/run
	$(PY) claims.py --model $(MODEL) --data $(DATA) --out $(OUT) $(FLAGS)

# Speed beside other ways, on a quiet machine: make bench MODEL=bert-base-multilingual-uncased DATA=data/xnli OUT=bench
bench: DATA = sample/nli
bench: OUT = bench
bench: .venv/bench
	$(PY) bench.py --model $(MODEL) --data $(DATA) --out $(OUT)

test: .venv/test
	$(PYTEST) tests

# The long proofs: forty kills, and 10,000 cases of broken input.
prove: export PROVE = 1
prove: .venv/test
	$(PYTEST) tests/test_kill.py tests/test_fuzz.py

.venv/run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.venv/bench: requirements-bench.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache
