# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Experts of vLLM whose weights are quantized: how they are loaded, and that they are run."""

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)

from torchao_masquant.expert_modules import through_experts
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses.expert_linear import expert_product
from torchao_masquant.vllm_plugin.expert_loading import ExpertLoading
from torchao_masquant.vllm_plugin.loading import check_shape
from torchao_masquant.vllm_plugin.token_ids import TokenIds
from torchao_masquant.vllm_plugin.weight_parts import WeightParts

if TYPE_CHECKING:
    from torchao_masquant.vllm_plugin.quantization import MASQuantVllmConfig

__all__ = ["MASQuantExpertMethod"]


def _gated(
    act: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return act(gate) * up


_ACTIVATIONS: Mapping[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


class MASQuantExpertMethod(FusedMoEMethodBase):
    """Loads the quantized weights of a layer's experts, and runs them.

    Args:
        config: of the checkpoint.
        layer: of vLLM.
        formats: name in the checkpoint of each of the two projections, in the order of
            their use, to what it is.
        prefixes: own names that the checkpoint's files may have for the experts.
        token_ids: of the model's; None: no weight is routed.

    Raises:
        ValueError: vLLM is asked to run these experts in a way that this can't.
    """

    def __init__(
        self,
        config: "MASQuantVllmConfig",
        layer: Any,
        formats: Mapping[str, LayerFormat],
        prefixes: frozenset[str],
        token_ids: Optional[TokenIds],
    ):
        super().__init__(layer.moe_config)
        self.config = config
        self.formats = formats
        self.prefixes = prefixes
        self.token_ids = token_ids
        _check_asked(layer)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Note what is to be loaded, for which vLLM's own loaders have no place."""
        inner = intermediate_size_per_partition * self.moe.moe_parallel_config.tp_size
        expected = (
            (num_experts, 2 * inner, hidden_size),
            (num_experts, hidden_size, inner),
        )
        for (name, known), shape in zip(self.formats.items(), expected):
            check_shape(name, known, shape)
        if self.token_ids is not None:
            self.token_ids.hold_in(layer)
        layer.masquant_loading = ExpertLoading(
            layer, self.formats, self.prefixes, params_dtype
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what was loaded together."""
        self.config.check_claimed()
        up, down = layer.masquant_loading.weights()
        layer.masquant_up, layer.masquant_down = WeightParts(up), WeightParts(down)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's is asked."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Optional[nn.Module],
        shared_experts_input: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """The weighted sum over the experts of each token, (T, H) of x's type.

        The rows of x are the tokens of the step; shared experts are run by vLLM.
        """
        ids = None if self.token_ids is None else self.token_ids.ids[: x.shape[0]]

        def project(weight: Any) -> Callable[..., torch.Tensor]:
            def run(x: torch.Tensor, ends: Any, rows: Any, ids: Any) -> torch.Tensor:
                known = ids if weight.is_routed else None
                return expert_product(weight, x, ends, rows, known, None)

            return run

        return through_experts(
            x,
            topk_ids,
            topk_weights,
            ids,
            layer.local_num_experts,
            project(layer.masquant_up),
            partial(_gated, _ACTIVATIONS[layer.activation]),
            project(layer.masquant_down),
        )


def _check_asked(layer: Any) -> None:
    """Raise where vLLM runs experts in a way that is not built."""
    moe, vllm_config = layer.moe_config, get_current_vllm_config()
    parallel = moe.moe_parallel_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    reasons = {
        "expert parallelism": parallel.use_ep,
        "expert load balancing": parallel.enable_eplb,
        "data parallelism": parallel.dp_size > 1,
        "prefill context parallelism": parallel.pcp_size > 1,
        "sequence parallelism": parallel.is_sequence_parallel,
        "dual-batch overlap": vllm_config.parallel_config.enable_dbo,
        "LoRA": moe.is_lora_enabled,
        "biases": moe.has_bias,
        "router weights on their input": layer.apply_router_weight_on_input,
        "a limit of their activation": layer.swiglu_limit is not None,
        f"the activation {layer.activation.value}": layer.activation
        not in _ACTIVATIONS,
        # How many tokens an expert has is read by the host.
        "CUDA graphs (--enforce-eager does without)": (
            torch.get_default_device().type == "cuda" and graphs != CUDAGraphMode.NONE
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"{layer.layer_name}: quantized experts are not served with "
            f"{' and '.join(found)}."
        )
