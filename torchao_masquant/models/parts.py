# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The part of a model that reads tokens, its decoder, and the heads.

``get_decoder()`` gives the decoder of most models. It does not of composites
(a whole Qwen2.5-Omni speaks and draws, too), nor of much remote code. There the decoder is
found by what every language model has: a table of token embeddings, and beside it a list
of blocks.
"""

from dataclasses import dataclass
from typing import Any, Iterator, Optional

from torch import nn

__all__ = [
    "Decoder",
    "decoder_path",
    "find_decoder",
    "head_of",
    "heads_of",
    "token_reader",
]


@dataclass(frozen=True)
class Decoder:
    """Where a model turns token embeddings into hidden states.

    Attributes:
        module: whose calls it is.
        stack: its blocks, where ``module`` may hold a tower too; None where all of
            ``module`` is the decoder.
    """

    module: nn.Module
    stack: Optional[nn.ModuleList] = None

    def usual(self) -> set[int]:
        """Ids of the modules whose linears are quantized by default."""
        if self.stack is None:
            return self.possible()
        return {id(m) for m in self.stack.modules()}

    def possible(self) -> set[int]:
        """Ids of the modules whose linears can be quantized: all but towers."""
        others = {id(part) for part in _other_models(self.module)}

        def ids(module: nn.Module) -> set[int]:
            inside = {id(m) for m in module.modules()}
            if not inside & others:
                return inside
            # What is between a tower and the decoder is the tower's.
            if id(module) in others or (self.stack and id(self.stack) not in inside):
                return set()
            return {id(module)}.union(*map(ids, module.children()))

        return ids(self.module)


def token_reader(model: nn.Module) -> nn.Module:
    """The part of a model that is called with ``input_ids``, its own forward or a part's.

    A composite such as Qwen2.5-Omni has no ``forward``: its ``generate`` hands over to
    its thinker, which is the part that its config takes for the text model.

    Raises:
        ValueError: there is no forward, and no telling which part reads.
    """
    config = _config_of(model)
    if type(model).forward is not nn.Module.forward or not _is_of_model(config):
        return model
    text = config.get_text_config()
    parts = {
        name: part
        for name, part in model.named_children()
        if _is_of_model(own := _config_of(part)) and own.get_text_config() is text
    }
    if len(parts) != 1:
        raise ValueError(
            f"{type(model).__name__} has no forward, and its config does not tell which "
            "of its parts reads the tokens: take that part for the model, such as "
            f"model.{next(iter(parts or dict(model.named_children())), 'language_model')}."
        )
    return next(iter(parts.values()))


def heads_of(model: nn.Module) -> list[nn.Module]:
    """What makes logits of hidden states, in a model and in its parts."""
    return [
        head
        for module in model.modules()
        if (head := _given(module, "get_output_embeddings")) is not None
    ]


def head_of(model: nn.Module) -> Optional[nn.Module]:
    """What makes logits of the hidden states of the part that reads tokens."""
    return _given(token_reader(model), "get_output_embeddings")


def find_decoder(model: nn.Module) -> Optional[Decoder]:
    """The decoder of a model.

    Args:
        model: a transformers model, one of remote code, or any module: a module without
            a config is its own decoder, unless the only language model is in it.

    Returns:
        None where it cannot be told.
    """
    model = token_reader(model)
    named = _given(model, "get_decoder")
    if not _is_of_model(_config_of(model)):
        if named is not None:
            return Decoder(named)
        models = [
            m for m in _outermost_models(model) if _token_embedding(m) is not None
        ]
        if not models:
            return Decoder(model)
        return find_decoder(models[0]) if len(models) == 1 else None
    # Remote code inherits get_decoder(), which gives what may hold its towers, too.
    is_native = type(model).__module__.startswith("transformers.")
    if named is not None and is_native and not any(_other_models(named)):
        return Decoder(named)
    found = _found_by_embedding(named or model)
    if found is None and named is not None and named is not model:
        return Decoder(named)
    return found


def decoder_path(model: nn.Module) -> str:
    """Name of the decoder in a model, for ``get_submodule``; empty where it is the model
    itself, or cannot be told."""
    found = find_decoder(model)
    if found is None:
        return ""
    return next((n for n, m in model.named_modules() if m is found.module), "")


def _found_by_embedding(model: nn.Module) -> Optional[Decoder]:
    """The module around the token embeddings that holds a list of blocks."""
    embedding = _token_embedding(model) or _largest_embedding(model)
    if embedding is None:
        return None
    around = [m for m in model.modules() if any(c is embedding for c in m.modules())]
    for module in reversed(around):
        stack = _stack_in(module)
        if stack is not None:
            # A container is not called.
            called = [m for m in around if type(m).forward is not nn.Module.forward]
            outer = [m for m in called if any(c is module for c in m.modules())]
            return Decoder(outer[-1] if outer else module, stack)
    return None


def _stack_in(module: nn.Module) -> Optional[nn.ModuleList]:
    """The list of blocks that is nearest to a module; the largest of those."""
    towers = {id(m) for part in _other_models(module) for m in part.modules()}
    lists = [
        (name.count("."), -sum(p.numel() for p in child.parameters()), name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList)
        and id(child) not in towers
        and any(isinstance(m, nn.Linear) for m in child.modules())
    ]
    return min(lists, key=lambda entry: entry[:3])[3] if lists else None


def _other_models(module: nn.Module) -> Iterator[nn.Module]:
    """Parts of a module that are models of another kind, as their configs say."""
    own = type(_config_of(module))

    def under(parent: nn.Module) -> Iterator[nn.Module]:
        if own is type(None):
            return
        for child in parent.children():
            config = _config_of(child)
            if _is_of_model(config) and type(config) is not own:
                yield child
            else:
                yield from under(child)

    return under(module)


def _outermost_models(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_of_model(_config_of(child)):
            yield child
        else:
            yield from _outermost_models(child)


def _token_embedding(model: nn.Module) -> Optional[nn.Module]:
    embedding = _given(model, "get_input_embeddings")
    # Towers give their convolution.
    return embedding if isinstance(embedding, nn.Embedding) else None


def _largest_embedding(model: nn.Module) -> Optional[nn.Module]:
    """The embedding of most tokens, where no other has as many."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    most = max((m.num_embeddings for m in tables), default=0)
    found = [m for m in tables if m.num_embeddings == most]
    return found[0] if len(found) == 1 else None


def _config_of(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _is_of_model(config: Any) -> bool:
    return hasattr(config, "model_type") and hasattr(config, "get_text_config")


def _given(module: nn.Module, method: str) -> Optional[nn.Module]:
    """What a method of transformers' models gives, None where there is none."""
    function = getattr(module, method, None)
    try:
        found = function() if callable(function) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
