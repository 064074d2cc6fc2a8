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

# uv installs the same packages faster than pip; most of it are torch's CUDA libraries. Where it cannot reach an index that pip is configured for, pip does it.
what=(--constraint constraints.txt --editable '.[dev]')
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "${what[@]}" ||
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${what[@]}"

# The bound loss is tested with these too. They lie beside the packages, each in a folder of its own,
# so that the environment has one Megatron-Core; without them the tests that need them say so.
for pin in 0.17.1 0.18.2; do
  side=$venv/side/megatron-core-${pin%.*}
  [ -e "$side/megatron_core-$pin.dist-info" ] && continue
  rm -rf "$side"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$side" "megatron-core==$pin" ||
    echo "megatron-core $pin could not be fetched: its tests will be skipped, or fail on CI" >&2
done

# And the stacks whose functions megatron_infoentropy.rl stands for, without what they need.
for pin in verl-0.9.1 trl-1.16.0 skyrl-0.4.0; do
  [ -e "$venv/side/rl/$pin.dist-info" ] && continue
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$venv/side/rl" "${pin%-*}==${pin##*-}" ||
    echo "$pin could not be fetched: its tests will be skipped, or fail on CI" >&2
done
