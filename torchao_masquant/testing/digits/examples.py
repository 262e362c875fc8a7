# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Examples of one task, kept as bytes and served as the model's keyword inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchao_masquant.testing.digits import features


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass and the answers they ask for.

    Attributes:
        inputs: Keyword arguments of the model, see :meth:`TaskExamples.batch`.
        answer_ids: int64 [n], the token that should follow the prompt.
    """

    inputs: dict[str, Tensor]
    answer_ids: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.answer_ids.to(device))


@dataclass(frozen=True)
class TaskExamples:
    """All examples of one task; their prompts have equal length.

    Attributes:
        prompt_ids: int64 [n, length], the prompt up to but without the answer.
        answer_ids: int64 [n].
        images: uint8 [n, 8, 8] with values 0..16, None for a task without images.
        log_mels: uint8 [n, 40, 64], None for a task without sound.
    """

    prompt_ids: Tensor
    answer_ids: Tensor
    images: Tensor | None = None
    log_mels: Tensor | None = None

    def __len__(self) -> int:
        return self.answer_ids.numel()

    def select(self, rows: Tensor | slice) -> "TaskExamples":
        """The examples at ``rows`` (a slice, or int64 indices)."""
        return TaskExamples(
            self.prompt_ids[rows],
            self.answer_ids[rows],
            None if self.images is None else self.images[rows],
            None if self.log_mels is None else self.log_mels[rows],
        )

    def batch(self, append_answer: bool = False) -> Batch:
        """All examples as one batch.

        Args:
            append_answer: Let the right answer follow the prompt (teacher forcing).

        Returns:
            A batch whose ``inputs`` hold ``input_ids`` and ``attention_mask`` (int64
            [n, length]), and where the task has them ``pixel_values`` (float32
            [n * 64, 24]) with ``image_grid_thw`` (int64 [n, 3]), and
            ``input_features`` (float32 [n, 40, 64]) with ``feature_attention_mask``
            (int64 [n, 64]).
        """
        input_ids = self.prompt_ids
        if append_answer:
            input_ids = torch.cat([input_ids, self.answer_ids[:, None]], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        if self.images is not None:
            inputs["pixel_values"] = features.pixel_values(self.images)
            inputs["image_grid_thw"] = features.image_grid_thw(len(self))
        if self.log_mels is not None:
            inputs["input_features"] = features.input_features(self.log_mels)
            inputs["feature_attention_mask"] = torch.ones(
                len(self), self.log_mels.shape[-1], dtype=torch.int64
            )
        return Batch(inputs, self.answer_ids)

    def batches(self, batch_size: int, append_answer: bool = False) -> Iterator[Batch]:
        """The examples in order, ``batch_size`` at a time (the last may be smaller)."""
        for start in range(0, len(self), batch_size):
            yield self.select(slice(start, start + batch_size)).batch(append_answer)


def to_tensors(tasks: Mapping[str, TaskExamples]) -> dict[str, Tensor]:
    """Flatten to the named tensors of a safetensors file: "image.prompt_ids", ..."""
    tensors = {}
    for task, examples in tasks.items():
        tensors[f"{task}.prompt_ids"] = examples.prompt_ids.to(torch.uint8)
        tensors[f"{task}.answer_ids"] = examples.answer_ids.to(torch.uint8)
        if examples.images is not None:
            tensors[f"{task}.images"] = examples.images.contiguous()
        if examples.log_mels is not None:
            tensors[f"{task}.log_mels"] = examples.log_mels.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, TaskExamples]:
    """The inverse of :func:`to_tensors`."""
    tasks = dict.fromkeys(name.split(".")[0] for name in tensors)
    return {
        task: TaskExamples(
            tensors[f"{task}.prompt_ids"].long(),
            tensors[f"{task}.answer_ids"].long(),
            tensors.get(f"{task}.images"),
            tensors.get(f"{task}.log_mels"),
        )
        for task in tasks
    }
