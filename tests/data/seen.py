# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a tiny model is shown of data, as text, and what of it is scored."""

import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from torchao_masquant.data import ProcessedConversations, read_conversations


@dataclass
class Seen:
    """
    Attributes:
        text: with "[image]" and "[audio]" for the tokens of one.
        scored: the runs of tokens with a label.
    """

    text: str
    scored: list[str]


@cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    return AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)


def seen(folder: Path, source: Any, **options: Any) -> list[Seen]:
    """Each sample of data as the model in a folder is shown it."""
    processor, config = _loaded(folder)
    conversations = read_conversations(source, **options)
    samples = ProcessedConversations(conversations, processor, config, labelled=True)
    tokenizer = getattr(processor, "tokenizer", processor)
    return [_seen(sample, tokenizer) for sample in samples]


def _seen(sample: dict[str, Any], tokenizer: Any) -> Seen:
    ids, labels = sample["input_ids"][0].tolist(), sample["labels"][0].tolist()
    text = tokenizer.decode(ids)
    text = re.sub(r"(<image>)+", "[image]", text)
    text = re.sub(r"<\|audio_bos\|>(<\|AUDIO\|>)+<\|audio_eos\|>", "[audio]", text)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels):
        if label == token:
            runs[-1].append(token)
        else:
            assert label == -100
            runs.append([])
    return Seen(text, [tokenizer.decode(run) for run in runs if run])


def lines(folder: Path, *rows: Any) -> Path:
    """A file of rows."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(caplog: Any) -> str:
    """What was warned of, and nothing else."""
    records = [r for r in caplog.records if r.name.startswith("torchao_masquant")]
    return "\n".join(r.getMessage() for r in records if r.levelno >= logging.WARNING)
