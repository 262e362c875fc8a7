# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The weights of several experts in one MASQuantTensor."""

import copy
import io
import itertools

import pytest
import torch
from tensor_oracle import assert_linear, assert_same, make
from torch._dynamo.testing import CompileCounterWithBackend

from torchao_masquant.tensor_subclasses import MASQuantTensor

E, N, K = 4, 12, 32
NAMES = ("text", "vision", "audio")
SCHEMES = {
    "w8a8": {"weight_bits": 8, "act_bits": 8},
    "w4a8": {"weight_bits": 4, "act_bits": 8},
    "w4a6": {"weight_bits": 4, "act_bits": 6},
    "w4a4": {"weight_bits": 4, "act_bits": 4},
    "w4a16": {"weight_bits": 4, "act_bits": 16, "symmetric": False, "group_size": 8},
    "pairs of 8 bits": {"weight_bits": 4, "act_bits": 8, "low_rank_bits": 8},
    "rotation": {"weight_bits": 8, "act_bits": 8, "hadamard_size": 8},
}
#: Of activations in floats, whose groups divide K.
FLOATS = {
    "fp8": {
        "weight_bits": 8,
        "act_bits": 8,
        "weight_format": "e4m3",
        "act_format": "e4m3",
    },
    "w4a8-fp8": {"weight_bits": 4, "act_bits": 8, "act_format": "e4m3"},
    "nvfp4": {
        "weight_bits": 4,
        "act_bits": 4,
        "group_size": 16,
        "weight_format": "nvfp4",
        "act_format": "nvfp4",
        "hadamard_size": 16,
    },
}


def experts(seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """Weights of E experts, apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shift = 0.1 * normal(3, K) if options.get("act_bits", 8) != 16 else None
    shared = {
        "modalities": NAMES,
        "smoothing_factor": torch.rand(3, K, generator=generator) + 0.5,
        "act_shift": shift,
        "ranks": (2, 3),
    }
    return [
        MASQuantTensor.from_hp(
            normal(N, K).to(dtype),
            l1=0.1 * normal(K, 5),
            l2=normal(5, N),
            modality_bias=normal(3, N),
            **shared,
            **options,
        )
        for _ in range(E)
    ]


def routing(tokens: int, top_k: int, seed: int = 0):
    """(T, k) experts, the rows' places, and where each expert's rows end."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (
        torch.stack(
            [torch.randperm(E, generator=generator)[:top_k] for _ in range(tokens)]
        )
        if tokens
        else torch.empty(0, top_k, dtype=torch.int64)
    )
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.tensor([int((flat <= e).sum()) for e in range(E)])
    return flat[order], order // top_k, ends


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_expert_is_a_view_of_its_weight(scheme):
    apart = experts(**SCHEMES[scheme])
    weight = MASQuantTensor.stack(apart)
    assert weight.shape == (E, N, K) and weight.dtype == torch.float32
    for e, alone in enumerate(apart):
        assert_same(weight[e], alone)
        for modality in NAMES:
            assert torch.equal(
                weight.dequantize(modality=modality)[e],
                alone.dequantize(modality=modality),
            )
        assert torch.equal(weight.int_data()[e], alone.int_data())
    assert weight[2].qdata.data_ptr() == weight.qdata[2].data_ptr()
    assert weight.group_size == apart[0].group_size


def test_integers_are_packed_and_smoothing_is_held_once():
    weight = MASQuantTensor.stack(experts(**SCHEMES["w4a8"]))
    assert weight.qdata.shape == (E, N, K // 2) and weight.qdata.dtype == torch.uint8
    held = {
        "qdata": E * N * K // 2,
        "scale": 4 * E * N,
        "act_pre_scale": 4 * 3 * K,
        "act_shift": 4 * 3 * K,
        "pairs": 2 * E * 5 * (K + N),
        "modality_bias": 4 * E * 3 * N,
    }
    assert weight.nbytes_stored == sum(held.values())


def assert_rows(weight, bias, x, ids, experts, y):
    """Each expert's rows are what its matrix gives alone."""
    for e in experts.unique().tolist():
        rows = experts == e
        own = None if ids is None else ids[rows]
        assert_linear(
            y[rows], weight[e], x[rows], own, None if bias is None else bias[e]
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_row_meets_its_expert(scheme):
    weight = MASQuantTensor.stack(experts(**SCHEMES[scheme]))
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(E, N, generator=generator)
    call = torch.ops.masquant.expert_linear
    sizes = ((9, 2), (1, 1), (5, E), (0, 2))
    for (tokens, top_k), mixed in itertools.product(sizes, (True, False)):
        chosen, rows, ends = routing(tokens, top_k)
        x = torch.randn(tokens, K, generator=generator)
        ids = torch.randint(0, 3, (tokens,), generator=generator) if mixed else None
        own = None if ids is None else ids[rows]
        y = call(x, weight, ends, rows, ids, bias)
        assert y.shape == (tokens * top_k, N)
        assert_rows(weight, bias, x[rows], own, chosen, y)
        assert torch.equal(y, call(x[rows], weight, ends, None, own, bias))


@pytest.mark.parametrize("own_shifts", [False, True], ids=["one shift", "own shifts"])
@pytest.mark.parametrize("scheme", FLOATS)
def test_every_row_meets_its_expert_in_floats(scheme, own_shifts):
    """As its matrix alone, which tests/kernels and tests/quantize hold to float64."""
    apart = experts(**FLOATS[scheme])
    generator = torch.Generator().manual_seed(4)
    if own_shifts:
        for alone in apart:
            alone.act_shift = torch.randn(3, K, generator=generator)
    weight = MASQuantTensor.stack(apart)
    assert weight.dequantize().shape == (E, N, K)
    bias = torch.randn(E, N, generator=generator)
    call = torch.ops.masquant.expert_linear
    for (tokens, top_k), mixed in itertools.product(((9, 2), (0, 2)), (True, False)):
        chosen, rows, ends = routing(tokens, top_k)
        x = torch.randn(tokens, K, generator=generator)
        ids = torch.randint(0, 3, (tokens,), generator=generator) if mixed else None
        own = None if ids is None else ids[rows]
        y = call(x, weight, ends, rows, ids, bias)
        assert torch.equal(y, call(x[rows], weight, ends, None, own, bias))
        for e in chosen.unique().tolist():
            mine = chosen == e
            alone = torch.ops.masquant.linear(
                x[rows][mine],
                apart[e],
                None if own is None else own[mine],
                bias[e],
            )
            # The same codes, whose products are added in another order, and as many
            # roundings: K of a sum, and those of a pair of five and of what is added.
            bound = 2 * (K + 5 + 8) * 2**-24 * K * alone.abs().max()
            assert (y[mine] - alone).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_16_bits(dtype):
    weight = MASQuantTensor.stack(experts(dtype=dtype, **SCHEMES["w8a8"]))
    chosen, rows, ends = routing(7, 2)
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(7) % 3
    y = torch.ops.masquant.expert_linear(x, weight, ends, rows, ids)
    wide = torch.ops.masquant.expert_linear(x.float(), weight, ends, rows, ids)
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_under_autocast_input_and_result_are_of_its_type(scheme):
    """As of a linear: float64 is left alone."""
    weight = MASQuantTensor.stack(experts(**SCHEMES[scheme]))
    _, rows, ends = routing(7, 2)
    ids, call = torch.arange(7) % 3, torch.ops.masquant.expert_linear
    for given in (torch.float32, torch.float16, torch.float64):
        x = torch.randn(7, K, generator=torch.Generator().manual_seed(0)).to(given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x, weight, ends, rows, ids)
        cast = x if given == torch.float64 else x.bfloat16()
        assert torch.equal(y, call(cast, weight, ends, rows, ids))
        assert y.dtype == cast.dtype


@pytest.mark.parametrize("scheme", ["w4a6", "rotation"])
def test_each_expert_may_have_a_shift_of_its_own(scheme):
    apart = experts(**SCHEMES[scheme])
    generator = torch.Generator().manual_seed(8)
    for alone in apart:
        alone.act_shift = torch.randn(3, K, generator=generator)
    weight = MASQuantTensor.stack(apart)
    assert weight.act_shift.shape == (E, 3, K)
    assert torch.equal(weight[2].act_shift, apart[2].act_shift)
    chosen, rows, ends = routing(9, 2)
    x = torch.randn(9, K, generator=generator)
    for ids in (torch.arange(9) % 3, None):
        own = None if ids is None else ids[rows]
        y = torch.ops.masquant.expert_linear(x, weight, ends, rows, ids)
        assert_rows(weight, None, x[rows], own, chosen, y)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "nvfp4"])
def test_one_graph_for_all_numbers_of_tokens_and_experts(scheme):
    torch._dynamo.reset()
    weight = MASQuantTensor.stack(experts(**{**SCHEMES, **FLOATS}[scheme]))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, ends, rows, ids):
        return torch.ops.masquant.expert_linear(x, weight, ends, rows, ids)

    for tokens, seed in ((9, 0), (5, 1), (5, 2)):
        _, rows, ends = routing(tokens, 2, seed)
        x, ids = torch.randn(tokens, K), torch.arange(tokens) % 3
        y = torch.ops.masquant.expert_linear(x, weight, ends, rows, ids)
        torch.testing.assert_close(run(x, ends, rows, ids), y)
    assert counter.frame_count == 1


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_export(scheme):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight = MASQuantTensor.stack(experts(**SCHEMES[scheme]))
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x, ends, rows, ids):
            return torch.ops.masquant.expert_linear(x, self.weight, ends, rows, ids)

    module = Experts()
    _, rows, ends = routing(6, 2)
    args = (torch.randn(6, K), ends, rows, torch.arange(6) % 3)
    exported = torch.export.export(module, args)
    torch.testing.assert_close(exported.module()(*args), module(*args))


def test_copies_and_files():
    weight = MASQuantTensor.stack(experts(**SCHEMES["w4a8"]))
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    for other in (
        copy.deepcopy(weight),
        weight.clone(),
        weight.to("cpu"),
        torch.load(file, weights_only=True)["weight"],
    ):
        assert_same(other, weight)
    target = MASQuantTensor.stack(experts(seed=1, **SCHEMES["w4a8"]))
    target.copy_(weight)
    assert_same(target, weight)


def test_weights_that_do_not_fit_each_other():
    apart = experts(**SCHEMES["w4a8"])
    with pytest.raises(ValueError, match="at least one weight"):
        MASQuantTensor.stack([])
    other_factor = experts(seed=1, **SCHEMES["w4a8"])
    with pytest.raises(ValueError, match="with the same smoothing factors"):
        MASQuantTensor.stack([apart[0], other_factor[0]])
    with pytest.raises(ValueError, match="weights of one layout"):
        MASQuantTensor.stack([apart[0], experts(**SCHEMES["w4a6"])[0]])
    with pytest.raises(ValueError, match="experts need weights of one layout"):
        MASQuantTensor.stack([make(hadamard_size=size).tensor for size in (8, None)])


def test_calls_that_do_not_fit():
    weight = MASQuantTensor.stack(experts(**SCHEMES["w4a8"]))
    call = torch.ops.masquant.expert_linear
    ends = torch.tensor([1, 2, 3, 4])
    x = torch.randn(4, K)
    with pytest.raises(ValueError, match=r"of shape \(T, 32\), got \(4, 31\)"):
        call(x[:, :31], weight, ends)
    with pytest.raises(ValueError, match="ends must say of each of 4 experts"):
        call(x, weight, ends[:3])
    with pytest.raises(ValueError, match=r"modality ids of shape \(3,\)"):
        call(x, weight, ends, None, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="modality ids are integers"):
        call(x, weight, ends, None, torch.zeros(4))
    with pytest.raises(TypeError, match="floating point input"):
        call(x.to(torch.int8), weight, ends)
    with pytest.raises(TypeError, match=r"takes a MASQuantTensor \(E, N, K\)"):
        call(x, weight[0], ends)
    with pytest.raises(ValueError, match="experts are for masquant::expert_linear"):
        torch.ops.masquant.linear(x, weight)
    with pytest.raises(ValueError, match="takes the weight of one linear"):
        torch.nn.functional.linear(x, weight)
    for part in (lambda: weight[:2], lambda: weight[:, 0], lambda: weight[0][:, 0]):
        with pytest.raises(ValueError, match=r"taken one by one, as weight\[(0|e)\]"):
            part()


def test_experts_have_no_gradient():
    weight = MASQuantTensor.stack(experts(**SCHEMES["w4a8"]))
    x = torch.randn(4, K, requires_grad=True)
    y = torch.ops.masquant.expert_linear(x, weight, torch.tensor([1, 2, 3, 4]))
    with pytest.raises(RuntimeError, match="has no gradient"):
        y.sum().backward()
