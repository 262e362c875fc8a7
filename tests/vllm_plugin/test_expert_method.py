# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Experts of vLLM's that a folder has quantized: found, loaded, cut and run."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from torchao_masquant.integrations.checkpoint_format import (
    CheckpointFormat,
    flatten_state_dict,
)
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses import MASQuantTensor

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import (  # noqa: E402
    MoEActivation,
)
from vllm.model_executor.layers.fused_moe.routed_experts import (  # noqa: E402
    RoutedExperts,
)
from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402

from torchao_masquant.vllm_plugin import expert_method, quantization  # noqa: E402
from torchao_masquant.vllm_plugin.expert_loading import hand_over  # noqa: E402
from torchao_masquant.vllm_plugin.expert_method import (  # noqa: E402
    MASQuantExpertMethod,
)
from torchao_masquant.vllm_plugin.model_loading import watch_loading  # noqa: E402
from torchao_masquant.vllm_plugin.quantization import (  # noqa: E402
    MASQuantVllmConfig,
)
from torchao_masquant.vllm_plugin.token_ids import TokenIds  # noqa: E402

CPU = torch.device("cpu")
E, H, INNER, TOP_K = 5, 64, 64, 2
PREFIX = "model.layers.0.mlp.experts"
NAMES = (f"{PREFIX}.gate_up_proj", f"{PREFIX}.down_proj")


def of_experts(rows: int, columns: int, seed: int, **options) -> MASQuantTensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factor, rank = torch.rand(2, columns, generator=generator) + 0.5, 3

    def of_one() -> MASQuantTensor:
        return MASQuantTensor.from_hp(
            normal(rows, columns) * columns**-0.5,
            modalities=("text", "vision"),
            smoothing_factor=factor,
            modality_bias=normal(2, rows) * 0.1,
            act_shift=normal(2, columns) * 0.1,
            ranks=(rank,),
            l1=normal(columns, rank) * 0.1,
            l2=normal(rank, rows) * 0.1,
            weight_bits=4,
            act_bits=8,
            **options,
        )

    return MASQuantTensor.stack([of_one() for _ in range(E)])


@pytest.fixture
def weights():
    return dict(zip(NAMES, (of_experts(2 * INNER, H, 0), of_experts(H, INNER, 1))))


def a_layer(pieces: int = 1, rank: int = 0, **changes) -> RoutedExperts:
    """As vLLM makes it, without any weight of its own."""
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    parallel = dict.fromkeys(("use_ep", "enable_eplb", "is_sequence_parallel"), False)
    parallel |= {"dp_size": 1, "pcp_size": 1, "tp_size": pieces, "tp_rank": rank}
    moe = {"is_lora_enabled": False, "has_bias": False}
    of_layer = {
        "layer_name": PREFIX,
        "local_num_experts": E,
        "activation": MoEActivation.SILU,
        "apply_router_weight_on_input": False,
        "swiglu_limit": None,
    }
    for known in (parallel, moe, of_layer):
        known |= {n: v for n, v in changes.items() if n in known}
    for name, value in of_layer.items():
        setattr(layer, name, value)
    layer.moe_config = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(**parallel), **moe
    )
    return layer


@pytest.fixture(autouse=True)
def asked():
    """What vLLM was started with."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(enable_dbo=False),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
    )
    with (
        mock.patch.object(expert_method, "get_current_vllm_config", lambda: config),
        mock.patch.object(quantization, "get_current_vllm_config", lambda: config),
    ):
        yield config


def formats(weights) -> dict[str, LayerFormat]:
    return {name: LayerFormat.of(weight) for name, weight in weights.items()}


def claimed(weights, prefix: str = PREFIX, **changes):
    entry = CheckpointFormat("float32", formats(weights)).to_json()
    config = MASQuantVllmConfig.from_config(entry)
    ids = TokenIds(8, ("text", "vision"), {"text": (), "vision": (9,)}, CPU)
    ids.fill(torch.full((5,), 9), torch.tensor([0, 1, 1, 0, 1]).bool())
    with mock.patch.object(MASQuantVllmConfig, "_watched", lambda *_: ids):
        return config, config.get_quant_method(a_layer(**changes), prefix)


def handed_over(layer: RoutedExperts, stored) -> list[str]:
    """What is left of a checkpoint for vLLM's own loader."""
    others = hand_over(stored.items(), [layer.masquant_loading])
    return [name for name, _ in others]


def loaded(weights, **changes) -> RoutedExperts:
    _, method = claimed(weights)
    layer = a_layer(**changes)
    method.moe = layer.moe_config
    method.create_weights(
        layer,
        E,
        H,
        INNER // layer.moe_config.moe_parallel_config.tp_size,
        torch.float32,
    )
    stored = flatten_state_dict(weights)
    assert all(name.startswith(f"{PREFIX}._") for name in stored)
    assert handed_over(layer, stored) == []
    method.process_weights_after_loading(layer)
    layer.quant_method = method
    return layer


def test_nothing_is_loaded_again(weights):
    layer = loaded(weights)
    with pytest.raises(ValueError, match="not loaded again .* start vLLM anew"):
        handed_over(layer, flatten_state_dict(weights))


def run(layer: RoutedExperts, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weights, chosen = torch.rand(len(x), E, generator=generator).topk(TOP_K)
    return layer.quant_method.apply(layer, x, weights, chosen.int(), None, None)


def one_by_one(weights, x: torch.Tensor) -> torch.Tensor:
    """A linear of each expert, a token at a time."""
    generator = torch.Generator().manual_seed(7)
    shares, chosen = torch.rand(len(x), E, generator=generator).topk(TOP_K)
    up, down = weights.values()
    ids = torch.tensor([0, 1, 1, 0, 1])
    rows = []
    for token, share, experts, known in zip(x, shares, chosen, ids):
        y = torch.zeros(H)
        for s, e in zip(share, experts):
            hidden = torch.ops.masquant.linear(token[None], up[e], known[None])
            gate, other = hidden.chunk(2, -1)
            inner = F.silu(gate) * other
            y += s * torch.ops.masquant.linear(inner, down[e], known[None])[0]
        rows.append(y)
    return torch.stack(rows)


def test_experts_give_what_their_linears_give(weights):
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(3))
    found = run(loaded(weights), x)
    torch.testing.assert_close(found, one_by_one(weights, x), rtol=1e-5, atol=1e-5)


def test_pieces_of_two_processes_add_up(weights):
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(3))
    whole = run(loaded(weights), x)
    pieces = [run(loaded(weights, pieces=2, rank=r), x) for r in (0, 1)]
    # Each rounds its half of a token in front of the second projection.
    difference = (sum(pieces) - whole).norm() / whole.norm()
    assert difference < 0.02
    assert (pieces[0] - whole).norm() / whole.norm() > 0.3


def test_both_projections_are_claimed(weights):
    config, method = claimed(weights)
    assert isinstance(method, MASQuantExpertMethod) and list(method.formats) == [*NAMES]
    config.check_claimed()


def test_mixtral_has_another_name_in_vllm(weights):
    _, method = claimed(weights, "model.layers.0.block_sparse_moe.experts")
    assert isinstance(method, MASQuantExpertMethod)


def test_granites_mixture_has_that_name_everywhere(weights):
    renamed = {n.replace(".mlp.", ".block_sparse_moe."): w for n, w in weights.items()}
    _, method = claimed(renamed, "model.layers.0.block_sparse_moe.experts")
    assert isinstance(method, MASQuantExpertMethod)


def test_what_vllm_calls_the_projections_is_left(weights):
    entry = CheckpointFormat("float32", formats(weights)).to_json()
    config = MASQuantVllmConfig.from_config(entry)
    suffixes = {".down_proj": ".w2_weight", ".gate_up_proj": ".w13_weight"}
    moved = {".mlp.": ".moe."}
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_suffix=suffixes, orig_to_new_substr=moved)
    )
    assert list(config.layers) == [n.replace(".mlp.", ".moe.") for n in NAMES]


def test_experts_without_a_place_are_told_of(weights):
    config, method = claimed(weights, "model.layers.1.mlp.experts")
    assert method is None
    with mock.patch.object(config, "_is_of_this_process", lambda name: True):
        with pytest.raises(ValueError, match="no place for 2 quantized weights"):
            config.check_claimed()


def test_half_of_them_is_refused(weights):
    with pytest.raises(ValueError, match="not quantized as a whole"):
        claimed({NAMES[1]: weights[NAMES[1]]})


def waiting(weights) -> RoutedExperts:
    """For its weights."""
    _, method = claimed(weights)
    layer = a_layer()
    method.moe = layer.moe_config
    method.create_weights(layer, E, H, INNER, torch.float32)
    layer.quant_method = method
    return layer


def test_what_a_loader_does_not_hand_on_is_told_of(weights):
    layer = waiting(weights)
    with pytest.raises(ValueError, match=r"files lack \['qdata', .* of its weight"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_tensor_of_one_expert_is_refused(weights):
    stored = {f"{PREFIX}.0.up_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="0.up_proj.weight is no part of them"):
        handed_over(waiting(weights), stored)


def test_what_is_not_experts_is_left_to_vllm(weights):
    others = [f"{PREFIX}.bias", "model.layers.1.mlp.experts._down_proj_qdata", "a.b"]
    stored = dict.fromkeys(others, torch.zeros(1))
    assert handed_over(waiting(weights), stored) == others


class ByName(torch.nn.Module):
    """A model that looks up each name of a checkpoint, as many of vLLM's do."""

    def __init__(self, layer: RoutedExperts):
        super().__init__()
        self.norm = torch.nn.LayerNorm(2)
        self.experts = layer

    def load_weights(self, weights):
        known = dict(self.named_parameters())
        for name, tensor in weights:
            known[name].data.copy_(tensor)


def test_a_model_that_looks_up_names_is_handed_none_of_the_experts(weights):
    watch_loading(ByName)
    layer = waiting(weights)
    stored = {**flatten_state_dict(weights), "norm.bias": torch.ones(2)}
    model = ByName(layer)
    model.load_weights(stored.items())
    assert model.norm.bias.tolist() == [1, 1]
    layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match="ByName .* has no place for 'other.weight'"):
        model.load_weights([("other.weight", torch.ones(2))])


def test_another_number_of_experts_is_refused(weights):
    _, method = claimed(weights)
    with pytest.raises(
        ValueError, match=r"of shape \[5, 128, 64\], vLLM's model one of"
    ):
        method.create_weights(a_layer(), E + 1, H, INNER, torch.float32)


def test_columns_that_cannot_be_cut_are_refused(weights):
    weights[NAMES[1]] = of_experts(H, INNER, 1, hadamard_size=64)
    with pytest.raises(ValueError, match="by 2 processes in multiples of 64"):
        loaded(weights, pieces=2)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"use_ep": True}, "expert parallelism"),
        ({"dp_size": 2}, "data parallelism"),
        ({"is_sequence_parallel": True}, "sequence parallelism"),
        ({"has_bias": True}, "biases"),
        ({"activation": MoEActivation.SWIGLUOAI}, "the activation swigluoai"),
        (
            {"apply_router_weight_on_input": True, "enable_eplb": True},
            "expert load balancing and router weights on their input",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(weights, changes, reason):
    with pytest.raises(ValueError, match=f"not served with {reason}."):
        claimed(weights, **changes)


def test_dual_batch_overlap_is_refused(weights, asked):
    asked.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match="not served with dual-batch overlap."):
        claimed(weights)
