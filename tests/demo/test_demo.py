# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The demonstration: its table, its report, its options."""

import functools
import json
import shutil

import pytest
import torch
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config
from torchao_masquant.__main__ import main
from torchao_masquant.demo import checkpoint, compare, reload, table
from torchao_masquant.demo.compare import METHODS, SCHEMES, Row
from torchao_masquant.evaluation.tables import to_text
from torchao_masquant.testing import digits


@pytest.mark.slow
def test_the_whole_demonstration(tmp_path, monkeypatch, capsys):
    # A part of the calibration data, and of the held-out examples; a few for the linears.
    samples = digits.calibration_samples(48)
    monkeypatch.setattr(digits, "calibration_samples", lambda: samples)
    monkeypatch.setattr(compare, "_SQNR_EXAMPLES", 6)
    some = {
        task: examples.select(slice(0, len(examples) // 4))
        for task, examples in digits.heldout().items()
    }
    monkeypatch.setattr(
        digits, "evaluate", functools.partial(digits.evaluate, examples=some)
    )
    assert main(["demo", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outliers_trained_in"] is True
    assert report["reloaded"]["bit_identical"] is True
    assert report["reloaded"]["compiled_same_answers"] == 1
    assert report["reloaded"]["graph_breaks"] == 0

    rows = {(row["scheme"], row["method"]): row for row in report["rows"]}
    assert set(rows) == {("dense", "")} | {(s, m) for s in SCHEMES for m in METHODS}
    dense = rows["dense", ""]["accuracy"]
    # The paper's headline, on the model with trained-in outliers: with 4-bit
    # activations one factor for all tokens goes deaf, a factor per modality does not.
    assert rows["w4a4", "smoothquant"]["accuracy"]["audio"] < 0.5
    assert rows["w4a4", "masquant"]["accuracy"]["audio"] > dense["audio"] - 0.03
    for scheme in SCHEMES:
        ours, paper = rows[scheme, "masquant"], rows[scheme, "masquant-paper"]
        smoothquant = rows[scheme, "smoothquant"]
        for modality in ("vision", "audio"):
            assert ours["sqnr"][modality] > paper["sqnr"][modality] + 3
            assert ours["sqnr"][modality] > smoothquant["sqnr"][modality]
        for task, accuracy in ours["accuracy"].items():
            assert accuracy > dense[task] - 0.03
        assert ours["weight_bytes"] < rows["dense", ""]["weight_bytes"]
    # What was printed is what was reported.
    printed = capsys.readouterr().out
    sqnr = rows["w4a4", "masquant"]["sqnr"]
    assert " ".join(f"{value:>5.1f}" for value in sqnr.values()) in printed
    assert "trained in on purpose" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--variant", "loud"], "invalid choice: 'loud'"),
        (["demo", "--rank", "five"], "'five' is no rank"),
        (["demo", "--rank", "-1"], "rank must not be negative"),
        (["demo", "--json", "nowhere/report.json"], "there is no folder 'nowhere'"),
        (["dmeo"], "invalid choice: 'dmeo'"),
    ],
)
def test_a_typo_gets_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_table_shows_every_number_of_a_row():
    rows = [
        Row("dense", "", {"image": 1.0}, {"image": 0.25}, 4096),
        Row("w8a8", "rtn", {"image": 0.5}, {"image": 1.5}, 2048, 3.25, {"text": 40.04}),
    ]
    lines = to_text(table.render(rows, "title")).splitlines()
    dense = next(line for line in lines if "dense" in line)
    assert dense.split() == ["dense", "100.0", "0.250", "4"]
    rtn = next(line for line in lines if "w8a8" in line)
    assert rtn.split() == [
        "w8a8",
        "round-to-nearest",
        "50.0",
        "1.500",
        "40.0",
        "2",
        "3.2",
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized model, and the folder that it was saved to; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    model = digits.load_model("outliers")
    samples = digits.calibration_samples(8)
    quantize_(model, masquant_config(calibrate(model, samples, progress=False)))
    checkpoint.save(model, "w4a8", folder)
    return model, folder


def test_saved_model_reloads_bit_identical_here_too(saved):
    model, folder = saved
    linears = list(model.get_decoder().layers.parameters())
    assert (folder / "model.pt").stat().st_size < sum(p.numel() * 4 for p in linears)
    loaded = checkpoint.load(folder)
    with torch.no_grad():
        for inputs in checkpoint.prompts().values():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    # No temporary file is left.
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_reload_tells_a_changed_model(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved[1], tmp_path / "changed")
    weights = folder / "model.pt"
    state = torch.load(weights, weights_only=True)
    state["lm_head.weight"][3] += 1
    torch.save(state, weights)
    # Whether logits are the same is what is asked here, not what they compile to.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    with torch.no_grad():
        assert reload.main(folder)["bit_identical"] is False


def test_dense_bytes_are_those_of_the_decoder_in_bfloat16():
    row = compare.dense_row(digits.load_model("plain"))
    # 4 layers: q 256, k and v 128, o 256, gate, up and down 768 by 256.
    assert row.weight_bytes == 2 * 4 * 256 * (256 + 2 * 128 + 256 + 3 * 768)
