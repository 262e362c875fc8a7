# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What surrounds a launch: refusals, the device, and what runs where Triton cannot."""

import contextlib
import importlib.util
import warnings
from typing import Any, Iterator, Optional

import pytest

pytest.importorskip("triton")

import torch
from operator_cases import DOWN, OPERATORS, PRODUCT, QUANTIZE, WEIGHT_ONLY, operands

from torchao_masquant.kernels import gpu_lowering, reference
from torchao_masquant.kernels.gpu.operators import GpuOperator, operators
from torchao_masquant.kernels.library import LOWERED_ON_GPUS

# Of 21 tokens, 48 channels, 13 outputs, pairs of 2 and 3 columns.
GIVEN = operands("plain")
PACKED = operands("w4")
META = torch.device("meta")


def check(operator: str, **args: Any) -> None:
    operators()[operator].check(*args.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_kernels_take_is_let_through(operator: str) -> None:
    check(operator, **GIVEN.named(operator))
    optional = ["act_shift", "low_rank_hidden", "l2", "modality_bias", "bias"]
    if operator == WEIGHT_ONLY:
        optional += ["l1", "zero_point", "modality_ids"]
    args = GIVEN.named(operator)
    check(operator, **{k: None if k in optional else v for k, v in args.items()})


REFUSED = [
    (QUANTIZE, {"x": GIVEN.x.int()}, "x is torch.int32, must be torch.float16"),
    (QUANTIZE, {"act_bits": 9}, "2 to 8 bits, got act_bits=9"),
    (QUANTIZE, {"act_bits": 1}, "2 to 8 bits, got act_bits=1"),
    (
        QUANTIZE,
        {"act_pre_scale": GIVEN.pre_scale[:, :11]},
        r"act_pre_scale has shape \(3, 11\), must be \(3, 48\)",
    ),
    (QUANTIZE, {"act_pre_scale": GIVEN.pre_scale.half()}, "must be torch.float32"),
    (QUANTIZE, {"modality_ids": torch.ones(21)}, "modality_ids is torch.float32"),
    (QUANTIZE, {"act_shift": GIVEN.pre_scale[:2]}, "act_shift has shape"),
    (DOWN, {"l1": GIVEN.l1.double()}, "l1 is torch.float64"),
    (DOWN, {"l1": GIVEN.l1[:5]}, r"l1 has shape \(5, 5\), must be \(48, 5\)"),
    (PRODUCT, {"weight_bits": 9}, "2 to 8 bits, got weight_bits=9"),
    (PRODUCT, {"weight_bits": 4}, "qdata is torch.int8, must be torch.uint8"),
    (PRODUCT, {"qdata": GIVEN.qdata[:, :11]}, "qdata has shape"),
    (PRODUCT, {"scale": torch.rand(13, 5)}, "5 scales a channel do not divide 48"),
    (PRODUCT, {"scale": torch.rand(6, 1)}, "scale has shape"),
    (PRODUCT, {"l2": None}, "low_rank_hidden needs an l2"),
    (PRODUCT, {"out_dtype": torch.int32}, "got torch.int32"),
    (
        PRODUCT,
        {"qdata": PACKED.qdata[:, :5], "weight_bits": 4},
        r"qdata has shape \(13, 5\), must be \(13, 24\)",
    ),
    (WEIGHT_ONLY, {"zero_point": GIVEN.scale}, "zero_point is torch.float32"),
    (WEIGHT_ONLY, {"l2": None}, "l1 needs an l2"),
    (WEIGHT_ONLY, {"bias": torch.randn(6)}, "bias has shape"),
]


def test_refusals() -> None:
    for operator, wrong, message in REFUSED:
        with pytest.raises((TypeError, ValueError), match=message):
            check(operator, **GIVEN.named(operator, **wrong))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operand_on_another_device_is_refused(operator: str) -> None:
    args = GIVEN.named(operator)
    first = next(iter(args))
    for operand, value in args.items():
        if operand != first and isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"{operand} is on meta .* on cpu"):
                check(operator, **{**args, operand: value.to(META)})
    if operator == PRODUCT:
        with pytest.raises(ValueError) as raised:
            check(operator, **{**args, "bias": args["bias"].to(META)})
        assert str(raised.value) == (
            "masquant::int_linear: bias is on meta and what it is computed with on cpu: "
            "move them to one device."
        )


@pytest.fixture
def fresh() -> Iterator[None]:
    gpu_lowering.why_reference.cache_clear()
    gpu_lowering._warn.cache_clear()
    yield
    gpu_lowering.why_reference.cache_clear()
    gpu_lowering._warn.cache_clear()


def test_without_triton_the_reference_runs_and_says_so_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "triton" else found(name, *rest),
    )
    with pytest.warns(UserWarning, match="Triton is not installed; pip install"):
        found = gpu_lowering._eager(QUANTIZE)(*GIVEN.args(QUANTIZE))
    expected = reference.smooth_quantize(*GIVEN.args(QUANTIZE))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = gpu_lowering._eager(PRODUCT)(*GIVEN.args(PRODUCT))
    assert torch.equal(y, reference.int_linear(*GIVEN.args(PRODUCT)))


def test_on_an_old_gpu_the_reference_runs(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match="Tesla T4 has compute capability 7.5.* 8.0"):
        y = gpu_lowering._eager(WEIGHT_ONLY)(*GIVEN.args(WEIGHT_ONLY))
    assert torch.equal(y, reference.weight_only_linear(*GIVEN.args(WEIGHT_ONLY)))


def test_a_launch_is_made_on_the_device_of_its_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    current: list[torch.device] = []
    launched: list[torch.device] = []

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    operator = GpuOperator(QUANTIZE, lambda *args: launched.append(current[-1]))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(gpu_lowering, "operators", lambda: {QUANTIZE: operator})
    gpu_lowering._eager(QUANTIZE)(*GIVEN.args(QUANTIZE))
    assert launched == [GIVEN.x.device] and not current


def test_wrong_operands_are_refused_before_a_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(ValueError, match="modality_ids is on meta"):
        args = GIVEN.named(QUANTIZE)
        gpu_lowering._eager(QUANTIZE)(
            *{**args, "modality_ids": args["modality_ids"].to(META)}.values()
        )


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("wanted", ["1", "0", None])
def test_calls_are_measured_only_where_that_is_asked_for(
    wanted: Optional[str], capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao_masquant.kernels.gpu import measuring

    measured: list[str] = []
    operator = GpuOperator(QUANTIZE, lambda *args: None)
    monkeypatch.setattr(gpu_lowering, "operators", lambda: {QUANTIZE: operator})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        measuring, "measure_call", lambda name, launch, args: measured.append(name)
    )
    if wanted is None:
        monkeypatch.delenv("MASQUANT_TUNE", raising=False)
    else:
        monkeypatch.setenv("MASQUANT_TUNE", wanted)
    call = gpu_lowering._eager(QUANTIZE)
    call(*GIVEN.args(QUANTIZE))
    call(*operands("no-tokens").args(QUANTIZE))
    asked = wanted == "1" and not capturing
    assert measured == (["smooth_quantize"] if asked else [])


def test_operators_have_an_implementation_for_cuda() -> None:
    for name in (*OPERATORS, *LOWERED_ON_GPUS):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"masquant::{name}", "CUDA"
        )
