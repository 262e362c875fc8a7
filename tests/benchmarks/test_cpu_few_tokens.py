# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of few tokens on a CPU runs, and says what it measured."""

import pytest


def test_what_it_writes(run_quickly) -> None:
    cpu_few_tokens, found = run_quickly("cpu_few_tokens")
    assert list(found["seconds"]) == list(cpu_few_tokens.OURS)
    for name, times in found["seconds"].items():
        assert list(times) == ["1", "17"]
        for count, seconds in times.items():
            bytes_read = 3 * 2048 * 11008 * (1 if name == "w8a8" else 0.5)
            assert found["GB/s"][name][count] == pytest.approx(
                bytes_read / seconds / 1e9
            )
