#!/usr/bin/env bash
# The paper's models on one large GPU: what they take, how fast they train, what the loss costs, and
# what it does to a curve. Written for a card of 141 GB; everything it finds lies in FOLDER.
# usage: examples/gpu-6.7b.sh FOLDER [STAGE...]
#
#   data     text of this Python, a tokenizer of 32,000 entries, Megatron datasets
#   budget   memory by arithmetic, before anything is measured
#   speed    tokens/s, parts of a step, peak memory of every model, FP8 and bf16
#   curves   6.7B in FP8 with the three objectives, 468M in FP8 and in bf16, from the same seeds
#   study    a model of 110 million parameters, three objectives, two seeds, evaluated
#
# Without stages: all. What is finished is not done again, so that it can go on after a cut. Every
# stage but budget and study reads the data. PYTHON names the interpreter.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: examples/gpu-6.7b.sh FOLDER [STAGE...]}
shift
stages=${*:-data budget speed curves study}
megabytes=${MEGABYTES:-40}
rounds=${ROUNDS:-12}
steps=${STEPS:-60}
study=${STUDY:-$here/studies/gpu-110m.yaml}
vocabulary=32000
read -ra also <<<"${ALSO:-}" # more Megatron flags for every training
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

infoentropy() { "${PYTHON:-python}" -m megatron_infoentropy "$@"; }
say() { printf '\n== %s\n' "$*"; }

# One data-parallel rank, so a step is one micro-batch as published, and nothing is sharded: 18 bytes
# a parameter are 121 GB, and FP8 keeps copies of its own. Moments in bf16 take 4 of the 18 off.
read -ra moments <<<"${MOMENTS---use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16}"
fp8=(--transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe tensorwise)
declare -A sequences=([6.7b]=16 [1.2b]=16 [468m]=32)
choose_flags() { # model, precision
  flags=(--global-batch-size "${sequences[$1]}")
  if [ "$1" = 6.7b ]; then flags+=("${moments[@]}"); fi
  if [ "$2" = fp8 ]; then flags+=("${fp8[@]}"); fi
  flags+=("${also[@]}")
}

# A recipe for this text, which has not the Pile's domains; in bf16 as published, without FP8.
recipe_of() { # model, precision
  local recipe=$folder/recipes/$1-$2.yaml
  mkdir -p "$folder/recipes"
  sed 's/data-weights: paper/data-weights: natural/' "$here/paper/$1.yaml" >"$recipe"
  if [ "$2" = bf16 ]; then sed -i '/^fp8:/,/^$/d' "$recipe"; fi
  printf '%s' "$recipe"
}

# Real text in, no checkpoint of the optimizer out: 94 GB at 6.7B.
train() { # model, precision, run, flags...
  local model=$1 precision=$2 run=$3
  shift 3
  if [ -e "$run/.done" ]; then return; fi
  rm -rf "$run"
  choose_flags "$model" "$precision"
  infoentropy train "$(recipe_of "$model" "$precision")" --data "$folder/tokens" \
    --tokenizer "$folder/tokenizer" --run "$run" --ranks 1 --seed 111 "$@" -- "${flags[@]}" \
    --train-iters "$steps" --lr-warmup-iters $((steps / 6)) --log-interval 1 --eval-iters 0 \
    --no-save-optim --no-save-rng
  rm -rf "$run/checkpoints"
  touch "$run/.done"
}

data() {
  if [ -e "$folder/tokens/.done" ]; then return; fi
  infoentropy corpus "$folder/corpus" --megabytes "$megabytes" --overwrite
  rm -rf "$folder/tokenizer" "$folder/tokens"
  infoentropy tokenizer "$folder/corpus/train.jsonl.zst" --output "$folder/tokenizer" \
    --vocab-size "$vocabulary"
  for split in train validation test; do
    infoentropy preprocess --input "$folder/corpus/$split.jsonl.zst" \
      --tokenizer "$folder/tokenizer" --output "$folder/tokens/$split"
  done
  touch "$folder/tokens/.done"
}

budget() {
  for model in 6.7b 1.2b 468m; do
    choose_flags "$model" "${PRECISIONS:-fp8}"
    infoentropy train "$(recipe_of "$model" "${PRECISIONS:-fp8}")" --dry-run --ranks 1 -- \
      "${flags[@]}" | tee "$folder/budget-$model.txt"
  done
}

speed() {
  for model in 6.7b 1.2b 468m; do
    for precision in ${PRECISIONS:-fp8 bf16}; do
      local result=$folder/training_${model}_$precision.csv
      if [ -e "$result" ]; then continue; fi
      say "$model, $precision"
      choose_flags "$model" "$precision"
      infoentropy bench-recipe "$(recipe_of "$model" "$precision")" --data "$folder/tokens" \
        --tokenizer "$folder/tokenizer" --ranks 1 --rounds "$rounds" --output "$result" -- \
        "${flags[@]}"
    done
  done
}

curves() {
  local runs=()
  for objective in infoentropy focal cross_entropy; do
    say "6.7b, ${PRECISIONS:-fp8}, $objective"
    train 6.7b "${PRECISIONS:-fp8}" "$folder/6.7b-$objective" --objective "$objective"
    runs+=("$folder/6.7b-$objective")
  done
  for precision in ${PRECISIONS:-fp8 bf16}; do
    say "468m, $precision"
    train 468m "$precision" "$folder/468m-$precision"
  done
  infoentropy report "${runs[@]}" --output "$folder/curves-6.7b.html"
}

study() {
  infoentropy study "$study" --output "$folder/study"
}

for stage in $stages; do
  say "$stage"
  "$stage"
done
