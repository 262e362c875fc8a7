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
import torch
from expecttest import assert_expected_inline

from torchao_masquant.kernels import gpu_lowering, reference
from torchao_masquant.kernels.gpu import checks

X = torch.randn(5, 12)
PRE_SCALE = torch.rand(3, 12) + 0.5
IDS = torch.tensor([0, 1, 2, 0, 1])
QX, X_SCALE = reference.smooth_quantize(X, PRE_SCALE, IDS, 8)
Q8 = torch.randint(-127, 128, (7, 12), dtype=torch.int8)
Q4 = torch.randint(0, 256, (7, 6), dtype=torch.uint8)
SCALE = torch.rand(7, 1)
L1, L2 = torch.randn(12, 4), torch.randn(4, 7)
META = torch.device("meta")

SMOOTH: dict[str, Any] = dict(
    x=X, act_pre_scale=PRE_SCALE, modality_ids=IDS, act_bits=8, act_shift=None
)
DOWN: dict[str, Any] = dict(
    qdata=QX,
    scale=X_SCALE,
    l1=L1,
    modality_ids=IDS,
    ranks=[3, 1],
    low_rank_scale=None,
)
LINEAR: dict[str, Any] = dict(
    qx=QX,
    x_scale=X_SCALE,
    qdata=Q8,
    scale=SCALE,
    low_rank_hidden=torch.randn(5, 4),
    l2=L2,
    modality_bias=torch.randn(3, 7),
    modality_ids=IDS,
    bias=torch.randn(7),
    weight_bits=8,
    out_dtype=torch.float32,
)
WEIGHT_ONLY: dict[str, Any] = dict(
    x=X,
    act_pre_scale=PRE_SCALE,
    qdata=Q4,
    scale=torch.rand(7, 3),
    zero_point=torch.zeros(7, 3, dtype=torch.int8),
    l1=L1,
    l2=L2,
    modality_bias=torch.randn(3, 7),
    modality_ids=IDS,
    bias=torch.randn(7),
    ranks=[3, 1],
    weight_bits=4,
    out_dtype=torch.float32,
    low_rank_scale=None,
)
CHECKS = {
    "smooth_quantize": (checks.check_smooth_quantize, SMOOTH),
    "low_rank_down": (checks.check_low_rank_down, DOWN),
    "int_linear": (checks.check_int_linear, LINEAR),
    "weight_only_linear": (checks.check_weight_only_linear, WEIGHT_ONLY),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_the_kernels_take_is_let_through(name: str) -> None:
    check, args = CHECKS[name]
    check(**args)
    optional = ("act_shift", "low_rank_hidden", "l1", "l2", "modality_bias", "bias")
    bare = {k: None if k in optional and k != "l1" else v for k, v in args.items()}
    if name == "weight_only_linear":
        bare |= {"l1": None, "zero_point": None, "modality_ids": None}
    check(**bare)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("smooth_quantize", {"x": X.int()}, "x is torch.int32, must be torch.float16"),
        ("smooth_quantize", {"act_bits": 9}, "2 to 8 bits, got act_bits=9"),
        ("smooth_quantize", {"act_bits": 1}, "2 to 8 bits, got act_bits=1"),
        (
            "smooth_quantize",
            {"act_pre_scale": PRE_SCALE[:, :11]},
            r"act_pre_scale has shape \(3, 11\), must be \(\*, 12\)",
        ),
        (
            "smooth_quantize",
            {"act_pre_scale": PRE_SCALE.half()},
            "must be torch.float32",
        ),
        (
            "smooth_quantize",
            {"modality_ids": IDS.float()},
            "modality_ids is torch.float32",
        ),
        ("smooth_quantize", {"act_shift": PRE_SCALE[:2]}, "act_shift has shape"),
        ("low_rank_down", {"l1": L1.double()}, "l1 is torch.float64"),
        ("low_rank_down", {"l1": L1[:5]}, r"l1 has shape \(5, 4\), must be \(12, \*\)"),
        ("int_linear", {"weight_bits": 9}, "2 to 8 bits, got weight_bits=9"),
        ("int_linear", {"weight_bits": 4}, "qdata is torch.int8, must be torch.uint8"),
        ("int_linear", {"qdata": Q8[:, :11]}, "qdata has shape"),
        (
            "int_linear",
            {"scale": torch.rand(7, 5)},
            "5 scales a channel do not divide 12",
        ),
        ("int_linear", {"scale": torch.rand(6, 1)}, "scale has shape"),
        ("int_linear", {"l2": None}, "low_rank_hidden needs an l2"),
        ("int_linear", {"out_dtype": torch.int32}, "got torch.int32"),
        (
            "int_linear",
            {"qdata": Q4[:, :5], "weight_bits": 4},
            r"qdata has shape \(7, 5\), must be \(\*, 6\)",
        ),
        ("weight_only_linear", {"zero_point": SCALE}, "zero_point is torch.float32"),
        ("weight_only_linear", {"l2": None}, "l1 needs an l2"),
        ("weight_only_linear", {"bias": torch.randn(6)}, "bias has shape"),
    ],
)
def test_refusals(name: str, wrong: dict[str, Any], message: str) -> None:
    check, args = CHECKS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        check(**{**args, **wrong})


@pytest.mark.parametrize("name", CHECKS)
def test_every_operand_on_another_device_is_refused(name: str) -> None:
    check, args = CHECKS[name]
    first = next(iter(args))
    for operand, value in args.items():
        if operand != first and isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"{operand} is on meta .* on cpu"):
                check(**{**args, operand: value.to(META)})


def test_a_message() -> None:
    with pytest.raises(ValueError) as raised:
        checks.check_int_linear(**{**LINEAR, "bias": LINEAR["bias"].to(META)})
    assert_expected_inline(
        str(raised.value),
        """masquant::int_linear: bias is on meta and what it is computed with on cpu: move them to one device.""",
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
        q, scale = gpu_lowering._eager("smooth_quantize")(*SMOOTH.values())
    assert torch.equal(q, QX) and torch.equal(scale, X_SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = gpu_lowering._eager("int_linear")(*LINEAR.values())
    assert torch.equal(y, reference.int_linear(**LINEAR))


def test_on_an_old_gpu_the_reference_runs(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.warns(UserWarning, match="Tesla T4 has compute capability 7.5.* 8.0"):
        y = gpu_lowering._eager("weight_only_linear")(*WEIGHT_ONLY.values())
    assert torch.equal(y, reference.weight_only_linear(**WEIGHT_ONLY))


def test_a_launch_is_made_on_the_device_of_its_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    pytest.importorskip("triton")
    current: list[torch.device] = []
    launched: list[torch.device] = []

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    operator = gpu_lowering.GpuOperator(
        "smooth_quantize",
        checks.check_smooth_quantize,
        lambda *args: launched.append(current[-1]),
    )
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        gpu_lowering, "operators", lambda: {"smooth_quantize": operator}
    )
    gpu_lowering._eager("smooth_quantize")(*SMOOTH.values())
    assert launched == [X.device] and not current


def test_wrong_operands_are_refused_before_a_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(ValueError, match="modality_ids is on meta"):
        gpu_lowering._eager("smooth_quantize")(
            *{**SMOOTH, "modality_ids": IDS.to(META)}.values()
        )


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("wanted", ["1", "0", None])
def test_calls_are_measured_only_where_that_is_asked_for(
    wanted: Optional[str], capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from torchao_masquant.kernels.gpu import measuring

    measured: list[str] = []
    operator = gpu_lowering.GpuOperator(
        "smooth_quantize", checks.check_smooth_quantize, lambda *args: None
    )
    monkeypatch.setattr(
        gpu_lowering, "operators", lambda: {"smooth_quantize": operator}
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        measuring, "measure_call", lambda name, launch, args: measured.append(name)
    )
    if wanted is None:
        monkeypatch.delenv("MASQUANT_TUNE", raising=False)
    else:
        monkeypatch.setenv("MASQUANT_TUNE", wanted)
    call = gpu_lowering._eager("smooth_quantize")
    call(*SMOOTH.values())
    call(*{**SMOOTH, "x": X[:0], "modality_ids": IDS[:0]}.values())
    asked = wanted == "1" and not capturing
    assert measured == (["smooth_quantize"] if asked else [])


@pytest.mark.parametrize("name", CHECKS)
def test_operators_have_an_implementation_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"masquant::{name}", "CUDA")
