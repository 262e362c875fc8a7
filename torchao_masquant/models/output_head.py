# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The linear that makes logits of hidden states, which may share its weight with others."""

from typing import Any, Optional

from torch import nn

from torchao_masquant.models.parts import head_of

__all__ = ["head_name", "output_head", "stands_alone"]


def head_name(model: nn.Module) -> Optional[str]:
    """Name in the model of what makes logits of the decoder's output; None: there is none."""
    head = head_of(model)
    return next((n for n, m in model.named_modules() if m is head and n), None)


def output_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name in the model, and the linear.

    Raises:
        ValueError: there is none, or it is something else than a linear.
    """
    name = head_name(model)
    if name is None:
        raise ValueError(
            f"{type(model).__name__} has no output head that head_bits=8 could round: "
            "leave head_bits out, or take the class with a head."
        )
    head = model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{name} is a {type(head).__name__}, and head_bits=8 rounds linears: leave "
            "head_bits out."
        )
    return name, head


def stands_alone(model: nn.Module, name: str) -> None:
    """Have a head count as one whose weight is its own, where it was that of embeddings too.

    transformers reads that from the config when it saves and when it loads, and keeps
    lists of names. What it reads there goes for a bias that the head shares, too: that
    becomes a copy. Without effect on a model of another library.

    Args:
        model: of which ``name`` is the head, which has its own weight already.
        name: in the model.
    """
    for prefix, module in model.named_modules():
        own = f"{prefix}." if prefix else ""
        if not f"{name}.".startswith(own):
            continue
        known = module.__dict__.get("all_tied_weights_keys")
        if isinstance(known, dict):
            inside = name[len(own) :]
            known.pop(f"{inside}.weight", None)
            if known.pop(f"{inside}.bias", None) is not None:
                head: Any = model.get_submodule(name)
                head.bias = nn.Parameter(head.bias.data.clone(), requires_grad=False)
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        text: Any = getattr(config, "get_text_config", lambda: None)()
        if getattr(text, "tie_word_embeddings", False):
            text.tie_word_embeddings = False
