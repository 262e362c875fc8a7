# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized folder that vLLM and transformers are asked about."""

import json
from functools import cached_property
from pathlib import Path
from typing import Callable, Optional
from unittest import mock

import torch
from requests_of_each_kind import Request, requests
from torchao.quantization import quantize_
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)
from vllm_process import told

from torchao_masquant import calibrate, masquant_config, save_quantized
from torchao_masquant.data import ProcessedConversations, read_conversations
from torchao_masquant.modality import modality_token_ids
from torchao_masquant.models.parts import token_reader
from torchao_masquant.testing import model_folders

__all__ = ["COUNT", "Subject"]

_TEXT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}

#: Requests that are asked.
COUNT = 24


class Subject:
    """A quantized folder, and what transformers answers from it."""

    def __init__(
        self,
        folder: Path,
        scheme: str,
        *,
        with_images: bool,
        image: str = "<image>",
        sound: Optional[str] = None,
        make: Optional[Callable[[Path], Path]] = None,
        dtype: torch.dtype = torch.float32,
        **options,
    ):
        self.with_images, self.image, self.sound = with_images, image, sound
        if make is None:
            of = model_folders
            make = of.vision_model if with_images else of.text_model
        with mock.patch.dict(model_folders._TEXT, _TEXT):
            self.dense = dense = make(folder / "dense")
        seeing_or_hearing = with_images or sound is not None
        own = AutoModelForMultimodalLM if seeing_or_hearing else AutoModelForCausalLM
        self.loader = own
        model = own.from_pretrained(dense, dtype=dtype)
        if seeing_or_hearing:
            self._processor = AutoProcessor.from_pretrained(dense)
            read = []
            if with_images:
                read += read_conversations(str(model_folders.vision_samples(folder)))
            if sound is not None:
                read += read_conversations(str(model_folders.audio_samples(folder)))
            samples = ProcessedConversations(read, self._processor, model.config)
        else:
            self._processor = AutoTokenizer.from_pretrained(dense)
            torch.manual_seed(0)
            samples = [{"input_ids": torch.randint(10, 300, (2, 24))} for _ in range(6)]
        recipe = calibrate(model, samples, scheme=scheme, progress=False, **options)
        quantize_(model, masquant_config(recipe))
        self.folder = folder / "quantized"
        save_quantized(model, self.folder, beside=dense)
        # Of a whole Omni, the part that reads.
        self.reader = token_reader(model)
        self._placeholders = {
            t for known in modality_token_ids(model.config).values() for t in known
        }

    @cached_property
    def expected(self) -> list[tuple[list[int], list[int]]]:
        """Of each request the prompt's tokens, and those that transformers writes."""
        return [self._answer(r) for r in self.requests]

    @property
    def requests(self) -> list[Request]:
        return requests(
            COUNT, with_images=self.with_images, image=self.image, sound=self.sound
        )

    def inputs(self, request: Request):
        media = {"images": request.images} if request.seeds else {}
        if request.sound_seeds:
            media["audio"] = request.sounds
        return self._processor(text=request.prompt, return_tensors="pt", **media)

    def _answer(self, request: Request) -> tuple[list[int], list[int]]:
        inputs = self.inputs(request)
        tokens = self.reader.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0].tolist()
        prompt = inputs["input_ids"][0].tolist()
        return prompt, self._comparable(tokens[len(prompt) :])

    def _comparable(self, written: list[int]) -> list[int]:
        """Until a placeholder that the model has written: it has no image, and
        transformers' model takes it for one."""
        end = next(
            (n for n, t in enumerate(written, 1) if t in self._placeholders), None
        )
        return written[:end]

    def asked(
        self,
        output: Path,
        environment: dict[str, str] = {},
        *,
        folder: Optional[Path] = None,
        **options,
    ):
        """vLLM's answers, for another folder of the model if there is one."""
        settings = json.dumps(
            {
                "with_images": self.with_images,
                "image": self.image,
                "sound": self.sound,
                **options,
            }
        )
        asked = (folder or self.folder, COUNT, settings, output)
        found = told("ask_vllm.py", *asked, output=output, **environment)
        self.counters = found["counters"]
        return found["answers"]

    def differences(self, answers) -> list[float]:
        """Of the answers with another token: by how much the log probability of that of
        transformers is below vLLM's, which is the largest."""
        found = []
        for answer in answers:
            prompt, tokens = self.expected[answer["request"]]
            assert answer["prompt"] == prompt
            for ours, theirs, known in zip(
                tokens, answer["tokens"], answer["logprobs"]
            ):
                if ours != theirs:
                    lowest = min(known.values())
                    found.append(known[str(theirs)] - known.get(str(ours), lowest))
                    break
        return found

    def asked_of_two_processes(self, output: Path, **options):
        """vLLM's answers with tensor parallelism, or with other options."""
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        }
        usual = {"enforce_eager": True, "tensor_parallel_size": 2}
        return self.asked(output, environment, **(options or usual))

    @torch.no_grad()
    def log_probability_differences(self, answers, model=None) -> list[float]:
        """Of each token of the answers: how far vLLM's log probability of it is from
        that of transformers, to which the same tokens are shown.

        Args:
            answers: of vLLM.
            model: of transformers; None: the quantized one.
        """
        model, found = model or self.reader, []
        for answer in answers:
            inputs = self.inputs(self.requests[answer["request"]])
            tokens = self._comparable(answer["tokens"])
            shown = torch.tensor([answer["prompt"] + tokens[:-1]])
            inputs["input_ids"], inputs["attention_mask"] = shown, shown.ne(-1).long()
            logits = model(**inputs).logits[0, len(answer["prompt"]) - 1 :]
            known = logits.log_softmax(-1)
            for at, (token, theirs) in enumerate(zip(tokens, answer["logprobs"])):
                found.append(abs(known[at, token].item() - theirs[str(token)]))
        return found
