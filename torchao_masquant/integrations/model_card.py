# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The README.md of a quantized model: how it was made, and how it is loaded."""

import collections
import math
import re
from pathlib import Path
from typing import Any, Mapping, Optional

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.hub import read_config
from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
from torchao_masquant.options import scheme_of_numbers

__all__ = ["CARD", "add_scores", "is_model_card", "write_model_card"]

CARD = "README.md"

# How our own is known again.
_MARK = "<!-- made by torchao_masquant -->"
_SCORES, _SCORES_END = "<!-- scores -->", "<!-- end of scores -->"

# Metadata of the original that is as true of the quantized model.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def is_model_card(path: Path) -> bool:
    """Whether :func:`write_model_card` wrote a file."""
    return path.is_file() and _MARK in path.read_text("utf-8", errors="replace")


def write_model_card(folder: Path, original: Optional[Path], name: str) -> None:
    """Write the README.md of a quantized model that is saved.

    Args:
        folder: with its config.json.
        original: folder of the model before it was quantized; None where it is not known.
        name: that the folder will have.
    """
    config = read_config(folder)
    checkpoint = CheckpointFormat.from_json(config["quantization_config"])
    about = checkpoint.description
    base = _name_of(original) or about.get("model")
    text = _text(name, config, checkpoint, base)
    (folder / CARD).write_text(f"{_metadata(original, base)}\n{text}", "utf-8")


def add_scores(folder: Path, table: str) -> None:
    """Put scores into the README.md of a quantized model, in place of earlier ones.

    Args:
        folder: of the model.
        table: scores as text.

    Raises:
        ValueError: it has no README.md of ours.
    """
    card = folder / CARD
    if not is_model_card(card):
        raise ValueError(
            f"{str(folder)!r} has no README.md that tells how it was quantized: quantize "
            "the model again to have one."
        )
    text = card.read_text("utf-8")
    section = f"{_SCORES}\n## Scores\n\n```\n{table.strip()}\n```\n{_SCORES_END}\n"
    old = re.compile(f"{re.escape(_SCORES)}.*{re.escape(_SCORES_END)}\n?", re.S)
    if old.search(text):
        text = old.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    write_whole(card, text)


def _name_of(original: Optional[Path]) -> Optional[str]:
    """The name on the hub, as its cache has it; otherwise that of the folder."""
    if original is None:
        return None
    path = original.resolve()
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.name


def _metadata(original: Optional[Path], base: Optional[str]) -> str:
    """The YAML block that the hub reads."""
    from huggingface_hub import ModelCardData

    kept = {} if original is None else _metadata_of(original / CARD)
    about: dict[str, Any] = {k: kept[k] for k in _KEPT if k in kept}
    if base is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        about.update(base_model=base, base_model_relation="quantized")
    data = ModelCardData(
        library_name="transformers",
        tags=["torchao", "masquant", "quantized"],
        **about,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _metadata_of(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # Whatever its author wrote there, it is not what was asked for.
        return {}


def _text(
    name: str,
    config: Mapping[str, Any],
    checkpoint: CheckpointFormat,
    base: Optional[str],
) -> str:
    about = checkpoint.description
    layers = checkpoint.layers
    schemes = collections.Counter(
        scheme_of_numbers(x.weight_bits, x.act_bits, x.weight_format, x.act_format)
        for x in layers.values()
    )
    kinds = [entry for entry in checkpoint.options.values()]
    methods = sorted({str(entry.get("method")) for entry in kinds}) or ["unknown"]
    decoder_first = sorted(layers.values(), key=lambda of: of.is_of_tower)
    modalities = list(dict.fromkeys(m for x in decoder_first for m in x.modalities))
    found = dict.fromkeys(of.is_of_tower for of in decoder_first)
    parts = " and ".join(
        "the towers" if of_tower else "the decoder" for of_tower in found
    )
    size = sum(x.layout.nbytes for x in layers.values())
    dense = sum(2 * math.prod(x.shape) for x in layers.values())
    rows = {
        "Original": base or "unknown",
        "Scheme": ", ".join(schemes),
        "Method": ", ".join(methods),
        "Quantized": f"{len(layers)} linears of {parts}, {size / 2**20:.1f} MiB, "
        f"{100 * size / dense:.1f} % of what they take in bfloat16; all else in "
        f"{checkpoint.dtype}",
        "Modalities": ", ".join(modalities),
        **_options(kinds),
        **_calibration(about),
    }
    versions = about.get("versions")
    if isinstance(versions, dict):
        rows["Made with"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    of = f" of {base}" if base else ""
    return f"""{_MARK}
# {name}

This is a quantized version{of}, made with torchao_masquant (MASQuant, CVPR
2026, arXiv 2603.04800): integers take the place of the weights of its decoder. How it was
trained, what its license is and what it is not for, the original tells.

| | |
|---|---|
{table}

## Load it

```python
import torchao_masquant
{_loading(name, config)}
```
"""


def _options(kinds: list[dict[str, Any]]) -> dict[str, str]:
    """Options of the solution, where all linears have the same."""
    if not kinds or any(entry != kinds[0] for entry in kinds):
        return {}
    given = {
        key: value
        for key, value in kinds[0].items()
        if value is not None and key not in ("scheme", "method")
    }
    if kinds[0].get("method") == "rtn":
        given = {k: v for k, v in given.items() if k == "group_size"}
    if not given.get("epochs"):
        for key in ("epochs", "lr", "batch_size"):
            given.pop(key, None)
    text = ", ".join(f"{key} {value}" for key, value in given.items())
    return {"Options": text} if text else {}


def _calibration(about: Mapping[str, Any]) -> dict[str, str]:
    """What it was calibrated with, as far as it is known."""
    rows = {}
    if "data" in about:
        rows["Calibration data"] = str(about["data"])
    if "samples" in about:
        rows["Samples"] = str(about["samples"])
    tokens = about.get("tokens")
    if isinstance(tokens, dict):
        rows["Tokens"] = ", ".join(f"{n} {modality}" for modality, n in tokens.items())
    return rows


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _loading(name: str, config: Mapping[str, Any]) -> str:
    import transformers

    kind = next(iter(config.get("architectures") or ()), None)
    if kind is not None and hasattr(transformers, kind):
        more = ""
    else:
        known = [n for n in config.get("auto_map") or () if n.startswith("AutoModel")]
        kind, more = (known or ["AutoModel"])[-1], ", trust_remote_code=True"
    return (
        f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}"'
        f"{more})"
    )
