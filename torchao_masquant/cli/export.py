# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``export``."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from torchao_masquant import hub
from torchao_masquant.cli.ending import UsageError
from torchao_masquant.cli.models import read_paths
from torchao_masquant.options import STOCK
from torchao_masquant.outputs import check_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the export."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="folder of a quantized model"
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="to write; not there"
    )
    parser.add_argument(
        "--format",
        choices=("package", STOCK),
        default="package",
        help="package: the decoder, compiled, for a process with torch alone; "
        f"{STOCK}: a model for vLLM and others without this package, calibrated with "
        f"--target {STOCK} (default: %(default)s)",
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="SAFETENSORS",
        help="the tensors of one call, as the model's processor makes them, with every "
        "modality: safetensors.torch.save_file(dict(processor(...)), 'inputs.safetensors'); "
        "a model of text alone needs none",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "cpu", "triton", "aten"),
        default="auto",
        help="cpu: our C++ kernels, which go into the package; triton: those for GPUs; "
        "aten: operators of torch alone, slower; auto: ours where they run here "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON"
    )


def main(arguments: argparse.Namespace) -> int:
    """Export a decoder, or a model.

    Returns:
        Exit code.

    Raises:
        ValueError, TypeError, OSError: something is missing, damaged or cannot be
            exported.
    """
    hub.source_of(str(arguments.model))
    check_folder(
        arguments.folder,
        "package",
        sources=read_paths(arguments.model, arguments.inputs),
    )
    if arguments.format == STOCK:
        return _export_model(arguments)
    if arguments.inputs is not None and not arguments.inputs.is_file():
        raise FileNotFoundError(f"there is no file {str(arguments.inputs)!r}.")
    from torchao_masquant.deploy import export_decoder

    model = _load(arguments.model)
    folder = export_decoder(
        model,
        _sample(model, arguments.inputs),
        arguments.folder,
        kernels=arguments.kernels,
    )
    run = f"see Decoder in {folder / 'masquant_decoder.py'}"
    return _tell(arguments, folder, run)


def _export_model(arguments: argparse.Namespace) -> int:
    for name in ("inputs", "kernels"):
        if getattr(arguments, name) != arguments.default_of(name):
            raise UsageError(f"--{name} goes with --format package.")
    from torchao_masquant.deploy import export_compressed_tensors

    folder = export_compressed_tensors(arguments.model, arguments.folder)
    return _tell(arguments, folder, f"vllm serve {folder}")


def _tell(arguments: argparse.Namespace, folder: Path, run: str) -> int:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if arguments.json:
        print(json.dumps({"folder": str(folder), "bytes": sizes}, indent=2))
        return 0
    print(f"Wrote {folder} ({sum(sizes.values()) / 2**20:.1f} MiB).")
    print(f"Run it: {run}.")
    return 0


def _load(folder: Path) -> "nn.Module":
    kind = hub.class_of(
        hub.load_config(folder), "export it from Python with export_decoder"
    )
    return kind.from_pretrained(folder).eval()


def _sample(model: Any, path: Optional[Path]) -> "dict[str, torch.Tensor]":
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from torchao_masquant.routing import router_of

    if path is not None:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}.") from error
    router = router_of(model)
    if router is not None and len(router.modalities) > 1:
        raise ValueError(
            f"the model knows {', '.join(router.modalities)}: give --inputs, one call "
            "with all of them."
        )
    return {
        "input_ids": torch.arange(8)[None] % model.config.get_text_config().vocab_size
    }
