# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Ask vLLM about videos, and transformers for the same tokens: FOLDER MARK OPTIONS OUTPUT.

transformers is given the positions that vLLM has for a prompt's tokens. Its own are others
behind a video that is longer than it is wide, and of what is around a sound in a video.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchao_masquant.modality import modality_token_ids

_SIZE = {"shortest_edge": 64, "longest_edge": 4096}


def _video(seed: int, frames: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Noise of 24 x 20, of two frames a second."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 20, 24, 3), np.uint8)
    times = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames}
    named = {"frames_indices": list(range(frames)), "video_backend": "opencv"}
    return pixels, {**times, **named}


def _sound(seed: int) -> np.ndarray:
    """Noise of 1 to 3 s."""
    noise = np.random.default_rng(seed).normal(0, 0.1, 8_000 * (2 + seed % 5))
    return noise.astype(np.float32)


def requests(mark: str, *, have_sounds: bool) -> list[dict[str, Any]]:
    """What is asked: one video, or two, and with sounds one that is heard as well.

    Args:
        mark: how a prompt says where a video is.
        have_sounds: whether the model hears.
    """
    found = []
    for seed in range(6):
        prompt = f"{'why not ' * (seed % 4)}{mark}what is this{' a' * seed}"
        media = {"video": [_video(seed, 2 + 2 * (seed % 3))]}
        if seed % 3 == 2:
            prompt += f" and {mark}"
            media["video"].append(_video(seed + 10, 4))
        asked = {"multi_modal_data": media}
        asked["prompt"] = f"<start>user: {prompt}<end>\n<start>assistant: "
        found.append(asked)
        if have_sounds:
            heard = {"video": media["video"], "audio": [_sound(seed)]}
            heard["audio"] += [_sound(seed + 10)] * (len(media["video"]) - 1)
            options = {"mm_processor_kwargs": {"use_audio_in_video": True}}
            found.append({**asked, "multi_modal_data": heard, **options})
    return found


def _remember_positions(model: Any) -> dict[tuple[int, ...], Any]:
    """Prompts to the positions that vLLM's model gives them, from now on."""
    known, own = {}, model.get_mrope_input_positions

    def get_mrope_input_positions(tokens: list[int], features: Any) -> Any:
        known[tuple(tokens)] = found = own(tokens, features)
        return found

    model.get_mrope_input_positions = get_mrope_input_positions
    return known


@torch.no_grad()
def _difference(model: Any, processor: Any, asked: Any, answer: Any, at: Any) -> float:
    """By how much a log probability of an answer's tokens is off at most."""
    media = asked["multi_modal_data"]
    videos = [pixels for pixels, _ in media["video"]]
    options: dict[str, Any] = {"video_metadata": [times for _, times in media["video"]]}
    if "audio" in media:
        options["audio"] = media["audio"]
    options |= asked.get("mm_processor_kwargs", {})
    inputs = processor(
        text=asked["prompt"],
        videos=videos,
        size=_SIZE,
        do_sample_frames=False,
        return_tensors="pt",
        **options,
    )
    prompt, tokens = list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)
    known_ids = modality_token_ids(model.config).values()
    placeholders = {token for ids in known_ids for token in ids}
    # One that the model has written is text here, and a video's in transformers.
    end = next((n for n, t in enumerate(tokens, 1) if t in placeholders), None)
    tokens = tokens[:end]
    assert inputs["input_ids"][0].tolist() == prompt
    shown = torch.tensor([prompt + tokens[:-1]])
    positions, behind = at
    later = torch.arange(len(prompt), shown.shape[1]) + behind
    inputs["position_ids"] = torch.cat([positions, later.expand(3, -1)], 1)[:, None]
    inputs["input_ids"], inputs["attention_mask"] = shown, torch.ones_like(shown)
    # Of a prompt without an answer, and for positions alone.
    inputs.pop("mm_token_type_ids", None)
    logits = model(**inputs).logits[0, len(prompt) - 1 :]
    known = logits.log_softmax(-1)
    return max(
        abs(known[step, token].item() - told[token].logprob)
        for step, (token, told) in enumerate(zip(tokens, answer.outputs[0].logprobs))
    )


def main() -> None:
    from transformers import AutoModelForMultimodalLM, AutoProcessor
    from vllm import LLM, SamplingParams

    from torchao_masquant.models.parts import token_reader
    from torchao_masquant.vllm_plugin.token_ids import TokenIds

    folder, mark, options, output = sys.argv[1:]
    settings = json.loads(options)
    asked = requests(mark, have_sounds="audio" in settings["limit_mm_per_prompt"])
    engine = LLM(
        folder,
        dtype="float32",
        block_size=32,
        max_model_len=512,
        enforce_eager=True,
        mm_processor_kwargs={"size": _SIZE},
        **settings,
    )
    (positions,) = engine.apply_model(_remember_positions)
    model = token_reader(AutoModelForMultimodalLM.from_pretrained(folder)).eval()
    processor = AutoProcessor.from_pretrained(folder)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)

    def differences() -> list[float]:
        answers = engine.generate(asked, sampling, use_tqdm=False)
        return [
            _difference(model, processor, request, answer, at)
            for request, answer in zip(asked, answers)
            for at in [positions[tuple(answer.prompt_token_ids)]]
        ]

    found = {"as they are": differences()}
    TokenIds.fill = lambda self, *_: self.ids.zero_()  # type: ignore[method-assign]
    engine.reset_prefix_cache()
    found["all is text"] = differences()
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
