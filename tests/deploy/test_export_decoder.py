# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tutorial's decoder, compiled ahead, in a process that has torch alone."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from pages import ROOT, run_blocks
from tiny_models import PlainModel, batch, quantized, qwen25_vl, token_row
from torch import nn

from torchao_masquant import token_modalities
from torchao_masquant.deploy import export_decoder, write_package
from torchao_masquant.routing import router_of

# Two prompts of a mixed call, one of text alone.
PROMPTS = [
    [21, "image", 22, 23],
    [30, 31, "small image", 32, 33, 34, "image", 35, 36, 37],
    [24, 25, 26, 27, 28],
]
ANSWER = [40, 41, 42]

_SCRIPT = """
import json
import sys
folder, calls, results = sys.argv[1:]
sys.path.insert(0, folder)
import torch
from masquant_decoder import Decoder

torch.set_num_threads(1)
decoder = Decoder(folder, slots=29)
found = []
for call in torch.load(calls):
    decoder.reset()
    embeds = decoder.embed(call["input_ids"], call["features"])
    ids = decoder.modality_ids(call["input_ids"])
    logits = [decoder.prefill(embeds, ids, call["position_ids"])]
    for token in call["answer"]:
        logits.append(decoder.decode(torch.tensor([[token]])))
    first = decoder.generate(call["input_ids"], call["features"],
                             call["position_ids"], max_new_tokens=2)
    found.append({"embeds": embeds, "ids": ids, "logits": logits, "tokens": first})
torch.save(found, results)
for name in ("torchao_masquant", "torchao", "transformers", "numpy.testing", "safetensors"):
    assert name not in sys.modules, name
for token in [5] + [21] * 29:
    try:
        decoder.decode(torch.tensor([[token]]))
    except ValueError as error:
        print(error)
call = torch.load(calls)[0]
try:
    decoder.embed(call["input_ids"], call["features"][1:])
except ValueError as error:
    print(error)
# Another torch, another format.
facts = json.loads(open(folder + "/decoder.json").read())
for changed in ({"torch": "2.0.0"}, {"format": 99}):
    with open(folder + "/decoder.json", "w") as file:
        json.dump({**facts, **changed}, file)
    try:
        Decoder(folder)
    except ValueError as error:
        print(error)
with open(folder + "/decoder.json", "w") as file:
    json.dump(facts, file)
"""


def positions(length: int) -> torch.Tensor:
    """Neither all alike nor one after the other, as those of an image: fewer than tokens."""
    steps = torch.arange(length)
    return torch.stack((steps - steps // 4, steps // 2, steps - steps // 3))[:, None]


def call_of(parts: list[Any]) -> dict[str, Any]:
    ids = torch.tensor([token_row(parts)])
    features = torch.randn(int((ids == 5).sum()), 64)
    # Images are loud, so that it shows where they are taken for text.
    features[:, [3, 11]] = torch.tensor([30.0, -20.0])
    return {
        "input_ids": ids,
        "features": features if len(features) else None,
        "position_ids": positions(ids.shape[1]),
        "answer": ANSWER,
    }


@torch.no_grad()
def eager(model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """The same by the model itself, without a cache: the whole sequence each time."""
    ids = call["input_ids"]
    modality_ids = router_of(model).ids_of(ids)
    embeds = model.get_input_embeddings()(ids)
    if modality_ids is None:
        modality_ids = torch.zeros_like(ids)
    else:
        embeds[modality_ids != 0] = call["features"]
    logits, whole, positions, routed = [], embeds, call["position_ids"], modality_ids
    for token in [*call["answer"], None]:
        with token_modalities(model, routed):
            output = model(inputs_embeds=whole, position_ids=positions, use_cache=False)
        logits.append(output.logits[:, -1:])
        if token is not None:
            step = model.get_input_embeddings()(torch.tensor([[token]]))
            whole = torch.cat((whole, step), 1)
            positions = torch.cat(
                (positions, positions.max() + torch.ones(3, 1, 1, dtype=torch.int64)), 2
            )
            routed = torch.cat((routed, torch.zeros_like(routed[:, :1])), 1)
    return {"embeds": embeds, "ids": modality_ids, "logits": logits}


def run(folder: Path, calls: list[dict[str, Any]], scratch: Path) -> tuple[Any, str]:
    torch.save(calls, scratch / "calls.pt")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, folder, scratch / "calls.pt", scratch / "r.pt"],
        capture_output=True,
        text=True,
        # A folder from which nothing else can be imported by accident.
        cwd=scratch,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(scratch / "r.pt"), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch.export finds no bounds for the cache before 2.13",
)
def test_a_process_with_torch_alone_gives_the_model_s_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = run_blocks(ROOT / "tutorials" / "deploy_with_aotinductor.md")
    model, folder = made["model"], tmp_path / "package"
    # Linears that share their rotated input with others, and ones that do not.
    assert {layer.hadamard_size for layer in made["recipe"].layers.values()} != {None}
    torch.manual_seed(0)
    calls = [call_of(parts) for parts in PROMPTS]
    wanted = [eager(model, call) for call in calls]
    found, said = run(folder, calls, tmp_path)
    for ours, theirs in zip(found, wanted):
        assert torch.equal(ours["embeds"], theirs["embeds"])
        assert torch.equal(ours["ids"], theirs["ids"])
        assert len(ours["logits"]) == len(theirs["logits"]) == len(ANSWER) + 1
        for a, b in zip(ours["logits"], theirs["logits"]):
            # Single activations may be rounded otherwise.
            assert (a - b).norm() <= 2e-3 * b.norm()
        assert ours["tokens"][0, 0] == ours["logits"][0].argmax()
    # The bound means something: with its images taken for text a prompt is far off.
    confused = dict(calls[0], input_ids=torch.where(calls[0]["input_ids"] == 5, 21, 22))
    confused["features"] = None
    with torch.no_grad(), token_modalities(model, None):
        wrong = model(
            inputs_embeds=wanted[0]["embeds"], position_ids=calls[0]["position_ids"]
        ).logits[:, -1:]
    right = wanted[0]["logits"][0]
    assert (wrong - right).norm() > 1e-2 * right.norm()
    assert "there are 29 slots: make the Decoder with more" in said
    assert "token [5] stands for an image or a sound: give it to prefill" in said
    assert re.search("4 placeholders .* there are 3 features", said)
    assert "was compiled with torch 2.0.0" in said
    assert "has the format 99" in said

    facts = json.loads((folder / "decoder.json").read_text())
    assert facts["modalities"] == ["text", "vision"] and facts["position_rows"] == 3
    # Weights lie there once: those of the towers, and what only Python reads, do not.
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert not [name for name in weights if "visual" in name]
    integers = sum(w.numel() for w in weights.values() if w.dtype == torch.uint8)
    linears = [m for m in model.get_decoder().modules() if hasattr(m, "routed")]
    assert integers == sum(linear.weight.qdata.numel() for linear in linears)
    # Nothing half made is left beside it.
    files = {p.name for p in tmp_path.iterdir() if p.suffix != ".pt"}
    assert files == {"package"}


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = quantized(PlainModel(), scheme="w8a8")

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with token_modalities(self.model, ids):
            return self.model(x)


@pytest.mark.slow
def test_a_program_of_your_own_without_any_library(tmp_path):
    """kernels="aten": the package and the weights are all there is."""
    model = Wide().eval()
    x, ids = torch.randn(1, 9, 16), torch.tensor([[0, 1, 2] * 3])
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(
        model, (x, ids), dynamic_shapes=({1: length}, {1: length}), strict=False
    )
    folder = write_package({"model": program}, tmp_path / "package", kernels="aten")
    assert {path.name for path in folder.iterdir()} == {
        "decoder.pt2",
        "weights.pt",
        "decoder.json",
        "masquant_decoder.py",
    }
    x, ids = torch.randn(1, 14, 16), torch.randint(0, 3, (1, 14))
    torch.save((x, ids), tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n"
        "from torch._inductor.package import load_package\n"
        "folder, inputs, result = sys.argv[1:]\n"
        "program = load_package(folder + '/decoder.pt2', 'model')\n"
        "weights = torch.load(folder + '/weights.pt', mmap=True, weights_only=True)\n"
        "program.load_constants(weights, check_full_update=True, user_managed=True)\n"
        "torch.save(program(*torch.load(inputs)), result)\n"
        "assert 'torchao_masquant' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, folder]
        + [tmp_path / "inputs.pt", tmp_path / "result.pt"],
        check=True,
        cwd=tmp_path,
    )
    with torch.no_grad():
        wanted = model(x, ids)
    torch.testing.assert_close(
        torch.load(tmp_path / "result.pt"), wanted, rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    model = qwen25_vl(layers=1)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(FileExistsError, match="is there already"):
        export_decoder(model, batch(PROMPTS[0]), taken)
    with pytest.raises(FileExistsError, match="is there already"):
        write_package({}, taken)
    with pytest.raises(ValueError, match="needs a program"):
        write_package({}, tmp_path / "new")
    with pytest.raises(TypeError, match="takes a transformers model, got a Linear"):
        export_decoder(nn.Linear(2, 2), {}, tmp_path / "new")
    with pytest.raises(ValueError, match="the sample has padding"):
        export_decoder(model, batch(PROMPTS[0], PROMPTS[1]), tmp_path / "new")
    with pytest.raises(ValueError, match="the sample has one token"):
        export_decoder(model, {"input_ids": torch.tensor([[21]])}, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}
