#!/usr/bin/env bash
# The whole job on real text, on whatever this machine has: corpus, tokenizer, datasets, a small GPT
# trained with InfoEntropy and with cross entropy (two seeds each, so that noise has a size), export
# to Hugging Face format, evaluation, one page that compares them.
# usage: examples/demo.sh [FOLDER]     (an earlier demo there is replaced)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
demo=${1:-runs/demo}
seeds=${SEEDS:-"1 2"}
recipe=${RECIPE:-$here/tiny.yaml}
megabytes=${MEGABYTES:-12}
vocabulary=${VOCABULARY:-4096}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
tensor_parallel=${TENSOR_PARALLEL:-$([ "$gpus" = 1 ] && echo 1 || echo 2)}

say() { printf '\n== %s\n' "$*"; }

if [ -e "$demo" ] && [ ! -e "$demo/.demo" ]; then
  echo "$demo exists and is not an earlier demo: name another folder" >&2
  exit 1
fi
rm -rf "$demo"
mkdir -p "$demo"
touch "$demo/.demo"
start=$SECONDS

say "real text in the Pile's format: the documentation and the source of this Python"
infoentropy corpus "$demo/corpus" --megabytes "$megabytes"

say "a tokenizer, and Megatron datasets of every split and domain"
infoentropy tokenizer "$demo/corpus/train.jsonl.zst" --output "$demo/tokenizer" \
  --vocab-size "$vocabulary"
for split in train validation test; do
  infoentropy preprocess --input "$demo/corpus/$split.jsonl.zst" --tokenizer "$demo/tokenizer" \
    --output "$demo/tokens/$split" --workers 2
done

runs=()
for seed in $seeds; do
  for objective in infoentropy cross_entropy; do
    run=$demo/$objective-seed$seed
    runs+=("$run")
    say "$objective, seed $seed: train with Megatron, tensor parallel $tensor_parallel"
    infoentropy train "$recipe" --data "$demo/tokens" --tokenizer "$demo/tokenizer" --run "$run" \
      --objective "$objective" --seed "$seed" --tensor-parallel "$tensor_parallel" \
      --ranks "$tensor_parallel"
    say "$objective, seed $seed: export to Hugging Face format, evaluate on held-out text"
    infoentropy convert "$run/checkpoints" --tokenizer "$demo/tokenizer" --output "$run/hf" \
      --text "$here/../README.md"
    infoentropy evaluate "$run/hf" --data "$demo/tokens/test" \
      --token-counts "$demo/tokens/train/token_counts.npy" --output "$run"
  done
done

say "the report"
infoentropy report "${runs[@]}" --output "$demo/report.html" --open
echo "done in $((SECONDS - start)) s"
