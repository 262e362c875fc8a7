# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Measuring with a clock of our own: what is chosen, written down, and taken after."""

import json
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")

from operator_cases import operands

from torchao_masquant.kernels import reference
from torchao_masquant.kernels.gpu import measuring, tuning
from torchao_masquant.kernels.gpu.int_linear import int_linear
from torchao_masquant.kernels.gpu.int_linear_tilings import CONFIGS
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.library_products import (
    LIBRARY_PRODUCTS,
    library_product,
)
from torchao_masquant.kernels.gpu.measuring import LinearShape, measure_call, tune
from torchao_masquant.kernels.gpu.operators import operators
from torchao_masquant.kernels.gpu.tuning import LibraryProduct, questions

CPU = torch.device("cpu")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table of an architecture that the CPU poses as."""
    monkeypatch.setenv("MASQUANT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "table_name", lambda device: "sm_00")
    monkeypatch.setattr(measuring, "table_name", lambda device: "sm_00")
    tuning.forget_tables()
    yield tmp_path / "cache" / "triton_sm_00.json"
    tuning.forget_tables()


class Clock:
    """Runs a call and returns the next of given times, over and over."""

    def __init__(self, *times: float):
        self.times = times
        self.calls = 0

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        self.calls += 1
        return self.times[(self.calls - 1) % len(self.times)]


def linear_args(tokens: int = 3, n: int = 16, k: int = 32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    qx = torch.randint(-127, 128, (tokens, k), dtype=torch.int8)
    qdata = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales = (torch.rand(tokens, 1), torch.rand(n, 1))
    rest = (None,) * 5
    return (qx, scales[0], qdata, scales[1], *rest, 8, torch.float32)


def weight_only_args(tokens: int = 3, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    x = torch.randn(tokens, 32).to(dtype)
    qdata = torch.randint(0, 256, (16, 16), dtype=torch.uint8)
    zero_point = torch.randint(-8, 8, (16, 2), dtype=torch.int8)
    scale = torch.rand(16, 2)
    rest = (None,) * 5
    pre_scale = torch.rand(2, 32) + 0.5
    return (x, pre_scale, qdata, scale, zero_point, *rest, [], 4, dtype, None)


def few(monkeypatch: pytest.MonkeyPatch) -> list[TileConfig]:
    """Three tilings, for the interpreter is slow."""
    chosen = [CONFIGS[0], CONFIGS[2], CONFIGS[3]]
    fitting = "torchao_masquant.kernels.gpu.int_linear.fitting"
    monkeypatch.setattr(fitting, lambda *args: tuple(chosen))
    return chosen


def test_the_fastest_is_written_down_and_taken(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = few(monkeypatch)
    clock = Clock(3.0, 1.0, 2.0)
    found = measure_call("int_linear", int_linear, linear_args(), clock=clock)
    assert found is not None and found.entry == configs[1]
    assert [time for _, time in found.times] == [3.0, 1.0, 2.0]
    assert json.loads(tables.read_text()) == {
        "int_linear w8": {"4x16x32": configs[1].to_json()}
    }
    assert list(tables.parent.iterdir()) == [tables]
    with questions() as asked:
        int_linear(*linear_args())
    question = asked[0]
    taken = tuning.choose(question.kernel, question.key, configs, configs[0], CPU)
    assert taken == configs[1]
    # Of 4 tokens, as of 3, the entry is known; of 5 it is not.
    again = Clock(1.0)
    assert measure_call("int_linear", int_linear, linear_args(4), clock=again) is None
    assert again.calls == 0
    assert measure_call("int_linear", int_linear, linear_args(5), clock=again)
    assert set(json.loads(tables.read_text())["int_linear w8"]) == {
        "4x16x32",
        "8x16x32",
    }


def test_medians_of_rounds_and_ties_for_the_first(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow round of three changes nothing, nor does a lead of a hundredth."""
    configs = few(monkeypatch)
    clock = Clock(1.01, 1.0, 2.0, 9.0, 1.0, 2.0, 1.01, 1.0, 0.1)
    found = measure_call("int_linear", int_linear, linear_args(), clock=clock)
    assert found is not None and found.entry == configs[0]
    assert [time for _, time in found.times] == [1.01, 1.0, 2.0]


def test_a_library_that_is_faster_is_taken(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = few(monkeypatch)
    args = linear_args(tokens=24)
    clock = Clock(1.0, 2.0, 2.0, 2.0)
    found = measure_call("int_linear", int_linear, args, clock=clock)
    assert found is not None and found.entry == LibraryProduct("int_mm")
    assert len(found.times) == len(configs) + 1
    assert json.loads(tables.read_text())["int_linear w8"]["32x16x32"] == {
        "library": "int_mm"
    }
    assert library_product("int_linear", args) is LIBRARY_PRODUCTS["int_mm"]
    operator = operators()["int_linear"]
    torch.testing.assert_close(operator.run(*args), reference.int_linear(*args))
    # 17 tokens share the entry; 16 have none, and cuBLAS does not take them either.
    assert library_product("int_linear", linear_args(tokens=17)) is not None
    assert library_product("int_linear", linear_args(tokens=16)) is None


def test_what_a_library_cannot_take_is_not_measured(tables: Path) -> None:
    takes = LIBRARY_PRODUCTS["int_mm"].takes
    assert takes(*linear_args(17))
    assert not takes(*linear_args(16))
    assert not takes(*linear_args(17, k=36))
    assert not takes(*linear_args(17, n=12))
    takes = LIBRARY_PRODUCTS["dense"].takes
    assert takes(*weight_only_args())
    assert not takes(*weight_only_args(dtype=torch.float32))


def test_a_tiling_that_gives_another_result_is_refused(tables: Path) -> None:
    def broken(*args: Any, config: Any = None) -> torch.Tensor:
        y = int_linear(*args, config=config)
        return y if config is None else y + 1e6

    with pytest.raises(RuntimeError, match="another result"):
        measure_call("int_linear", broken, linear_args(), clock=Clock(1.0))
    assert not tables.exists()


def test_a_tiling_that_does_not_fit_is_left_out(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    configs = few(monkeypatch)

    def launch(*args: Any, config: Any = None) -> torch.Tensor:
        if config == configs[0]:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return int_linear(*args, config=config)

    found = measure_call("int_linear", launch, linear_args(), clock=Clock(1.0))
    assert found is not None and [e for e, _ in found.times] == configs[1:]


@pytest.mark.parametrize("case", ["plain", "w4", "int8-pair", "no-ids"])
def test_a_library_gives_the_same(case: str) -> None:
    given = operands(case)
    args = given.args("int_linear")
    y = LIBRARY_PRODUCTS["int_mm"].run(*args)
    torch.testing.assert_close(y, reference.int_linear(*args), rtol=1e-6, atol=1e-3)
    args = given.args("weight_only_linear", x=given.x.bfloat16())
    y = LIBRARY_PRODUCTS["dense"].run(*args)
    expected = reference.weight_only_linear(*args)
    # Weights, tokens and hidden states are rounded to 8 bits.
    most = 2.0**-6 * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=most)


@pytest.mark.parametrize("name", ["int_linear", "weight_only_linear"])
def test_a_library_is_looked_up_where_tilings_are(name: str) -> None:
    args = linear_args() if name == "int_linear" else weight_only_args()
    with questions() as asked:
        operators()[name].launch(*args)
    (product,) = [p for p in LIBRARY_PRODUCTS.values() if p.operator == name]
    assert product.entry(args) == (asked[0].kernel, asked[0].key)


def test_tune_measures_every_operator_of_a_linear(tables: Path) -> None:
    told = []
    path = tune(
        [
            LinearShape(16, 32, rank=4, low_rank_bits=8),
            LinearShape(16, 32, 4, 16, group_size=16),
        ],
        [2, 1, 2],
        device=CPU,
        clock=lambda call: 1.0,
        tell=told.append,
    )
    assert path == tables
    table = json.loads(tables.read_text())
    assert sorted(table) == [
        "int_linear w8",
        "low_rank_down int8",
        "smooth_quantize",
        "weight_only_linear w4 group",
    ]
    assert [sorted(entries) for entries in table.values()] == [
        ["1x16x32", "2x16x32"],
        ["1x4x32", "2x4x32"],
        ["1x32", "2x32"],
        ["1x16x32", "2x16x32"],
    ]
    assert len(told) == 8


def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="no tables for cpu: tilings are for GPUs"):
        tune([LinearShape(16, 32)], [1], device=CPU)
    with pytest.raises(RuntimeError, match="no tables for cpu"):
        measure_call("int_linear", int_linear, linear_args())


def test_a_damaged_table_is_named(tables: Path) -> None:
    tables.parent.mkdir()
    tables.write_text("{")
    with pytest.raises(ValueError, match=f"{tables.name}.* is no table .* delete it"):
        int_linear(*linear_args())


def test_entries_of_another_version_are_not_taken(tables: Path) -> None:
    tables.parent.mkdir()
    other = TileConfig.of(1, 1, BLOCK_M=1).to_json()
    tables.write_text(
        json.dumps({"int_linear w8": {"4x16x32": other, "8x16x32": {"library": "?"}}})
    )
    for tokens in (3, 5):
        args = linear_args(tokens)
        operator = operators()["int_linear"]
        torch.testing.assert_close(operator.run(*args), reference.int_linear(*args))
