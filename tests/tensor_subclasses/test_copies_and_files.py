# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Copies, moves, checkpoints: what is the same weight afterwards, and what is refused."""

import copy
import io
import pickle
import pickletools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_oracle import ids_for
from tensor_cases import CASES, every_case, storages
from tensor_oracle import assert_same, inner_tensors, make, unrouted
from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear


@every_case
def test_copies_and_views(name: str) -> None:
    """The same parts, of the same memory where that is asked for."""
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
    # Dynamo keys graphs by them.
    hash(tuple(attributes.values()))
    rebuilt = MASQuantTensor.__tensor_unflatten__(
        inner_tensors(tensor), attributes, tensor.shape, tensor.stride()
    )
    for view in (tensor.detach(), rebuilt):
        assert_same(view, tensor)
        assert storages(view) == storages(tensor)
    for duplicate in (
        tensor.clone(),
        copy.deepcopy(tensor),
        pickle.loads(pickle.dumps(tensor)),
        copy.deepcopy(nn.Parameter(tensor, requires_grad=False)),
    ):
        assert_same(duplicate, tensor)
        assert not set(storages(duplicate)) & set(storages(tensor))
    for same in (
        tensor.contiguous(),
        tensor.to("cpu"),
        tensor.to("cpu", copy=True),
        tensor.cpu(),
    ):
        assert_same(same, tensor)
    meta = tensor.to("meta")
    assert isinstance(meta, MASQuantTensor) and meta.device.type == "meta"
    assert meta.same_layout(tensor) and meta.dtype == tensor.dtype
    assert all(t.is_meta for t in inner_tensors(meta).values())
    target = CASES[name]()
    for t in inner_tensors(target).values():
        t.zero_()
    before = storages(target)
    target.copy_(CASES[name]())
    assert_same(target, CASES[name]())
    assert storages(target) == before


def test_a_parameter_stays_one() -> None:
    parameter = nn.Parameter(make().tensor, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(copy.deepcopy(parameter), nn.Parameter)


def test_contiguous_of_a_slice() -> None:
    part = make().tensor[:, 4:12]
    assert not part.qdata.is_contiguous()
    whole = part.contiguous()
    assert all(t.is_contiguous() for t in inner_tensors(whole).values())
    assert_same(whole, part)


def test_linear_on_meta() -> None:
    x, ids = torch.randn(2, 5, 16, device="meta"), torch.zeros(2, 5, device="meta")
    y = linear(x.bfloat16(), make().tensor.to("meta"), ids.long(), None)
    assert y.is_meta and y.shape == (2, 5, 6) and y.dtype == torch.bfloat16


def test_to_another_dtype_leaves_a_quantized_weight_alone() -> None:
    """As torchao's tensors do: the values it holds have types of their own."""
    tensor = make(hadamard_size=8).tensor
    for dtype in (torch.float16, torch.bfloat16):
        assert_same(tensor.to(dtype), tensor)
        module = nn.Linear(16, 6)
        module.weight = nn.Parameter(tensor, requires_grad=False)
        module.to(dtype)
        assert module.bias.dtype == dtype
        assert_same(module.weight.data, tensor)


def test_copy_of_another_layout_raises() -> None:
    """Ranks (3, 2) and (2, 3) have tensors of one shape, and another meaning."""
    of_16 = "the source's shape is torch.Size([{}]), the target's"
    for source, problem in (
        (make("w4a8"), "the source's weight_bits is 4, the target's 8"),
        (make(shape=(5, 16)), of_16.format("5, 16")),
        (make(shape=(6, 12)), of_16.format("6, 12")),
        (make(ranks=(3, 2)), "the source's ranks are (3, 2), the target's (2, 3)"),
        (make(group_size=4), "the source's scale is of shape (6, 4), the target's"),
        (
            make(modalities=2, ranks=(5,)),
            "the source's modalities is ('text', 'vision')",
        ),
        (make(low_rank_bits=8), "the source's low_rank_bits is 8, the target's 16"),
        (make("w4a16"), "the source's weight_bits is 4, the target's 8"),
        (make(hadamard_size=8), "the source's hadamard_size is 8, the target's None"),
    ):
        target = make().tensor
        with pytest.raises(ValueError) as raised:
            target.copy_(source.tensor)
        message = str(raised.value)
        assert message.startswith(
            f"copy_ needs two MASQuantTensors of one layout, and {problem}"
        )
        assert message.endswith(f": got {source.tensor!r} for {target!r}.")
        assert_same(target, make().tensor)
    for lacking, name in (
        (make(with_bias=False), "modality_bias"),
        (make(with_bias=True, with_shift=False), "act_shift"),
    ):
        with pytest.raises(ValueError, match=f"the target has no {name}"):
            lacking.tensor.copy_(make().tensor)
    quantized, dense = make().tensor, torch.zeros(6, 16)
    for target, source, kinds in (
        (quantized, dense, "got a Tensor for a MASQuantTensor."),
        (dense, quantized, "got a MASQuantTensor for a Tensor."),
    ):
        with pytest.raises(ValueError, match=re.escape(kinds)):
            target.copy_(source)


@pytest.mark.parametrize("low_rank_bits", [16, 8])
@pytest.mark.parametrize(
    "options",
    [
        dict(ranks=()),
        dict(ranks=(1, 3)),
        dict(with_bias=False),
        dict(dtype=torch.bfloat16),
        dict(ranks=(), with_bias=False),
    ],
    ids=str,
)
def test_copy_into_a_target_with_more_parts(
    options: dict[str, Any], low_rank_bits: int
) -> None:
    """They are filled with what changes nothing; types of the source are converted."""
    source = make(**options)
    if low_rank_bits == 8 and source.ranks:
        source = make(**options, low_rank_bits=8)
    target = make(low_rank_bits=low_rank_bits, seed=1).tensor
    before = storages(target)
    target.copy_(source.tensor)
    assert storages(target) == before and target.dtype == torch.float32
    x, ids = torch.randn(9, 16), ids_for(9)
    assert torch.equal(linear(x, target, ids), linear(x, source.tensor, ids))
    assert torch.equal(linear(x, target), linear(x, source.tensor))


def test_copy_of_one_smoothing_factor_for_all() -> None:
    source = MASQuantTensor.from_hp(torch.randn(6, 16), modalities=("text", "vision"))
    target = make(modalities=2, ranks=()).tensor
    target.copy_(source)
    x, ids = torch.randn(9, 16), ids_for(9, modalities=2)
    assert torch.equal(linear(x, target, ids), linear(x, source))


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
        make(hadamard_size=8),
        make(hadamard_size=4),
    ]
    made = [case.tensor for case in (make(), *others)]
    assert len({key(tensor) for tensor in made}) == len(made)
    assert not any(made[0].same_layout(other) for other in made[1:])


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


def test_loading_in_another_process(tmp_path: Path) -> None:
    """Where the package was imported; without it a checkpoint is refused, not misread."""
    tensors = {name: made() for name, made in CASES.items()}
    torch.save(tensors, tmp_path / "w.pt")
    x, ids = torch.randn(5, 16), ids_for(5)
    torch.save((x, ids), tmp_path / "x.pt")
    program = """
import sys, torch
try:
    torch.load(sys.argv[1], weights_only=True)
except Exception as error:
    assert "MASQuantTensor" in str(error)
else:
    raise AssertionError
import torchao_masquant
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


def test_what_was_saved_before_there_were_rotations_loads() -> None:
    tensor = make("w4a8").tensor
    older = copy.copy(tensor.__dict__)
    del older["hadamard_size"]
    loaded = tensor.clone()
    loaded.__dict__.clear()
    loaded.__setstate__(older)
    assert_same(loaded, tensor)


def named_of_ours(value: object) -> set[str]:
    """What a pickle names of the package."""
    strings = [a for _, a, _ in pickletools.genops(pickle.dumps(value, protocol=2))]
    names = [a for a in strings if isinstance(a, str) and "torchao_masquant" in a]
    return {name for name in names if " " in name}


def test_a_version_without_rotations_refuses_its_pickles() -> None:
    """They name a function that it does not have, and others nothing new."""
    bare, rotated = (make("w4a8", hadamard_size=size).tensor for size in (None, 8))
    assert {name.split()[-1] for name in named_of_ours(bare)} == {"MASQuantTensor"}
    assert named_of_ours(rotated) > named_of_ours(bare)
    file = io.BytesIO()
    torch.save({"weight": nn.Parameter(rotated, requires_grad=False)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    assert isinstance(loaded, nn.Parameter)
    assert_same(loaded.data, rotated)
    assert unrouted().hadamard_size is None
