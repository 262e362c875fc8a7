# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Models and processors, by a folder or by their name on the Hugging Face hub."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from torchao_masquant import hub
from torchao_masquant.cli.ending import UsageError
from torchao_masquant.cli.imports import failed_import

if TYPE_CHECKING:
    import torch

__all__ = [
    "DIGITS",
    "MODEL_HELP",
    "add_model_options",
    "load_config",
    "load_model",
    "load_processor",
    "model_folder",
    "read_paths",
    "resolve_device",
]

#: the small model that this package ships, and its variant without trained-in outliers
DIGITS = {"digits": "outliers", "digits-plain": "plain"}

# Seconds that nobody needs a bar for.
_BRIEF = 3.0

_DTYPES = ("auto", "bfloat16", "float16", "float32")

#: of the argument MODEL
MODEL_HELP = (
    "a model's folder, its name on the Hugging Face hub, or 'digits', the small model "
    "that comes with this package"
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of how a model is loaded."""
    group = parser.add_argument_group("loading the model")
    group.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="of its weights and activations; auto: as in the checkpoint "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="such as cpu, cuda, cuda:1; auto: the GPU where there is one "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the model's folder brings along: off by default, since "
        "it may do anything",
    )


def resolve_device(name: str) -> "torch.device":
    """A device that is there.

    Raises:
        UsageError: it is no name of a device.
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        # Not any accelerator: calibration needs float64, which some do not have.
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name!r} is no device: give such as cpu, cuda, cuda:1 or auto."
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"there is no device {name!r} here: {reason}") from error
    return device


def model_folder(name: str) -> str:
    """What ``from_pretrained`` takes for a model's name on the command line.

    Raises:
        FileNotFoundError: it is written as a folder, and there is none.
    """
    if name in DIGITS and not Path(name).is_dir():
        from torchao_masquant.testing.digits.checkpoints import checkpoint_path

        return str(checkpoint_path(DIGITS[name]))
    return hub.source_of(name)


def read_paths(*names: Any) -> list[Path]:
    """Files and folders that a command reads, of what it was given.

    Args:
        *names: of models and data, and None. What is none of a folder or a file, such as
            a name on the hub, is left out.
    """
    given = [Path(name) for name in names if name is not None]
    return [path for path in given if path.exists()]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """One sentence where a model on the hub cannot be had."""
    try:
        with hub.reachable(name):
            yield
    except ImportError as error:
        failed = failed_import(error)
        if failed is not None:
            from importlib.metadata import version

            library, reason = failed
            raise ImportError(
                f"{name!r} needs {library}, which is installed but cannot be imported "
                f"({reason}): install a release of it that fits torch "
                f"{version('torch')}, or uninstall it."
            ) from error
        # transformers' first sentence names what is missing; a page of advice follows.
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ImportError(
            f"{name!r} needs a library that is missing: {reason}."
        ) from error


def brief_transformers() -> None:
    """Progress of transformers is shown where it takes long, and as ours is."""
    from transformers.utils import logging

    from torchao_masquant.progress import LogLines

    def bar(factory: Any, args: Any, options: dict[str, Any]) -> Any:
        if not sys.stderr.isatty() and logging.is_progress_bar_enabled():
            return LogLines(*args, **options)
        return factory(*args, **{**options, "delay": _BRIEF, "leave": False})

    logging.set_tqdm_hook(bar)


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a model.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or of a model that transformers does not know.
    """
    folder = model_folder(name)
    with _explained(folder):
        return hub.load_config(folder, trust_remote_code)


def load_model(
    name: str,
    config: Any,
    arguments: argparse.Namespace,
    quantization_config: Any = None,
) -> Any:
    """A model in evaluation mode.

    Args:
        name: a folder, or a name on the hub.
        config: from :func:`load_config`.
        arguments: those of :func:`add_model_options`.
        quantization_config: quantizes while loading.

    Raises:
        ValueError: there is no such device.
    """
    device = resolve_device(arguments.device)
    brief_transformers()
    folder = model_folder(name)
    more = (
        {}
        if quantization_config is None
        else {"quantization_config": quantization_config}
    )
    with _explained(folder):
        model = hub.auto_class(config).from_pretrained(
            folder,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            **more,
        )
    return model.eval().to(device)


def load_processor(name: str, trust_remote_code: bool = False) -> Any:
    """The processor of a model; a tokenizer for one that reads text only.

    Raises:
        OSError: there is none.
        ImportError: it needs a library that is missing.
    """
    from transformers import AutoProcessor

    folder = model_folder(name)
    try:
        with _explained(folder):
            return AutoProcessor.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        if not Path(folder).is_dir():
            raise
        if name in DIGITS and folder != name:
            raise OSError(
                f"the model {name!r} has no processor: give it the data 'digits'."
            ) from error
        raise OSError(
            f"{name!r} has no processor that can be loaded ({_first_line(error)}): copy "
            "the processor and tokenizer files of the original model into it."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
