# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The arithmetic of the CPU benchmarks."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cpu_linear")


def test_ratios_are_over_the_fastest_way(linear: Any) -> None:
    taken = dict(zip([*linear.HIGH, *linear.TORCHAO], [8, 6, 7, 5, 4, 3, 2, 10, 9]))
    taken["w8a8 base"] = 2
    rows = [
        linear.Row(64, 32, 16, name, milliseconds, 5)
        for name, milliseconds in taken.items()
    ]
    (found,) = linear.ratios(rows)
    assert found["candidate"] == "w8a8 base" and found["tokens"] == 16
    # bf16 alone took 6 at best, with float32 4.
    assert found["over bf16"] == 3 and found["over high"] == 2
    assert found["over torchao int8 dynamic"] == 1.5
    assert found["over torchao int4 weight-only"] == 4.5


def test_candidates_take_turns(linear: Any) -> None:
    order: list[str] = []

    def candidate(name: str) -> Any:
        return lambda: order.append(name)

    taken = linear.measure({name: candidate(name) for name in "ab"}, 0.0)
    assert order == ["a", "b"] * (len(order) // 2)
    # Two rounds warm up.
    assert {name: len(times) for name, times in taken.items()} == {
        name: len(order) // 2 - 2 for name in "ab"
    }


@pytest.mark.parametrize("length", [8, 9, 256])
def test_prompts_hold_the_image_that_they_announce(linear: Any, length: int) -> None:
    model = importlib.import_module("cpu_model")
    inputs = model.prompt(length, True)
    assert inputs["input_ids"].shape == (1, length)
    images = int((inputs["input_ids"] == model._IMAGE).sum())
    assert images == length // 2 == int(inputs["mm_token_type_ids"].sum())
    assert inputs["image_grid_thw"].prod() == len(inputs["pixel_values"]) == 4 * images
    assert set(model.prompt(length, False)) == {"input_ids", "attention_mask"}


def test_shares_of_memory_and_speedups(linear: Any) -> None:
    model = importlib.import_module("cpu_model")
    dense = {
        "load s": 3.0,
        "linears MiB": 100.0,
        "tokens/s after 8": 10.0,
        "graphs": {},
    }
    ours = {"load s": 1.0, "linears MiB": 25.0, "tokens/s after 8": 20.0, "graphs": {}}
    assert model.ratios({model.DENSE: dense, "w4a8": ours}) == {
        "w4a8": {"load s": 3.0, "linears MiB": 0.25, "tokens/s after 8": 2.0}
    }
