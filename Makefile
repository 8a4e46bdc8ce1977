# Everything happens in .venv, made from the requirements files where it is not there or out of date.
PYTHON ?= python3
BIN := .venv/bin
PY = $(BIN)/python

# Memory that is freed stays with the process: glibc hands it back to the kernel at every step
# otherwise, which clears it anew each time, up to a tenth of a step on a CPU.
export MALLOC_MMAP_THRESHOLD_ = 33554432
export MALLOC_TRIM_THRESHOLD_ = 2147483647

DEMO ?= demo
demo test prove: export HF_HUB_OFFLINE = 1
MODEL ?= sample/model
TUNE = --model $(MODEL) --data sample/intents14 --lr 2e-4 --batch-size 64

.PHONY: demo test prove format claims bench clean

# Both phases on the sample. Each line can be run by hand; run again, the whole goes on where it stopped.
demo: .venv/run
	$(PY) extract.py --model $(MODEL) --data sample/intents --out $(DEMO)/features
	$(PY) grid_search.py --features $(DEMO)/features --out $(DEMO)/grid
	$(PY) train.py $(TUNE) --out $(DEMO)/runs/baseline --head pooler
	$(PY) train.py $(TUNE) --out $(DEMO)/runs/mc-bert --layers-from $(DEMO)/grid/best.json
	$(PY) train.py $(TUNE) --out $(DEMO)/runs/mc-bert-wf --layers-from $(DEMO)/grid/best.json --freeze-layers 9 11 12 --freeze-epoch 2
	$(PY) evaluate.py $(DEMO)/runs/baseline $(DEMO)/runs/mc-bert $(DEMO)/runs/mc-bert-wf --data sample/intents14 --out $(DEMO)/results --epoch last mean en
	$(PY) plot.py grid $(DEMO)/grid --out $(DEMO)/figures
	$(PY) plot.py confusion $(DEMO)/grid --out $(DEMO)/figures
	$(PY) plot.py training $(DEMO)/runs/baseline $(DEMO)/runs/mc-bert $(DEMO)/runs/mc-bert-wf --out $(DEMO)/figures
	$(PY) plot.py differences $(DEMO)/results --out $(DEMO)/figures

test: .venv/test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(PY) -m pytest -n 2 --dist worksteal tests --ignore tests/robustness

format: .venv/test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# The long proofs: thirty kills, full disks, 10,000 cases of broken input, torch.compile.
prove: export PROVE = 1
prove: .venv/test
	$(PY) -m pytest -n 2 --dist worksteal tests/robustness
	$(PY) -m pytest tests/test_train.py -k compiled

# The paper's eight conclusions. On XNLI: make claims DATA=data/xnli MODEL=bert-base-multilingual-uncased OUT=claims/xnli FLAGS=
DATA ?= sample/intents14
OUT ?= claims/sample
FLAGS ?= --lr 2e-4 --batch-size 64
claims: .venv/run
	$(PY) -m experiments.claims --model $(MODEL) --data $(DATA) --out $(OUT) $(FLAGS)

# Speed beside other ways, on a quiet machine: make bench MODEL=bert-base-multilingual-uncased DATA=data/xnli OUT=bench
bench: DATA = sample/nli
bench: OUT = bench
bench: .venv/bench
	$(PY) -m experiments.bench --model $(MODEL) --data $(DATA) --out $(OUT)

.venv/run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.venv/bench: requirements-bench.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
