#!/usr/bin/env bash
# What needs a GPU, in three calls of less than ten minutes each. None needs a network or .venv:
#
#   tools/gpu.sh check    every kernel against float64, one FP8 training step, compute-sanitizer,
#                         first times at 8192 x 128256
#   tools/gpu.sh test     every test marked gpu
#   tools/gpu.sh bench    the full grid; called again it goes on with OUT/bench_*.csv
#
# and, a stage or two a call, what examples/gpu-6.7b.sh does with the paper's models:
#
#   tools/gpu.sh paper [STAGE...]
#
# PYTHON (python3) has torch, triton, pytest. WHEELS (build/wheels) is a folder of wheels with what it
# lacks, installed once into build/gpu. OUT (runs/gpu) gets one log a call, and the result file.
# Where there is no git, INFOENTROPY_COMMIT names the commit. Exit status 1 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=${WHEELS:-build/wheels} out=${OUT:-runs/gpu} site=$PWD/build/gpu
stage=${1:-}
case $stage in check | test | bench | paper) ;; *) sed -n '2,16s/^# \?//p' "$0" >&2 && exit 2 ;; esac
[ -n "${INFOENTROPY_COMMIT:-}" ] || git rev-parse HEAD >/dev/null 2>&1 ||
  { echo "no git here: set INFOENTROPY_COMMIT" >&2 && exit 2; }
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$out"
out=$(cd "$out" && pwd) log=$out/$stage.log failed=()
: >"$log"

# step NAME SECONDS COMMAND...: everything printed goes to the log, the end of a failure to the screen
step() {
  local name=$1 seconds=$2 start=$SECONDS code=0 from
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  from=$(($(wc -l <"$log") + 1))
  timeout --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 || code=$?
  case $code in
    0) echo "ok      $name ($((SECONDS - start)) s)" ;;
    124 | 137) echo "TIMEOUT $name ($seconds s)" ;;
    *) echo "FAILED  $name ($((SECONDS - start)) s, status $code)" ;;
  esac
  [ $code = 0 ] && return 0
  failed+=("$name")
  tail -n +"$from" "$log" | tail -n 25
  return 1
}

pytest() { # pytest NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  step "$name" "$seconds" "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=10 \
    "${parallel[@]}" "$@"
  tail -n 1 "$log"
}

prepare() {
  [ -e "$site/.ready" ] || {
    step "wheels" 120 "$python" -m pip install --quiet --disable-pip-version-check --no-index \
      --no-deps --upgrade --target "$site" "$wheels"/*.whl && touch "$site/.ready"
  } || return 1
  export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
  # Transformer Engine looks for these by name; the driver's own folder stays first.
  local folders
  folders=$("$python" -c "import pathlib, torch; root = pathlib.Path(torch.__file__).parents[1]
print(*(f for p in ('nccl', 'cu13', 'cudnn') for f in root.glob(f'nvidia/{p}/lib')), sep=':')")
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folders
  step "extension" 240 env INFOENTROPY_REQUIRE_CUDA=1 "$python" setup.py build_ext --inplace ||
    return 1
  step "versions" 90 "$python" -c "import torch, triton, megatron.core as core
from megatron_infoentropy.kernels import cuda, triton_kernels
assert torch.cuda.is_available(), 'torch sees no GPU'
gpu = torch.device('cuda')
for module in (cuda, triton_kernels):
    assert module.why_unavailable(gpu, torch.bfloat16) is None, module.why_unavailable(gpu, torch.bfloat16)
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, core.__version__)" ||
    return 1
  tail -n 1 "$log"
  # Where this fails, tests of it are skipped and the bench lists it: that must not look like success.
  step "Transformer Engine" 90 "$python" -c "import transformer_engine.pytorch, liger_kernel"
  parallel=()
  "$python" -c 'import xdist' 2>/dev/null && parallel=(--numprocesses 8 --dist worksteal)
  return 0
}

check() {
  step "kernels against float64" 150 "$python" tests/kernels/sanitized_calls.py
  pytest "FP8 step of Transformer Engine" 150 \
    'tests/integration/test_recipes_gpu.py::test_transformer_engine_builds_and_trains_the_fp8_recipe[tensorwise]'
  bench_one
  pytest "compute-sanitizer" 240 tests/gpu/test_sanitizer.py
}

bench_one() {
  step "first times" 100 "$python" -m megatron_infoentropy bench --tokens 8192 --vocabulary 128256 \
    --dtype bfloat16 --no-compiled --repeats 10 --output "$out/first_times.csv"
  tail -n 50 "$log"
}

# Tests of training start processes of their own: they take longest and begin first.
test_all() {
  pytest "tests marked gpu" 530 tests/integration/test_recipes_gpu.py \
    tests/gpu/test_layouts_on_gpus.py tests/gpu/test_kernels_on_gpu.py tests/gpu/test_loss_on_gpu.py \
    tests/kernels/test_cuda_gpu.py tests/loss/test_linear_devices.py tests/bench/test_measure.py
}

bench_all() {
  step "bench" 560 "$python" -m megatron_infoentropy bench --grid full --repeats 10 --hidden 4096 \
    --steps 30 --counters --minutes "${MINUTES:-6}" --output "$out"
  tail -n 60 "$log"
}

paper() {
  step "the paper's models" 580 env PYTHON="$python" examples/gpu-6.7b.sh "$out/6.7b" "$@"
  tail -n 80 "$log"
}

SECONDS=0
if prepare; then
  case $stage in check) check ;; test) test_all ;; bench) bench_all ;; paper) paper "${@:2}" ;; esac
fi
echo "$stage: ${#failed[@]} failed${failed[*]:+: ${failed[*]}}; ${SECONDS} s; $log"
[ ${#failed[@]} = 0 ]
