# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized transformers model, sharded by its class's own tensor parallel plan."""

import re
from typing import Callable, Optional

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["tensor_parallel"]

# transformers' names of what torch has a style for.
_COLUMNS = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
}
_ROWS = {
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_STYLES: dict[str, Callable[[], ParallelStyle]] = {**_COLUMNS, **_ROWS}

# Nothing is to be done for them where there are no gradients.
_WHOLE = ("replicate", "replicated_with_grad_allreduce")


def tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, *, src_data_rank: Optional[int] = 0
) -> nn.Module:
    """Shard a quantized transformers model over the ranks of a mesh, in place.

    Every rank calls it with the whole model, quantized or loaded, and afterwards calls
    the model with the same inputs. Other models, and other plans, are for torch's own
    ``parallelize_module``, which this is made of.

    Args:
        model: whose class has a plan for tensor parallelism (``model.tp_plan``).
        mesh: with one dimension.
        src_data_rank: the rank whose weights all take; None: each takes its own, and
            nothing is sent.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is no plan, or a part of the model can't be sharded in this
            way over so many ranks; nothing has been changed then.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"tensor_parallel takes a mesh with one dimension, got {mesh.ndim}: give it "
            'a part of the mesh, such as mesh["tp"].'
        )
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no tensor parallel plan: shard its linears "
            "with torch.distributed.tensor.parallel.parallelize_module."
        )
    styles: dict[str, str] = {}
    modules = dict(model.named_modules())
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        styles |= {name: style for name in modules if expression.fullmatch(name)}
    _check_heads(model, mesh.size())
    for name, style in styles.items():
        _check_module(name, modules[name], style, mesh.size())
    for name, style in styles.items():
        if style not in _WHOLE:
            parallelize_module(
                modules[name], mesh, _STYLES[style](), src_data_rank=src_data_rank
            )
    return model


def _check_heads(model: nn.Module, ranks: int) -> None:
    """Raise unless every rank gets whole attention heads."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for kind in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, kind, None)
        if heads is not None and heads % ranks:
            raise ValueError(
                f"{type(model).__name__} has {kind}={heads}, which {ranks} ranks can't "
                f"share evenly: take a number of ranks that divides {heads}."
            )


def _check_module(name: str, module: nn.Module, style: str, ranks: int) -> None:
    if style not in _STYLES and style not in _WHOLE:
        raise ValueError(
            f"{name}: the model's plan shards it as {style!r}, which a quantized model "
            "has no way for: shard the other linears with "
            "torch.distributed.tensor.parallel.parallelize_module."
        )
    if not isinstance(module, MASQuantLinear) or style in _WHOLE:
        return
    weight = module.weight
    if not isinstance(weight, MASQuantTensor):
        raise ValueError(f"{name} is sharded already.")
    by_columns = style in _ROWS
    size = weight.shape[1] if by_columns else weight.shape[0]
    kind = "input" if by_columns else "output"
    if size % ranks:
        raise ValueError(
            f"{name} has {size} {kind} channels, which {ranks} ranks can't share "
            f"evenly: take a number of ranks that divides {size}."
        )
    multiple = weight.column_multiple
    if by_columns and size // ranks % multiple:
        raise ValueError(
            f"{name}: {ranks} ranks would get {size // ranks} of its {size} input "
            f"channels each, which is no multiple of {multiple} "
            f"({weight.column_units}): take fewer ranks, or quantize it with smaller "
            f"groups{'' if weight.hadamard_size is None else ' and rotations'}."
        )
