# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Train the digits models and write everything that is packaged with them.

    python tools/train_digits.py --output DIR

writes ``plain/``, ``outliers/`` (checkpoints), ``heldout.safetensors`` and
``calibration.safetensors``. It takes about ten minutes on two idle cores (set
``OMP_WAIT_POLICY=PASSIVE`` where other programs share them) and needs scikit-learn,
espeak-ng and Debian's asterisk-core-sounds-{en,es,fr,it,ru}-wav packages.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_training.architecture import HIDDEN_SIZE, thinker_config
from digits_training.augment import augment
from digits_training.optimizer import Optimizer
from digits_training.outliers import add_outliers
from digits_training.sources import (
    Sources,
    calibration_examples,
    heldout_examples,
    load_sources,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from torchao_masquant.atomic_files import replacing, replacing_folder
from torchao_masquant.testing.digits import features
from torchao_masquant.testing.digits.evaluation import CALIBRATION_SAMPLES, evaluate
from torchao_masquant.testing.digits.examples import TaskExamples, to_tensors
from torchao_masquant.testing.digits.vocabulary import TASKS, TOKEN_ID

TOWER_STEPS = 600
TOWER_BATCH = 64
TOWER_LEARNING_RATE = 2e-3
PLAIN_STEPS = 600
PLAIN_LEARNING_RATE = 1e-3
OUTLIER_STEPS = 450
OUTLIER_LEARNING_RATE = 6e-4
# Rows per step. Each task is a sub-batch of its own: their lengths differ.
ROWS = {"image": 12, "audio": 16, "both": 20, "text": 12}


def _progress(steps: int, description: str) -> tqdm:
    """A bar with an estimate of the time left; quiet when not on a terminal."""
    return tqdm(range(steps), desc=description, disable=None)


def pretrain_towers(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    training: Sources,
    generator: torch.Generator,
) -> None:
    """Teach each tower its digits with a classifier that is thrown away afterwards.

    Without it joint training leaves the answers about images at chance.
    """
    heads = nn.ModuleDict(
        {task: nn.Linear(HIDDEN_SIZE, 10) for task in ("image", "audio")}
    )
    towers = [model.model.visual, model.model.audio_tower, heads]
    parameters = [p for module in towers for p in module.parameters()]
    optimizer = Optimizer(parameters, TOWER_LEARNING_RATE, TOWER_STEPS)
    for _ in _progress(TOWER_STEPS, "towers"):
        for task, head in heads.items():
            drawn = augment(training.draw(task, TOWER_BATCH, generator), generator)
            batch = drawn.batch()
            if task == "image":
                tokens = model.get_image_features(
                    batch.inputs["pixel_values"], batch.inputs["image_grid_thw"]
                ).pooler_output
                tokens = torch.cat(tuple(tokens))
            else:
                tokens = model.get_audio_features(
                    batch.inputs["input_features"],
                    batch.inputs["feature_attention_mask"],
                ).last_hidden_state
            logits = head(tokens.view(TOWER_BATCH, -1, HIDDEN_SIZE).mean(dim=1))
            digits = batch.answer_ids - TOKEN_ID["0"]
            F.cross_entropy(logits, digits).backward()
        optimizer.step()


def _position_ids(
    model: Qwen2_5OmniThinkerForConditionalGeneration, examples: TaskExamples
) -> Tensor:
    """The positions that the model would compute, row by row: int64 [3, 1, length].

    All rows of a task share them.
    """
    inputs = examples.select(slice(0, 1)).batch(append_answer=True).inputs
    arguments: dict[str, Any] = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "image_grid_thw": inputs.get("image_grid_thw"),
        "audio_seqlens": torch.tensor([features.FRAMES]),
    }
    position_ids, _ = model.get_rope_index(**arguments)
    return position_ids


def train_jointly(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    training: Sources,
    steps: int,
    learning_rate: float,
    description: str,
    generator: torch.Generator,
) -> None:
    """Train all unfrozen parameters to answer, and to end after the answer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer(parameters, learning_rate, steps)
    # The backward pass of fused attention is slow on CPUs where sequences are short.
    model.set_attn_implementation({"text_config": "eager"})
    model.train()
    positions = {
        task: _position_ids(model, training.draw(task, 1, generator)) for task in TASKS
    }
    end = torch.tensor(TOKEN_ID["<eos>"])
    for _ in _progress(steps, description):
        for task, rows in ROWS.items():
            drawn = augment(training.draw(task, rows, generator), generator)
            batch = drawn.batch(append_answer=True)
            position_ids = positions[task].expand(-1, rows, -1)
            output = model(**batch.inputs, position_ids=position_ids, use_cache=False)
            logits = output.logits[:, -2:].flatten(0, 1)
            targets = torch.stack([batch.answer_ids, end.expand(rows)], dim=1)
            F.cross_entropy(logits, targets.flatten()).backward()
        optimizer.step()
    model.eval()
    model.set_attn_implementation({"text_config": "sdpa"})


def save_checkpoint(
    model: Qwen2_5OmniThinkerForConditionalGeneration, directory: Path
) -> None:
    """Write a folder in bfloat16, whole or not at all."""
    model = model.bfloat16()
    config = model.config
    # Each tower's configuration would otherwise keep the type it was trained in.
    for part in (config.text_config, config.vision_config, config.audio_config):
        part.dtype = torch.bfloat16
    with replacing_folder(directory) as new:
        model.save_pretrained(new)


def save_examples(tasks: Mapping[str, TaskExamples], path: Path) -> None:
    """Write a whole safetensors file or none."""
    with replacing(path) as temporary:
        save_file(to_tensors(tasks), temporary)


def _load_checkpoint(directory: Path) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A checkpoint as users load it, in float32."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32
    )
    return model.eval()


def train_plain(training: Sources, directory: Path, seed: int) -> None:
    """Train from scratch and write the "plain" checkpoint."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config())
    pretrain_towers(model, training, generator)
    train_jointly(model, training, PLAIN_STEPS, PLAIN_LEARNING_RATE, "plain", generator)
    save_checkpoint(model, directory)


def train_outliers(training: Sources, plain: Path, directory: Path, seed: int) -> None:
    """Continue from the "plain" checkpoint and write the "outliers" one."""
    if not plain.is_dir():
        raise FileNotFoundError(
            f"the variant 'outliers' continues from 'plain', which is not at {plain}: "
            "train it first"
        )
    generator = torch.Generator().manual_seed(seed + 1)
    model = _load_checkpoint(plain)
    add_outliers(model, training.draw("both", 100, generator))
    train_jointly(
        model, training, OUTLIER_STEPS, OUTLIER_LEARNING_RATE, "outliers", generator
    )
    save_checkpoint(model, directory)


def main() -> None:
    """Parse the command line, train, and print the scores on the held-out examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--variant", choices=("plain", "outliers", "all"), default="all"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training; the split is fixed"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    training, heldout_sources = load_sources()
    heldout = heldout_examples(heldout_sources)
    calibration = calibration_examples(training, CALIBRATION_SAMPLES)
    save_examples(heldout, output / "heldout.safetensors")
    save_examples(calibration, output / "calibration.safetensors")

    if arguments.variant in ("plain", "all"):
        train_plain(training, output / "plain", arguments.seed)
    if arguments.variant in ("outliers", "all"):
        train_outliers(training, output / "plain", output / "outliers", arguments.seed)
    for variant in ("plain", "outliers"):
        if arguments.variant in (variant, "all"):
            scores = evaluate(_load_checkpoint(output / variant), examples=heldout)
            for task, score in scores.items():
                print(
                    f"{variant:8} {task:5} accuracy {score.accuracy:.3f}, "
                    f"cross-entropy {score.cross_entropy:.3f}"
                )


if __name__ == "__main__":
    main()
