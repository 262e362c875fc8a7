# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From a transformers model to a folder that runs without it."""

import inspect
import os
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Union

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from transformers import DynamicCache, PreTrainedModel

from torchao_masquant.deploy.decoder_program import (
    Decode,
    Embed,
    Prefill,
    cache_keyword,
)
from torchao_masquant.deploy.lowering import choose_kernels
from torchao_masquant.deploy.package import new_folder, write_package
from torchao_masquant.modality import TEXT
from torchao_masquant.models.parts import token_reader
from torchao_masquant.routing import Router, router_of

__all__ = ["export_decoder"]

# Of an exported program's logits to those of the model itself: rounding of single
# activations tips over, as it does between any two orders of summation.
_TOLERANCE = 0.1
_KINDS = ("full_attention", "sliding_attention")
# What the programs give a decoder, or make anew.
_TAKEN = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_position",
)


class ObservedCall(NamedTuple):
    """What the decoder was called with, and what it made of it."""

    inputs_embeds: torch.Tensor
    modality_ids: torch.Tensor
    position_ids: torch.Tensor
    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


@torch.no_grad()
def export_decoder(
    model: PreTrainedModel,
    sample: Mapping[str, Any],
    folder: Union[str, os.PathLike],
    *,
    kernels: str = "auto",
) -> Path:
    """Compile the decoder of a model into a package that needs torch alone.

    Three programs share one copy of the weights: "embed" (token ids to embeddings),
    "prefill" (embeddings, modality ids and positions of a prompt of any length of two
    tokens or more) and "decode" (one token of the base modality, which does no
    low-rank work). Keys and values are tensors of the caller's with any number of
    slots, written in place. Towers stay outside: the features that they make of images
    and sounds are put in among the embeddings.

    See :func:`~torchao_masquant.deploy.write_package` for what the folder holds, and
    ``masquant_decoder.py`` in it for how it is run. It is compiled for processors
    like this one and for this version of torch.

    Args:
        model: a transformers model, on one device, in eval mode.
        sample: keyword inputs of one call, with every modality that the model is to
            meet and without padding. The programs' results are held to the model's own
            on it; its batch size is theirs.
        folder: is made here; not there yet, or empty.
        kernels: "cpu", our C++ kernels, or "triton", those for GPUs; "aten", operators
            of torch alone, slower; "auto": ours where they run here.

    Returns:
        The folder.

    Raises:
        TypeError: it is no transformers model.
        ValueError: the decoder takes more than embeddings, positions and a causal
            mask, keeps more than keys and values, or the sample has padding.
        FileExistsError: the folder is not empty.
    """
    # Of a composite, the part that writes.
    model = token_reader(model)
    if not callable(getattr(model, "get_decoder", None)) or not hasattr(
        model, "config"
    ):
        raise TypeError(
            f"export_decoder takes a transformers model, got a {type(model).__name__}: "
            "export your own with torch.export and give the programs to write_package."
        )
    target = new_folder(folder)
    check_layers(model)
    call = observe(model, sample)
    kernels = choose_kernels(kernels, call.inputs_embeds.device)
    _check_result(model, call)
    router = router_of(model)
    modalities = (TEXT,) if router is None else router.modalities
    facts = {
        "model": type(model).__name__,
        "batch": call.inputs_embeds.shape[0],
        "hidden_size": call.inputs_embeds.shape[2],
        "dtype": str(call.keys[0].dtype).removeprefix("torch."),
        "keys": [[t.shape[1], t.shape[3]] for t in call.keys],
        "values": [[t.shape[1], t.shape[3]] for t in call.values],
        "position_rows": call.position_ids.shape[0]
        if call.position_ids.dim() == 3
        else 0,
        "modalities": list(modalities),
        "placeholders": _placeholders(router),
    }
    return write_package(_programs(model, call), target, kernels=kernels, facts=facts)


def _placeholders(router: Optional[Router]) -> dict[str, list[int]]:
    if router is None or router.token_ids is None:
        return {}
    return {name: list(tokens) for name, tokens in router.token_ids.items()}


def check_layers(model: PreTrainedModel) -> None:
    """Raise unless a layer's state is its keys and values, and its numbers are lowered."""
    for name, parameter in model.named_parameters():
        form = getattr(parameter.data, "act_format", None)
        if form is not None:
            raise ValueError(
                f"{name} is for activations in {form!r}, which has no operators in torch "
                "alone: export a decoder that is quantized with a scheme of integers, or "
                "w4a16."
            )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - set(_KINDS))
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has layers of {', '.join(unknown)}, whose state is "
            "more than keys and values: its decoder cannot be exported."
        )


def observe(model: PreTrainedModel, sample: Mapping[str, Any]) -> ObservedCall:
    """Run the model on the sample and see how its decoder is called."""
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        seen.update(dict(zip(names, args)) | kwargs)

    decoder = model.get_decoder()
    cache = DynamicCache(config=model.config.get_text_config())
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        output = model(**sample, use_cache=True, **{cache_keyword(model): cache})
    finally:
        handle.remove()
    embeds = seen.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(seen["input_ids"])
    batch, count = embeds.shape[:2]
    if count < 2:
        raise ValueError("the sample has one token: give one with two or more.")
    padded = sample.get("attention_mask")
    if isinstance(padded, torch.Tensor) and not bool(padded.all()):
        raise ValueError("the sample has padding: give rows of one length.")
    others = sorted(
        name
        for name, value in seen.items()
        if isinstance(value, (torch.Tensor, list, tuple)) and name not in _TAKEN
    )
    if others:
        raise ValueError(
            f"the decoder of {type(model).__name__} is called with {', '.join(others)} "
            "beside embeddings and positions: it cannot be exported."
        )
    if _looks_ahead(seen.get("attention_mask")):
        raise ValueError(
            f"the decoder of {type(model).__name__} looks ahead, within an image for "
            "instance: it cannot be exported, as its programs look back only."
        )
    return ObservedCall(
        embeds,
        _modality_ids(model, sample, embeds),
        _positions(model, seen.get("position_ids"), batch, count, embeds.device),
        output.logits[:, -1:],
        [layer.keys for layer in cache.layers],
        [layer.values for layer in cache.layers],
    )


def _looks_ahead(mask: Any) -> bool:
    """Whether a mask made outside of the decoder, if it was, is more than causal."""
    if isinstance(mask, Mapping):
        return any(map(_looks_ahead, mask.values()))
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return False
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return bool(allowed[..., : mask.shape[2]].triu(1).any())


def _positions(
    model: PreTrainedModel,
    seen: Optional[torch.Tensor],
    batch: int,
    count: int,
    device: torch.device,
) -> torch.Tensor:
    """(3, B, T) where the rotary embedding has three sections, else (B, T)."""
    if seen is None:
        seen = torch.arange(count, device=device).expand(batch, count)
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    if seen.dim() == 2 and "mrope_section" in parameters:
        seen = seen.expand(3, *seen.shape)
    if seen.dim() == 3 and seen.shape[0] == 4:
        # Positions in a packed row come first, and serve its mask alone.
        seen = seen[1:]
    return seen.expand(*seen.shape[:-2], batch, count).contiguous()


def _modality_ids(
    model: PreTrainedModel, sample: Mapping[str, Any], embeds: torch.Tensor
) -> torch.Tensor:
    router = router_of(model)
    ids = None
    if router is not None and router.token_ids is not None and "input_ids" in sample:
        ids = router.ids_of(sample["input_ids"])
    if ids is None:
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    return ids


def _cache(
    call: ObservedCall, slots: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    def empty(t: torch.Tensor) -> torch.Tensor:
        return t.new_zeros(t.shape[0], t.shape[1], slots, t.shape[3])

    return [empty(t) for t in call.keys], [empty(t) for t in call.values]


def call_as_exported(model: PreTrainedModel, call: ObservedCall) -> torch.Tensor:
    """Logits (B, 1, V) of the sample by what will be exported, eagerly."""
    count = call.inputs_embeds.shape[1]
    position = torch.arange(count, device=call.inputs_embeds.device)
    return Prefill(model)(
        call.inputs_embeds,
        call.modality_ids,
        call.position_ids,
        position,
        *_cache(call, count + 3),
    )


def _check_result(model: PreTrainedModel, call: ObservedCall) -> None:
    """Raise unless the decoder, called as exported, gives the model's own logits."""
    found = call_as_exported(model, call)
    wanted = call.logits.double()
    off = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not off <= _TOLERANCE:
        raise ValueError(
            f"the decoder of {type(model).__name__}, called with embeddings, positions "
            f"and a causal mask, differs from the model itself (by {off:.0%} of the "
            "logits' norm): it cannot be exported."
        )


def _programs(model: PreTrainedModel, call: ObservedCall) -> dict[str, ExportedProgram]:
    batch, count = call.inputs_embeds.shape[:2]
    device = call.inputs_embeds.device
    tokens, slots = Dim("tokens", min=2), Dim("slots", min=2)
    # A number of slots of its own, not to be taken for another size.
    keys, values = _cache(call, 2 * count + 3)
    caches = [{2: slots} for _ in keys], [{2: slots} for _ in values]
    last = call.position_ids.dim() - 1
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    return {
        "embed": export(
            Embed(model),
            (token.expand(batch, count).contiguous(),),
            dynamic_shapes=({1: Dim("tokens", min=1)},),
            strict=False,
        ),
        "prefill": export(
            Prefill(model),
            (
                call.inputs_embeds,
                call.modality_ids,
                call.position_ids,
                torch.arange(count, device=device),
                keys,
                values,
            ),
            dynamic_shapes=(
                {1: tokens},
                {1: tokens},
                {last: tokens},
                {0: tokens},
                *caches,
            ),
            strict=False,
        ),
        "decode": export(
            Decode(model),
            (
                token,
                call.position_ids[..., -1:].contiguous(),
                torch.full((1,), count, device=device),
                keys,
                values,
            ),
            dynamic_shapes=({}, {}, {}, *caches),
            strict=False,
        ),
    }
