# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is trained on and what is held out.

Images are split by image, sound by voice (espeak-ng) or recording, text by prompt:
nothing held out is ever trained on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from digits_training import speech
from digits_training.prompts import answer_id, multimodal_prompt, text_prompts
from torchao_masquant.testing.digits.examples import TaskExamples
from torchao_masquant.testing.digits.vocabulary import TASKS

HELDOUT_PER_TASK = 200
TRAINING_CLIPS = 5000
# Fixed, so that a checkpoint is never scored on what another run trained it on.
SPLIT_SEED = 0

_ANSWER_IDS = torch.tensor([answer_id(number) for number in range(19)])


@dataclass(frozen=True)
class Sources:
    """The material of one split.

    Attributes:
        images: uint8 [images, 8, 8] with values 0..16.
        image_digits: int64 [images].
        clips: Spoken digits.
        text: Examples of the "text" task.
    """

    images: Tensor
    image_digits: Tensor
    clips: speech.Clips
    text: TaskExamples

    def examples(self, task: str, images: Tensor, clips: Tensor) -> TaskExamples:
        """Examples of a multimodal task.

        Args:
            task: "image", "audio" or "both".
            images: int64 [n], which images (ignored by "audio").
            clips: int64 [n], which clips (ignored by "image").
        """
        has_image, has_audio = task != "audio", task != "image"
        numbers = torch.zeros_like(images)
        if has_image:
            numbers = numbers + self.image_digits[images]
        if has_audio:
            numbers = numbers + self.clips.digits[clips]
        prompt = torch.tensor(multimodal_prompt(task))
        return TaskExamples(
            prompt.repeat(len(numbers), 1),
            _ANSWER_IDS[numbers],
            self.images[images] if has_image else None,
            self.clips.log_mels[clips] if has_audio else None,
        )

    def draw(self, task: str, count: int, generator: torch.Generator) -> TaskExamples:
        """``count`` random examples of ``task``, drawn with replacement."""

        def rows(size: int) -> Tensor:
            return torch.randint(size, (count,), generator=generator)

        if task == "text":
            return self.text.select(rows(len(self.text)))
        images, clips = rows(len(self.images)), rows(len(self.clips.digits))
        return self.examples(task, images, clips)


def load_sources() -> tuple[Sources, Sources]:
    """The training and the held-out material.

    Raises:
        RuntimeError: A package that provides some of it is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(
            "scikit-learn is missing: install it with `pip install scikit-learn`"
        ) from error
    speech.check_installed()

    generator = torch.Generator().manual_seed(SPLIT_SEED)
    handwritten = load_digits()
    images = torch.from_numpy(handwritten.images).to(torch.uint8)
    image_digits = torch.from_numpy(handwritten.target).long()
    image_order = torch.randperm(len(images), generator=generator)
    heldout_images = image_order[: 2 * HELDOUT_PER_TASK]
    training_images = image_order[2 * HELDOUT_PER_TASK :]

    prompts = text_prompts()
    text_order = torch.randperm(len(prompts), generator=generator)
    text = TaskExamples(
        torch.tensor([ids for ids, _ in prompts]),
        _ANSWER_IDS[torch.tensor([number for _, number in prompts])],
    )
    training = Sources(
        images[training_images],
        image_digits[training_images],
        speech.spoken_digits(TRAINING_CLIPS, heldout=False, seed=SPLIT_SEED),
        text.select(text_order[HELDOUT_PER_TASK:]),
    )
    # With the ten recordings, twice the number a task needs: "both" gets its own clips.
    clips = 2 * HELDOUT_PER_TASK - 10
    heldout = Sources(
        images[heldout_images],
        image_digits[heldout_images],
        speech.spoken_digits(clips, heldout=True, seed=SPLIT_SEED),
        text.select(text_order[:HELDOUT_PER_TASK]),
    )
    # Two voices of espeak-ng may be one under two names: ask the sound itself.
    heard = {clip.numpy().tobytes() for clip in training.clips.log_mels}
    if any(clip.numpy().tobytes() in heard for clip in heldout.clips.log_mels):
        raise RuntimeError(
            "a held-out clip is also a training clip: this version of espeak-ng does "
            "not tell all voices apart"
        )
    return training, heldout


def heldout_examples(heldout: Sources) -> dict[str, TaskExamples]:
    """The evaluation set: every held-out image and clip is used once."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    images = torch.randperm(len(heldout.images), generator=generator)
    clips = torch.randperm(len(heldout.clips.digits), generator=generator)
    single, pair = slice(0, HELDOUT_PER_TASK), slice(HELDOUT_PER_TASK, None)
    return {
        "image": heldout.examples("image", images[single], clips[single]),
        "audio": heldout.examples("audio", images[single], clips[single]),
        "both": heldout.examples("both", images[pair], clips[pair]),
        "text": heldout.text,
    }


def calibration_examples(training: Sources, count: int) -> dict[str, TaskExamples]:
    """``count`` training examples, evenly over the tasks."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return {task: training.draw(task, count // len(TASKS), generator) for task in TASKS}
