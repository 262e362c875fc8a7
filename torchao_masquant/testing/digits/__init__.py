# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A small real multimodal model, its calibration and its held-out data.

A Qwen2.5-Omni thinker of four million parameters (text, vision and audio towers; four
decoder layers) that reads handwritten digits, hears spoken ones and adds: four tasks,

- "image": which digit is in the image?
- "audio": which digit was spoken?
- "both": what is the sum of the two?
- "text": what is the sum of two written digits?

Everything needed is in this package, nothing is downloaded::

    model = load_model("outliers")
    recipe = calibrate(model, calibration_samples())
    evaluate(model)["audio"].accuracy

The variant "plain" is the model as trained. In the variant "outliers" large activations
on four channels of image and sound tokens are trained in on purpose, to reproduce at
this size what multimodal LLMs of usual size show (see ``tools/digits_training``): say so wherever
its numbers are quoted.
"""

from torchao_masquant.testing.digits.checkpoints import (
    VARIANTS,
    checkpoint_path,
    load_model,
)
from torchao_masquant.testing.digits.evaluation import (
    TaskScore,
    calibration_samples,
    evaluate,
    heldout,
    heldout_batches,
    prompt,
)
from torchao_masquant.testing.digits.examples import Batch, TaskExamples
from torchao_masquant.testing.digits.hub_folder import (
    write_folder,
    write_image,
    write_sound,
)
from torchao_masquant.testing.digits.vocabulary import TASKS, TOKEN_ID, VOCABULARY

__all__ = [
    "TASKS",
    "TOKEN_ID",
    "VARIANTS",
    "VOCABULARY",
    "Batch",
    "TaskExamples",
    "TaskScore",
    "calibration_samples",
    "checkpoint_path",
    "evaluate",
    "heldout",
    "heldout_batches",
    "load_model",
    "prompt",
    "write_folder",
    "write_image",
    "write_sound",
]
