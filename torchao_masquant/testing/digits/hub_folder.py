# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The digits model as models of its kind are published, and files to ask it with.

A whole Qwen2.5-Omni that doesn't speak, with tokenizer, processor and chat template, so
that servers which start from a folder can be tried where there is no network.
"""

import json
import wave
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchao_masquant.testing.digits import features
from torchao_masquant.testing.digits.checkpoints import checkpoint_path
from torchao_masquant.testing.digits.log_mel import SAMPLE_RATE, waveform_of
from torchao_masquant.testing.digits.vocabulary import TOKEN_ID, VOCABULARY

__all__ = ["write_folder", "write_image", "write_sound"]

_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<vision_start><image><vision_end>"
    "{% elif part['type'] == 'video' %}<vision_start><video><vision_end>"
    "{% elif part['type'] == 'audio' %}<audio_start><audio><audio_end>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)

#: Of Qwen2.5-Omni's tokenizer to those of the vocabulary.
_NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "vision_bos_token": "<vision_start>",
    "vision_eos_token": "<vision_end>",
    "audio_bos_token": "<audio_start>",
    "audio_eos_token": "<audio_end>",
}

_EXTRACTOR = "DigitsFeatureExtractor"


def write_folder(folder: Path | str, variant: str = "outliers") -> Path:
    """Write the model to a folder.

    Its processor's own code is in it, as a line: loaders have to trust it
    (``trust_remote_code=True``).

    Args:
        folder: made where missing.
        variant: "plain" or "outliers".

    Returns:
        The folder.
    """
    folder, source = Path(folder), checkpoint_path(variant)
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "model.safetensors")
    named = {f"thinker.{name}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    # Its class wants the speakers' voices, though there are none.
    torch.save({}, folder / "spk_dict.pt")
    thinker = json.loads((source / "config.json").read_text())
    _write(
        folder / "config.json",
        {
            "architectures": ["Qwen2_5OmniForConditionalGeneration"],
            "model_type": "qwen2_5_omni",
            "dtype": thinker["dtype"],
            "enable_audio_output": False,
            "thinker_config": _without_dtype(thinker),
        },
    )
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": TOKEN_ID["<bos>"],
            "eos_token_id": TOKEN_ID["<eos>"],
            "pad_token_id": TOKEN_ID["<pad>"],
        },
    )
    _write_processor(folder)
    return folder


def write_image(file: Path | str, image: Tensor) -> Path:
    """Write a PNG file.

    Args:
        file: to be written.
        image: uint8 [8, 8], 0 (paper, which is black) to 16 (ink).
    """
    from PIL import Image

    enlarged = (features.enlarged(image[None])[0] + 1) / 2 * 255
    Image.fromarray(enlarged.round().to(torch.uint8).numpy()).convert("RGB").save(file)
    return Path(file)


def write_sound(file: Path | str, log_mel: Tensor) -> Path:
    """Write a WAV file of 1.024 s that sounds as a spectrogram says.

    Args:
        file: to be written, at 16 kHz, which the processor hears: what it does not depends
            on how a server resamples.
        log_mel: uint8 [40, 64].
    """
    waveform = waveform_of(log_mel)
    # Nothing is above 4 kHz.
    spectrum = F.pad(torch.fft.rfft(waveform), (0, waveform.numel() // 2))
    samples = 2 * torch.fft.irfft(spectrum)
    samples = (samples * 32767).round().clamp(-32768, 32767).to(torch.int16)
    with wave.open(str(file), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(2 * SAMPLE_RATE)
        writer.writeframes(samples.numpy().tobytes())
    return Path(file)


def _write(file: Path, entry: dict[str, Any]) -> None:
    file.write_text(json.dumps(entry, indent=2) + "\n")


def _without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """One of a part would be kept to, whatever type the whole is loaded in."""
    return {
        name: _without_dtype(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "dtype"
    }


def _write_processor(folder: Path) -> None:
    _tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    module = "feature_extractor"
    (folder / f"{module}.py").write_text(
        f"from torchao_masquant.testing.digits.{module} import {_EXTRACTOR}  # noqa\n"
    )
    pixels = features.IMAGE_SIZE**2
    images = {
        "patch_size": features.PATCH_SIZE,
        "merge_size": features.MERGE_SIZE,
        "temporal_patch_size": features.TEMPORAL_PATCH_SIZE,
        # Of any picture, 16 x 16 are looked at.
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": [0.5] * features.CHANNELS,
        "image_std": [0.5] * features.CHANNELS,
    }
    _write(
        folder / "preprocessor_config.json",
        {
            "processor_class": "Qwen2_5OmniProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
            **images,
            "feature_extractor_type": _EXTRACTOR,
            "auto_map": {"AutoFeatureExtractor": f"{module}.{_EXTRACTOR}"},
        },
    )
    _write(
        folder / "video_preprocessor_config.json",
        {"video_processor_type": "Qwen2VLVideoProcessor", **images},
    )


def _tokenizer() -> Any:
    """Of words, and of what stands between them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [token for token in VOCABULARY if token.startswith("<")]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=_NAMED,
    )
