# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A linear of vLLM, or a head, whose weights are quantized: how they are loaded and run."""

from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Sequence, Union

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.vllm_plugin.loading import (
    built,
    check_shape,
    columns_of_rank,
    loaded_before,
    own_copy,
    rows_of_head,
)
from torchao_masquant.vllm_plugin.shards import QuantizedShards
from torchao_masquant.vllm_plugin.token_ids import TokenIds

if TYPE_CHECKING:
    from torchao_masquant.vllm_plugin.quantization import MASQuantVllmConfig

__all__ = ["MASQuantLinearMethod"]

ShardId = Union[int, str, None]

_QKV = {"q": 0, "k": 1, "v": 2}


class MASQuantLinearMethod(LinearMethodBase):
    """Loads the parts of quantized weights into a linear, and runs it.

    Args:
        config: of the checkpoint.
        formats: name in the checkpoint of each shard, in the order of the outputs, to what
            it is.
        token_ids: of the model's; None: no weight is routed.
    """

    def __init__(
        self,
        config: "MASQuantVllmConfig",
        formats: Mapping[str, LayerFormat],
        token_ids: Optional[TokenIds],
    ):
        self.config = config
        self.formats = formats
        self.token_ids = token_ids

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make a place for each part of the weights.

        Weights of unequal shapes and ranks are no one tensor: a parameter of a part is
        empty, and hands what is loaded on. A shard becomes a weight as soon as its parts
        are complete, of which this process keeps its piece.

        Raises:
            ValueError: vLLM's model is another one, is to have adapters, or weights that no
                file has.
        """
        config, first = get_current_vllm_config(), next(iter(self.formats))
        if config.load_config.load_format == "dummy":
            raise ValueError(
                f"{first}: quantized weights are not made up: leave out --load-format dummy."
            )
        if config.lora_config is not None:
            raise ValueError(
                f"{first}: quantized layers are not served with LoRA: "
                "leave out --enable-lora, or merge the adapter before you calibrate."
            )
        sizes = getattr(layer, "output_sizes", [output_size])
        if len(self.formats) == len(sizes) > 1 and isinstance(layer, QKVParallelLinear):
            # They count heads that tensor parallelism has to repeat.
            sizes = [f.shape[0] for f in self.formats.values()]
        elif isinstance(layer, ParallelLMHead):
            # Without the rows that vLLM fills it up with.
            sizes = [layer.org_vocab_size]
        elif len(self.formats) == 1:
            sizes = [output_size]
        for (name, known), size in zip(self.formats.items(), sizes):
            check_shape(name, known, (size, input_size))
        if self.token_ids is not None:
            self.token_ids.hold_in(layer)
        layer.masquant_loading = _Loading(layer, self.formats, params_dtype)
        kinds = {p: d for known in self.formats.values() for p, d in known.parts}
        for part, dtype in kinds.items():
            take = _taker(layer.masquant_loading, part)
            place = _place(getattr(torch, dtype), take)
            layer.register_parameter(f"_weight_{part}", place)
        # The byte under the weight's own name, which stops readers who don't know the rest.
        layer.register_parameter("weight", _place(torch.uint8, lambda *_: None))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the shards together."""
        self.config.check_claimed()
        weights = layer.masquant_loading.weights()
        del layer.masquant_loading
        for name in [n for n, _ in layer.named_parameters(recurse=False)]:
            if name == "weight" or name.startswith("_weight_"):
                delattr(layer, name)
        layer.masquant = QuantizedShards(weights)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The layer's outputs of this process, (..., N) of x's type."""
        ids = None
        if layer.masquant.is_routed:
            ids = layer.masquant_token_ids.ids[: x.shape[:-1].numel()]
        return layer.masquant(x, ids, bias)


def _place(dtype: torch.dtype, take: Callable[..., None]) -> Parameter:
    """A parameter that holds nothing, and hands on what vLLM loads into it."""
    place = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    set_weight_attrs(place, {"weight_loader": take})
    return place


def _taker(loading: "_Loading", part: str) -> Callable[..., None]:
    """A loader of a part: a function, whose name vLLM asks for when it loads again."""

    def take(param: Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        loading.take(part, param, tensor, shard_id)

    return take


class _Loading:
    """The weights of one layer while a checkpoint is read.

    vLLM keeps the loaders of a layer for good, and with them this.

    Args:
        layer: of vLLM.
        formats: name of each shard to what it is.
        dtype: that the weights stand for.
    """

    def __init__(
        self, layer: Any, formats: Mapping[str, LayerFormat], dtype: torch.dtype
    ):
        self._layer, self._dtype = layer, dtype
        self._names, self._formats = list(formats), list(formats.values())
        self._parts: list[dict[str, torch.Tensor]] = [{} for _ in formats]
        self._weights: list[Optional[MASQuantTensor]] = [None for _ in formats]
        self._is_over = False

    def take(
        self,
        part: str,
        param: Parameter,
        tensor: torch.Tensor,
        shard_id: ShardId = None,
    ) -> None:
        """Take a part of a shard's weight, as vLLM's loaders hand it on.

        Args:
            part: its name.
            param: that has its place.
            tensor: all of it, whatever piece of it this process keeps.
            shard_id: of the shard; None: there is one, or the tensor says it.

        Raises:
            ValueError: there is no such shard, its parts are damaged, or all have been
                loaded before.
        """
        if self._is_over:
            raise loaded_before(self._names[0])
        if shard_id is None:
            shard_id = getattr(tensor, "shard_id", None)
        shard = 0 if shard_id is None else _QKV.get(shard_id, shard_id)  # type: ignore[arg-type]
        if not isinstance(shard, int) or shard >= len(self._names):
            raise ValueError(
                f"{self._layer.prefix}: vLLM loads {part} into a shard {shard_id!r}, of "
                f"{self._names}."
            )
        parts, known = self._parts[shard], self._formats[shard]
        parts[part] = tensor
        if len(parts) == len(known.parts):
            weight = built(self._names[shard], known, parts, self._dtype)
            self._weights[shard] = own_copy(self._piece(weight, shard), param.device)
            self._parts[shard] = {}

    def _piece(self, weight: MASQuantTensor, shard: int) -> MASQuantTensor:
        """What this process keeps of a shard's weight."""
        layer = self._layer
        if isinstance(layer, ParallelLMHead):
            return rows_of_head(layer, weight)
        rank, pieces = layer.tp_rank, layer.tp_size
        if isinstance(layer, ReplicatedLinear):
            pieces = 1
        if pieces == 1:
            return weight
        if isinstance(layer, RowParallelLinear):
            return columns_of_rank(self._names[shard], weight, rank, pieces)
        if len(self._names) == 1 and len(layer.output_partition_sizes) > 1:
            raise ValueError(
                f"{self._names[0]}: the checkpoint has several projections in one "
                "weight, which tensor parallelism can't cut: use tensor_parallel_size=1."
            )
        size = layer.output_partition_sizes[shard]
        if isinstance(layer, QKVParallelLinear) and shard > 0:
            rank //= layer.num_kv_head_replicas
        piece = weight[rank * size : (rank + 1) * size]
        assert isinstance(piece, MASQuantTensor)
        return piece

    def weights(self) -> Sequence[MASQuantTensor]:
        """All of them, which are not held here any longer.

        Raises:
            ValueError: the checkpoint lacks a part.
        """
        for name, weight, parts, known in zip(
            self._names, self._weights, self._parts, self._formats
        ):
            if weight is None:
                missing = [part for part, _ in known.parts if part not in parts]
                raise ValueError(
                    f"{name}: the checkpoint's files lack {missing} of its weight: "
                    "download or save the checkpoint again."
                )
        found = [weight for weight in self._weights if weight is not None]
        self._weights, self._is_over = [], True
        return found
