# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a plan says, against quantized models and against reckoning by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from torchao_masquant import SCHEMES, MASQuantLinear, MASQuantTensor
from torchao_masquant.__main__ import main
from torchao_masquant.options import SolverOptions
from torchao_masquant.planning.estimate import (
    CalibrationPlan,
    plan_calibration,
    plan_inference,
    statistics_bytes,
)
from torchao_masquant.planning.skeleton import InputGroup, read_skeleton
from torchao_masquant.solver.cost import solver_bytes
from torchao_masquant.weight_bytes import Compensation, weight_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    model = tiny_models.qwen25_vl()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    return str(path)


#: of a layer: q/k/v, o, gate/up and down
GROUPS = [(64, (64, 32, 32)), (64, (64,)), (64, (96, 96)), (96, (64,))]
OPTIONS = SolverOptions(alpha=0.5, separation=1.0)


def make(scheme: Any, n: int, k: int, compensation: Compensation) -> MASQuantTensor:
    modalities = ("text", "vision", "audio")[: compensation.modalities]
    others = len(modalities) - 1
    rank = compensation.rank
    full = rank if isinstance(rank, int) else max(1, round(rank * min(n, k)))
    rank = full if compensation.rank and others else 0
    shifted = compensation.shift and scheme.act_bits != 16
    return MASQuantTensor.from_hp(
        torch.randn(n, k),
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        modalities=modalities,
        smoothing_factor=torch.ones(len(modalities), k),
        ranks=(rank,) * others if rank else (),
        l1=torch.randn(k, rank * others) if rank else None,
        l2=torch.randn(rank * others, n) if rank else None,
        modality_bias=torch.zeros(len(modalities), n) if compensation.bias else None,
        act_shift=torch.zeros(len(modalities), k) if shifted else None,
        low_rank_bits=compensation.low_rank_bits,
        weight_format=scheme.weight_format,
        act_format=scheme.act_format,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "compensation",
    [
        Compensation(3, 0.1),
        Compensation(2, 3, low_rank_bits=8),
        Compensation(3, 0),
        Compensation(1, 3),
    ],
    ids=["a share", "pairs of int8", "no pairs", "one modality"],
)
def test_bytes_are_exact(scheme: str, compensation: Compensation) -> None:
    # An odd width, of which packed integers leave half a byte.
    n, k = 24, 256 if SCHEMES[scheme].group_size else 35
    weight = make(SCHEMES[scheme], n, k, compensation)
    assert weight_bytes(n, k, SCHEMES[scheme], compensation) == weight.nbytes_stored


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "fp8", "nvfp4"])
def test_bytes_of_a_shard_are_exact(scheme: str) -> None:
    compensation = Compensation(3, 4)
    n, k = 24, 512
    weight = make(SCHEMES[scheme], n, k, compensation)
    for sharded, piece in (("rows", weight[:12]), ("columns", weight[:, :256])):
        assert piece.nbytes_stored == weight_bytes(
            n, k, SCHEMES[scheme], compensation, ranks=2, sharded=sharded
        )


def test_skeleton_is_the_model(folder: str) -> None:
    skeleton = read_skeleton(folder)
    model = tiny_models.quantized(tiny_models.qwen25_vl(), scheme="w4a8")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, MASQuantLinear)}
    assert {x.name: (x.n, x.k) for x in skeleton.linears} == {
        name: tuple(m.weight.shape) for name, m in linears.items()
    }
    assert skeleton.modalities == ("text", "vision")
    assert skeleton.blocks == 2 and skeleton.kv_heads == 2 and skeleton.head_dim == 16
    dense = tiny_models.qwen25_vl()
    assert skeleton.values == sum(p.numel() for p in dense.parameters())
    layer = dense.get_decoder().layers[0]
    assert skeleton.block_values == sum(p.numel() for p in layer.parameters())
    assert [(g.k, g.outputs) for g in skeleton.groups] == 2 * GROUPS
    head = dense.lm_head
    assert (skeleton.head.n, skeleton.head.k) == tuple(head.weight.shape)
    styles = {x.name.rpartition(".")[2]: x.sharded for x in skeleton.linears}
    assert styles["q_proj"] == styles["up_proj"] == "rows"
    assert styles["o_proj"] == styles["down_proj"] == "columns"
    # All that the quantized model holds, to the byte.
    plan = plan_inference(skeleton, SCHEMES["w4a8"], Compensation(2), context=8)
    others = sum(
        p.numel() * p.element_size()
        for p in model.parameters()
        if not isinstance(p.data, MASQuantTensor)
    )
    stored = sum(m.weight.data.nbytes_stored for m in linears.values())
    assert plan.weight_bytes == others + stored


def test_statistics_are_exact() -> None:
    from torchao_masquant.statistics.input_statistics import InputStatistics

    statistics = InputStatistics(40, ("text", "vision"), torch.device("cpu"), True)
    for index in range(2):
        x = torch.randn(256, 40)
        statistics.update("x", x, torch.full((256,), index))
    held = sum(
        t.nbytes
        for m in statistics.moments
        for t in (m.amin, m.amax, m.sum, m.outer, m.sample)
        if t is not None
    )
    assert statistics_bytes([InputGroup("", 40, (8,))], 2) == held


def held(k: int) -> int:
    """Statistics of an input for two modalities."""
    return 2 * (8 * k * k + 24 * k + 1024 * k)


def workspace(k: int, outputs: tuple[int, ...]) -> int:
    values = k * sum(outputs)
    return max(solver_bytes(n, k, values, 2, OPTIONS) for n in outputs)


def calibration(folder: str, **more: Any) -> CalibrationPlan:
    arguments = {"samples": 10, "tokens": 100, "options": OPTIONS, **more}
    return plan_calibration(
        read_skeleton(folder), SCHEMES["w4a8"], Compensation(2), **arguments
    )


def test_memory_of_calibration_by_hand(folder: str) -> None:
    plan = calibration(folder)
    assert plan.statistics_bytes == sum(held(k) for k, _ in GROUPS)
    assert plan.workspace_bytes == max(workspace(k, n) for k, n in GROUPS)
    # The statistics of an input go as it is solved for, and its integers come.
    solving = max(
        sum(held(k) for k, _ in GROUPS[i:])
        + workspace(*GROUPS[i])
        + sum(k * sum(outputs) for k, outputs in GROUPS[:i])
        for i in range(4)
    )
    assert plan.device_bytes == max(plan.front_bytes, plan.block_bytes + solving)
    dense = tiny_models.qwen25_vl()
    front = [dense.model.visual, dense.get_decoder().embed_tokens]
    counted = sum(p.numel() * 4 for m in front for p in m.parameters())
    # The norms of two layers and of the decoder, and biases of q, k and v.
    assert plan.front_bytes == counted + 4 * (5 * 64 + 2 * 128)
    assert plan.activation_bytes == 2 * 10 * 100 * 64 * 4


def test_statistics_that_do_not_fit_are_made_in_passes(folder: str) -> None:
    bound = held(64) * 2
    plan, whole = calibration(folder, max_statistics_bytes=bound), calibration(folder)
    # Two of 64 channels, then the third of them, then one of 96, alone beyond the bound.
    assert plan.statistics_bytes == max(2 * held(64), held(96))
    assert plan.device_bytes < whole.device_bytes


def test_sharing_needs_whole_heads(folder: str) -> None:
    skeleton = read_skeleton(folder)

    def reason(devices: int, scheme: str = "w4a8") -> Any:
        return plan_inference(
            skeleton,
            SCHEMES[scheme],
            Compensation(2),
            context=8,
            devices=devices,
        ).reason

    assert reason(2) is None
    assert reason(4) == "4 devices can't share 2 kv heads"
    assert reason(3) == "3 devices can't share 4 heads"
    assert "groups of 128 do not divide the 64 channels" in reason(1, "w4a16")


def test_two_devices_hold_about_half(folder: str) -> None:
    skeleton = read_skeleton(folder)
    one, two = (
        plan_inference(skeleton, None, Compensation(2), context=8, devices=devices)
        for devices in (1, 2)
    )
    linears = sum(x.n * x.k for x in skeleton.linears) + skeleton.sharded_others
    assert one.device_weight_bytes - two.device_weight_bytes == linears * 4 // 2
    assert two.sent_bytes == 4 * 2 * 64 * 4 / 2 and one.sent_bytes == 0
    # Sums of statistics are sent, where devices share the samples.
    assert calibration(folder).reduced_bytes == 0
    summed = 2 * sum(held(k) for k, _ in GROUPS)
    assert calibration(folder, devices=2).reduced_bytes == summed


def run(*arguments: str) -> int:
    return main(["plan", *arguments])


def test_command(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--devices", "2", "--memory", "1GiB") == 0
    printed = capsys.readouterr().out
    for word in ("w4a8", "Calibration", "fits", "vision", "2 devices"):
        assert word in printed
    assert run(folder, "--json", "--machine", "h100") == 0
    printed = capsys.readouterr()
    # Scripts that ask for the seconds of a machine go on, and are told.
    assert printed.err == "--machine has no effect: a plan tells no seconds.\n"
    record = json.loads(printed.out)
    assert [row["scheme"] for row in record["inference"]] == ["dense", *SCHEMES]
    assert record["calibration"]["device_bytes"] > 0
    # What each weight gets of "auto" is its data's to say; on average it is as much.
    assert run(folder, "--json", "--rank", "auto") == 0
    auto = json.loads(capsys.readouterr().out)
    for row, other in zip(auto["inference"], record["inference"]):
        assert row["weight_bytes"] == other["weight_bytes"]
    assert run(folder, "--memory", "10K") == 1
    assert "too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [("no such model", "there is no folder"), ("empty", "has no config.json")],
)
def test_errors_are_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(str(tmp_path / name)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--devices", "0"], ["--memory", "much"], ["--rank", "1.5"], ["--rank", "-1"]],
)
def test_bad_options(folder: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(folder, *arguments)
    assert raised.value.code == 2


def test_the_model_that_comes_along_is_planned_by_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("digits") == 0
    assert "28 linears to quantize" in capsys.readouterr().out
