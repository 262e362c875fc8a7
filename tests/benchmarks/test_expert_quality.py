# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of what quantization leaves of experts."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "expert_quality.py"


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_no_other_method_is_as_good_on_any_modality(scheme, tmp_path, capsys):
    report = tmp_path / "quality.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    size = ["--experts", "4", "--hidden", "64", "--inner", "48", "--tokens", "1536"]
    assert main([*size, "--schemes", scheme, "--json", str(report)]) == 0
    rows = {
        row["method"]: row["sqnr_db"] for row in json.loads(report.read_text())["rows"]
    }
    ours = rows["masquant"]
    for method in ("rtn", "smoothquant", "masquant-paper"):
        assert all(ours[name] > rows[method][name] for name in ours), (method, rows)
    # Of modalities with outliers, by far.
    for name in ("vision", "audio"):
        assert ours[name] > 8 + max(rows["rtn"][name], rows["smoothquant"][name])
    assert "own statistics" in capsys.readouterr().out
