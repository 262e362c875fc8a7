# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model by its folder, or its name on the Hugging Face hub: config, class and files."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence, Union

__all__ = [
    "OTHER_WEIGHTS",
    "auto_class",
    "class_of",
    "folder_of",
    "load_config",
    "meta_model",
    "reachable",
    "read_config",
    "source_of",
    "weight_files",
    "write_index",
]

_CONFIG = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Where transformers looks for weights: what is there first is what it loads.
_WEIGHTS = (
    (_SINGLE, _INDEX),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# The first of these classes of transformers that knows a config is taken. A model that takes images or sounds is
# in one of the first two, its bare language model may be in the third as well.
_AUTO_CLASSES = (
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
)

#: Weights by other libraries, or in formats that transformers had before, and what
#: training leaves: by the whole name, in any folder.
OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "model*.bin",
    "diffusion_pytorch_model*",
    "consolidated*",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx[._]data*",
    "*.h5",
    "*.msgpack",
    "*.tflite",
    "*.mlmodel",
    "*.ot",
    "*.pte",
    "*.ckpt",
    "*.npz",
    "openvino_*",
    "model*.pt",
    "model*.pth",
    "pytorch_model*.pt",
    "training_args.bin",
    "optimizer*.pt",
    "optimizer*.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
)

# Files of a repository that are not downloaded: neither loaded nor copied along.
_NOT_NEEDED: Sequence[str] = [
    *(prefix + pattern for pattern in OTHER_WEIGHTS for prefix in ("", "*/")),
    "original/*",
]


def source_of(name: str) -> str:
    """What ``from_pretrained`` takes for a model's name.

    Raises:
        FileNotFoundError: it is written as a folder, and there is none.
        NotADirectoryError: it is a file.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise _no_config(path)
        return name
    if path.is_file():
        raise NotADirectoryError(f"{name!r} is a file: give a model's folder.")
    if not _may_be_on_hub(name) or "/" not in name:
        raise _no_folder(name)
    return name


def folder_of(model: Union[str, os.PathLike]) -> Path:
    """The folder of a model; one on the hub is downloaded, without what is not needed.

    Raises:
        FileNotFoundError: there is no such folder, and none that the hub gives.
    """
    name, path = os.fspath(model), Path(model)
    if path.is_dir():
        return path
    if not _may_be_on_hub(name):
        raise _no_folder(name)
    from huggingface_hub import snapshot_download

    with reachable(name):
        return Path(snapshot_download(name, ignore_patterns=list(_NOT_NEEDED)))


def _may_be_on_hub(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _no_config(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{str(folder)!r} has no {_CONFIG}: give the folder of a transformers model."
    )


def _no_folder(name: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"there is no folder {name!r}; a model on the hub is named 'owner/name'."
    )


@contextlib.contextmanager
def reachable(name: str) -> Iterator[None]:
    """One sentence where something of a model on the hub cannot be had."""
    try:
        yield
    except OSError as error:
        if Path(name).is_dir() or error.strerror is not None:
            raise
        raise FileNotFoundError(
            f"{name!r} is no folder here, and cannot be had from the Hugging Face hub: "
            "there is no network, no such model, or it asks for a login; give the "
            "folder of a model that is downloaded."
        ) from error


def load_config(model: Union[str, os.PathLike], trust_remote_code: bool = False) -> Any:
    """The config of a model, as transformers makes it.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or of a model that transformers does not know.
    """
    from transformers import AutoConfig

    name = os.fspath(model)
    with reachable(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says, as it stands there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON file, or holds something else than names and values.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise _no_config(folder)
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON file: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, no config.")
    return found


def auto_class(config: Any) -> Any:
    """The class of transformers that loads models with this config.

    Raises:
        ValueError: none does.
    """
    import transformers

    mapped = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        found = getattr(transformers, name, None)
        if found is not None and (
            type(config) in found._model_mapping.keys() or name in mapped
        ):
            return found
    raise ValueError(
        f"{config.model_type!r} is no language model that transformers loads by itself: "
        f"its config is in none of {', '.join(_AUTO_CLASSES)}."
    )


def class_of(config: Any, advice: str) -> Any:
    """The class of transformers that a config names, the one it was saved from.

    Args:
        config: of a model.
        advice: what to do where there is none, for the error's sentence.

    Raises:
        ValueError: transformers has no such class.
    """
    import transformers

    names = getattr(config, "architectures", None) or ()
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"the model's config.json names {' and '.join(names) or 'no class'}, which "
        f"transformers does not have: {advice}."
    )


def meta_model(kind: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """The model that a class of :func:`auto_class` makes of a config, without weights.

    Raises:
        Exception: whatever the model's own code raises.
    """
    import torch

    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust_remote_code)


def weight_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The files that ``from_pretrained`` takes a model's weights from.

    Args:
        folder: of the model.
        pickled: whether files of torch will do where there is no safetensors file.

    Raises:
        FileNotFoundError: there are none.
        ValueError: their index is damaged, or leads out of the folder.
    """
    for single, index in _WEIGHTS if pickled else _WEIGHTS[:1]:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in _indexed(folder / index)]
    raise FileNotFoundError(
        f"{str(folder)!r} has neither {_SINGLE} nor {_INDEX}: download it, or save the "
        "model there with save_pretrained."
    )


def _indexed(index: Path) -> list[str]:
    """Names of files that an index of weights names."""
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        for name in names:
            path = Path(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} is no file of this folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(index)!r} is damaged ({error}): download or save it again."
        ) from error
    return sorted(names)


def write_index(folder: Path, weight_map: Mapping[str, str], size: int) -> None:
    """Write the index of a folder's safetensors files.

    Args:
        folder: of the model. What its index says beside the files stays.
        weight_map: name of each tensor to that of its file.
        size: bytes of all of them.
    """
    path = folder / _INDEX
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    content = {
        "metadata": {**before.get("metadata", {}), "total_size": size},
        "weight_map": dict(weight_map),
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
