# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which linears of a model are measured; the measuring is in tests/kernels/gpu."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchao_masquant import MASQuantLinear, tune_kernels
from torchao_masquant.kernels.gpu import measuring
from torchao_masquant.kernels.gpu.measuring import LinearShape
from torchao_masquant.tensor_subclasses import MASQuantTensor


def on_a_gpu(
    shape: tuple[int, int],
    bits: tuple[int, int],
    groups: int = 1,
    pair: Any = None,
) -> MASQuantLinear:
    """Of fake tensors, which are on a GPU that need not be there."""
    out_features, in_features = shape

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")

    packed = bits[0] <= 4
    qdata = empty(
        out_features,
        in_features // 2 if packed else in_features,
        dtype=torch.uint8 if packed else torch.int8,
    )
    parts: dict[str, Any] = {}
    if pair is not None:
        parts["l1"] = empty(in_features, 6, dtype=pair)
        parts["l2"] = empty(6, out_features, dtype=pair)
    if pair == torch.int8:
        parts["low_rank_scale"] = empty(6)
    weight = MASQuantTensor(
        qdata,
        empty(out_features, groups),
        empty(1, in_features),
        in_features,
        *bits,
        ("text",),
        (),
        torch.bfloat16,
        **parts,
    )
    linear = nn.Linear(in_features, out_features, device="meta")
    return MASQuantLinear.from_float(linear, weight, "linear", None)


def test_every_kind_of_linear_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tune(shapes: Any, tokens: Any, **options: Any) -> Path:
        asked.append((list(shapes), list(tokens), options["dtype"], options["device"]))
        return Path("table.json")

    monkeypatch.setattr(measuring, "tune", tune)
    with FakeTensorMode():
        model = nn.Sequential(
            on_a_gpu((32, 64), (8, 8), pair=torch.int8),
            on_a_gpu((32, 64), (8, 8), pair=torch.int8),
            nn.Linear(64, 64, device="meta"),
            on_a_gpu((64, 32), (4, 16), groups=2),
            on_a_gpu((64, 32), (4, 8), pair=torch.bfloat16),
        )
        path = tune_kernels(model, [1, 16])
    assert path == Path("table.json")
    ((shapes, tokens, dtype, device),) = asked
    assert shapes == [
        LinearShape(32, 64, 8, 8, None, 6, 8),
        LinearShape(64, 32, 4, 16, 16, 0, 16),
        LinearShape(64, 32, 4, 8, None, 6, 16),
    ]
    assert (tokens, dtype, device.type) == ([1, 16], torch.bfloat16, "cuda")


def test_a_model_without_any_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="no quantized linear on a GPU"):
        tune_kernels(nn.Linear(3, 3))
