#!/usr/bin/env bash
# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

# The tests at both ends of the ranges that pyproject.toml declares: the oldest release of
# everything on the oldest Python, then the newest on the newest. It is none of CI's: each
# end has torch of its own, some GB where the index has builds for GPUs alone. uv reads
# its own variables, such as UV_INDEX_URL or UV_TORCH_BACKEND=cpu.
#
# OLDEST_PYTHON and NEWEST_PYTHON name the interpreters; arguments go to pytest.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
ends="$root/build/ends"
[ -x "$ends/uv/bin/uv" ] || {
    "${PYTHON:-python3}" -m venv "$ends/uv"
    "$ends/uv/bin/python" -m pip install --quiet uv
}
uv="$ends/uv/bin/uv"
cd "$root"

status=0
at() {
    local name=$1 python=$2 resolution=$3
    shift 3
    echo "The $name releases, Python $python:"
    "$uv" venv --quiet --clear --python "$python" "$ends/$name"
    "$uv" pip install --quiet --python "$ends/$name/bin/python" \
        --resolution "$resolution" --editable "$root[data,dev,report]"
    "$uv" pip list --quiet --python "$ends/$name/bin/python" |
        grep -E "^(numpy|safetensors|torch|torchao|transformers) "
    OMP_NUM_THREADS=1 "$ends/$name/bin/python" -m pytest "$@" || status=1
}

at oldest "${OLDEST_PYTHON:-3.10}" lowest-direct "$@"
at newest "${NEWEST_PYTHON:-3.13}" highest "$@"
exit $status
