# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration sees of experts, and what it makes of it."""

import pytest
import torch
from expert_models import LAYOUTS, NAMES, E, H, MoEModel, sample, samples
from torch import nn

from torchao_masquant import Recipe, calibrate
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.models.experts import experts_of
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import weight_fingerprint
from torchao_masquant.routing import Router
from torchao_masquant.selection import select, select_linears
from torchao_masquant.solver.experts import recentered, solve_experts
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.expert_statistics import ExpertStatistics
from torchao_masquant.statistics.input_statistics import InputStatistics


def recipe_of(model: nn.Module, data=None, **options) -> Recipe:
    data = samples() if data is None else data
    return calibrate(model, data, modalities=NAMES, progress=False, **options)


@torch.no_grad()
def observed(model: MoEModel, data) -> CalibrationSession:
    router = Router(NAMES, skip_padding=True)
    session = CalibrationSession({}, router, True, experts_of(model))
    with session.observing(model):
        for one in data:
            router.call.known, router.call.ids = True, one["modality_ids"]
            model(one["x"])
    return session


@torch.no_grad()
def test_a_token_counts_once_before_its_experts_and_once_in_each():
    """Held to statistics of a loop over tokens and their experts. -2 is padding."""
    model = MoEModel()
    ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 2, 1, -2, 0]])
    one = sample(3, 11, ids)
    session = observed(model, [one])
    hidden = torch.tanh(model.first(one["x"]))[0]
    chosen, _ = model.choices(hidden)
    inner, owners = [], []
    for token, experts in enumerate(chosen.tolist()):
        for e in experts:
            both = model.experts.gate_up_proj[e] @ hidden[token]
            gate, up = both[: both.numel() // 2], both[both.numel() // 2 :]
            inner.append(gate * torch.sigmoid(gate) * up)
            owners.append(int(ids[0, token]))
    for name, tokens, modality in (
        ("experts.gate_up_proj", hidden, ids[0]),
        ("experts.down_proj", torch.stack(inner), torch.tensor(owners)),
    ):
        for index, moments in enumerate(session.statistics[name].moments):
            own = tokens[modality == index].double()
            assert moments.count == own.shape[0] > 0
            close = {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(moments.outer, own.t() @ own, **close)
            torch.testing.assert_close(moments.amax, own.amax(0), **close)
            torch.testing.assert_close(moments.sum, own.sum(0), **close)


def made_up(width: int) -> InputStatistics:
    statistics = InputStatistics(width, NAMES, torch.device("cpu"), True)
    generator = torch.Generator().manual_seed(5)
    for index in range(3):
        x = torch.randn(200, width, generator=generator)
        x = x * torch.randn(width, generator=generator).exp()
        statistics.update("x", x, torch.full((200,), index))
    return statistics


@pytest.mark.parametrize("method", ["masquant", "masquant-paper", "smoothquant", "rtn"])
def test_experts_are_solved_for_as_linears_that_share_an_input(method):
    weight = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    statistics = made_up(16)
    options = SolverOptions(scheme="w4a8", method=method, rank=3)
    layer = solve_experts("experts", weight, statistics, options)
    layer.check("experts", 3)
    assert layer.shape == (3, 20, 16)
    assert layer.fingerprint == weight_fingerprint(weight)
    group = {str(e): weight[e] for e in range(3)}
    for e, alone in enumerate(solve_group(group, statistics, options).values()):
        mine = layer.expert(e)
        assert mine.ranks == alone.ranks and mine.shape == alone.shape
        found, wanted = mine.tensors(), alone.tensors()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_the_second_projection_is_solved_for_without_each_experts_mean():
    """Against statistics of the tokens themselves, with the mean taken off."""
    generator = torch.Generator().manual_seed(4)
    statistics = ExpertStatistics(E, 6, NAMES[:2], torch.device("cpu"), True)
    direct = InputStatistics(6, NAMES[:2], torch.device("cpu"), True)
    # Expert 3 sees no token of the second modality.
    experts = torch.randint(0, E, (900,), generator=generator)
    ids = torch.where(experts == 3, 0, torch.randint(0, 2, (900,), generator=generator))
    x = torch.randn(900, 6, generator=generator)
    x = x + 50 * torch.randn(E, 2, 6, generator=generator)[experts, ids]
    # A channel that is constant in each expert.
    x[:, 5] = 10.0 * experts + ids
    for part in (slice(0, 600), slice(600, 610), slice(610, 900)):
        statistics.update_experts("x", x[part], ids[part], experts[part])
    found, means = recentered(statistics)
    wanted = torch.zeros(E, 2, 6, dtype=torch.float64)
    for e in range(E):
        for m in range(2):
            own = x[(experts == e) & (ids == m)].double()
            everyone = x[ids == m].double().mean(0)
            wanted[e, m] = (own.sum(0) + everyone) / (own.shape[0] + 1)
    torch.testing.assert_close(means, wanted)
    direct.update("x", (x - wanted[experts, ids]).float(), ids)
    for one, other, whole in zip(found.moments, direct.moments, statistics.moments):
        close = {"rtol": 1e-4, "atol": 1e-4}
        floor = 2.0**-8 * whole.absmax()
        assert one.count == other.count
        wanted_max = torch.maximum(other.absmax(), floor)
        torch.testing.assert_close(one.absmax(), wanted_max, **close)
        torch.testing.assert_close(one.mean(), other.mean(), **close)
        torch.testing.assert_close(one.covariance(), other.covariance(), **close)
        torch.testing.assert_close(one.sample, other.sample, **close)


def test_a_channel_that_is_constant_in_each_expert_has_no_covariance():
    statistics = ExpertStatistics(E, 4, ("text",), torch.device("cpu"), True)
    experts = torch.arange(400) % E
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 1e4
    statistics.update_experts("x", x, None, experts)
    (moments,) = recentered(statistics)[0].moments
    assert not moments.covariance()[1].any() and not moments.covariance()[:, 1].any()
    assert moments.covariance().diagonal()[[0, 2, 3]].gt(0.5).all()
    weight = torch.randn(E, 8, 4, generator=torch.Generator().manual_seed(1))
    layer = solve_experts("experts", weight, statistics, SolverOptions("w8a8"))
    # On no token is the outlier rounded: y = W z is a part of the bias.
    quantized = layer.quantize(weight, SolverOptions("w8a8").number_format, ("text",))
    order = torch.argsort(experts, stable=True)
    ends = torch.arange(1, E + 1) * 100
    y = torch.ops.masquant.expert_linear(x[order], quantized, ends)
    exact = (weight[experts[order]].double() @ x[order].double()[..., None])[..., 0]
    assert (y - exact).abs().max() < 0.2


def test_pairs_of_different_ranks_are_filled_up_with_zeros():
    weight = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    # What is rounded without an error has nothing to make up for.
    weight[1] = 0
    options = SolverOptions(scheme="w4a8", method="masquant-paper", rank=3)
    layer = solve_experts("experts", weight, made_up(16), options)
    assert layer.ranks == (3, 3)
    assert not layer.l1[1].any() and not layer.l2[1].any()
    assert layer.l1[0].any() and layer.l2[2].any()
    for bits in (8, 16):
        quantized = layer.quantize(weight, options.number_format, NAMES, bits)
        assert quantized.shape == weight.shape
        assert not quantized.dequantize(modality="audio")[1].any()


def test_rank_auto_is_the_same_share_for_all_experts():
    model = MoEModel()
    recipe = recipe_of(model, rank="auto", alpha=0.5, separation=1.0)
    # 5 % of 32 and of 24.
    assert recipe.layers["experts.gate_up_proj"].ranks == (2, 2)
    assert recipe.layers["experts.down_proj"].ranks == (1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_left_as_it_was(layout):
    model = MoEModel(layout)
    before = {n: p.clone() for n, p in model.named_parameters()}
    attributes = set(vars(model.experts))
    recipe = recipe_of(model, method="rtn")
    assert type(model.experts) is LAYOUTS[layout]
    assert set(vars(model.experts)) == attributes
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    first = "up_proj" if layout == "not gated" else "gate_up_proj"
    inner = 24 if layout == "not gated" else 48
    assert recipe.layers[f"experts.{first}"].shape == (E, inner, H)
    assert recipe.layers["experts.down_proj"].shape == (E, H, 24)


def test_passes_give_what_one_pass_gives():
    model = MoEModel()
    options = {"alpha": 0.5, "separation": 1.0}
    whole = recipe_of(model, **options)
    parts = recipe_of(model, max_statistics_bytes=1, **options)
    assert list(whole.layers) == list(parts.layers)
    for name, layer in whole.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, getattr(parts.layers[name], key)), (name, key)


def test_nan_in_a_token_of_an_expert():
    model = MoEModel()
    model.experts.gate_up_proj.data[2] = 1e30
    with pytest.raises(ValueError, match="^experts.down_proj: its input holds nan"):
        recipe_of(model)
    model = MoEModel()
    model.experts.down_proj.data[2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"^experts.down_proj\[2\]: its weight holds"):
        recipe_of(model)
    assert type(model.experts) is LAYOUTS["gated"]


def test_learning_is_not_for_experts():
    with pytest.raises(ValueError, match="exclude 'experts.*'|exclude '.*experts"):
        recipe_of(MoEModel(), epochs=1)


def test_groups_that_do_not_divide_the_inner_width():
    message = r"2 of 2 linears \(experts.gate_up_proj, experts.down_proj\): .*size=8"
    with pytest.raises(ValueError, match=message):
        recipe_of(MoEModel(), group_size=20, exclude="first")


def test_patterns_choose_experts_by_their_parameters():
    model = MoEModel()
    assert list(select(model).experts) == ["experts.gate_up_proj", "experts.down_proj"]
    assert list(select(model).linears) == ["first"]
    only = select(model, include="experts.*")
    assert not only.linears and len(only.experts) == 2
    without = select(model, exclude="re:experts\\..*")
    assert list(without.linears) == ["first"] and not without.experts
    for options in ({"include": "*.down_proj"}, {"exclude": "*.down_proj"}):
        with pytest.raises(ValueError, match="^experts are quantized as a whole, and "):
            select(model, **options)
    with pytest.raises(ValueError, match="leave experts alone, and no linear"):
        select_linears(model, include="experts.*")


def test_a_recipe_of_experts_is_saved_whole(tmp_path):
    recipe = recipe_of(MoEModel(), alpha=0.5, separation=1.0)
    recipe.save(tmp_path / "recipe.safetensors")
    loaded = Recipe.load(tmp_path / "recipe.safetensors")
    assert list(loaded.layers) == list(recipe.layers)
    for name, layer in recipe.layers.items():
        other = loaded.layers[name]
        assert (other.shape, other.ranks) == (layer.shape, layer.ranks)
        assert other.fingerprint == layer.fingerprint
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, getattr(other, key))


def test_readers_of_linears_alone_are_told_of_a_newer_format(tmp_path):
    from safetensors import safe_open

    for options, version in (({}, "3"), ({"exclude": "experts.*"}, "2")):
        recipe = recipe_of(MoEModel(), method="rtn", **options)
        recipe.save(tmp_path / "recipe.safetensors")
        with safe_open(tmp_path / "recipe.safetensors", framework="pt") as file:
            assert file.metadata()["format_version"] == version


def test_parts_that_contradict_each_other():
    recipe = recipe_of(MoEModel(), alpha=0.5, separation=1.0)
    layer = recipe.layers["experts.down_proj"]
    layer.l1 = layer.l1[:3]
    message = r"l1 of experts.down_proj is of shape \(3, 24, 2\), it should be \(4, 24"
    with pytest.raises(ValueError, match=message):
        Recipe(recipe.options, recipe.modalities, recipe.layers)


@pytest.mark.parametrize("budget", ["2 bits", "10 bits"])
def test_a_budget_is_refused_however_large(budget):
    with pytest.raises(ValueError, match="a budget is for linears alone"):
        recipe_of(MoEModel(), scheme="w4a8", budget=budget)
