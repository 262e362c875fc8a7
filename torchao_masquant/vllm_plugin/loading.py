# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From what vLLM hands on of a checkpoint to the weight that a process keeps."""

from typing import Any, Mapping

import torch

from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "built",
    "check_shape",
    "columns_of_rank",
    "loaded_before",
    "own_copy",
    "rows_of_head",
]


def check_shape(name: str, known: LayerFormat, shape: tuple[int, ...]) -> None:
    """Raise where vLLM's model has another weight than the checkpoint.

    Args:
        name: in the checkpoint.
        known: what it is there.
        shape: of the whole weight in vLLM's model.

    Raises:
        ValueError: the shapes differ.
    """
    if known.shape != shape:
        raise ValueError(
            f"{name}: the checkpoint has a weight of shape {list(known.shape)}, vLLM's "
            f"model one of {list(shape)}: its config.json is that of another model."
        )


def built(
    name: str, known: LayerFormat, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> MASQuantTensor:
    """The weight of all its parts.

    Raises:
        ValueError: they are damaged.
    """
    try:
        return known.build(parts, dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


def columns_of_rank(
    name: str, weight: MASQuantTensor, rank: int, pieces: int
) -> MASQuantTensor:
    """The input channels (of each expert) that one of several processes keeps.

    Raises:
        ValueError: blocks of the rotation, or groups, can't be shared evenly.
    """
    size, left = divmod(weight.shape[-1], pieces)
    if left or size % weight.column_multiple:
        raise ValueError(
            f"{name}: {weight.shape[-1]} input channels can't be shared by {pieces} "
            f"processes in multiples of {weight.column_multiple} "
            f"({weight.column_units}): choose another tensor_parallel_size, or calibrate "
            "with a hadamard_size and a group_size that divide their pieces."
        )
    piece = weight[..., rank * size : (rank + 1) * size]
    assert isinstance(piece, MASQuantTensor)
    return piece


def rows_of_head(layer: Any, weight: MASQuantTensor) -> MASQuantTensor:
    """The tokens that one process keeps of an output head.

    Args:
        layer: of vLLM, which has a multiple of some number of tokens in each process. Any
            rows will do for those that are none: their logits are not looked at.
        weight: of all tokens.
    """
    mine, size = layer.shard_indices, layer.num_embeddings_per_partition
    rows = weight[mine.org_vocab_start_index : mine.org_vocab_end_index]
    while len(rows) < size:
        rows = torch.cat([rows, weight[: size - len(rows)]])
    assert isinstance(rows, MASQuantTensor)
    return rows


def own_copy(piece: MASQuantTensor, device: torch.device) -> MASQuantTensor:
    """A piece in memory of its own, which does not hold that of the whole."""
    return piece.with_parts(
        {n: t.to(device, copy=True).contiguous() for n, t in piece.parts().items()}
    )


def loaded_before(name: str) -> ValueError:
    """Of weights that are loaded into a model that has them already."""
    return ValueError(
        f"{name}: quantized weights are not loaded again into a model that runs "
        "(reload_weights): start vLLM anew."
    )
