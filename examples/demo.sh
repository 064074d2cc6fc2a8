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
gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
tensor_parallel=${TENSOR_PARALLEL:-$([ "$gpus" = 1 ] && echo 1 || echo 2)}

# Commands are noted here and run at the end, one after the other in one process: in processes of
# their own, most would import torch, transformers and Megatron again.
words=()
infoentropy() { words+=(infoentropy "$@" ";"); }
say() { words+=(say "$*" ";"); }
run='
import sys
from megatron_infoentropy.cli import main
from megatron_infoentropy.runtime.device import keep_memory

keep_memory()
words = []
for word in sys.argv[1:]:
    if word != ";":
        words.append(word)
        continue
    command, *words = words
    if command == "say":
        print("\n==", *words, flush=True)
    else:
        sys.argv = [command, *words]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
    words = []
'

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
    run_folder=$demo/$objective-seed$seed
    runs+=("$run_folder")
    say "$objective, seed $seed: train with Megatron, tensor parallel $tensor_parallel"
    infoentropy train "$recipe" --data "$demo/tokens" --tokenizer "$demo/tokenizer" \
      --run "$run_folder" --objective "$objective" --seed "$seed" \
      --tensor-parallel "$tensor_parallel" --ranks "$tensor_parallel"
  done
done

for run_folder in "${runs[@]}"; do
  say "$(basename "$run_folder"): export to Hugging Face format, evaluate on held-out text"
  infoentropy convert "$run_folder/checkpoints" --tokenizer "$demo/tokenizer" \
    --output "$run_folder/hf" --text "$here/../README.md"
  infoentropy evaluate "$run_folder/hf" --data "$demo/tokens/test" \
    --token-counts "$demo/tokens/train/token_counts.npy" --output "$run_folder"
done

say "the report"
infoentropy report "${runs[@]}" --output "$demo/report.html" --open

python -c "$run" "${words[@]}"
echo "done in $((SECONDS - start)) s"
