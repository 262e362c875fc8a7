# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The DATA argument of the commands: samples for a model."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from torchao_masquant.cli.calibration_options import whole
from torchao_masquant.cli.models import DIGITS, MODEL_HELP, load_processor

if TYPE_CHECKING:
    from torchao_masquant.data import Conversation

__all__ = [
    "add_model_and_data",
    "calibration_samples",
    "described",
    "evaluation_tasks",
]

_DIGITS = "digits"

# For the end of a command's help.
_DATA_FORMS = """\
DATA is one of
  a file         of rows: lines of JSON, a JSON array, CSV, parquet; paths start from the
                 file. A row has one of these forms, or that of LLaVA, ShareGPT, OpenAI,
                 Alpaca, LLaMA-Factory, VQA, captions, ... (docs/cli.md):
                   {"messages": [{"role": "user", "content": [
                      {"type": "image", "path": "cat.png"},
                      {"type": "audio", "path": "meow.wav"},
                      {"type": "text", "text": "Who is it?"}]}]}
                   {"image": "cat.png", "prompt": "Who is it?", "answer": "A cat."}
                   {"text": "Plain text, without a chat around it."}
                 What is not read of a row is named in a warning.
  a folder       images, sounds, videos and texts; files of one name make one sample
                 (cat.png, cat.wav, cat.txt), a text beside them is the prompt; or with
                 a metadata.jsonl or .csv that names its files
  a dataset      what save_to_disk() of the library datasets wrote, with such columns
  samples.pt     the model's own keyword inputs: a list of dicts that torch.save wrote, or
                 a folder of .pt files with one dict each; to calibrate with
  synthetic      made-up shapes, tones and words: to try the commands, not to judge by
  digits         digits seen, heard and read, for the model 'digits' alone
"""


def add_model_and_data(
    parser: argparse.ArgumentParser, examples: str, *, optional_data: bool = False
) -> None:
    """MODEL, DATA and how much of it, and what DATA may be.

    Args:
        parser: of a command.
        examples: for the end of its help.
        optional_data: whether the command does something without, too.
    """
    parser.epilog = f"{_DATA_FORMS}\n{examples}"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "data",
        nargs="?" if optional_data else None,
        metavar="DATA",
        help="a file of rows (JSON, CSV, parquet), a folder, a saved dataset, a .pt "
        "file, 'synthetic' or 'digits': see below",
    )
    parser.add_argument(
        "--max-samples",
        type=whole(1),
        metavar="N",
        help="of the data, the first N samples",
    )


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """What results tell of model and data: their names, without the folders around."""
    names = {"model": arguments.model, "data": arguments.data}
    return {
        key: Path(name).resolve().name if Path(name).exists() else name
        for key, name in names.items()
    }


def calibration_samples(
    arguments: argparse.Namespace, config: Any
) -> Sequence[Mapping[str, Any]]:
    """A model's keyword inputs, one dict a sample.

    Args:
        arguments: with ``model``, ``data``, ``max_samples`` and
            ``trust_remote_code``.
        config: of the model, which need not be loaded yet: bad data is told at once.

    Raises:
        ValueError: the data is empty, damaged, or not for this model.
        OSError: a file is not there.
    """
    from torchao_masquant.data import ProcessedConversations, SavedSamples

    if arguments.data == _DIGITS:
        _check_digits(arguments.model, config)
        from torchao_masquant.testing import digits

        return digits.calibration_samples()[: arguments.max_samples]
    if SavedSamples.can_read(Path(arguments.data)):
        saved = SavedSamples(arguments.data)
        return (
            saved if arguments.max_samples is None else saved[: arguments.max_samples]
        )
    conversations = _conversations(arguments, config)
    processor = load_processor(arguments.model, arguments.trust_remote_code)
    return ProcessedConversations(conversations, processor, config)


def evaluation_tasks(
    arguments: argparse.Namespace, config: Any
) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Name of each task to its samples, with labels; raises as the above."""
    from torchao_masquant.data import ProcessedConversations

    if arguments.data == _DIGITS:
        _check_digits(arguments.model, config)
        return _digits_tasks(arguments.max_samples)
    tasks: "dict[str, list[Conversation]]" = {}
    for conversation in _conversations(arguments, config):
        scored = "answers" if conversation.turns else "all text"
        tasks.setdefault(conversation.task or scored, []).append(conversation)
    processor = load_processor(arguments.model, arguments.trust_remote_code)
    return {
        name: ProcessedConversations(found, processor, config, labelled=True)
        for name, found in tasks.items()
    }


def _conversations(arguments: argparse.Namespace, config: Any) -> "list[Conversation]":
    from torchao_masquant.data import media_of, read_conversations

    return read_conversations(arguments.data, media_of(config), arguments.max_samples)


def _check_digits(model: str, config: Any) -> None:
    from torchao_masquant.data.reading import SYNTHETIC
    from torchao_masquant.testing.digits import VOCABULARY

    text = getattr(config, "text_config", None)
    if model in DIGITS or getattr(text, "vocab_size", None) == len(VOCABULARY):
        return
    raise ValueError(
        f"the data 'digits' is for the model 'digits' alone, not for {model!r}: give "
        f"your own, or {SYNTHETIC!r}."
    )


def _digits_tasks(
    count: Optional[int],
) -> dict[str, Sequence[Mapping[str, Any]]]:
    import torch

    from torchao_masquant.testing import digits

    tasks: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name, examples in digits.heldout().items():
        batch = examples.select(slice(count)).batch(append_answer=True).inputs
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -1] = batch["input_ids"][:, -1]
        tasks[name] = [{**batch, "labels": labels}]
    return tasks
