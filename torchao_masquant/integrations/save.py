# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Writing a quantized model as a whole, or not at all."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from torchao_masquant.atomic_files import replacing_folder
from torchao_masquant.conversion.quantized_modules import quantized_modules
from torchao_masquant.hub import read_config
from torchao_masquant.integrations.attachment import (
    attach_to_transformers,
    check_savable,
)
from torchao_masquant.integrations.model_card import (
    CARD,
    is_model_card,
    write_model_card,
)
from torchao_masquant.integrations.other_files import copy_other_files
from torchao_masquant.integrations.unloaded import (
    add_unloaded,
    is_of_same_model,
    tell_of_unloaded,
    unloaded_tensors,
)
from torchao_masquant.outputs import check_folder

__all__ = ["save_quantized"]

_LOGGER = logging.getLogger(__name__)


def save_quantized(
    model: nn.Module,
    folder: Union[str, os.PathLike],
    *,
    beside: Optional[Union[str, os.PathLike]] = None,
    **options: Any,
) -> None:
    """``model.save_pretrained(folder)``, whole or not at all.

    The model is written to a temporary folder beside ``folder``, which takes its name
    at the end; an error or an interruption before that leaves ``folder`` as it was. A
    process that is killed leaves the temporary folder, too: ``.NAME.`` and eight
    characters, to be deleted. What else lies in ``folder``, such as a processor, stays
    there; a README.md that tells how the model was made is written where there is none.

    Args:
        model: a quantized transformers model.
        folder: made where missing, together with its parents.
        beside: folder of the original model. Its other files (processor, tokenizer,
            templates, code) are copied along, and so are the tensors that the model's
            class does not load; what is not is named in a warning. None: nothing is
            taken along; where the model was loaded from a folder, tensors that are in
            there alone are named in a warning.
        **options: of ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        TypeError: it is no transformers model.
        ValueError: it is not quantized, another method of transformers than torchao's
            has quantized it too, or a weight cannot be stored; a model that is not ours
            lies in ``folder``.
        OSError: ``folder`` cannot be written.
    """
    _check_model(model)
    target = Path(os.path.realpath(folder))
    sources = () if beside is None else (beside,)
    check_folder(folder, beside_others=True, sources=sources)
    # save_pretrained(push_to_hub=True) names the repository after the new one's name.
    with replacing_folder(target) as new:
        model.save_pretrained(new, **options)  # type: ignore[operator]
        card = target / CARD
        if not card.exists() or is_model_card(card):
            write_model_card(new, None if beside is None else Path(beside), target.name)
        if beside is not None:
            _take_along(model, Path(beside), new)
        else:
            _tell_of_left(model)
        _write_speakers(model, new)
        if target.exists():
            _keep_others(target, new)


def _check_model(model: nn.Module) -> None:
    if not callable(getattr(model, "save_pretrained", None)):
        raise TypeError(
            "save_quantized takes a transformers model, got a "
            f"{type(model).__name__}: torch.save its state_dict()."
        )
    if not quantized_modules(model):
        raise ValueError(
            f"{type(model).__name__} has no quantized linear: quantize it with "
            "masquant_config(recipe) first, or call its save_pretrained."
        )
    attach_to_transformers(model)
    check_savable(model)


def _keep_others(old: Path, new: Path) -> None:
    """Put what the new save did not write, and is no weight, beside it."""
    for path in old.iterdir():
        kept = new / path.name
        if kept.exists() or _is_weight(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, kept, symlinks=True)
        else:
            shutil.copy2(path, kept, follow_symlinks=False)


def _take_along(model: nn.Module, original: Path, new: Path) -> None:
    """Put what the class does not know of the original beside what was written."""
    copy_other_files(original, new)
    tensors = unloaded_tensors(model, original)
    # A part of the original, a language model without its towers, does not need them.
    kept = is_of_same_model(model, original)
    tell_of_unloaded(list(tensors), model, kept)
    if kept:
        add_unloaded(new, tensors)


def _tell_of_left(model: nn.Module) -> None:
    """Say which tensors are in the folder of the original alone, where it is known."""
    original = Path(getattr(model, "name_or_path", "") or "")
    if not (original / "config.json").is_file():
        return
    if "quantization_config" in read_config(original):
        return
    if is_of_same_model(model, original) and (
        left := unloaded_tensors(model, original)
    ):
        _LOGGER.warning(
            "not saved: %d tensors of %s that %s does not load, %s the first; "
            "save_quantized(model, folder, beside=%r) takes them along.",
            len(left),
            original,
            type(model).__name__,
            next(iter(left)),
            str(original),
        )


def _write_speakers(model: nn.Module, new: Path) -> None:
    """Write the voices that Qwen2.5-Omni's class wants to load, and does not save."""
    speakers = getattr(model, "speaker_map", None)
    file = new / "spk_dict.pt"
    if isinstance(speakers, dict) and speakers and not file.exists():
        torch.save(speakers, file)


def _is_weight(name: str) -> bool:
    return name.startswith(("model", "pytorch_model")) and name.endswith(
        (".safetensors", ".bin", ".index.json")
    )
