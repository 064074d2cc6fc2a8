#!/usr/bin/env bash
# What needs a GPU, in one command for a card that is lent for minutes, without a network or .venv:
#
#   tools/gpu.sh pack WHEELS [RESULTS]   before, where there is nvcc: build/gpu gets all it will need
#   tools/gpu.sh [STEP...]               on the card: the steps, in order of worth
#   tools/gpu.sh --dry-run [STEP...]     the same commands on a CPU, small
#   tools/gpu.sh paper [STAGE...]        examples/gpu-6.7b.sh in the same environment
#
#   kernels     every kernel of both GPU backends against float64
#   headline    times of the loss beside its peers, 8192 x 128256 and 8192 x 151936 in bf16
#               and of the output layer with the loss, hidden size 4096, fused and not
#   curves      20 steps in bf16, FP8 tensorwise and FP8 delayed, two layers deep
#   steps       interleaved steps of the deepest 6.7B model that fits, our loss and Megatron's
#   compiled    the headline again, with what torch.compile makes of the peers
#   tests       tests marked gpu, of kernels and the loss
#   trainings   tests marked gpu that train
#   sanitizer   the kernels under compute-sanitizer
#
# Every step is bounded, and all of them by LIMIT seconds (570). OUT (runs/gpu) gets at most eight
# files: gpu.log, steps.csv and a result file a step, each written as its numbers are known. Called
# again with the same OUT, or with those files in build/gpu/results, it goes on: steps that ended
# well are left out, bench and tests take up where they were. PYTHON (python3) has torch, triton and
# pytest. Where there is no git, build/gpu/commit or INFOENTROPY_COMMIT names the commit. Exit
# status 1 where a step failed or was left out.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} pack=build/gpu site=$PWD/build/gpu-site limit=${LIMIT:-570} MIB=64
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

pack() { # pack WHEELS [RESULTS]: what travels besides the tree; refuses what would not arrive
  local wheels=${1:?usage: tools/gpu.sh pack WHEELS [RESULTS]} results=${2:-} size
  [ -z "$(git status --porcelain -uno)" ] || { echo "commit first: results name it" >&2 && return 2; }
  INFOENTROPY_REQUIRE_CUDA=1 "$python" setup.py build_ext --inplace >/dev/null || return 1
  rm -rf "$pack" && mkdir -p "$pack/wheels" "$pack/results"
  cp "$wheels"/*.whl "$pack/wheels" && cp megatron_infoentropy/_C*.so "$pack" || return 1
  sha256sum setup.py csrc/* >"$pack/sources"
  git rev-parse HEAD >"$pack/commit"
  [ -z "$results" ] || cp "$results"/*.csv "$pack/results"
  size=$({ git ls-files -co --exclude-standard -z && find "$pack" -type f -print0; } |
    du --files0-from=- --apparent-size -cb | tail -n 1 | cut -f 1)
  echo "$pack and the tree: $((size / 1048576 + 1)) of $MIB MiB; carry $pack along"
  [ "$size" -le $((MIB * 1048576)) ]
}

# step NAME SECONDS COMMAND...: everything printed goes to the log, the end of a failure to the screen
step() {
  local name=$1 seconds=$(($2 * (1 + 4 * dry))) begun=$SECONDS code=0 from said=ok
  shift 2
  [ "$seconds" -le $((limit - SECONDS)) ] || seconds=$((limit - SECONDS))
  if [ "$seconds" -lt 15 ]; then
    echo "NO TIME $name"
    failed+=("$name")
    return 1
  fi
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  from=$(($(wc -l <"$log") + 1))
  timeout --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 || code=$?
  case $code in 0) ;; 124 | 137) said=timeout ;; *) said=failed ;; esac
  printf '%-8s%s (%d s)\n' "${said/#ok/ok }" "$name" $((SECONDS - begun))
  [ -z "${facts:-}" ] || echo "$name,$said,$((SECONDS - begun)),$facts" >>"$out/steps.csv"
  [ $code = 0 ] && return 0
  failed+=("$name")
  tail -n +"$from" "$log" | tail -n 25
  return 1
}

prepare() { # packages, the extension, what a GPU must show; then who measures what and where
  [ $dry = 1 ] || [ ! -d $pack/wheels ] || [ -e "$site/.ready" ] || {
    step packages 90 "$python" -m pip install --quiet --disable-pip-version-check --no-index \
      --no-deps --no-compile --upgrade --target "$site" $pack/wheels/*.whl && touch "$site/.ready"
  } || return 1
  export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
  # Transformer Engine looks for these by name; the driver's own folder stays first.
  LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$("$python" -c "import importlib.util, pathlib
root = pathlib.Path(importlib.util.find_spec('torch').origin).parents[1]
print(*(f for p in ('nccl', 'cu13', 'cudnn') for f in root.glob(f'nvidia/{p}/lib')), sep=':')")
  export LD_LIBRARY_PATH
  if [ $dry = 0 ] && sha256sum --check --quiet $pack/sources 2>/dev/null; then
    cp $pack/_C*.so megatron_infoentropy/
  fi
  # One start tells both whether the extension loads here (else 3) and the facts of every row.
  local lines code=0 tell="import csv, sys
try: from megatron_infoentropy.kernels.cuda import _C; _C.cuda_shard_statistics
except (ImportError, AttributeError): sys.exit(3)
from megatron_infoentropy.bench.results import provenance
facts = provenance(); csv.writer(sys.stdout, lineterminator='\n').writerows([facts, facts.values()])"
  lines=$("$python" -c "$tell") || code=$?
  if [ $code = 3 ]; then # none was carried, or it does not load here
    step extension 240 env INFOENTROPY_REQUIRE_CUDA=$((1 - dry)) "$python" setup.py build_ext --inplace &&
      lines=$("$python" -c "$tell")
    code=$?
  fi
  [ $code = 0 ] || return 1
  [ $dry = 1 ] || step versions 90 "$python" -c "import torch, triton, megatron.core as core
from megatron_infoentropy.kernels import unavailable
assert torch.cuda.is_available(), 'torch sees no GPU'
reasons = unavailable(torch.device('cuda'), torch.bfloat16)
assert reasons['triton'] is reasons['cuda'] is None, reasons
import transformer_engine.pytorch, liger_kernel  # absent, they would only be listed as such
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, core.__version__)" || return 1
  facts=${lines#*$'\n'}
  [ -e "$out/steps.csv" ] || echo "step,outcome,seconds,${lines%%$'\n'*}" >"$out/steps.csv"
  parallel=()
  [ $dry = 1 ] || { "$python" -c 'import xdist' 2>/dev/null && parallel=(--numprocesses 8 --dist worksteal); }
}

tests() { # tests SECONDS ARGUMENTS...: those whose outcome is not known yet
  step "$step" "$1" "$python" -m pytest -q -p no:cacheprovider --outcomes "$out/tests.csv" "${parallel[@]}" "${@:2}"
  local code=$?
  grep -E '^[0-9]+ (passed|failed|skipped|deselected)|in [0-9.]+s' "$log" | tail -n 1
  return $code
}

kernels() { # ten processes, since compiling is what takes time
  local calls=("--backend cuda" --backend\ triton\ --setting\ {0..10})
  [ $dry = 0 ] || calls=(--backend\ native\ --setting\ {1,10})
  # shellcheck disable=SC2016  # the inner shell expands them
  step kernels 120 bash -c 'printf "%s\n" "${@:2}" | xargs -P 10 -L 1 "$1" tests/kernels/sanitized_calls.py' \
    - "$python" "${calls[@]}"
}

bench() { # bench NAME OPTIONS...
  local grid=headline from
  [ $dry = 0 ] || grid=tiny
  from=$(($(wc -l <"$log") + 1))
  step "$1" 110 "$python" -m megatron_infoentropy bench --grid $grid --resume --repeats 10 \
    --output "$out/$1.csv" "${@:2}" && tail -n +"$from" "$log" | tail -n 100
}

curves() {
  local from=$(($(wc -l <"$log") + 1))
  step curves 100 "$python" tools/gpu_curves.py "$out/curves.csv" --steps $((dry ? 3 : 20)) &&
    tail -n +"$from" "$log" | tail -n 3
}

# Two losses, a step each in turn. FP8 as the recipe has it where its curve was right, else bf16.
steps() {
  local recipe=examples/paper/6.7b.yaml gib layers from
  local flags=(--micro-batch-size 8 --global-batch-size 8 --use-precision-aware-optimizer
    --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16)
  if [ $dry = 1 ] || ! grep -q '^curves,ok,' "$out/steps.csv"; then
    sed '/^fp8:/,/^$/d' $recipe >"$temporary/6.7b_bf16.yaml"
    recipe=$temporary/6.7b_bf16.yaml
  fi
  gib=$("$python" -c "import torch
print(torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else 139)")
  from=$(($(wc -l <"$log") + 1))
  layers=$("$python" tools/gpu_depth.py $recipe "$gib" -- "${flags[@]}" 2>>"$log") || layers=0
  tail -n +"$from" "$log"
  [ $dry = 0 ] || flags=(--micro-batch-size 1 --global-batch-size 1 --hidden-size 64
    --ffn-hidden-size 64 --num-attention-heads 2 --seq-length 64 --vocab-size 512)
  [ $dry = 0 ] || layers=2
  step steps 150 "$python" -m megatron_infoentropy bench-recipe "$recipe" --ranks 1 \
    --rounds $((dry ? 3 : 10)) --loss infoentropy --loss "megatron unfused" \
    --output "$out/steps_6.7b.csv" -- "${flags[@]}" --num-layers "$layers" \
    --exit-duration-in-mins 2 && tail -n 30 "$log"
}

sanitizer() {
  if [ $dry = 1 ]; then
    step sanitizer 60 "$python" tests/kernels/sanitized_calls.py --backend native --setting 10
  else
    tests 200 tests/gpu/test_sanitizer.py
  fi
}

run_step() {
  local name=$1
  step=$name
  if grep -q "^$name,ok," "$out/steps.csv"; then echo "before  $name" && return; fi
  case $name in
    headline) bench headline --no-compiled --hidden 4096 ;;
    compiled) bench compiled ;;
    tests)
      if [ $dry = 1 ]; then tests 120 tests/kernels/test_on_gpu.py; else
        tests 240 -m gpu tests/gpu/test_loss_on_gpu.py tests/gpu/test_kernels_on_gpu.py \
          tests/kernels/test_cuda_gpu.py tests/loss/test_linear_autograd.py tests/bench/test_measure.py
      fi ;;
    trainings)
      if [ $dry = 1 ]; then tests 120 tests/bench/test_recipe_bench.py; else
        tests 300 -m gpu tests/integration/test_recipes_gpu.py tests/gpu/test_layouts_on_gpus.py
      fi ;;
    *) "$name" ;;
  esac
  [ $dry = 1 ] || cp "$out"/*.csv $pack/results 2>/dev/null || true
}

all="kernels headline curves steps compiled tests trainings sanitizer"
dry=0 failed=() facts=
case ${1:-} in
  pack) pack "${@:2}" && exit ;;
  --help | -h) sed -n '2,28s/^# \?//p' "$0" && exit ;;
  --dry-run) dry=1 && shift ;;
esac
[ "${1:-}" != pack ] || exit 1
[ $# -gt 0 ] || set -- $all
for each in "$@"; do
  [ "$1" = paper ] || [[ " $all " = *" $each "* ]] || { echo "no step $each; these: $all" >&2 && exit 2; }
done
if [ -z "${INFOENTROPY_COMMIT:-}" ]; then
  head=$(git rev-parse HEAD 2>/dev/null) || head=
  if [ -z "$head" ]; then
    INFOENTROPY_COMMIT=$(cat $pack/commit 2>/dev/null) || { echo "no git here: set INFOENTROPY_COMMIT" >&2 && exit 2; }
  elif [ $dry = 1 ]; then # of uncommitted changes too
    INFOENTROPY_COMMIT=$head
  fi
fi
export INFOENTROPY_COMMIT=${INFOENTROPY_COMMIT:-}
temporary=$(mktemp -d) && trap 'rm -rf "$temporary"' EXIT
out=${OUT:-runs/gpu} && [ $dry = 0 ] || out=${OUT:-$temporary}
mkdir -p "$out" $pack/results && out=$(cd "$out" && pwd) log=$out/gpu.log
touch "$log"
[ $dry = 1 ] || cp -n $pack/results/*.csv "$out" 2>/dev/null
[ $dry = 0 ] || limit=${LIMIT:-3000} # a CPU compiles slowly
SECONDS=0
if prepare; then
  if [ "${1:-}" = paper ]; then
    step paper "$limit" env PYTHON="$python" examples/gpu-6.7b.sh "$out/6.7b" "${@:2}"
    tail -n 80 "$log"
  else
    for each in "$@"; do run_step "$each"; done
  fi
else
  failed+=("what comes before the steps")
fi
echo "${#failed[@]} failed or left out${failed[*]:+: ${failed[*]}}; ${SECONDS} s; $log"
[ ${#failed[@]} = 0 ]
