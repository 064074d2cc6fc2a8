#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer with UBSan, then under ThreadSanitizer; a minute on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${CXX:-g++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sources=(tests/kernels/sanitized.cpp csrc/shard_ops_cpu.cpp csrc/threads.cpp csrc/instruction_sets.cpp)
flags=(-std=c++17 -O1 -g1 -fno-math-errno -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread)
for sanitizers in address,undefined thread; do
  program=$folder/${sanitizers%%,*}
  "$compiler" "${flags[@]}" "-fsanitize=$sanitizers" "${sources[@]}" -o "$program" -ldl
  echo -n "$sanitizers: "
  "$program"
done
