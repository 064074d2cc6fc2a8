#!/usr/bin/env bash
# Makes a virtual environment and installs the package into it, editable, with what tests need.
# usage: tools/install.sh VENV
set -euo pipefail
venv=$1

suits='import sys; sys.exit(sys.version_info[:2] < (3, 12))'
for python in "${PYTHON:-}" python3.12 python3 python; do
  [ -n "$python" ] && "$python" -c "$suits" 2>/dev/null && break
  python=
done
if [ -z "$python" ]; then
  echo "No Python 3.12 found: install it (python3.12), or name one: make PYTHON=/path/to/python" >&2
  exit 1
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing into $venv with $("$venv/bin/python" --version); the first time takes some minutes"

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

# install WHAT...: uv installs the same packages faster than pip; most of it are torch's CUDA
# libraries. Where it cannot reach an index that pip is configured for, pip does it.
install() {
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@" ||
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# beside FOLDER NAME VERSION: into a folder beside the packages, without what it needs.
beside() {
  [ -e "$venv/side/$1/${2//-/_}-$3.dist-info" ] ||
    install --no-deps --upgrade --target "$venv/side/$1" "$2==$3" ||
    echo "$2 $3 could not be fetched: its tests will be skipped, or fail on CI" >&2
}

install --constraint constraints.txt --editable '.[dev]'
# The bound loss is tested with these too, and the environment has one Megatron-Core.
beside megatron-core-0.17 megatron-core 0.17.1
beside megatron-core-0.18 megatron-core 0.18.2
# And the stacks whose functions megatron_infoentropy.rl stands for.
beside rl verl 0.9.1
beside rl trl 1.16.0
beside rl skyrl 0.4.0
