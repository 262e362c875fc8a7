# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From conversations to a model's keyword inputs, by its own processor."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Mapping

import torch

from torchao_masquant.data.conversations import (
    AUDIO,
    IMAGE,
    TEXT,
    Conversation,
    Message,
    Part,
)
from torchao_masquant.data.images import read_image
from torchao_masquant.data.lazy_samples import LazySamples
from torchao_masquant.data.sounds import read_audio
from torchao_masquant.modality import modality_token_ids

__all__ = ["ProcessedConversations", "media_of"]

_MODALITIES: Mapping[str, str] = {IMAGE: "vision", AUDIO: "audio"}

_NOT_SCORED = -100

# Tokens at the end of a prompt that may differ where an answer follows.
_JOINED = 2


def media_of(config: Any) -> list[str]:
    """Kinds of media that a model takes: "image", "audio".

    Args:
        config: a transformers config.
    """
    known = modality_token_ids(config)
    return [kind for kind, modality in _MODALITIES.items() if modality in known]


class ProcessedConversations(LazySamples):
    """A model's keyword inputs, made when they are asked for: none is kept.

    Args:
        conversations: one sample each.
        processor: of the model, from ``AutoProcessor``; a tokenizer for a model that
            reads text only.
        config: of the model.
        labelled: add ``labels``, as ``evaluate`` takes them: the tokens of the
            assistant's last answer, or all of the text where there is none.

    Raises:
        ValueError: a conversation has a medium that the model does not take, or the
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
        # A tokenizer knows no parts: its templates want the content as one text.
        self._is_tokenizer = not hasattr(processor, "tokenizer")
        self._check(media_of(config), type(config).__name__)

    def _check(self, media: Sequence[str], name: str) -> None:
        template = getattr(self.processor, "chat_template", None)
        for conversation in self.conversations:
            for kind in sorted(conversation.kinds - {TEXT}):
                if kind not in media:
                    raise ValueError(
                        f"{conversation.where} has an {kind}, which this model does not "
                        f"take (its {name} declares "
                        f"{' and '.join(media) or 'text'} only): leave it out."
                    )
            if conversation.messages and template is None:
                raise ValueError(
                    f"{conversation.where} is a conversation, but the model's processor "
                    "has no chat template: add a chat_template.jinja to the model's "
                    'folder, or give plain text, {"text": "..."}.'
                )

    def __len__(self) -> int:
        return len(self.conversations)

    def _sample(self, index: int) -> dict[str, Any]:
        conversation = self.conversations[index]
        inputs = self._inputs(conversation)
        if self.labelled:
            inputs["labels"] = self._labels(conversation, inputs)
        return inputs

    def _inputs(self, conversation: Conversation) -> dict[str, Any]:
        if conversation.text is not None:
            call = partial(self.processor, text=conversation.text)
            return self._called(call, conversation.where)
        return self._from_messages(
            conversation.messages,
            conversation.where,
            add_generation_prompt=not conversation.is_answered,
        )

    def _from_messages(
        self, messages: Sequence[Message], where: str, add_generation_prompt: bool
    ) -> dict[str, Any]:
        call = partial(
            self.processor.apply_chat_template,
            [self._message(message, where) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
        )
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
        return {"type": TEXT, "text": part.value}

    def _sampling_rate(self) -> int:
        for name in ("feature_extractor", "audio_processor"):
            rate = getattr(getattr(self.processor, name, None), "sampling_rate", None)
            if rate is not None:
                return int(rate)
        return 16_000

    def _labels(
        self, conversation: Conversation, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        labels = ids.clone()
        for token in self._placeholders:
            labels[ids == token] = _NOT_SCORED
        if not conversation.is_answered:
            return labels
        where = conversation.where
        # The prompt by itself tells where the answer begins: few templates mark it.
        prompt = self._from_messages(
            conversation.messages[:-1], where, add_generation_prompt=True
        )["input_ids"]
        shared = min(prompt.shape[1], ids.shape[1])
        differs = (ids[0, :shared] != prompt[0, :shared]).nonzero()
        start = int(differs[0]) if len(differs) else shared
        # A tokenizer may join the prompt's last characters with the answer's first;
        # such a token is the answer's.
        if start < prompt.shape[1] - _JOINED or start == ids.shape[1]:
            raise ValueError(
                f"{where}: its answer cannot be told from its prompt, since the chat "
                "template writes the prompt differently where an answer follows: leave "
                "the answer out to score all of the text."
            )
        labels[:, :start] = _NOT_SCORED
        return labels
