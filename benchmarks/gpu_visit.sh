#!/usr/bin/env bash
# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

# One visit to a machine with a GPU, PyTorch for it, Triton and transformers, and no
# network: is it right, how fast is it, and what does tuning give?
#
#   benchmarks/gpu_visit.sh prepare   here: collects what may be missing there
#   benchmarks/gpu_visit.sh           there: about eight minutes
#   DRY_RUN=whole benchmarks/gpu_visit.sh   the same with no GPU; DRY_RUN=short takes less
#
# OUT is the folder of what it finds (build/gpu_visit), WHEELS of what is carried
# (build/gpu_wheels), STAGES a choice of "check time tune torchao", VISIT_SECONDS the
# time for all of it, PYTHON the interpreter.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/build/gpu_wheels}

if [ "${1:-}" = prepare ]; then
    exec "$python" "$root/benchmarks/gpu_visit/wheels.py" collect "$wheels"
fi

out=${OUT:-$root/build/gpu_visit}
seconds=${VISIT_SECONDS:-470}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The package as an install lays it: kernels/ and tensor_subclasses/ are inside of it, and
# neither is ever found by its own name, which other packages ask for.
site=$work/site
mkdir -p "$site" "$work/helpers" "$work/run"
cp -r "$root/torchao_masquant" "$site/"
cp -r "$root/kernels" "$root/tensor_subclasses" "$site/torchao_masquant/"
cp "$root"/tests/operator_*.py "$root/tests/hadamard_oracle.py" \
    "$root"/tests/kernels/{backends,quick_interpreter}.py "$work/helpers/"
"$python" "$root/benchmarks/gpu_visit/wheels.py" unpack "$wheels" "$site"

export PYTHONPATH="$site:$work/helpers:$root/benchmarks" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1
# A dozen processes compile: none takes every core.
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1
# Nothing is compiled for the processor; it is compared with.
export MASQUANT_CPU_ENGINE=reference
export MASQUANT_CACHE_DIR="$work/cache" TRITON_CACHE_DIR="$work/triton"
export TORCHINDUCTOR_CACHE_DIR="$work/inductor"
if [ -n "${DRY_RUN:-}" ]; then export DRY_RUN TRITON_INTERPRET=1; fi
cd "$work/run"

status=0
# Runs stages until a moment, and has them ended if they hang.
stage() {
    local names=$1 budget=$2 left=$((seconds - SECONDS - 5)) code=0
    [ "$budget" -lt "$left" ] || budget=$left
    if [ "$budget" -lt 15 ]; then
        echo "no time is left for $names"
        status=1
        return
    fi
    # shellcheck disable=SC2086 # a short dry run has several in one process
    timeout --kill-after=3 $((budget + 5)) "$python" -m gpu_visit $names \
        --out "$out" --until $(($(date +%s) + budget)) || code=$?
    [ "$code" = 0 ] || status=$code
    return "$code"
}

visit() {
    local name code
    # Hundredths of the time.
    declare -A shares=([check]=36 [time]=28 [tune]=23 [torchao]=13)
    if [ "${DRY_RUN:-}" = short ]; then
        stage "${STAGES:-check time tune torchao}" "$seconds" || true
        return
    fi
    for name in ${STAGES:-check time tune torchao}; do
        code=0
        stage "$name" $((seconds * shares[$name] / 100)) || code=$?
        # What is wrong is not measured: what is left of the time is for another visit.
        if [ "$name" = check ] && [ "$code" = 1 ]; then break; fi
    done
}

{
    visit
    echo "after $SECONDS s: $(ls "$out" | tr '\n' ' ')"
    exit "$status"
} 2>&1 | tee "$out/visit.log"
exit "${PIPESTATUS[0]}"
