#!/usr/bin/env bash
# The paper on a real multilingual encoder that fits a CPU: multilingual-e5-small, 12 blocks x 384, 100 languages.
#
#     experiments/e5_small.sh                                                     # everything goes to e5/
#     PARTS="search xnli" JOBS=2 ARCHIVES=../shared/data experiments/e5_small.sh  # two runs at a time, a thread each
#     PARTS="xnli claims" ROWS=52110 JOBS=15 experiments/e5_small.sh              # fifteen at a time on one GPU
#
# Stopped and started again with the same settings, it goes on where it was. With one thread, at 20 to 45 pairs a
# second, 10,000 pairs for 5 epochs take 20 to 42 minutes, and xnli is 20 such runs. On a GPU so small a model is bound
# by launches: several runs at a time, best under NVIDIA's MPS (nvidia-cuda-mps-control -d). The tables: RESULTS.md
# beside this file.
#
# The encoder is the hub's intfloat/multilingual-e5-small; where the hub cannot be reached, it is made from two
# packages, whose weights of 4 bits are widened to float32 and nothing else (make_e5_small.py). By its authors' report
# it has seen English NLI pairs in its own training: XNLI is easier for it than it should be.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-e5}
PARTS=${PARTS:-search rows xnli large translate claims}
SEEDS=${SEEDS:-0 1 2 3 4}             # of xnli
ROWS=${ROWS:-10000}                   # train pairs of xnli
EPOCHS=${EPOCHS:-5}                   # of xnli
LARGE_ROWS=${LARGE_ROWS:-52110}       # of large: two epochs, one seed
TRANSLATE_ROWS=${TRANSLATE_ROWS:-9000}
RATES=${RATES:-1e-4 3e-4 1e-3}         # of the fair search: its defaults
DEV_ROWS=${DEV_ROWS:-500}             # of each language, while training
PROTOCOLS=${PROTOCOLS:-last mean en joint oracle}  # of evaluate.py --epoch, for xnli
CLAIMS_SEEDS=${CLAIMS_SEEDS:-5}       # seeds 0, 1, ...
CLAIMS=${CLAIMS:---lr 1e-4 --max-train-rows 5000 --max-eval-rows 200 --max-rows 1000}
JOBS=${JOBS:-1}                       # runs of train.py at a time; when several, each has one thread
ARCHIVES=${ARCHIVES:-}                # a folder that holds the archives (default: download them)
MODEL=${MODEL:-}                      # another encoder with 12 blocks
MAKE_E5=${MAKE_E5:-../shared/tools/make_e5_small.py}
PY=${PY:-.venv/bin/python}
LANGUAGES="en zh es de ar ur fr"

[ -x "$PY" ] || make .venv/run
mkdir -p "$OUT"
archives=${ARCHIVES:+--archives $ARCHIVES}
[ "$JOBS" = 1 ] || export OMP_NUM_THREADS=1
part() { [[ " $PARTS " == *" $1 "* ]]; }
at_once() { xargs -P "$JOBS" -I{} bash -c '{}'; }  # runs the lines it is given, JOBS at a time
training() {                                       # a line for it: a run's name, and its flags
    echo "$PY train.py --model $MODEL --data $OUT/data/xnli --out $OUT/runs/$1 --lr 5e-5" \
         "--max-eval-rows $DEV_ROWS ${*:2}"
}

if [ -z "$MODEL" ]; then
    MODEL=intfloat/multilingual-e5-small
    reach="import transformers; transformers.AutoConfig.from_pretrained('$MODEL')"
    if [ -d "$OUT/model" ] || ! $PY -c "$reach" 2> /dev/null; then
        MODEL=$OUT/model
        [ -f "$MODEL/tokenizer_config.json" ] || $PY "$MAKE_E5" "$MODEL"  # its last file
    fi
fi
echo "encoder: $MODEL"

data() {
    [ -f "$OUT/data/$1/sources.json" ] ||
        $PY data.py "${@:2}" --out "$OUT/data/$1" --languages $LANGUAGES $archives
}
data massive massive --balance
data massive60 massive --intents 0
data xnli xnli --train-languages en de es fr zh

# Phase 1 on MASSIVE's four intents: the fair search, and the paper's plain one beside it.
if part search || part xnli; then
    $PY extract.py --model "$MODEL" --data "$OUT/data/massive" --out "$OUT/features"
    $PY grid_search.py --features "$OUT/features" --out "$OUT/grid-fair" --scale layer --lr $RATES
    $PY grid_search.py --features "$OUT/features" --out "$OUT/grid-plain" --scale none --lr 1e-3
    for grid in fair plain; do
        $PY plot.py grid "$OUT/grid-$grid" --out "$OUT/figures/$grid"
    done
fi

# How many rows: the search, logistic regression and fine-tuning; conclusions 3 to 5 on test (scikit-learn: make .venv/test).
if part rows; then
    $PY -m experiments.rows --model "$MODEL" --data "$OUT/data/massive" --out "$OUT/rows/massive" --rows 40 100 500 3240 --seeds 5
    $PY -m experiments.rows --model "$MODEL" --data "$OUT/data/massive60" --out "$OUT/rows/massive60" --rows 500 --seeds 5
    $PY -m experiments.phase_one "$OUT/rows/massive/3240/grid" --data "$OUT/rows/massive/3240/data"
fi

# Phase 2 on XNLI: the paper's systems, and MC-BERT with the fair search's layers; each at its last epoch and its mean.
mc="--layers 6 8 11 --pooling max"
if part xnli; then
    for seed in $SEEDS; do
        recipe="--max-train-rows $ROWS --epochs $EPOCHS --seed $seed"
        training "baseline-seed$seed" --head pooler $recipe
        training "mc-bert-seed$seed" $mc $recipe
        training "mc-bert-wf-seed$seed" $mc --freeze-layers 9 11 12 --freeze-epoch 2 $recipe
        training "searched-seed$seed" --layers-from "$OUT/grid-fair/best.json" $recipe
    done | at_once
    runs=()
    for name in baseline mc-bert mc-bert-wf searched; do
        for seed in $SEEDS; do runs+=("$OUT/runs/$name-seed$seed"); done
    done
    first=${SEEDS%% *}
    both="--data $OUT/data/xnli --epoch $PROTOCOLS"
    $PY evaluate.py "${runs[@]}" $both --out "$OUT/results/xnli"
    $PY evaluate.py "${runs[@]}" $both --out "$OUT/results/xnli-against-mc-bert" \
        --baseline "$([ "$SEEDS" = "$first" ] && echo "mc-bert-seed$first" || echo mc-bert)"
    $PY plot.py differences "$OUT/results/xnli" --out "$OUT/figures"
    $PY plot.py training "$OUT"/runs/{baseline,mc-bert,mc-bert-wf}-seed"$first" --out "$OUT/figures"  # Figure 5
fi

# The same three on more rows, two epochs: beside what Multilingual-MiniLM-L12-H384 is published with.
if part large; then
    recipe="--max-train-rows $LARGE_ROWS --epochs 2"
    {
        training large-baseline --head pooler $recipe
        training large-mc-bert $mc $recipe
        training large-mc-bert-wf $mc --freeze-layers 9 11 12 --freeze-epoch 1 $recipe  # after 2 nothing is left
    } | at_once
    both="--data $OUT/data/xnli --epoch last mean"
    $PY evaluate.py "$OUT"/runs/large-{baseline,mc-bert,mc-bert-wf} $both --out "$OUT/results/large"
    $PY evaluate.py "$OUT"/runs/large-{baseline,mc-bert,mc-bert-wf} $both --out "$OUT/results/large-against-mc-bert" \
        --baseline large-mc-bert
fi

# Translate-Train on machine-translated rows, against zero-shot from as many English ones.
if part translate; then
    for language in en de es fr zh; do
        training "translate-$language" $mc --train-language $language --max-train-rows "$TRANSLATE_ROWS" \
            --epochs "$EPOCHS"
    done | at_once
    $PY evaluate.py "$OUT/runs/translate-en" --translate-train "$OUT"/runs/translate-{de,es,fr,zh} \
        --data "$OUT/data/xnli" --out "$OUT/results/translate"
fi

# The eight conclusions and the controls, on all 60 intents: 22 runs a seed, shared among JOBS calls.
if part claims; then
    grid=$([ ! -f "$OUT/grid-fair/best.json" ] || echo "--grid $OUT/grid-fair")
    claims="$PY -m experiments.claims --model $MODEL --data $OUT/data/massive60 --out $OUT/claims --controls"
    claims+=" --drop-models --seeds $CLAIMS_SEEDS $grid $CLAIMS"
    if [ "$JOBS" != 1 ]; then
        for ((share = 1; share <= JOBS; share++)); do
            echo "$claims --share $share/$JOBS"
        done | at_once
    fi
    $claims
fi
