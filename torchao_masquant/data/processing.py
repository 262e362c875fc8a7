# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From conversations to a model's keyword inputs, by its own processor."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch

from torchao_masquant.data.images import read_image
from torchao_masquant.data.lazy_samples import LazySamples
from torchao_masquant.data.parts import (
    AUDIO,
    IMAGE,
    MEDIA,
    TEXT,
    VIDEO,
    Conversation,
    Message,
    Part,
)
from torchao_masquant.data.rewording import equal_tokens, reworded
from torchao_masquant.data.sounds import read_audio
from torchao_masquant.data.videos import read_video
from torchao_masquant.modality import modality_token_ids

__all__ = ["ProcessedConversations", "media_of"]

_MODALITIES: Mapping[str, str] = {IMAGE: "vision", AUDIO: "audio"}

_NOT_SCORED = -100


def media_of(config: Any) -> list[str]:
    """Kinds of media that a model takes: "image", "audio".

    Args:
        config: a transformers config.
    """
    known = modality_token_ids(config)
    return [kind for kind, modality in _MODALITIES.items() if modality in known]


def _not_taken(kind: str, where: str, media: Sequence[str], config: Any) -> ValueError:
    """The error for a medium of a kind that a model does not take."""
    article, advice = "an", ""
    if kind == VIDEO:
        article = "a"
        advice = " or give some of its frames as images" if IMAGE in media else ""
    return ValueError(
        f"{where} has {article} {kind}, which this model does not take (its "
        f"{type(config).__name__} and its processor declare "
        f"{' and '.join(media) or 'text'} only): leave it out{advice}."
    )


class ProcessedConversations(LazySamples):
    """A model's keyword inputs, made when they are asked for: none is kept.

    Args:
        conversations: one sample each.
        processor: of the model, from ``AutoProcessor``; a tokenizer for a model that
            reads text only.
        config: of the model.
        labelled: add ``labels``, as ``evaluate`` takes them: the tokens of the
            assistant's turns, or all of the text where there is none.

    Raises:
        ValueError: a conversation has a medium that the model does not take, or the
            model's own token of one in its text, or no turn that is to be scored; or the
            processor has no chat template.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        config: Any,
        *,
        labelled: bool = False,
    ):
        self.conversations = list(conversations)
        self.processor = processor
        self.labelled = labelled
        token_ids = modality_token_ids(config)
        self._placeholders = sorted({t for ids in token_ids.values() for t in ids})
        tokenizer = getattr(processor, "tokenizer", processor)
        self._special = set(tokenizer.all_special_ids) - set(self._placeholders)
        # A tokenizer knows no parts: its templates want the content as one text.
        self._is_tokenizer = not hasattr(processor, "tokenizer")
        self._check(config)

    def _check(self, config: Any) -> None:
        media = media_of(config)
        if getattr(self.processor, "video_processor", None) is not None:
            media.append(VIDEO)
        template = getattr(self.processor, "chat_template", None)
        for conversation in self.conversations:
            others = sorted(conversation.kinds - {TEXT, *media})
            if others:
                raise _not_taken(others[0], conversation.where, media, config)
            if conversation.messages and template is None:
                raise ValueError(
                    f"{conversation.where} is a conversation, but the model's processor "
                    "has no chat template: add a chat_template.jinja to the model's "
                    'folder, or give plain text, {"text": "..."}.'
                )
            self._check_tokens(conversation)
            if self.labelled and conversation.turns and not conversation.scored_turns:
                raise ValueError(
                    f"{conversation.where} has no turn that is to be scored: each of the "
                    "assistant's has a weight of 0; leave it out."
                )

    def _check_tokens(self, conversation: Conversation) -> None:
        """No token that stands for a medium is a part of a text."""
        parts = [part for m in conversation.messages for part in m.parts]
        texts = [part.value for part in parts if part.kind == TEXT]
        for kind in MEDIA:
            token = getattr(self.processor, f"{kind}_token", None)
            for text in (conversation.text or "", *texts):
                if isinstance(token, str) and token and token in text:
                    raise ValueError(
                        f"{conversation.where} has {token!r} in its text, which the model "
                        f"takes for the place of one {kind}: give the {kind} as a part of a "
                        f"message, or in a column and write <{kind}> where it stands."
                    )

    def __len__(self) -> int:
        return len(self.conversations)

    def _sample(self, index: int) -> dict[str, Any]:
        conversation = self.conversations[index]
        # Each medium is read once, however often its message is put into a template.
        messages = [
            self._message(message, conversation.where)
            for message in conversation.messages
        ]
        inputs = self._inputs(conversation, messages)
        if self.labelled:
            inputs["labels"] = self._labels(conversation, messages, inputs)
        return inputs

    def _inputs(
        self, conversation: Conversation, messages: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        where = conversation.where
        if conversation.text is not None:
            return self._called(partial(self.processor, text=conversation.text), where)
        return self._from_messages(messages, where, not conversation.is_answered)

    def _from_messages(
        self, messages: Sequence[dict[str, Any]], where: str, asks: bool
    ) -> dict[str, Any]:
        call = partial(
            self.processor.apply_chat_template,
            # transformers writes into the messages.
            [dict(message) for message in messages],
            add_generation_prompt=asks,
            tokenize=True,
            return_dict=True,
        )
        metadata = [
            part.get("metadata")
            for message in messages
            for part in message["content"]
            if not isinstance(part, str) and part["type"] == VIDEO
        ]
        if metadata:
            # The frames are chosen; a processor would choose among them once more.
            options: dict[str, Any] = {"do_sample_frames": False}
            if None not in metadata:
                options["video_metadata"] = [metadata]
            call = partial(call, processor_kwargs=options)
        return self._called(call, where)

    def _called(self, call: Callable[..., Any], where: str) -> dict[str, Any]:
        try:
            return dict(call(return_tensors="pt"))
        # A processor's own errors, and those of a template, are of any kind.
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
            raise ValueError(
                f"{where}: the model's processor does not take it ({reason})."
            ) from error

    def _message(self, message: Message, where: str) -> dict[str, Any]:
        if self._is_tokenizer:
            content: Any = "".join(part.value for part in message.parts)
        else:
            content = [self._part(part, where) for part in message.parts]
        return {"role": message.role, "content": content}

    def _part(self, part: Part, where: str) -> dict[str, Any]:
        if part.kind == IMAGE:
            return {"type": IMAGE, "image": read_image(part.value, where)}
        if part.kind == AUDIO:
            sound = read_audio(part.value, self._sampling_rate(), where)
            return {"type": AUDIO, "audio": sound}
        if part.kind == VIDEO:
            frames, metadata = self._video(part.value, where)
            return {"type": VIDEO, "video": frames, "metadata": metadata}
        return {"type": TEXT, "text": part.value}

    def _video(self, value: Any, where: str) -> tuple[Any, Any]:
        """Frames, and when they were where that is known."""
        if isinstance(value, tuple):
            return [read_image(frame, where) for frame in value], None
        if isinstance(value, (Path, bytes)):
            return read_video(value, where)
        return np.asarray(value), None

    def _sampling_rate(self) -> int:
        for name in ("feature_extractor", "audio_processor"):
            rate = getattr(getattr(self.processor, name, None), "sampling_rate", None)
            if rate is not None:
                return int(rate)
        return 16_000

    def _labels(
        self,
        conversation: Conversation,
        messages: Sequence[dict[str, Any]],
        inputs: Mapping[str, Any],
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for turn in conversation.scored_turns:
            start, end = self._span(conversation, messages, turn, ids[0])
            scored[:, start:end] = True
        if not conversation.turns:
            scored[:] = True
        for token in self._placeholders:
            scored[ids == token] = False
        return ids.masked_fill(~scored, _NOT_SCORED)

    def _span(
        self,
        conversation: Conversation,
        messages: Sequence[dict[str, Any]],
        turn: int,
        ids: torch.Tensor,
    ) -> tuple[int, int]:
        """First token of an assistant's turn, and the first one after it.

        Few templates mark the turns, and many write one differently where others follow.
        So the same conversation with other words in this turn tells where it stands.
        """
        others = [*messages[:turn], reworded(messages[turn]), *messages[turn + 1 :]]
        other = self._inputs(conversation, others)["input_ids"][0]
        start = equal_tokens(ids, other)
        if start == len(ids) == len(other):
            raise ValueError(
                f"{conversation.where}: an answer cannot be scored, since the chat "
                "template leaves it out."
            )
        if turn == len(messages) - 1:
            return start, len(ids)
        end = len(ids) - equal_tokens(ids[start:].flip(0), other[start:].flip(0))
        # The token that ends a turn is the assistant's, too.
        return start, end + int(int(ids[end]) in self._special)
