# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a plan has to know of a model: read from its config, without weights."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from torchao_masquant.hub import auto_class, load_config, meta_model
from torchao_masquant.modality import modality_token_ids
from torchao_masquant.models.parts import token_reader
from torchao_masquant.selection import select_linears

__all__ = ["InputGroup", "LinearShape", "Skeleton", "read_skeleton"]

# Linears that read one tensor, by the last part of their names.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_ROWWISE = ("rowwise", "rowwise_rep", "rowwise_split_input")


@dataclass(frozen=True)
class LinearShape:
    """A linear to quantize.

    Attributes:
        name: in the model.
        n: output channels.
        k: input channels.
        sharded: how the class's tensor parallel plan cuts its weight: "rows",
            "columns", or "" for not at all.
    """

    name: str
    n: int
    k: int
    sharded: str = ""


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor, so that they share its statistics.

    Attributes:
        block: name of the decoder layer.
        k: width of the input.
        outputs: channels of each of them.
    """

    block: str
    k: int
    outputs: tuple[int, ...]

    @property
    def values(self) -> int:
        """Of their weights."""
        return self.k * sum(self.outputs)


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        source: what it was read from.
        model_class: of transformers.
        element: bytes of a value of the weights.
        modalities: names, base first.
        linears: to quantize.
        groups: of linears with one input.
        blocks: number of decoder layers.
        block_values: values of the largest decoder layer's weights.
        other_values: values of all that is not quantized.
        head: that makes logits of hidden states; None where there is none.
        hidden: width of the decoder.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: width of one.
        sharded_others: of ``other_values``, those that the class's tensor parallel plan
            shards: embeddings and the head.
    """

    source: str
    model_class: str
    element: int
    modalities: tuple[str, ...]
    linears: tuple[LinearShape, ...]
    groups: tuple[InputGroup, ...]
    blocks: int
    block_values: int
    other_values: int
    head: Optional[LinearShape]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    sharded_others: int

    @property
    def values(self) -> int:
        """Of all weights."""
        return self.other_values + sum(x.n * x.k for x in self.linears)

    def cache_bytes(self, tokens: int) -> int:
        """Of the keys and values of so many tokens."""
        width = self.kv_heads * self.head_dim
        return 2 * self.blocks * width * self.element * tokens


def read_skeleton(source: str) -> Skeleton:
    """Read a config, and make the model that it describes on the meta device.

    Args:
        source: a folder with a config.json, or a name on the Hugging Face hub.

    Raises:
        OSError: there is no config.
        ValueError: transformers can't make a model of it.
    """
    config = load_config(source)
    model = _meta_model(config)
    linears = select_linears(model)
    plan = getattr(model, "tp_plan", None) or {}
    shapes = tuple(
        LinearShape(name, x.out_features, x.in_features, _sharding(plan, name))
        for name, x in linears.items()
    )
    groups: dict[tuple[str, int], list[LinearShape]] = {}
    for shape in shapes:
        groups.setdefault(_input(shape), []).append(shape)
    blocks = _blocks(model, shapes)
    total = sum(p.numel() for p in model.parameters())
    embeddings = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if name in plan and isinstance(module, (nn.Embedding, nn.Linear))
    )
    text = config.get_text_config()
    heads = text.num_attention_heads
    dtype = next(model.parameters()).dtype
    return Skeleton(
        source=source,
        model_class=type(model).__name__,
        element=torch.empty((), dtype=dtype, device="meta").element_size(),
        modalities=tuple(modality_token_ids(config) or {"text": ()}),
        linears=shapes,
        groups=tuple(
            InputGroup(_block_of(key[0]), key[1], tuple(x.n for x in members))
            for key, members in groups.items()
        ),
        blocks=len(blocks),
        block_values=max(blocks.values(), default=0),
        other_values=total - sum(x.n * x.k for x in shapes),
        sharded_others=embeddings,
        head=_head(model, plan),
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _meta_model(config: Any) -> Any:
    model = meta_model(auto_class(config), config)
    dtype = getattr(config, "dtype", None) or getattr(
        config.get_text_config(), "dtype", None
    )
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def _sharding(plan: dict[str, str], name: str) -> str:
    generic = ".".join("*" if part.isdigit() else part for part in name.split("."))
    style = plan.get(generic)
    if style is None:
        return ""
    return "columns" if style in _ROWWISE else "rows"


def _input(shape: LinearShape) -> tuple[str, int]:
    parent, _, last = shape.name.rpartition(".")
    for names in _SIBLINGS:
        if last in names:
            return f"{parent}.{names[0]}", shape.k
    return shape.name, shape.k


def _head(model: Any, plan: dict[str, str]) -> Optional[LinearShape]:
    reader: Any = token_reader(model)
    head = reader.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    return LinearShape(name, head.out_features, head.in_features, _sharding(plan, name))


def _blocks(model: nn.Module, shapes: tuple[LinearShape, ...]) -> dict[str, int]:
    """Decoder layers, and values of their weights."""
    names = {_block_of(shape.name) for shape in shapes}
    return {
        name: sum(p.numel() for p in model.get_submodule(name).parameters())
        for name in names
        if name
    }


def _block_of(name: str) -> str:
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else ""
