# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Writing a quantized model as a whole, or not at all."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from torchao_masquant.integrations.attachment import attach_to_transformers
from torchao_masquant.integrations.checkpoint_format import quantized_modules
from torchao_masquant.integrations.exchange import exchange
from torchao_masquant.integrations.model_card import (
    CARD,
    is_model_card,
    write_model_card,
)
from torchao_masquant.outputs import check_folder

__all__ = ["save_quantized"]

# Of other formats that lie in folders of models, too.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5")


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
        beside: folder of the original model, whose other files (its processor and
            tokenizer, no weights, no folders, no README.md) are copied along.
        **options: of ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        TypeError: it is no transformers model.
        ValueError: it is not quantized, or another method has quantized it too; a model
            that is not ours lies in ``folder``.
        OSError: ``folder`` cannot be written.
    """
    _check_model(model)
    # Where a link leads: the link itself stays.
    target = Path(os.path.realpath(folder))
    sources = () if beside is None else (beside,)
    check_folder(folder, beside_others=True, sources=sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OSError(
            f"cannot save to {os.fspath(folder)!r}: {error.strerror or error}; give a "
            "folder that can be written."
        ) from error
    try:
        # save_pretrained(push_to_hub=True) names the repository after it.
        new = temporary / "new" / target.name
        model.save_pretrained(new, **options)  # type: ignore[operator]
        card = target / CARD
        if not card.exists() or is_model_card(card):
            write_model_card(new, None if beside is None else Path(beside), target.name)
        if beside is not None:
            _copy_files(Path(beside), new)
        if target.exists():
            _keep_others(target, new)
            exchange(new, target, temporary / "old")
        else:
            os.rename(new, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    method = model.hf_quantizer.quantization_config.quant_method  # type: ignore
    if method != "masquant":
        raise ValueError(
            f"{type(model).__name__} is quantized with {method}, too, which knows "
            "nothing of MASQuant's weights: save the state_dict() with torch.save."
        )


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


def _copy_files(original: Path, new: Path) -> None:
    """Put the original model's files that were not written anew beside what was."""
    for path in sorted(original.iterdir()):
        if path.name.startswith(".") or not path.is_file() or _holds_weights(path):
            continue
        # It tells of another model.
        if path.name == CARD:
            continue
        if not (new / path.name).exists():
            shutil.copy2(path, new / path.name)


def _holds_weights(path: Path) -> bool:
    return _is_weight(path.name) or path.suffix in _WEIGHT_SUFFIXES


def _is_weight(name: str) -> bool:
    return name.startswith(("model", "pytorch_model")) and name.endswith(
        (".safetensors", ".bin", ".index.json")
    )
