# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The digits model as a folder that servers start from."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    Qwen2_5OmniForConditionalGeneration,
)

from torchao_masquant.testing import digits
from torchao_masquant.testing.digits import features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits.write_folder(tmp_path_factory.mktemp("digits") / "model", "plain")


def test_the_whole_model_has_the_thinker(folder):
    whole = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    thinker, inputs = digits.load_model("plain"), digits.prompt("both")
    with torch.no_grad():
        assert torch.equal(whole.thinker(**inputs).logits, thinker(**inputs).logits)


@pytest.mark.parametrize(
    "task, question",
    [
        ("image", "Which digit is shown?"),
        ("audio", "Which digit is spoken?"),
        ("both", "What is the sum?"),
    ],
)
def test_a_chat_is_the_prompt_that_was_trained(folder, task, question):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kinds = {"both": ("image", "audio")}.get(task, (task,))
    parts = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False
    )
    for token in ("<image>", "<audio>"):
        text = text.replace(token, token * 16)
    expected = digits.prompt(task)["input_ids"][0].tolist()
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_a_file_of_a_sound_is_heard_as_the_sound(folder, tmp_path):
    kept = digits.heldout()["audio"].log_mels[3]
    file = digits.write_sound(tmp_path / "sound.wav", kept)
    with wave.open(str(file)) as reader:
        assert (reader.getframerate(), reader.getnframes()) == (16_000, 16_384)
        sound = np.frombuffer(reader.readframes(16_384), np.int16) / 32768
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    heard = extractor(
        [sound], sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    assert heard["attention_mask"].sum() == features.FRAMES
    difference = heard["input_features"] - features.input_features(kept[None])
    assert difference.abs().mean() < 0.03


def test_a_short_sound_is_heard_with_the_silence_after_it(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    heard = extractor([np.ones(9, np.float32)], return_attention_mask=True)
    assert np.sum(heard["attention_mask"]) == features.FRAMES


def test_a_file_of_an_image_has_its_pixels(tmp_path):
    image = digits.heldout()["image"].images[:1]
    file = digits.write_image(tmp_path / "image.png", image[0])
    pixels = torch.from_numpy(np.array(Image.open(file))).float() / 255 * 2 - 1
    expected = features.enlarged(image)[0, :, :, None].expand(16, 16, 3)
    assert (pixels - expected).abs().max() < 0.01
