# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""lm-eval's own model classes on quantized folders, on tasks of files.

Needs ``pip install 'lm_eval[hf]'``, which takes too long to be part of the set-up.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torchao.quantization import quantize_
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from torchao_masquant import (
    MASQuantLinear,
    calibrate,
    masquant_config,
    save_quantized,
    token_modalities,
)

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("accelerate", reason="lm_eval's model classes need it")
pytest.importorskip("peft", reason="lm_eval's model classes need it")

pytestmark = pytest.mark.slow

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>"]
ALPHABET = sorted(ByteLevel.alphabet())
IMAGE, VOCABULARY = 3, len(SPECIAL) + len(ALPHABET)

TEXT = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)


def tokenizer() -> Qwen2Tokenizer:
    """A token for each byte."""
    made = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*SPECIAL, *ALPHABET])},
        merges=[],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<eos>",
    )
    made.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    return made


def prepared(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_().mul_(parameter[0].numel() ** -0.5)
    return model.eval()


def task(folder: Path, documents: list[dict[str, Any]], **fields: Any) -> Any:
    """A local task of lm-eval."""
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **fields,
    }
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=config)


def evaluate(model: str, folder: Path, made: Any, **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), **options},
        tasks=[made],
        device="cpu",
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_log_likelihoods_of_a_text_model(tmp_path):
    """lm-eval's are those of the model in memory."""
    model = prepared(Qwen2ForCausalLM(TEXT))
    ids = torch.randint(4, VOCABULARY, (4, 4, 24))
    recipe = calibrate(model, [{"input_ids": i} for i in ids], progress=False)
    quantize_(model, masquant_config(recipe))
    save_quantized(model, tmp_path / "model")
    tokens = tokenizer()
    tokens.save_pretrained(tmp_path / "model")
    documents = [{"q": f"is {n} even?", "label": n % 2} for n in range(6)]
    made = task(
        tmp_path,
        documents,
        output_type="multiple_choice",
        doc_to_text="q",
        doc_to_choice=["yes", "no"],
        doc_to_target="label",
        metric_list=[{"metric": "acc"}],
    )
    found = evaluate("hf", tmp_path / "model", made)
    right = 0
    for document, sample in zip(documents, found["samples"]["local"]):
        assert sample["doc"] == document
        expected = []
        for choice in (" yes", " no"):
            text = tokens(document["q"] + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                scores = model(input_ids=text).logits[0, :-1].log_softmax(-1)
            scores = scores.gather(1, text[0, 1:, None])
            expected.append(scores[-len(choice) :].sum().item())
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        # In a batch, sums of float32 go in another order, and 8-bit integers flip.
        assert likelihoods == pytest.approx(expected, rel=0.02)
        right += likelihoods.index(max(likelihoods)) == document["label"]
    assert found["results"]["local"]["acc,none"] == pytest.approx(right / 6)


def see(document: dict[str, Any]) -> list[Any]:
    """A picture, made of what the document says."""
    from PIL import Image

    pixels = torch.randint(
        0, 256, (28, 28, 3), generator=torch.Generator().manual_seed(document["seed"])
    )
    return [Image.fromarray(pixels.to(torch.uint8).numpy())]


def test_a_model_that_sees_generates(tmp_path):
    """hf-multimodal: an image in, the answer of the model in memory out."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=TEXT, image_token_index=IMAGE
    )
    model = prepared(LlavaForConditionalGeneration(config))
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

    def inputs(seed: int) -> Any:
        return processor(
            images=see({"seed": seed}),
            text=f"<image> what is number {seed}?",
            return_tensors="pt",
        )

    samples = [dict(inputs(seed)) for seed in range(100, 120)]
    recipe = calibrate(model, samples, scheme="w4a8", progress=False)
    assert recipe.modalities == ("text", "vision")
    quantize_(model, masquant_config(recipe))
    save_quantized(model, tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    documents = [{"seed": seed} for seed in range(4)]
    made = task(
        tmp_path,
        documents,
        output_type="generate_until",
        doc_to_text="<image> what is number {{seed}}?",
        doc_to_image=see,
        doc_to_target="seed",
        generation_kwargs={"until": ["<eos>"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    found = evaluate("hf-multimodal", tmp_path / "model", made)
    answers = set()
    for document, sample in zip(documents, found["samples"]["local"]):
        (answer,) = sample["resps"][0]
        prompt = inputs(document["seed"])
        with torch.no_grad():
            expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        expected = expected[0, prompt["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(expected, skip_special_tokens=True)
        answers.add(text)
        assert answer.strip() == text.strip()
    assert len(answers) > 1
    # That it was quantized, and routed.
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    linear = next(m for m in loaded.modules() if isinstance(m, MASQuantLinear))
    with token_modalities(loaded, torch.tensor([[0, 1]])):
        linear(torch.randn(1, 2, 32))
