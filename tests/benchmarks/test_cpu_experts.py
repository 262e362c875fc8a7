# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of experts on a CPU runs, and says what it measured."""

import pytest


def test_what_it_writes(run_quickly) -> None:
    cpu_experts, found = run_quickly("cpu_experts")
    names = [f"{s}, {w}" for s in cpu_experts.SCHEMES for w in cpu_experts.WAYS]
    assert list(found["seconds"]) == list(found["GB/s"]) == names
    # One token meets two experts of 2 x 32 by 64 and 64 by 32.
    for name in names:
        bytes_read = 2 * 3 * 32 * 64 * (1 if "w8" in name else 0.5)
        seconds = found["seconds"][name]["1"]
        assert found["GB/s"][name]["1"] == pytest.approx(bytes_read / seconds / 1e9)
