# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of tiny random models with processors, and data for them.

They are the real classes of transformers with a tokenizer made on the spot, so that all
that starts from a folder can be tried where there is no network. They know nothing. Their
tensors have the names of models of their kind on the hub, which transformers loads, and
gives back to what it has loaded, but not to a model that it has made.
"""

import json
import math
import re
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

__all__ = [
    "audio_model",
    "audio_samples",
    "text_model",
    "vision_model",
    "vision_samples",
    "write_image",
    "write_lines",
    "write_sound",
]

SPECIAL = ["<pad>", "<start>", "<end>", "<image>", "<|audio_bos|>", "<|AUDIO|>"]
SPECIAL += ["<|audio_eos|>"]
PAD, START, END, IMAGE, _, AUDIO, _ = range(len(SPECIAL))

TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>assistant: {% endif %}"
)

SIZE, PATCH = 16, 4
RATE = 16_000

#: What transformers calls parts that it has made to what the hub's files call them.
_PUBLISHED = {
    r"^vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
    # transformers 5.19
    r"^language_model\.model\.model\.": "language_model.model.",
}

_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
}

#: That a sound has, or fewer.
_SECONDS = 1

_AUDIO: dict[str, Any] = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "max_source_positions": 50,
}


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of bytes and a few pairs of them, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TEXT["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["user assistant what is this? a red square"], trainer
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>"
    )


def _saved(model: Any, processor: Any, folder: Path) -> Path:
    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            width = parameter[0].numel()
            parameter.data.normal_(generator=generator).mul_(width**-0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _name_as_on_the_hub(folder / "model.safetensors")
    return folder


def _name_as_on_the_hub(file: Path) -> None:
    tensors = {}
    for name, tensor in load_file(file).items():
        for made, published in _PUBLISHED.items():
            name = re.sub(made, published, name)
        tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})


def vision_model(folder: Path) -> Path:
    """A LLaVA that sees images of 16 x 16 as 16 tokens."""
    from transformers.models.clip.image_processing_pil_clip import (
        CLIPImageProcessorPil,
    )

    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    return _saved(model, processor, folder)


def audio_model(folder: Path) -> Path:
    """A Qwen2-Audio that hears a second as 25 tokens."""
    config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        audio_config=_AUDIO,
        audio_token_index=AUDIO,
        tie_word_embeddings=False,
    )
    processor = transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=_SECONDS),
        _tokenizer(),
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    return _saved(model, processor, folder)


def text_model(folder: Path) -> Path:
    """A Qwen2 that reads."""
    config = transformers.Qwen2Config(**_TEXT)
    tokenizer = _tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    return _saved(transformers.Qwen2ForCausalLM(config), tokenizer, folder)


def write_image(path: Path, seed: int = 0) -> Path:
    """Noise of 24 x 20."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_sound(path: Path, seconds: float = 1.0, rate: int = RATE) -> Path:
    """A tone, as PCM of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        times = (i / rate for i in range(int(seconds * rate)))
        values = [int(8000 * math.sin(2 * math.pi * 440 * t)) for t in times]
        file.writeframes(struct.pack(f"<{len(values)}h", *values))
    return path


def write_lines(path: Path, *rows: object) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vision_samples(folder: Path, count: int = 4) -> Path:
    """A JSONL file of questions about images, answered, and of text."""
    rows = []
    for index in range(count):
        write_image(folder / f"{index}.png", index)
        parts = [
            {"type": "image", "path": f"{index}.png"},
            {"type": "text", "text": f"What is number {index}, " + "and " * index},
        ]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": parts},
                    {"role": "assistant", "content": f"a square, {index}"},
                ]
            }
        )
    return write_lines(folder / "samples.jsonl", *rows, {"text": "Plain text. " * 8})


def audio_samples(folder: Path, count: int = 3) -> Path:
    """A JSONL file of questions about sounds."""
    rows = []
    for index in range(count):
        write_sound(folder / f"{index}.wav", 0.5 + 0.1 * index)
        rows.append(
            {
                "audio": f"{index}.wav",
                "prompt": "What do you hear? " * (index + 1),
                "answer": "a tone",
            }
        )
    return write_lines(folder / "sounds.jsonl", *rows)
