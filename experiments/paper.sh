#!/usr/bin/env bash
# The paper's whole recipe on M-BERT, from nothing: both phases, Table 1, Figure 5.
#
#     experiments/paper.sh                              # one seed; everything goes to paper/
#     SEEDS="0 1 2" OUT=/disk/paper experiments/paper.sh
#     MODEL=sample/model ARCHIVES=../shared/data FLAGS="--max-train-rows 200 --max-eval-rows 50" experiments/paper.sh
#
# The third is a trial. Stopped and started again with the same settings, it goes on where it was. In full it has not
# been run yet: no M-BERT could be had. Sizes: archives 0.5 GB; M-BERT 0.7 GB; features of MASSIVE 0.7 GB; each run of
# phase 2 about 5 GB on disk (its state and up to five models). 392,702 pairs x 5 epochs are 6 hours on a V100 by the
# paper, about a day on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-bert-base-multilingual-uncased}
OUT=${OUT:-paper}
SEEDS=${SEEDS:-0}
ARCHIVES=${ARCHIVES:-}      # a folder that holds the three archives (default: download them)
TRANSLATE=${TRANSLATE:-}    # e.g. "de es zh ar ur": Translate-Train too, a run of the baseline's recipe for each
CLAIMS=${CLAIMS:-}          # e.g. "--seeds 5 --controls": the eight conclusions too, 11 runs a seed, 22 with controls
FLAGS=${FLAGS:-}            # more flags for every train.py
PY=${PY:-.venv/bin/python}
BASELINE="--head pooler --lr 5e-5 --epochs 2 --weight-decay 0.01"  # M-BERT's own recipe

[ -x "$PY" ] || make .venv/run
mkdir -p "$OUT"
archives=${ARCHIVES:+--archives $ARCHIVES}

# The data: the stand-in for the in-house intents (four of them, balanced), and MultiNLI to train, XNLI to test.
[ -f "$OUT/data/massive/sources.json" ] || $PY data.py massive --balance --out "$OUT/data/massive" $archives
[ -f "$OUT/data/xnli/sources.json" ] ||
    $PY data.py xnli --train-languages en $TRANSLATE --out "$OUT/data/xnli" $archives

# Phase 1, as the paper: features as they are, one learning rate, ranked by the test languages: 3,825 classifiers.
$PY extract.py --model "$MODEL" --data "$OUT/data/massive" --out "$OUT/features"
$PY grid_search.py --features "$OUT/features" --out "$OUT/grid" --scale none --lr 1e-3 --select test
$PY plot.py grid "$OUT/grid" --out "$OUT/figures"
$PY plot.py confusion "$OUT/grid" --out "$OUT/figures"

# Phase 2: Table 1. Test files are opened at the end alone.
train() { $PY train.py --model "$MODEL" --data "$OUT/data/xnli" --out "$OUT/runs/$1" "${@:2}" $FLAGS; }
runs=()
for system in baseline mc-bert mc-bert-wf; do
    for seed in $SEEDS; do
        case $system in
            baseline) flags=$BASELINE ;;
            mc-bert) flags="--layers 6 8 11 --pooling max" ;;
            mc-bert-wf) flags="--layers 6 8 11 --pooling max --freeze-layers 9 11 12 --freeze-epoch 2" ;;
        esac
        train "$system-seed$seed" $flags --seed "$seed"
        runs+=("$OUT/runs/$system-seed$seed")
    done
done
translated=()
for language in $TRANSLATE; do
    train "translate-$language" $BASELINE --train-language "$language"
    translated+=("$OUT/runs/translate-$language")
done
$PY evaluate.py "${runs[@]}" ${translated[@]:+--translate-train "${translated[@]}"} --data "$OUT/data/xnli" \
    --out "$OUT/results" --epoch last mean en joint oracle
$PY plot.py differences "$OUT/results" --out "$OUT/figures"

# Figure 5: ten epochs at a constant rate, watched on the test sets.
long="--epochs 10 --schedule constant --track-test"
train figure5-baseline --head pooler $long
train figure5-mc-bert $long
train figure5-mc-bert-wf --freeze-layers 9 11 12 --freeze-epoch 2 $long
$PY plot.py training "$OUT"/runs/figure5-* --split test --out "$OUT/figures"

# The eight conclusions.
[ -z "$CLAIMS" ] || $PY -m experiments.claims --model "$MODEL" --data "$OUT/data/xnli" --out "$OUT/claims" \
    --grid "$OUT/grid" $CLAIMS $FLAGS
