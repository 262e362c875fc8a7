# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What others read in an exported folder: vLLM without the plugin, and transformers."""

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from requests_of_each_kind import requests
from safetensors.torch import load_file, save_file
from torchao.quantization import quantize_
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from torchao_masquant import calibrate, masquant_config, save_quantized
from torchao_masquant.data import ProcessedConversations, read_conversations
from torchao_masquant.deploy import export_compressed_tensors
from torchao_masquant.testing import model_folders

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

_HERE = Path(__file__).parent
#: vLLM's attention on CPUs takes heads of 32 and more, its 4-bit kernel multiples of 32.
_TEXT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
_COUNT = 24


class Exported:
    """A model of ours, and the folder that is exported of it."""

    def __init__(self, folder: Path, scheme: str, *, with_images: bool):
        self.with_images = with_images
        make = model_folders.vision_model if with_images else model_folders.text_model
        with mock.patch.dict(model_folders._TEXT, _TEXT):
            dense = make(folder / "dense")
        self.loader = AutoModelForMultimodalLM if with_images else AutoModelForCausalLM
        self.model = self.loader.from_pretrained(dense, dtype=torch.float32)
        if with_images:
            self.processor = AutoProcessor.from_pretrained(dense)
            read = read_conversations(str(model_folders.vision_samples(folder)))
            samples = ProcessedConversations(read, self.processor, self.model.config)
        else:
            self.processor = AutoTokenizer.from_pretrained(dense)
            torch.manual_seed(0)
            samples = [{"input_ids": torch.randint(10, 300, (2, 24))} for _ in range(6)]
        groups = {"group_size": 32} if scheme == "w4a16" else {}
        recipe = calibrate(
            self.model,
            samples,
            scheme=scheme,
            target="compressed-tensors",
            progress=False,
            **groups,
        )
        quantize_(self.model, masquant_config(recipe))
        save_quantized(self.model, folder / "quantized", beside=dense)
        self.folder = export_compressed_tensors(folder / "quantized", folder / "stock")

    def inputs(self, request) -> dict[str, torch.Tensor]:
        media = {"images": request.images} if request.seeds else {}
        return self.processor(text=request.prompt, return_tensors="pt", **media)

    def vllm_answers(self, output: Path, dtype: str):
        _name_tower_as_vllm_does(self.folder)
        settings = {
            "with_images": self.with_images,
            "image": "<image>",
            "sound": None,
            "enforce_eager": True,
            "dtype": dtype,
        }
        run = subprocess.run(
            [
                *(sys.executable, _HERE / "ask_vllm.py", self.folder, str(_COUNT)),
                *(json.dumps(settings), output),
            ],
            env={
                **os.environ,
                # Of no plugin at all.
                "VLLM_PLUGINS": "",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
            },
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return json.loads(output.read_text())["answers"]


def _name_tower_as_vllm_does(folder: Path) -> None:
    """transformers names LLaVA's tower otherwise than vLLM 0.32 reads it."""
    for file in folder.glob("*.safetensors"):
        named = {
            n.replace("vision_tower.", "vision_tower.vision_model.", 1)
            if "vision_tower." in n and "vision_model." not in n
            else n: t
            for n, t in load_file(file).items()
        }
        save_file(named, file, {"format": "pt"})


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize(
    "scheme, dtype, most",
    # An int8 that is rounded the other way moves a log probability by a hundredth. Of
    # 4-bit weights vLLM has no kernel in float32 on CPUs.
    [("w8a8", "float32", 0.05), ("w4a16", "bfloat16", 0.1)],
)
@torch.no_grad()
def test_vllm_without_the_plugin(tmp_path, scheme, dtype, most, with_images):
    """Log probabilities of the tokens that vLLM answers, against those of our model."""
    subject = Exported(tmp_path, scheme, with_images=with_images)
    dense = subject.loader.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    asked = requests(_COUNT, with_images=with_images)
    answers = subject.vllm_answers(tmp_path / "answers.json", dtype)
    found, off = [], []
    for request, answer in zip(asked, answers):
        inputs = subject.inputs(request)
        prompt = inputs["input_ids"]
        assert prompt[0].tolist() == answer["prompt"]
        # A random model answers with image tokens too, which transformers refuses.
        tokens = [*itertools.takewhile(model_folders.IMAGE.__ne__, answer["tokens"])]
        inputs["input_ids"] = torch.cat([prompt, torch.tensor([tokens]).long()], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        ours, exact = (
            m(**inputs).logits[0, prompt.shape[1] - 1 :].log_softmax(-1)
            for m in (subject.model, dense)
        )
        for place, token in enumerate(tokens):
            theirs = answer["logprobs"][place][str(token)]
            found.append(abs(theirs - ours[place, token].item()))
            off.append(abs(theirs - exact[place, token].item()))
    assert max(found) < most
    # It would show if it were another model.
    assert statistics.mean(found) < statistics.mean(off) / 2


@torch.no_grad()
def test_transformers(tmp_path):
    subject = Exported(tmp_path, "w4a16", with_images=True)
    theirs = subject.loader.from_pretrained(subject.folder, dtype=torch.float32).eval()
    for request in requests(4, with_images=True):
        inputs = subject.inputs(request)
        ours = subject.model(**inputs).logits
        torch.testing.assert_close(theirs(**inputs).logits, ours, rtol=0, atol=1e-4)
