# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Whole linears on a GPU: called, captured, compiled, packaged, and on their device.

Each check raises AssertionError with what it saw. What is right is what the operators'
plain implementation computes on the CPU in float32.
"""

import tempfile
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from gpu_bench import timing
from gpu_bench.candidates import BOUND
from gpu_bench.plan import Step
from torch import nn

from gpu_visit.place import device, is_dry, linear_builder
from torchao_masquant import SCHEMES
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "KINDS",
    "called",
    "candidate",
    "captured",
    "compiled",
    "guarded",
    "packaged",
]

# Schemes, and what a weight of each has beside them.
KINDS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w4a8": {},
    "w4a16": {},
    "w8a8, rotated, pair of 8 bits": {"low_rank_bits": 8, "hadamard_size": 64},
    "fp8": {},
    "w4a8-fp8": {},
    "nvfp4": {},
}
# Outputs and channels; the interpreter takes its time.
_SHAPE = (16, 128) if is_dry() else (200, 256)
_LENGTHS = (1, 5) if is_dry() else (1, 5, 40)


class _Linear(nn.Module):
    """One quantized linear of bfloat16, of three modalities, with no bias."""

    def __init__(self, kind: str):
        super().__init__()
        scheme = SCHEMES[kind.partition(",")[0]]
        out_features, in_features = _SHAPE
        generator = torch.Generator().manual_seed(len(kind))

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        self.weight = nn.Parameter(
            MASQuantTensor.from_hp(
                random(*_SHAPE).bfloat16(),
                weight_bits=scheme.weight_bits,
                act_bits=scheme.act_bits,
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
                modalities=("text", "vision", "audio"),
                smoothing_factor=random(3, in_features).abs() + 0.5,
                ranks=(20, 3),
                l1=random(in_features, 23) / in_features**0.5,
                l2=random(23, out_features),
                modality_bias=random(3, out_features),
                weight_format=scheme.weight_format,
                act_format=scheme.act_format,
                **KINDS[kind],
            ),
            requires_grad=False,
        )

    def forward(
        self, x: torch.Tensor, ids: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        return torch.ops.masquant.linear(x, self.weight, ids)


def _given(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, _SHAPE[1], generator=generator).bfloat16()
    ids = torch.randint(0, 3, (tokens,), generator=generator)
    return x.to(device()), ids.to(device())


def _assert_close(found: torch.Tensor, expected: torch.Tensor, about: str) -> None:
    found, expected = found.float().cpu(), expected.float().cpu()
    error = float((found - expected).norm() / expected.norm())
    assert error <= BOUND, f"{about}: relative error {error:.2e}, not {BOUND:.2e}"


@torch.no_grad()
def called(kind: str) -> None:
    """As the plain implementation, with ids and without."""
    plain = _Linear(kind)
    ours = _Linear(kind).to(device())
    for tokens in _LENGTHS:
        x, ids = _given(tokens)
        for mix in (ids, None):
            cpu_ids = None if mix is None else mix.cpu()
            # In float32, of the same 16-bit input.
            expected = plain(x.cpu().float(), cpu_ids)
            about = f"{tokens} tokens, {'no ids' if mix is None else 'mixed'}"
            _assert_close(ours(x, mix), expected, about)


@torch.no_grad()
def captured(kind: str) -> None:
    """In a CUDA graph, replayed with other tokens of other modalities: bit by bit."""
    linear = _Linear(kind).to(device())
    for tokens in _LENGTHS:
        x, ids = _given(tokens)
        results: list[torch.Tensor] = []
        graph = timing.captured([lambda: results.append(linear(x, ids))])
        for seed in (1, 2):
            other, other_ids = _given(tokens, seed)
            x.copy_(other)
            ids.copy_(other_ids)
            graph.replay()
            same = torch.equal(results[-1], linear(other, other_ids))
            assert same, f"{tokens} tokens: not the bits of a call"


@torch.no_grad()
def compiled(kind: str) -> None:
    """By Inductor, for every number of tokens but one in one graph."""
    linear = _Linear(kind).to(device())
    backend = "eager" if is_dry() == "short" else "inductor"
    function: Callable[..., torch.Tensor] = torch.compile(
        linear, fullgraph=True, dynamic=True, backend=backend
    )
    for tokens in _LENGTHS[1:]:
        x, ids = _given(tokens)
        for mix in (ids, None):
            _assert_close(function(x, mix), linear(x, mix), f"{tokens} tokens")


@torch.no_grad()
def packaged(kind: str) -> None:
    """By AOTInductor, loaded again."""
    from torch._inductor.package import load_package

    from torchao_masquant.deploy import lower, write_package

    linear = _Linear(kind).to(device())
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(
        linear, _given(9), dynamic_shapes={"x": {0: length}, "ids": {0: length}}
    )
    kernels = "triton" if device().type == "cuda" else "aten"
    if is_dry() == "short":
        run = lower(program, kernels).module()
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = write_package(
                {"linear": program}, Path(folder) / "made", kernels=kernels
            )
            weights = torch.load(made / "weights.pt", weights_only=True)
            run = load_package(str(made / "decoder.pt2"), "linear")
            moved = {name: weight.to(device()) for name, weight in weights.items()}
            run.load_constants(moved, check_full_update=True, user_managed=True)
    for tokens in _LENGTHS[1:]:
        x, ids = _given(tokens)
        _assert_close(run(x, ids), linear(x, ids), f"{tokens} tokens")


@torch.no_grad()
def guarded() -> None:
    """Launched on its tensors' device and the current stream; mixed devices are refused."""
    linear = _Linear("w8a8").to(device())
    x, ids = _given(5)
    expected = linear(x, ids)
    if device().type == "cpu":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What takes a while, so that a launch on another stream would be too early.
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = linear(late, ids)
    stream.synchronize()
    assert torch.equal(found, expected), "not launched on the current stream"
    try:
        linear(x, ids.cpu())
    except (ValueError, RuntimeError) as error:
        assert "modality_ids" in str(error), error
    else:
        raise AssertionError("ids on the CPU were not refused")
    if torch.cuda.device_count() > 1:
        other = torch.device("cuda", 1)
        found = _Linear("w8a8").to(other)(x.to(other), ids.to(other))
        assert found.device == other and torch.equal(found.to(x.device), expected)


@torch.no_grad()
def candidate(step: Step, name: str) -> None:
    """A candidate of the benchmark, at its real size; its kernels are compiled then."""
    built = linear_builder(step).build(name)
    for call in built.calls[:1]:
        call()
    about = f"relative error {built.error:.2e}, not {built.bound:.2e}"
    assert built.error <= built.bound, about
