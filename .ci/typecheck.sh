#!/usr/bin/env bash
# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

# mypy over the package as it is installed: kernels/ and tensor_subclasses/ lie beside
# torchao_masquant/ here and inside of it there, and mypy does not follow the import
# hook of an editable install. Links put the folders where their import names say.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/torchao_masquant"
ln -s "$root"/torchao_masquant/* "$root/kernels" "$root/tensor_subclasses" \
    "$tree/torchao_masquant/"
cd "$tree"

check() {
    "$root/.venv/bin/python" -m mypy --config-file "$root/pyproject.toml" \
        --cache-dir "$root/.mypy_cache" "$@"
}

status=0
# Names of files as they are in the checkout, so that an editor finds them.
check -p torchao_masquant |
    sed -E 's#^torchao_masquant/(kernels|tensor_subclasses)/#\1/#' || status=1
MYPYPATH="$root/tools" check "$root"/tools/*.py || status=1
exit $status
