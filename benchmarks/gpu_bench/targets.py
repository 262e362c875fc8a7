# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Ratios of what was measured, and which targets they meet."""

from dataclasses import dataclass
from typing import Callable, Iterator, Optional

from gpu_bench.plan import BF16, BF16_FUSED, PRODUCT, SCHEME_NAMES, TORCHAO

__all__ = ["Row", "Target", "ratios", "targets"]


@dataclass(frozen=True)
class Row:
    """One candidate of one step.

    Attributes:
        step: its number; only candidates of one step were measured in turn.
        linear: which linears of which models have the shape.
        in_features: K.
        out_features: N, of all linears.
        tokens: M.
        candidate: its name.
        graph: microseconds of its kernels.
        eager: microseconds when called from Python.
        rounds: of which these are the medians.
        paper: microseconds that the card takes at least; None for a card whose peaks
            are not known.
        error: of the result, relative.
        wrong: whether the error is too large for what it computes.
    """

    step: int
    linear: str
    in_features: int
    out_features: int
    tokens: int
    candidate: str
    graph: float
    eager: float
    rounds: int
    paper: Optional[float]
    error: float
    wrong: bool

    @property
    def of_paper(self) -> Optional[float]:
        """Share of the roofline that it reaches."""
        return None if self.paper is None else self.paper / self.graph


@dataclass(frozen=True)
class Target:
    """A ratio to reach wherever it was measured.

    Attributes:
        name: in words.
        least: ratio.
        worst: of those measured; None where none was.
        where: the worst was.
        measured: how many were.
        met: how many of them reach it.
    """

    name: str
    least: float
    worst: Optional[float]
    where: str
    measured: int
    met: int

    @property
    def verdict(self) -> str:
        """ "met", "missed" or "not measured"."""
        if self.worst is None:
            return "not measured"
        return "met" if self.met == self.measured else "missed"


def _steps(rows: list[Row]) -> Iterator[dict[str, Row]]:
    steps: dict[int, dict[str, Row]] = {}
    for row in rows:
        steps.setdefault(row.step, {})[row.candidate] = row
    yield from steps.values()


def _is_ours(candidate: str) -> bool:
    return candidate.partition(" ")[0] in SCHEME_NAMES


def ratios(rows: list[Row]) -> list[dict[str, object]]:
    """Of each of our candidates, how many times faster it is than what ran beside it."""
    found = []
    for step in _steps(rows):
        for name, row in step.items():
            if not _is_ours(name):
                continue
            entry: dict[str, object] = {
                "linear": row.linear,
                "in_features": row.in_features,
                "out_features": row.out_features,
                "tokens": row.tokens,
                "candidate": name,
            }
            for other in (BF16, BF16_FUSED, *TORCHAO):
                if other in step:
                    for how in ("graph", "eager"):
                        ratio = getattr(step[other], how) / getattr(row, how)
                        entry[f"over {other}, {how}"] = round(ratio, 3)
            found.append(entry)
    return found


Choice = Callable[[dict[str, Row]], Optional[float]]


def _over(ours: str, other: str, tokens: Callable[[int], bool]) -> Choice:
    def ratio(step: dict[str, Row]) -> Optional[float]:
        if ours not in step or other not in step or not tokens(step[ours].tokens):
            return None
        return step[other].graph / step[ours].graph

    return ratio


def _of_paper(ours: str, tokens: Callable[[int], bool]) -> Choice:
    def share(step: dict[str, Row]) -> Optional[float]:
        if ours not in step or not tokens(step[ours].tokens):
            return None
        return step[ours].of_paper

    return share


def _fastest_w4(step: dict[str, Row]) -> Optional[float]:
    found = [
        ratio
        for scheme in ("w4a8", "w4a16")
        if (ratio := _over(f"{scheme} base", BF16, lambda m: m == 1)(step)) is not None
    ]
    return max(found, default=None)


def _roofline(step: dict[str, Row]) -> Optional[float]:
    found = [
        row.of_paper
        for name, row in step.items()
        if _is_ours(name) and row.of_paper is not None
    ]
    return min(found, default=None)


def _fastest(step: dict[str, Row]) -> Optional[float]:
    """The fastest scheme, base-only, over bf16."""
    found = [
        ratio
        for scheme in SCHEME_NAMES
        if (ratio := _over(f"{scheme} base", BF16, lambda m: True)(step)) is not None
    ]
    return max(found, default=None)


# All of them on the kernels alone: ratios of times in CUDA graphs.
_TARGETS: tuple[tuple[str, float, Choice], ...] = (
    (
        "w8a8 over bf16, base-only, 2048 tokens or more",
        1.6,
        _over("w8a8 base", BF16, lambda m: m >= 2048),
    ),
    (
        "w8a8 over bf16, half vision, 2048 tokens or more",
        1.45,
        _over("w8a8 half vision", BF16, lambda m: m >= 2048),
    ),
    (
        "w4a8 over w8a8, base-only, 2048 tokens or more",
        0.9,
        _over("w4a8 base", "w8a8 base", lambda m: m >= 2048),
    ),
    ("w8a8 over bf16, one token", 1.7, _over("w8a8 base", BF16, lambda m: m == 1)),
    ("w4 (the faster of a8 and a16) over bf16, one token", 2.8, _fastest_w4),
    (
        "w8a8 over torchao SmoothQuant, base-only",
        1.25,
        _over("w8a8 base", TORCHAO[0], lambda m: True),
    ),
    (
        "w8a8 base-only over all vision, that is at most 10 % of low-rank work",
        1 / 1.1,
        _over("w8a8 all vision", "w8a8 base", lambda m: True),
    ),
    (
        "w8a8's product alone, 8192 tokens or more, of its roofline",
        0.7,
        _of_paper(f"{PRODUCT} w8a8", lambda m: m >= 8192),
    ),
    (
        "w4a8 base-only, one token, of its roofline",
        0.45,
        _of_paper("w4a8 base", lambda m: m == 1),
    ),
    ("the slowest of ours at a shape, of its roofline", 0.8, _roofline),
    ("the fastest scheme over bf16, base-only", 1.0, _fastest),
)


def targets(rows: list[Row]) -> list[Target]:
    """Each target at every step where it can be told."""
    steps = list(_steps(rows))
    found = []
    for name, least, choice in _TARGETS:
        reached = []
        for step in steps:
            ratio = choice(step)
            if ratio is not None:
                row = next(iter(step.values()))
                where = f"K={row.in_features} N={row.out_features} M={row.tokens}"
                reached.append((ratio, where))
        worst, where = min(reached, default=(None, ""))
        met = sum(ratio >= least for ratio, _ in reached)
        found.append(Target(name, least, worst, where, len(reached), met))
    return found
