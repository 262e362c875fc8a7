# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What tensors do besides linears: copies, moves, slices, checkpoints."""

import copy
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import pytest
import torch
from tensor_oracle import (
    SCHEMES,
    UNIT,
    Case,
    assert_linear,
    assert_same,
    assert_same_linear,
    f64,
    ids_for,
    inner_tensors,
    make,
    pair_f64,
    smoothed_f64,
    unrouted,
)
from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear

CASES: dict[str, Callable[[], MASQuantTensor]] = {
    **{scheme: lambda scheme=scheme: make(scheme).tensor for scheme in SCHEMES},
    "odd width": lambda: make("w4a8", shape=(5, 15)).tensor,
    "groups": lambda: make("w4a8", group_size=4).tensor,
    "asymmetric groups": lambda: make("w4a16", group_size=4).tensor,
    "asymmetric 3 bits": lambda: made_of_3_bits(),
    "pair of 8 bits": lambda: make("w4a8", low_rank_bits=8).tensor,
    "weight-only, pair of 8 bits": lambda: make("w4a16", low_rank_bits=8).tensor,
    "no pair": lambda: make(ranks=()).tensor,
    "no modality bias": lambda: make(with_bias=False).tensor,
    "unrouted": unrouted,
    "bfloat16": lambda: make(dtype=torch.bfloat16).tensor,
}


def made_of_3_bits() -> MASQuantTensor:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    return MASQuantTensor.from_hp(
        weight, weight_bits=3, act_bits=16, symmetric=False, group_size=2
    )


every_case = pytest.mark.parametrize("name", CASES)


def storages(tensor: MASQuantTensor) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in inner_tensors(tensor).values()]


@every_case
def test_detach_shares_storage(name: str) -> None:
    tensor = CASES[name]()
    detached = tensor.detach()
    assert_same(detached, tensor)
    assert storages(detached) == storages(tensor)


@every_case
def test_clone_owns_its_storage(name: str) -> None:
    tensor = CASES[name]()
    clone = tensor.clone()
    assert_same(clone, tensor)
    assert not set(storages(clone)) & set(storages(tensor))


@every_case
def test_deepcopy_and_pickle(name: str) -> None:
    tensor = CASES[name]()
    for duplicate in (
        copy.deepcopy(tensor),
        pickle.loads(pickle.dumps(tensor)),
        copy.deepcopy(nn.Parameter(tensor, requires_grad=False)),
    ):
        assert_same(duplicate, tensor)
        assert not set(storages(duplicate)) & set(storages(tensor))


def test_a_parameter_stays_one() -> None:
    parameter = nn.Parameter(make().tensor, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(copy.deepcopy(parameter), nn.Parameter)


@every_case
def test_contiguous(name: str) -> None:
    assert_same(CASES[name]().contiguous(), CASES[name]())


def test_contiguous_of_a_slice() -> None:
    part = make().tensor[:, 4:12]
    assert not part.qdata.is_contiguous()
    whole = part.contiguous()
    assert all(t.is_contiguous() for t in inner_tensors(whole).values())
    assert_same(whole, part)


@every_case
def test_to_another_device(name: str) -> None:
    tensor = CASES[name]()
    meta = tensor.to("meta")
    assert isinstance(meta, MASQuantTensor) and meta.device.type == "meta"
    assert meta.shape == tensor.shape and meta.dtype == tensor.dtype
    there, here = inner_tensors(meta), inner_tensors(tensor)
    assert there.keys() == here.keys()
    for part, t in there.items():
        assert t.is_meta and t.shape == here[part].shape, part
        assert t.dtype == here[part].dtype, part
    assert_same(tensor.to("cpu"), tensor)
    assert_same(tensor.cpu(), tensor)


def test_linear_on_meta() -> None:
    x, ids = torch.randn(2, 5, 16, device="meta"), torch.zeros(2, 5, device="meta")
    y = linear(x.bfloat16(), make().tensor.to("meta"), ids.long(), None)
    assert y.is_meta and y.shape == (2, 5, 6) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_another_dtype_leaves_a_quantized_weight_alone(dtype: torch.dtype) -> None:
    """As torchao's tensors do: the values it holds have types of their own."""
    tensor = make().tensor
    assert_same(tensor.to(dtype), tensor)
    module = nn.Linear(16, 6)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    module.to(dtype)
    assert module.bias.dtype == dtype
    assert_same(module.weight.data, tensor)


@every_case
def test_copy_(name: str) -> None:
    target = CASES[name]()
    for t in inner_tensors(target).values():
        t.zero_()
    before = storages(target)
    target.copy_(CASES[name]())
    assert_same(target, CASES[name]())
    assert storages(target) == before


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (make("w4a8"), "the source's weight_bits is 4, the target's 8"),
        (
            make(shape=(5, 16)),
            "the source's shape is torch.Size([5, 16]), the target's",
        ),
        (
            make(shape=(6, 12)),
            "the source's shape is torch.Size([6, 12]), the target's",
        ),
        (make(ranks=(3, 2)), "the source's ranks are (3, 2), the target's (2, 3)"),
        (make(group_size=4), "the source's scale is of shape (6, 4), the target's"),
        (
            make(modalities=2, ranks=(5,)),
            "the source's modalities is ('text', 'vision')",
        ),
        (make(low_rank_bits=8), "the source's low_rank_bits is 8, the target's 16"),
        (make("w4a16"), "the source's weight_bits is 4, the target's 8"),
    ],
    ids=lambda case: repr(case.tensor)[15:60] if hasattr(case, "tensor") else "",
)
def test_copy_of_another_layout_raises(source: Case, problem: str) -> None:
    """Ranks (3, 2) and (2, 3) have tensors of one shape, and another meaning."""
    target = make().tensor
    with pytest.raises(ValueError) as raised:
        target.copy_(source.tensor)
    message = str(raised.value)
    assert message.startswith(
        f"copy_ needs two MASQuantTensors of one layout, and {problem}"
    )
    assert message.endswith(f": got {source.tensor!r} for {target!r}.")
    assert_same(target, make().tensor)


def test_copy_needs_room_for_every_part() -> None:
    for lacking, name in (
        (make(with_bias=False), "modality_bias"),
        (make(with_bias=True, with_shift=False), "act_shift"),
    ):
        with pytest.raises(ValueError, match=f"the target has no {name}"):
            lacking.tensor.copy_(make().tensor)


@pytest.mark.parametrize(
    "source",
    [
        make(ranks=()),
        make(ranks=(1, 3)),
        make(with_bias=False),
        make(dtype=torch.bfloat16),
        make(ranks=(), modalities=3, with_bias=False),
    ],
    ids=lambda case: repr(case.tensor)[15:100],
)
@pytest.mark.parametrize("low_rank_bits", [16, 8])
def test_copy_into_a_target_with_more_parts(source: Case, low_rank_bits: int) -> None:
    """They are filled with what changes nothing; types of the source are converted."""
    if low_rank_bits == 8 and source.ranks:
        return
    target = make(low_rank_bits=low_rank_bits, seed=1).tensor
    before = storages(target)
    target.copy_(source.tensor)
    assert storages(target) == before and target.dtype == torch.float32
    x, ids = torch.randn(9, 16), ids_for(9)
    linear = torch.ops.masquant.linear
    assert torch.equal(linear(x, target, ids), linear(x, source.tensor, ids))
    assert torch.equal(linear(x, target), linear(x, source.tensor))


def test_copy_of_one_smoothing_factor_for_all() -> None:
    source = MASQuantTensor.from_hp(torch.randn(6, 16), modalities=("text", "vision"))
    target = make(modalities=2, ranks=()).tensor
    target.copy_(source)
    x = torch.randn(9, 16)
    assert torch.equal(
        torch.ops.masquant.linear(x, target, ids_for(9, modalities=2)),
        torch.ops.masquant.linear(x, source),
    )


def test_copy_between_dense_and_quantized_raises() -> None:
    quantized, dense = make().tensor, torch.zeros(6, 16)
    for target, source, kinds in (
        (quantized, dense, "got a Tensor for a MASQuantTensor."),
        (dense, quantized, "got a MASQuantTensor for a Tensor."),
    ):
        with pytest.raises(ValueError, match=re.escape(kinds)):
            target.copy_(source)


def test_pinning() -> None:
    tensor = make().tensor
    assert not tensor.is_pinned()
    if torch.accelerator.is_available():
        pinned = tensor.pin_memory()
        assert pinned.is_pinned()
        assert_same(pinned, tensor)
    else:
        # Reaches the inner tensors, which need an accelerator for it.
        with pytest.raises(RuntimeError, match="accelerator"):
            tensor.pin_memory()


@every_case
def test_flatten_and_unflatten(name: str) -> None:
    tensor = CASES[name]()
    names, attributes = tensor.__tensor_flatten__()
    assert names[:3] == ["qdata", "scale", "act_pre_scale"]
    optional = (
        "l1",
        "l2",
        "modality_bias",
        "zero_point",
        "low_rank_scale",
        "act_shift",
    )
    assert [n for n in optional if getattr(tensor, n) is not None] == names[3:]
    rebuilt = MASQuantTensor.__tensor_unflatten__(
        inner_tensors(tensor), attributes, tensor.shape, tensor.stride()
    )
    assert_same(rebuilt, tensor)
    assert storages(rebuilt) == storages(tensor)
    # Dynamo keys graphs by them.
    hash(tuple(attributes.values()))


def test_key_of_compiled_graphs() -> None:
    """All but the values: two weights of one layout share a graph, others do not."""
    key = MASQuantTensor._stable_hash_for_caching
    assert key(make(seed=1).tensor) == key(make(seed=2).tensor)
    others = [
        make("w4a8"),
        make("w4a6"),
        make(shape=(6, 12)),
        make(ranks=(3, 2)),
        make(ranks=()),
        make(with_bias=False),
        make(group_size=4),
        make(dtype=torch.bfloat16),
        make(low_rank_bits=8),
        make("w3a3"),
        make("w4a16"),
        make("w4a16", symmetric=True),
        make("w4a16", group_size=4),
    ]
    keys = [key(case.tensor) for case in (make(), *others)]
    assert len(set(keys)) == len(keys)


# Slices.


@every_case
@pytest.mark.parametrize("bounds", [(0, 2), (2, 5), (1, 1), (0, 100), (-3, -1), (4, 2)])
def test_row_slices(name: str, bounds: tuple[int, int]) -> None:
    tensor = CASES[name]()
    part = tensor[bounds[0] : bounds[1]]
    rows = range(tensor.shape[0])[bounds[0] : bounds[1]]
    assert isinstance(part, MASQuantTensor)
    assert part.shape == (len(rows), tensor.shape[1])
    for modality in tensor.modalities:
        whole = tensor.dequantize(modality=modality)
        assert torch.equal(
            part.dequantize(modality=modality), whole[bounds[0] : bounds[1]]
        )
    x = torch.randn(7, tensor.shape[1], generator=torch.Generator().manual_seed(0))
    ids = ids_for(7) if tensor.is_routed else None
    y = linear(x, tensor, ids, None)[:, bounds[0] : bounds[1]]
    assert_same_linear(linear(x, part, ids, None), y, part, x, ids)
    if len(rows):
        assert_linear(linear(x, part, ids, None), part, x, ids)


@every_case
def test_column_slices_add_up(name: str) -> None:
    """As row-parallel ranks add theirs: weights side by side, biases summed once."""
    tensor = CASES[name]()
    k = tensor.shape[1]
    cuts = [0, 4, 12, k]
    parts = [tensor[:, a:b] for a, b in zip(cuts, cuts[1:])]
    for index, modality in enumerate(tensor.modalities):
        whole = tensor.dequantize(torch.float32, modality)
        together = torch.cat([p.dequantize(torch.float32, modality) for p in parts], 1)
        # The r products of L1 L2 may be added in another order for fewer columns.
        down, up = pair_f64(tensor, index)
        size = np.abs(smoothed_f64(tensor)) + (np.abs(down) @ np.abs(up)).T
        pre_scale = f64(tensor.act_pre_scale)[index if tensor.is_routed else 0]
        bound = 2 * (down.shape[1] and down.shape[1] + 2) * UNIT * size * pre_scale
        assert (np.abs(f64(together) - f64(whole)) <= bound).all()
    if tensor.modality_bias is None:
        assert all(p.modality_bias is None for p in parts)
    else:
        total = sum(p.modality_bias for p in parts)
        assert torch.equal(total, tensor.modality_bias)
    for a, b, part in zip(cuts, cuts[1:], parts):
        assert part.in_features == b - a and part.shape == (tensor.shape[0], b - a)
        x = torch.randn(5, b - a, generator=torch.Generator().manual_seed(b))
        ids = ids_for(5) if tensor.is_routed else None
        assert_linear(linear(x, part, ids, None), part, x, ids)


@pytest.mark.parametrize("shifted", [False, True])
def test_outputs_of_column_slices_add_up(shifted: bool) -> None:
    """Where every slice of a token has the same maximum, and so the same step."""
    case = make("w8a8", with_shift=shifted)
    tensor = case.tensor
    ids = ids_for(9)
    levels = torch.randint(-126, 127, (9, 16)).float()
    levels[:, [0, 5, 13]] = 127
    pre_scale, shift = tensor.act_pre_scale, tensor.act_shift
    if shift is not None:
        # Whole numbers and powers of two: x p - o comes out exact, so that the levels
        # above are those of every slice.
        tensor = MASQuantTensor.from_hp(
            case.weight,
            modalities=tensor.modalities,
            smoothing_factor=(2.0 ** case.smoothing_factor.log2().round()),
            ranks=case.ranks,
            l1=case.l1,
            l2=case.l2,
            modality_bias=case.modality_bias,
            act_shift=(shift * 8).round(),
        )
        pre_scale, shift = tensor.act_pre_scale, tensor.act_shift
        x = (levels + shift[ids]) / pre_scale[ids]
        assert torch.equal(x * pre_scale[ids] - shift[ids], levels)
    else:
        x = levels / pre_scale[ids]
    whole = linear(x, tensor, ids, None)
    parts = [
        linear(x[:, a:b], tensor[:, a:b], ids, None)
        for a, b in ((0, 4), (4, 12), (12, 16))
    ]
    # 127 / p * p may be off by a rounding, and with it a slice's step by two UNIT:
    # well within what assert_same_linear grants a sum of K terms.
    assert_same_linear(sum(parts), whole, tensor, x, ids)


def test_outputs_of_column_slices_of_a_weight_only_tensor_add_up() -> None:
    """Nothing is rounded on the way: any token, to the order of sums."""
    tensor = make("w4a16", group_size=4, low_rank_bits=8).tensor
    ids = ids_for(9)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    whole = linear(x, tensor, ids, None)
    parts = [
        linear(x[:, a:b], tensor[:, a:b], ids, None)
        for a, b in ((0, 4), (4, 12), (12, 16))
    ]
    assert_same_linear(sum(parts), whole, tensor, x, ids)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_slices_are_views(scheme: str) -> None:
    for part_of in (lambda t: t[2:4], lambda t: t[:, 4:8]):
        tensor = make(scheme, group_size=4, low_rank_bits=8).tensor
        part = part_of(tensor)
        shared = storages(tensor)
        for name, t in inner_tensors(part).items():
            if name == "modality_bias" and part.shape[0] == 6:
                continue  # zeros of its own, where column 0 is another slice's
            assert t.untyped_storage().data_ptr() in shared, name
        part.scale.zero_()
        assert (part_of(tensor).dequantize() == 0).all()
        assert (tensor.dequantize() != 0).any()


def test_narrow_is_slicing() -> None:
    tensor = make("w4a8").tensor
    assert_same(tensor.narrow(0, 1, 3), tensor[1:4])
    assert_same(tensor.narrow(1, 2, 6), tensor[:, 2:8])
    assert_same(tensor.narrow(-1, 2, 6), tensor[:, 2:8])
    assert_same(tensor.narrow(-2, 0, 2), tensor[:2])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w3a3", "w4a16"])
def test_loading_shards_as_vllm_does(scheme: str, dim: int) -> None:
    """``param.data.narrow(...).copy_(loaded.narrow(...))`` fills the parameter."""
    parameter = nn.Parameter(make(scheme, shape=(8, 16), seed=1).tensor, False)
    loaded = make(scheme, shape=(8, 16), seed=2).tensor
    size = parameter.shape[dim] // 2
    for rank in range(2):
        target = parameter.data.narrow(dim, rank * size, size)
        source = loaded.narrow(dim, rank * size, size)
        assert not torch.equal(target.qdata, source.qdata)
        target.copy_(source)
        assert_same(target, source)
    whole = parameter.data
    for name, t in inner_tensors(loaded).items():
        assert torch.equal(getattr(whole, name), t), name


def test_merging_projections_as_vllm_does() -> None:
    """q, k and v, of one input and so of one smoothing, into one parameter's rows."""
    merged = make(shape=(12, 16), seed=1).tensor
    for t in inner_tensors(merged).values():
        t.zero_()
    source = make(shape=(12, 16), seed=2).tensor
    for start, size in ((0, 6), (6, 2), (8, 4)):
        merged.narrow(0, start, size).copy_(source[start : start + size].clone())
    assert_same(merged, source)


@pytest.mark.parametrize(
    "scheme, group_size, bounds, multiple, described",
    [
        ("w4a8", None, (1, 8), 2, "4-bit integers, group size 16"),
        ("w4a8", None, (2, 7), 2, "4-bit integers, group size 16"),
        ("w8a8", 4, (2, 8), 4, "8-bit integers, group size 4"),
        ("w8a8", 4, (4, 6), 4, "8-bit integers, group size 4"),
        ("w4a8", 8, (4, 8), 8, "4-bit integers, group size 8"),
        ("w8a8", 2, (1, 4), 2, "8-bit integers, group size 2"),
        ("w3a3", None, (1, 8), 2, "3-bit integers, group size 16"),
        ("w4a16", 4, (2, 8), 4, "4-bit integers, group size 4"),
    ],
)
def test_slices_between_groups_or_bytes_raise(
    scheme: str,
    group_size: Optional[int],
    bounds: tuple[int, int],
    multiple: int,
    described: str,
) -> None:
    tensor = make(scheme, group_size=group_size).tensor
    message = (
        f"columns {bounds[0]}:{bounds[1]} of a MASQuantTensor of shape (6, 16) must "
        f"start and end on a multiple of {multiple} ({described})."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tensor[:, bounds[0] : bounds[1]]


@pytest.mark.parametrize("dim", [0, 1])
def test_steps_raise(dim: int) -> None:
    message = "MASQuantTensor slices with step 1 only, got step=2."
    with pytest.raises(ValueError, match=re.escape(message)):
        make().tensor[(slice(None), slice(None, None, 2)) if dim else slice(0, 6, 2)]


def test_the_last_columns_of_an_odd_width() -> None:
    tensor = make("w4a8", shape=(5, 15)).tensor
    part = tensor[:, 10:]
    assert part.shape == (5, 5) and part.qdata.shape == (5, 3)
    assert torch.equal(part.dequantize(), tensor.dequantize()[:, 10:])


@pytest.mark.parametrize(
    "transpose", [lambda t: t.t(), lambda t: t.transpose(0, 1), lambda t: t.mT]
)
def test_transposed_is_dense(transpose: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = unrouted("w4a8")
    out = transpose(tensor)
    assert not isinstance(out, MASQuantTensor)
    assert torch.equal(out, tensor.dequantize().t())
    # Of one smoothing for all modalities there is one such matrix; else there is not.
    with pytest.raises(RuntimeError, match="transposed weight does not know"):
        transpose(make("w4a8").tensor)


# Checkpoints.


class Layers(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        for i, name in enumerate(CASES):
            tensor = CASES[name]()
            if seed:
                for t in inner_tensors(tensor).values():
                    t.zero_()
            self.register_parameter(f"w{i}", nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign: bool) -> None:
    buffer = io.BytesIO()
    torch.save(Layers(0).state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    model = Layers(1)
    model.load_state_dict(loaded, assign=assign)
    for key, value in Layers(0).state_dict().items():
        assert_same(loaded[key], value)
        assert_same(model.state_dict()[key], value)


def test_a_checkpoint_is_as_big_as_what_it_stores(tmp_path: Path) -> None:
    """A slice saves its own bytes only after clone(), as any tensor does."""
    tensor = make(shape=(256, 512)).tensor
    torch.save(tensor, tmp_path / "w.pt")
    size = (tmp_path / "w.pt").stat().st_size
    assert tensor.nbytes_stored < size < tensor.nbytes_stored + 10_000


def test_loading_where_only_the_package_was_imported(tmp_path: Path) -> None:
    tensors = {name: made() for name, made in CASES.items()}
    torch.save(tensors, tmp_path / "w.pt")
    x, ids = torch.randn(5, 16), ids_for(5)
    torch.save((x, ids), tmp_path / "x.pt")
    program = """
import sys, torch, torchao_masquant
tensors = torch.load(sys.argv[1], weights_only=True)
x, ids = torch.load(sys.argv[2], weights_only=True)
w = tensors["w4a8"]
assert type(w) is torchao_masquant.MASQuantTensor
torch.save((tensors, torch.ops.masquant.linear(x, w, ids, None)), sys.argv[3])
"""
    paths = [str(tmp_path / n) for n in ("w.pt", "x.pt", "back.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=tmp_path)
    back, y = torch.load(tmp_path / "back.pt", weights_only=True)
    for name, tensor in tensors.items():
        assert_same(back[name], tensor)
    assert torch.equal(y, linear(x, tensors["w4a8"], ids, None))


def test_a_checkpoint_without_the_package_is_refused_not_misread(
    tmp_path: Path,
) -> None:
    torch.save(make().tensor, tmp_path / "w.pt")
    program = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "w.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert "MASQuantTensor" in result.stderr


def test_dequantized_after_every_trip() -> None:
    """The values, not only the bytes: against float64, after all of the above."""
    case = make("w4a8")
    trip = pickle.loads(pickle.dumps(copy.deepcopy(case.tensor.clone().detach())))
    step = f64(trip.scale) * f64(trip.act_pre_scale)[0]
    error = np.abs(f64(trip.dequantize()) - f64(case.weight))
    assert (error <= 0.5 * step * (1 + 1e-4)).all()
