# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where a smoothing factor can go, so that nothing divides by it at run time.

Into the weight of the norm whose output linears read; into the rows of ``v_proj``, which
``o_proj`` reads a weighted mean of; into those of ``up_proj``, which ``down_proj`` reads
times what the gate lets through. What a model does in between, and who else reads it, is
tried out: a call whose factors are powers of two gives the same bits with them.
"""

import contextlib
import re
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchao_masquant.models.parts import find_decoder

__all__ = ["Fold", "find_folds", "folded_norm"]

# Names of linears side by side: the second reads channels of the first, each times
# something that the first does not decide.
_LINEAR_IN_BETWEEN = (
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("up_proj", "down_proj"),
)

# A weight of (1 + w) is known to no better than w is: it stays above this.
_LEAST = 0.5


@dataclass(frozen=True)
class Fold:
    """A module that can take the factor of linears into its weight.

    Attributes:
        source: name of a norm, or of a linear, whose output is divided by the factor.
        readers: names of all linears that read it.
        channels: (K,) which channel of the source each input channel of the readers is;
            those that are one have one factor.
    """

    source: str
    readers: tuple[str, ...]
    channels: torch.Tensor


@torch.no_grad()
def find_folds(
    model: nn.Module, linears: Mapping[str, nn.Linear], run: Callable[[], object]
) -> list[Fold]:
    """Where the factors of linears can go.

    Args:
        model: that holds them; left as it was.
        linears: name in the model to module, dense or quantized.
        run: calls the model, once or more, always with the same tokens. Whoever reads the
            output of a norm must be called by it: what sees images alone, by an image.
    """
    found = [*_norm_folds(model, linears, run), *_linear_folds(model, linears)]
    kinds: dict[tuple[str, str], list[Fold]] = defaultdict(list)
    for fold in found:
        kinds[_kind(fold.source), _kind(fold.readers[0])].append(fold)
    if not kinds:
        return []
    expected = _results(model, run)
    kept: list[Fold] = []
    for folds in kinds.values():
        with _scaled(model, folds):
            results = _results(model, run)
        if expected and all(map(torch.equal, results, expected)):
            kept.extend(folds)
    return kept


def folded_norm(
    norm: nn.Module, factor: torch.Tensor
) -> Optional[tuple[dict[str, torch.Tensor], float]]:
    """Parameters with which a norm's output is divided by a factor.

    Args:
        norm: whose ``weight`` (K,), or one more than that, multiplies its output.
        factor: (K,) positive.

    Returns:
        Name to the parameter, in float64, and a number that the output is divided by
        besides; None where the weight is none of the two.
    """
    factor = factor.detach().double().cpu()
    own = {
        n: p.detach().double().cpu() for n, p in norm.named_parameters(recurse=False)
    }
    weight = own["weight"]
    more = {"bias": own["bias"] / factor} if own.get("bias") is not None else {}
    plain = {"weight": weight / factor, **more}
    if _divides(norm, plain, factor):
        return plain, 1.0
    wanted = (1 + weight) / factor
    least = wanted.abs().min().item()
    besides = min(1.0, least / _LEAST) if least > 0 else 1.0
    shifted = {
        "weight": wanted / besides - 1,
        **{n: p / besides for n, p in more.items()},
    }
    if _divides(norm, shifted, factor * besides):
        return shifted, besides
    return None


def _divides(
    norm: nn.Module, parameters: Mapping[str, torch.Tensor], factor: torch.Tensor
) -> bool:
    """Whether a norm with these parameters gives what it gives, divided by a factor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(factor), generator=generator, dtype=torch.float64)
    own = {
        n: p.detach().double().cpu() for n, p in norm.named_parameters(recurse=False)
    }
    try:
        before = torch.func.functional_call(norm, own, x)
        after = torch.func.functional_call(norm, dict(parameters), x)
    except (RuntimeError, TypeError):
        return False
    if not isinstance(before, torch.Tensor) or before.shape != x.shape:
        return False
    wanted, after = before.double() / factor, after.double()
    # Norms of transformers compute in float32.
    return bool(torch.allclose(after, wanted, rtol=1e-3, atol=1e-3 * _size(wanted)))


def _size(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _norm_folds(
    model: nn.Module, linears: Mapping[str, nn.Linear], run: Callable[[], object]
) -> list[Fold]:
    """Norms whose very output linears are called with."""
    made: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
    sources: dict[str, Optional[str]] = {}
    handles = []

    def remember(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            made[id(output)] = weakref.ref(output), name

    def look_up(name: str, args: tuple[Any, ...]) -> None:
        known = made.get(id(args[0])) if args else None
        source = known[1] if known is not None and known[0]() is args[0] else None
        # None for good where it is called with several.
        if sources.setdefault(name, source) != source:
            sources[name] = None

    for name, module in model.named_modules():
        if _is_norm(module):
            handles.append(
                module.register_forward_hook(
                    lambda _, __, output, name=name: remember(name, output)
                )
            )
    for name, linear in linears.items():
        handles.append(
            linear.register_forward_pre_hook(
                lambda _, args, name=name: look_up(name, args)
            )
        )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    readers: dict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        if source is not None:
            readers[source].append(name)
    return [
        Fold(source, tuple(names), torch.arange(linears[names[0]].in_features))
        for source, names in readers.items()
        if _takes_factors(model.get_submodule(source))
    ]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and next(module.children(), None) is None
    )


def _takes_factors(norm: nn.Module) -> bool:
    count = norm.get_parameter("weight").numel()
    return folded_norm(norm, 2.0 ** (torch.arange(count) % 3 - 1)) is not None


def _linear_folds(model: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[Fold]:
    for parent, module in model.named_modules():
        for first, second in _LINEAR_IN_BETWEEN:
            source, reader = getattr(module, first, None), f"{parent}.{second}"
            if not isinstance(source, nn.Linear) or reader not in linears:
                continue
            width = linears[reader].in_features
            channels = _repeated(source.out_features, width, module)
            if channels is not None:
                yield Fold(f"{parent}.{first}", (reader,), channels)


def _repeated(count: int, width: int, attention: nn.Module) -> Optional[torch.Tensor]:
    """Which of ``count`` channels each of ``width`` is, where heads are repeated."""
    if count == width:
        return torch.arange(count)
    size = getattr(attention, "head_dim", None)
    if not isinstance(size, int) or count % size or width % count:
        return None
    heads = torch.arange(count).unflatten(0, (-1, 1, size))
    return heads.expand(-1, width // count, size).flatten()


def _kind(name: str) -> str:
    """A name without numbers: what is alike in all blocks is tried together."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@contextlib.contextmanager
def _scaled(model: nn.Module, folds: Sequence[Fold]) -> Iterator[None]:
    """Divide what sources give, and multiply what readers take, by powers of two."""
    generator = torch.Generator().manual_seed(0)
    handles = []
    for fold in folds:
        count = int(fold.channels.max()) + 1
        factor = 2.0 ** torch.randint(-1, 2, (count,), generator=generator)
        repeated = factor[fold.channels]
        handles.append(
            model.get_submodule(fold.source).register_forward_hook(
                lambda _, __, output, by=factor: output / by.to(output)
            )
        )
        for name in fold.readers:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, by=repeated: (args[0] * by.to(args[0]), *args[1:])
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _results(model: nn.Module, run: Callable[[], object]) -> list[torch.Tensor]:
    """The hidden states that the decoder gives in one run, of each of its calls."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        # Keys and values, which come behind them, are scaled where v_proj is.
        first = next(
            (t for t in tree_leaves(output) if isinstance(t, torch.Tensor)), None
        )
        if first is not None:
            found.append(first.clone())

    decoder = find_decoder(model)
    handle = (model if decoder is None else decoder.module).register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return found
