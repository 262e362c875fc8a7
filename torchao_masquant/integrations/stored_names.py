# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which weights of a model the tensors in a checkpoint's files become."""

from typing import Any, Mapping, Sequence

__all__ = ["loaded_names", "model_names", "stored_to_model_names", "unchanged_names"]


def model_names(
    stored: str,
    renamings: Sequence[Any],
    converters: Sequence[Any],
    prefix: str,
    known: Mapping[str, Any],
) -> tuple[list[str], bool]:
    """transformers' way from a name in a file to names in the model.

    Args:
        stored: name in a file.
        renamings: transformers' ``WeightRenaming`` of the model.
        converters: its ``WeightConverter``.
        prefix: its ``base_model_prefix``.
        known: names in the model.

    Returns:
        Names in the model, and whether the tensor becomes one of them as it is.
    """
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
    if name not in known and stored in known:
        # As transformers does: it was not meant to be renamed.
        return [stored], True
    if pattern is None:
        return [name], True
    targets = next(c for c in converters if pattern in c.source_patterns)
    first, *_ = targets.target_patterns
    return [name.replace(first, t) for t in targets.target_patterns], False


def stored_to_model_names(model: Any, stored: Sequence[str]) -> dict[str, list[str]]:
    """The same for all tensors of a checkpoint; the model remembers how to go back.

    Args:
        model: a transformers model, which may be on the meta device.
        stored: names in its files.

    Returns:
        Name in a file to names in the model, of those that the model has.
    """
    conversions, targets = _targets(model, stored)
    # What saving undoes, see transformers' revert_weight_conversion.
    model._weight_conversions = [c for c in conversions if c.was_used()]
    known = model.state_dict()
    found = {name: [t for t in to if t in known] for name, (to, _) in targets.items()}
    return {name: to for name, to in found.items() if to}


def loaded_names(model: Any, stored: Sequence[str]) -> set[str]:
    """Those of the names in a checkpoint's files that become weights of a model."""
    known, (_, targets) = model.state_dict(), _targets(model, stored)
    return {name for name, (to, _) in targets.items() if any(t in known for t in to)}


def unchanged_names(model: Any, stored: Sequence[str]) -> dict[str, str]:
    """Name in the model to that in a file, of tensors that become one as they are."""
    _, targets = _targets(model, stored)
    return {to[0]: name for name, (to, as_it_is) in targets.items() if as_it_is}


def _targets(
    model: Any, stored: Sequence[str]
) -> tuple[Sequence[Any], dict[str, tuple[list[str], bool]]]:
    """transformers' conversions, and what :func:`model_names` says of each name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    return conversions, {
        name: model_names(name, renamings, converters, prefix, known) for name in stored
    }
