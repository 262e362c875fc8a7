# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which linears of a model are quantized."""

import fnmatch
import re
from typing import Optional, Sequence, Union

import torch
from torch import nn

from torchao_masquant.experts import warn_of_expert_weights
from torchao_masquant.families import ModelFamily, family_of

__all__ = ["Patterns", "decoder_of", "match_names", "select_linears"]

Patterns = Optional[Union[str, Sequence[str]]]


def _matching(names: Sequence[str], patterns: Patterns, option: str) -> set[str]:
    """Names that match a pattern; raises for a pattern that matches none."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if pattern.startswith("re:"):
            regex = re.compile(pattern[3:])
            hits = [n for n in names if regex.fullmatch(n)]
        else:
            hits = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
        if not hits:
            raise ValueError(
                f"{option} pattern {pattern!r} matches no linear of the model; its "
                f"linears are named like {names[0]!r}."
                if names
                else f"{option} pattern {pattern!r} matches nothing: the model has no "
                "linear."
            )
        matched.update(hits)
    return matched


def match_names(
    names: Sequence[str],
    include: Patterns = None,
    exclude: Patterns = None,
    default: Optional[Sequence[str]] = None,
) -> list[str]:
    """Narrow names down by patterns.

    Args:
        names: full names of linears.
        include: patterns of those to take; None for ``default``.
        exclude: patterns of those to leave out.
        default: what to take where nothing is included; None for all.

    Returns:
        The rest, in the same order.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    if include is not None:
        chosen = _matching(names, include, "include")
    else:
        chosen = set(names if default is None else default)
    chosen -= _matching(names, exclude, "exclude")
    if not chosen:
        raise ValueError(
            f"no linear is left to quantize: look at include ({include!r}) and exclude "
            f"({exclude!r})."
        )
    return [name for name in names if name in chosen]


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that turns token embeddings into hidden states."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _towers(decoder: nn.Module, family: ModelFamily) -> set[int]:
    """Ids of the modules in a decoder that make image and sound tokens."""
    return {
        id(module)
        for name, tower in decoder.named_modules()
        if name in family.towers
        for module in tower.modules()
    }


def select_linears(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> dict[str, nn.Linear]:
    """The linears to quantize: by default, all of the language model's decoder.

    Args:
        model: a transformers model, or any module. What ``model.get_decoder()`` gives
            is the default choice, without the towers in front of it and without
            ``lm_head``; a module that has no such method is taken whole. What
            :mod:`torchao_masquant.families` says of its kind is left out, too.
        include: patterns of full names, in place of the default choice.
        exclude: patterns of full names to leave out.

    Patterns are shell-style (``*.layers.0.*``), or regular expressions that match the
    whole name where they start with ``re:``, as in torchao's ``FqnToConfig``.

    Returns:
        Name in ``model`` to module, in the model's order.

    Raises:
        ValueError: a pattern matches nothing, nothing is left to quantize, or a linear
            is no plain one of the decoder.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    decoder = decoder_of(model)
    family = family_of(getattr(model, "config", None))
    towers = _towers(decoder, family)
    inside = {id(m) for m in decoder.modules() if id(m) not in towers}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    default = [
        n
        for n, m in linears.items()
        if id(m) in inside
        and m is not head
        and not any(fnmatch.fnmatchcase(n, p) for p in family.high_precision)
    ]
    names = match_names(list(linears), include, exclude, default)
    selected = {name: linears[name] for name in names}
    for name, linear in selected.items():
        if id(linear) not in inside or linear is head:
            raise ValueError(
                f"{name} is not part of the decoder, so what it is called with are not "
                "the call's tokens, whose modalities are known: leave it out."
            )
        # A subclass may compute something else than x W^T + b.
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(linear).__name__}, not a plain nn.Linear: it is "
                "quantized or observed already, or needs to be excluded."
            )
        if type(linear.weight.data) is not torch.Tensor:
            raise ValueError(
                f"{name} holds a {type(linear.weight.data).__name__}, not a plain "
                "tensor: it is quantized already, or needs to be excluded."
            )
    warn_of_expert_weights(decoder)
    return selected
