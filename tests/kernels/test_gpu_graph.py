# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``torch.compile`` makes of a decoder layer on a GPU, found out without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "graphs_without_gpu.py"


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # All workers have the one that is made first.
        folder = folder.parent
    file = folder / "graphs_without_gpu.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(_made())
    return json.loads(file.read_text())


def _made() -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def launched(graphs: dict[str, Any]) -> list[dict[str, Any]]:
    return [graph for name, graph in graphs.items() if name != "exported"]


QUANTIZE = "smooth_quantize.smooth_quantize_kernel"
SMOOTH = "smooth.smooth_kernel"
DOWN = ["low_rank_down.low_rank_down_kernel", "low_rank_down.reduce_kernel"]
PRODUCT, SUM = "int_linear.int_linear_kernel", "linear_epilogue.reduce_kernel"
WEIGHT_ONLY = "weight_only_linear.weight_only_linear_kernel"


def layer(prologue: str, *linear: str) -> list[str]:
    """q, k and v have one prologue, o its own, gate and up have one, down its own."""
    return [
        launch
        for linears in (3, 1, 2, 1)
        for launch in (prologue, *linears * list(linear))
    ]


def test_base_tokens(graphs: dict[str, Any]) -> None:
    assert graphs["base"]["kernels"] == layer(QUANTIZE, PRODUCT)
    assert graphs["base"]["kernels"].count(QUANTIZE) == 4
    assert graphs["base"]["kernels"].count(PRODUCT) == 7


def test_mixed_tokens(graphs: dict[str, Any]) -> None:
    assert graphs["mixed"]["kernels"] == layer(QUANTIZE, *DOWN, PRODUCT)


def test_one_token(graphs: dict[str, Any]) -> None:
    """K is split, and a second kernel adds the parts."""
    assert graphs["decode"]["kernels"] == layer(QUANTIZE, PRODUCT, SUM)


def test_weight_only(graphs: dict[str, Any]) -> None:
    """q/k/v are smoothed once, and so are gate and up."""
    assert graphs["weight only"]["kernels"] == layer(SMOOTH, WEIGHT_ONLY)


def test_one_token_of_weight_only_linears_is_smoothed_where_it_is_read(
    graphs: dict[str, Any],
) -> None:
    assert graphs["weight only, one token"]["kernels"] == 7 * [WEIGHT_ONLY, SUM]


def test_any_number_of_tokens_is_one_graph(graphs: dict[str, Any]) -> None:
    """Sizes in tokens stay symbols, and equal launches are still found equal."""
    graph = graphs["mixed"]
    assert set(graph["symbols"]) == {graph["symbols"][0]}
    assert graph["grids"][0] == "[(floordiv, 1, 1)]"


def test_rotations_are_shared_too(graphs: dict[str, Any]) -> None:
    """A kernel that rotates is launched as often as one that does not."""
    assert graphs["rotated"]["kernels"] == layer(QUANTIZE, PRODUCT)
    # Of tokens that the product would smooth itself.
    found = graphs["rotated weight only, one token"]["kernels"]
    assert found == layer(SMOOTH, WEIGHT_ONLY, SUM)


def test_floats(graphs: dict[str, Any]) -> None:
    """As integers, with other kernels before and in the product."""
    quantize = "float_smooth_quantize.float_smooth_quantize_kernel"
    product = "float_linear.float_linear_kernel"
    assert graphs["floats"]["kernels"] == layer(quantize, *DOWN, product)


def test_an_export_keeps_the_operators(graphs: dict[str, Any]) -> None:
    """What runs on any device, and what other passes know."""
    graph = graphs["exported"]
    assert not graph["kernels"]
    names = [call for call in graph["calls"] if call.startswith("masquant.")]
    quantize, down, product = (
        f"masquant.{name}.default"
        for name in ("smooth_quantize", "low_rank_down", "int_linear")
    )
    one, two = [quantize, down, product], [quantize, *2 * [down, product]]
    assert names == [quantize, *3 * [down, product], *one, *two, *one]


def test_nothing_else_is_launched_or_copied(launched: list[dict[str, Any]]) -> None:
    """All results are written to new memory in place, and no operator is left."""
    for graph in launched:
        assert not [call for call in graph["calls"] if "masquant" in call]
        assert not [
            call for call in graph["calls"] if "clone" in call or "copy_" == call
        ]
        launches = [call for call in graph["calls"] if "triton_kernel" in call]
        assert set(launches) == {"triton_kernel_wrapper_mutation"}


def test_what_is_left_is_for_inductor_to_fuse(launched: list[dict[str, Any]]) -> None:
    """Norms, the activation, sums and views; of attention this graph has a stand-in."""
    for graph in launched:
        fused = {
            call.removeprefix("aten.").partition(".")[0]
            for call in graph["calls"]
            if call.startswith("aten.")
        }
        assert fused <= {
            *("_to_copy", "pow", "mean", "add", "rsqrt", "mul", "silu", "sum"),
            *("view", "transpose", "empty", "sym_size"),
        }
