# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``evaluate`` against sums written out here."""

import copy
import dataclasses
import datetime
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from torchao_masquant import Evaluation, evaluate, token_modalities
from torchao_masquant.evaluation import linear_sqnr
from torchao_masquant.evaluation.weights import method_of
from torchao_masquant.testing import digits

VOCABULARY, IMAGE, SOUND = 11, 3, 4


class Table(nn.Module):
    """The next token's logits are a row of a table."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.config = SimpleNamespace(image_token_id=IMAGE, audio_token_id=SOUND)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table(input_ids))


def _sample(rows, labels=None, mask=None):
    ids = torch.tensor(rows)
    sample = {"input_ids": ids, "labels": ids if labels is None else labels}
    if mask is not None:
        sample["attention_mask"] = torch.tensor(mask)
    return sample


def _log_softmax(row):
    row = row.astype(np.float64)
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def _expected(model, reference, samples):
    """Loops over tokens: one dict a labelled token, and KLs by modality."""
    tables = [m.table.weight.detach().numpy() for m in (model, reference)]
    tokens, examples = [], []
    kl = {"text": [], "vision": [], "audio": []}
    for sample in samples:
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        mask = sample.get("attention_mask")
        mask = [[1] * len(r) for r in ids] if mask is None else mask.tolist()
        for row, label, kept in zip(ids, labels, mask):
            names = [{IMAGE: "vision", SOUND: "audio"}.get(t, "text") for t in row]
            present = {n for n, k in zip(names, kept) if k}
            content = "+".join(n for n in kl if n in present)
            found = []
            for place, token in enumerate(row):
                log_p, log_q = (_log_softmax(t[token]) for t in tables)
                divergence = (np.exp(log_q) * (log_q - log_p)).sum()
                if kept[place]:
                    kl[names[place]].append(divergence)
                target = label[place + 1] if place + 1 < len(row) else -100
                if target != -100:
                    found.append(
                        dict(
                            content=content,
                            loss=-log_p[target],
                            reference_loss=-log_q[target],
                            right=log_p.argmax() == target,
                            reference_right=log_q.argmax() == target,
                            agrees=log_p.argmax() == log_q.argmax(),
                            kl=divergence,
                        )
                    )
            if found:
                examples.append(found)
                tokens += found
    return tokens, examples, kl


def _mean(rows, key):
    return sum(float(row[key]) for row in rows) / len(rows)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(3)
    found = []
    for rows, length in ((5, 9), (1, 2), (3, 1), (2, 40)):
        ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
        labels = ids.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        mask = (torch.rand(ids.shape, generator=generator) < 0.8).long()
        found.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    # No label in one row, and text alone.
    found[0]["labels"][2] = -100
    found[0]["input_ids"][0] = 7
    return found


def test_equals_the_sums_written_out(samples):
    model, reference = Table(0), Table(1)
    result = evaluate(model, {"one": samples}, reference, progress=False)
    tokens, examples, kl = _expected(model, reference, samples)
    score = result.tasks["one"]
    assert (score.examples, score.tokens) == (len(examples), len(tokens))
    right = [all(t["right"] for t in example) for example in examples]
    assert score.accuracy == pytest.approx(sum(right) / len(right))
    right = [all(t["reference_right"] for t in example) for example in examples]
    assert score.reference_accuracy == pytest.approx(sum(right) / len(right))
    # Float64 throughout: sums of some hundred terms of order one.
    close = dict(rel=1e-12)
    assert score.cross_entropy == pytest.approx(_mean(tokens, "loss"), **close)
    assert score.perplexity == pytest.approx(math.exp(_mean(tokens, "loss")), **close)
    assert score.reference_cross_entropy == pytest.approx(
        _mean(tokens, "reference_loss"), **close
    )
    assert score.kl == pytest.approx(_mean(tokens, "kl"), **close)
    assert score.kl_p99 == pytest.approx(
        np.quantile([t["kl"] for t in tokens], 0.99), **close
    )
    assert score.agreement == pytest.approx(_mean(tokens, "agrees"))
    for modality, values in kl.items():
        found = result.by_modality[modality]
        assert found.tokens == len(values) > 0
        assert found.kl == pytest.approx(np.mean(values), **close)
    contents = {t["content"] for t in tokens}
    assert set(result.by_content) == contents and len(contents) > 1
    for content, found in result.by_content.items():
        rows = [t for t in tokens if t["content"] == content]
        assert found.tokens == len(rows)
        assert found.cross_entropy == pytest.approx(_mean(rows, "loss"), **close)
        assert found.reference_cross_entropy == pytest.approx(
            _mean(rows, "reference_loss"), **close
        )


def test_a_small_chunk_gives_the_same(samples, monkeypatch):
    whole = evaluate(Table(0), samples, Table(1), progress=False)
    monkeypatch.setattr(
        "torchao_masquant.evaluation.token_scores._CHUNK_BYTES", 3 * 8 * VOCABULARY
    )
    assert evaluate(Table(0), samples, Table(1), progress=False) == whole


def test_a_model_is_no_different_from_itself(samples):
    result = evaluate(Table(0), samples, Table(0), progress=False)
    assert list(result.tasks) == ["all"]
    score = result.tasks["all"]
    assert (score.kl, score.kl_p99, score.agreement) == (0, 0, 1)
    assert score.reference_accuracy == score.accuracy
    assert {m.kl for m in result.by_modality.values()} == {0.0}


def test_without_a_reference_nothing_is_compared(samples):
    alone = evaluate(Table(0), samples, progress=False)
    compared = evaluate(Table(0), samples, Table(1), progress=False)
    assert not alone.has_reference and compared.has_reference
    assert alone.tasks["all"].cross_entropy == compared.tasks["all"].cross_entropy
    assert alone.tasks["all"].accuracy == compared.tasks["all"].accuracy
    assert alone.tasks["all"].kl is None and alone.sqnr == {}
    assert alone.by_modality["vision"].kl is None
    assert (alone.scheme, alone.method, alone.quantized_linears) == (None, None, 0)


def test_a_modality_without_tokens_has_no_divergence():
    result = evaluate(Table(0), [_sample([[5, 6, 7]])], Table(1), progress=False)
    assert result.by_modality["audio"].tokens == 0
    assert math.isnan(result.by_modality["audio"].kl)
    assert list(result.by_content) == ["text"]
    assert Evaluation.from_json(result.to_json()).by_modality["audio"].tokens == 0


def test_a_token_that_both_models_rule_out_weighs_nothing(samples):
    models = Table(0), Table(1)
    for model in models:
        model.table.weight.data[:, 10] = -math.inf
    for sample in samples:
        sample["labels"][sample["labels"] == 10] = -100
    score = evaluate(models[0], samples, models[1], progress=False).tasks["all"]
    assert math.isfinite(score.kl) and math.isfinite(score.cross_entropy)
    models[0].table.weight.data[:, 9] = -math.inf
    score = evaluate(models[0], samples, models[1], progress=False).tasks["all"]
    assert score.kl == math.inf


def test_models_are_left_as_they_were(samples):
    model, reference = Table(0).train(), Table(1).train()
    evaluate(model, samples, reference, progress=False)
    assert model.training and reference.training
    with pytest.raises(ValueError):
        evaluate(model, [{}], reference, progress=False)
    assert model.training and "forward" not in model.__dict__


def test_labels_are_not_handed_to_the_model_and_generators_will_do(samples):
    # Table.forward takes no labels: it would raise.
    listed = evaluate(Table(0), {"a": samples, "b": samples[:1]}, progress=False)
    once = evaluate(
        Table(0), {"a": iter(samples), "b": (s for s in samples[:1])}, progress=False
    )
    assert once == listed and list(once.tasks) == ["a", "b"]


def test_a_compiled_model_is_called_compiled(samples):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Table(0), backend=backend, dynamic=True)
    reference = torch.compile(Table(1), backend="eager")
    result = evaluate(compiled, samples, reference, progress=False)
    assert graphs
    assert result == evaluate(Table(0), samples, Table(1), progress=False)


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        ({}, ValueError, "dataset is empty: it has no task"),
        ([], ValueError, "task 'all' of the dataset is empty"),
        ({"a": []}, ValueError, "task 'a' of the dataset is empty"),
        ([{"input_ids": torch.ones(1, 2, dtype=torch.long)}], ValueError, "no labels"),
        ([[1]], TypeError, "sample 0 of task 'all' is a list"),
        (
            [_sample([[1, 2]], torch.tensor([[1, -100]]))],
            ValueError,
            "no labelled token.*after the first token",
        ),
        (
            [_sample([[1, 2]], torch.tensor([[1, 2, 3]]))],
            ValueError,
            r"have shape \(1, 3\), the model's logits are for .* \(1, 2\)",
        ),
        ([_sample([[1, 2]], torch.ones(1, 2))], TypeError, "tensor of integers"),
        ([_sample([[1, 2]], [[1, 2]])], TypeError, "tensor of integers"),
        ([_sample([[1, 2]], torch.tensor([[1, 11]]))], ValueError, "from 11 to 11"),
        ([_sample([[1, 2]], torch.tensor([[1, -1]]))], ValueError, "from -1 to -1"),
    ],
)
def test_data_that_cannot_be_scored_is_told_in_a_sentence(dataset, error, message):
    with pytest.raises(error, match=message):
        evaluate(Table(0), dataset, progress=False)


@pytest.mark.parametrize("broken", ["model", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_of_nan_are_told_with_their_place(broken, value, samples):
    models = {"model": Table(0), "reference": Table(1)}
    models[broken].table.weight.data[7, 2] = value
    with pytest.raises(
        ValueError, match=f"the {broken}'s logits for sample 0 of task 'x' hold nan"
    ):
        evaluate(models["model"], {"x": samples}, models["reference"], progress=False)


def test_a_reference_that_does_not_fit_is_refused(samples):
    with pytest.raises(ValueError, match="another architecture than the model: table"):
        evaluate(Table(0), samples, Table(1, vocabulary=12), progress=False)
    small, large = tiny_models.omni_thinker(layers=1), tiny_models.omni_thinker()
    data = [_labelled(s) for s in tiny_models.samples(audio=True, count=1)]
    with pytest.raises(ValueError, match="another architecture than the model"):
        evaluate(small, data, large, progress=False)
    large = tiny_models.omni_thinker(layers=1)
    large.resize_token_embeddings(64)
    with pytest.raises(
        ValueError, match="vocabulary of 64 tokens, the model one of 48"
    ):
        evaluate(small, data, large, progress=False)
    quantized = tiny_models.quantized(tiny_models.omni_thinker(layers=1))
    with pytest.raises(ValueError, match="the reference is quantized"):
        evaluate(small, data, quantized, progress=False)


def test_a_model_without_logits_per_token_is_refused():
    with pytest.raises(ValueError, match=r"gives no logits .* but shape \(2, 3\)"):
        evaluate(
            nn.Linear(4, 3), [{"input": torch.ones(2, 4), "labels": 0}], progress=False
        )

    class Nothing(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="gives no logits .* but a NoneType"):
        evaluate(Nothing(), [{"labels": 0, "x": 1}], progress=False)


def _labelled(sample):
    labels = sample["input_ids"].clone()
    labels[labels < tiny_models.FIRST_WORD] = -100
    return {**sample, "labels": labels}


def test_a_quantized_model_against_its_original():
    model = tiny_models.omni_thinker()
    quantized = tiny_models.quantized(copy.deepcopy(model), scheme="w4a8")
    data = [_labelled(s) for s in tiny_models.samples(audio=True, count=2)]
    result = evaluate(quantized, {"t": data}, model, progress=False)
    assert result.modalities == ("text", "vision", "audio")
    assert (result.scheme, result.quantized_linears) == ("w4a8", 14)
    assert list(result.by_content) == ["text+vision+audio"]

    ratios = linear_sqnr(model, quantized, tiny_models.samples(audio=True, count=2))
    assert result.sqnr.keys() == ratios.keys()
    for name, by_modality in ratios.items():
        for modality, ratio in by_modality.items():
            found = result.sqnr[name][modality]
            assert (found.plain, found.centered) == (ratio.plain, ratio.centered)
    mean = sum(r["audio"].centered for r in ratios.values()) / len(ratios)
    assert result.mean_sqnr("audio") == pytest.approx(mean)

    linears = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 14
    assert result.reference_weight_bytes == sum(4 * m.weight.numel() for m in linears)
    held = [
        m.weight.nbytes_stored
        for m in quantized.modules()
        if hasattr(m, "weight") and hasattr(m.weight, "nbytes_stored")
    ]
    assert result.weight_bytes == sum(held) and len(held) == 14

    with torch.no_grad():
        losses = []
        for sample in data:
            inputs = {k: v for k, v in sample.items() if k != "labels"}
            log_p = quantized(**inputs).logits.double().log_softmax(-1)
            for row, labels in zip(log_p, sample["labels"]):
                losses += [
                    -row[t - 1, labels[t]].item()
                    for t in range(1, len(labels))
                    if labels[t] != -100
                ]
    assert result.tasks["t"].cross_entropy == pytest.approx(np.mean(losses), rel=1e-12)
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_padding_changes_nothing():
    model = tiny_models.qwen25_vl()
    quantized = tiny_models.quantized(copy.deepcopy(model))
    long = [1, *tiny_models.words(9), "image", *tiny_models.words(5)]
    short = [1, "small image", *tiny_models.words(4, seed=1)]
    padded = tiny_models.batch(long, short)
    assert (padded["attention_mask"] == 0).any()
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    result = evaluate(quantized, [{**padded, "labels": labels}], model, progress=False)
    assert sum(m.tokens for m in result.by_modality.values()) == int(
        padded["attention_mask"].sum()
    )
    assert result.by_modality["vision"].tokens == 5
    ratio = linear_sqnr(model, quantized, [padded])
    name = next(iter(ratio))
    assert ratio[name]["text"].count == result.by_modality["text"].tokens


@pytest.mark.parametrize("method", ["masquant", "smoothquant", "rtn"])
def test_declared_modalities_where_there_are_no_input_ids(method):
    model = tiny_models.PlainModel()
    quantized = tiny_models.quantized(copy.deepcopy(model), method=method)
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[0, 1, 2, 1], [0, 0, 0, 0]])
    sample = {
        "x": torch.randn(2, 4, 16, generator=generator),
        "modality_ids": ids,
        "labels": torch.randint(0, 12, (2, 4), generator=generator),
    }
    result = evaluate(quantized, [sample], model, progress=False)
    counts = {m: s.tokens for m, s in result.by_modality.items()}
    assert counts == {"text": 5, "vision": 2, "audio": 1}
    assert list(result.by_content) == ["text", "text+vision+audio"]
    assert set(result.sqnr["first"]) == set(counts)
    with torch.no_grad():
        log_q = model(sample["x"]).double().log_softmax(-1)
        if method == "masquant":
            with token_modalities(quantized, ids):
                log_p = quantized(sample["x"]).double().log_softmax(-1)
        else:
            log_p = quantized(sample["x"]).double().log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    for index, modality in enumerate(counts):
        assert result.by_modality[modality].kl == pytest.approx(
            kl[ids == index].mean().item(), rel=1e-9
        )


def test_declared_modalities_of_the_wrong_shape_are_refused():
    sample = {
        "x": torch.randn(2, 4, 16),
        "modality_ids": torch.zeros(2, 3, dtype=torch.long),
        "labels": torch.zeros(2, 4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=r"modality ids of shape \(2, 3\) for logits"):
        evaluate(tiny_models.PlainModel(), [sample], progress=False)


def test_the_method_is_read_from_the_config():
    model = Table(0)
    model.config.quantization_config = SimpleNamespace(
        quant_type=SimpleNamespace(method="masquant")
    )
    assert evaluate(model, [_sample([[1, 2]])], progress=False).method == "masquant"


def test_the_method_is_known_before_and_after_a_folder(tmp_path):
    model = tiny_models.quantized(tiny_models.qwen25_vl(), method="smoothquant")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert method_of(model) == method_of(again) == "smoothquant"


def test_a_file_of_before_name_and_date_is_read(tmp_path):
    found = evaluate(Table(0), [_sample([[1, 2]])], progress=False)
    assert found.date == datetime.date.today().isoformat()
    data = found.to_json()
    old = {k: v for k, v in data.items() if k not in ("name", "date")}
    assert Evaluation.from_json(old) == dataclasses.replace(found, name=None, date=None)
    del old["tasks"]
    with pytest.raises(ValueError, match="Evaluation holds the fields"):
        Evaluation.from_json(old)


def test_the_digits_model_scores_as_its_own_evaluation_says():
    model = digits.load_model("outliers")

    def samples(task):
        for batch in digits.heldout_batches(task, 100, append_answer=True):
            labels = torch.full_like(batch.inputs["input_ids"], -100)
            labels[:, -1] = batch.answer_ids
            yield {**batch.inputs, "labels": labels}

    tasks = ("text", "both")
    result = evaluate(model, {task: samples(task) for task in tasks}, progress=False)
    examples = {task: digits.heldout()[task] for task in tasks}
    expected = digits.evaluate(model, examples=examples)
    for task in tasks:
        score = result.tasks[task]
        assert score.examples == score.tokens == 200
        assert score.accuracy == expected[task].accuracy
        # Float32 logits; one more token behind the answer's changes the summation.
        assert score.cross_entropy == pytest.approx(
            expected[task].cross_entropy, abs=1e-5
        )
    assert list(result.by_content) == ["text", "text+vision+audio"]
