# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rows from a benchmark's file."""

import dataclasses
import math
import statistics
from typing import Any, Mapping, Optional, Sequence, Union

from torchao_masquant.options import SolverOptions
from torchao_masquant.report.rows import DENSE, Row, Rows
from torchao_masquant.wording import joined

__all__ = ["rows_of_results"]

_Rank = Union[int, float, str, None]

#: what makes two rows rows of one model
_Key = tuple[str, str, _Rank]


def rows_of_results(results: Any, name: str = "") -> list[Rows]:
    """Rows of a benchmark's file, one group for each variant of the model.

    The file holds a list of rows, or an object with such a list under "rows". A row is
    an object with these keys; others are left alone:

    - "scheme": such as "w4a8"; "dense" for the model before it was quantized.
    - "method": a key of METHODS, any other name, or "" for the dense model.
    - "accuracy" or "tasks": task to fraction of right answers, 0..1; or task to an
      object with "accuracy" and, where known, "cross_entropy" and "kl".
    - "weight_bytes" or "bytes": of the decoder's linear weights; null: not known.
    - "variant": name of the model, "" without; rows of different ones are not compared.
    - "seed": a number. Rows that differ in nothing else become their mean.
    - "rank": of the pairs, a share (float), a number (int), "auto" or null.
    - "cross_entropy": task to mean of -log p(right answer), in nats.
    - "sqnr": modality to mean centred SQNR over the linears, in dB.
    - "kl": task or modality to mean KL(dense || quantized), in nats.

    The first four have to be there. A number may be null, "nan", "inf" or "-inf"; null
    is left out. Beside "rows", an object may have "variant" and "rank" for all rows, and
    "outliers_trained_in", true or false.

    Args:
        results: the parsed file.
        name: of the file, where there are several.

    Returns:
        Groups in order of appearance; none where there are no rows.

    Raises:
        ValueError: a row is damaged, or there twice; names it.
    """
    whole: Mapping[str, Any] = results if isinstance(results, Mapping) else {}
    listed = whole.get("rows") if whole else results
    if not isinstance(listed, list):
        raise ValueError(
            "it holds no list of rows, as `demo --json` or benchmarks/quality.py write "
            "it."
        )
    # By variant and model: seed to row.
    found: dict[str, dict[_Key, dict[Any, Row]]] = {}
    for index, data in enumerate(listed):
        where = f"rows[{index}]"
        row = _row(data, where)
        variant = data.get("variant", whole.get("variant", ""))
        rank, seed = data.get("rank"), data.get("seed")
        _check_labels(variant, rank, seed, where)
        models = found.setdefault(variant, {})
        seeds = models.setdefault((row.scheme, row.method, rank), {})
        if seed in seeds:
            raise ValueError(
                f"{where} is of the same variant, scheme, method, rank and seed as a "
                "row before it: give it another method's name."
            )
        seeds[seed] = row
    trained_in = whole.get("outliers_trained_in") is True
    said = ["The outliers of this model were trained in on purpose."] * trained_in
    if _is_number(whole.get("rank")):
        said.append(f"The low-rank pairs have {_rank_text(whole['rank'])}.")
    return [
        _group(": ".join(filter(None, ("Benchmark results", name, variant))), m, said)
        for variant, m in found.items()
    ]


def _group(
    source: str, models: Mapping[_Key, Mapping[Any, Row]], said: Sequence[str]
) -> Rows:
    """Means over the seeds, and which ranks figures show."""
    ranks: dict[str, list[_Rank]] = {}
    for scheme, method, rank in models:
        known = ranks.setdefault(method, [])
        if scheme != DENSE and rank is not None and rank not in known:
            known.append(rank)
    several = {method: known for method, known in ranks.items() if len(known) > 1}
    drawn = {method: _drawn_rank(known) for method, known in several.items()}
    rows = []
    for (_, method, rank), seeds in models.items():
        row = _mean(list(seeds.values()))
        if method in several and row.scheme != DENSE:
            text = "no rank" if rank is None else _rank_text(rank)
            row = dataclasses.replace(row, rank=text, drawn=rank == drawn[method])
        rows.append(row)
    notes = list(said)
    counts = sorted({len(seeds) for seeds in models.values()})
    if counts[-1] > 1:
        notes.append(
            f"Means over {joined([str(c) for c in counts])} seeds, ± their standard "
            "deviation."
        )
    if drawn:
        texts = dict.fromkeys(_rank_text(rank) for rank in drawn.values())
        notes.append(
            f"The figures show the pairs of {joined(list(texts))}; the table has every "
            "rank."
        )
    return Rows(source, tuple(rows), " ".join(notes))


def _drawn_rank(ranks: Sequence[_Rank]) -> _Rank:
    default = SolverOptions().rank
    return default if default in ranks else ranks[0]


def _rank_text(rank: _Rank) -> str:
    share = isinstance(rank, float)
    return f"rank {100 * rank:g} %" if share else f"rank {rank}"  # type: ignore[operator]


def _mean(rows: Sequence[Row]) -> Row:
    """The row of several seeds."""
    if len(rows) == 1:
        return rows[0]
    sizes = [row.weight_bytes for row in rows if row.weight_bytes is not None]
    accuracy = _columns([row.accuracy for row in rows])
    return dataclasses.replace(
        rows[0],
        accuracy=_means([row.accuracy for row in rows]),
        cross_entropy=_means([row.cross_entropy for row in rows]),
        weight_bytes=round(sum(sizes) / len(sizes)) if sizes else None,
        sqnr=_means([row.sqnr for row in rows]),
        kl=_means([row.kl for row in rows]),
        deviation={
            task: statistics.stdev(values)
            for task, values in accuracy.items()
            if len(values) > 1 and all(map(math.isfinite, values))
        },
    )


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {n: sum(values) / len(values) for n, values in _columns(rows).items()}


def _check_labels(variant: Any, rank: Any, seed: Any, where: str) -> None:
    if not isinstance(variant, str):
        raise ValueError(f"{where}.variant is no text.")
    if rank is not None and rank != "auto" and not _is_number(rank):
        raise ValueError(f"{where}.rank is no number.")
    if seed is not None and not _is_number(seed):
        raise ValueError(f"{where}.seed is no number.")


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is no object.")
    for name in ("scheme", "method"):
        if name not in data:
            raise ValueError(f"{where} has no {name!r}.")
        if not isinstance(data[name], str):
            raise ValueError(f"{where}.{name} is no text.")
    size_name = _first(data, ("weight_bytes", "bytes"), where)
    size = data[size_name]
    if size is not None and not (_is_number(size) and math.isfinite(size)):
        raise ValueError(f"{where}.{size_name} is no number.")
    tasks_name = _first(data, ("accuracy", "tasks"), where)
    scores = _scores(data[tasks_name], f"{where}.{tasks_name}")
    more = {
        name: _numbers(data.get(name), f"{where}.{name}")
        for name in ("cross_entropy", "kl", "sqnr")
    }
    return Row(
        scheme=data["scheme"],
        method=data["method"],
        accuracy=scores["accuracy"],
        cross_entropy={**scores["cross_entropy"], **more["cross_entropy"]},
        weight_bytes=None if size is None else int(size),
        sqnr=more["sqnr"],
        kl={**scores["kl"], **more["kl"]},
    )


def _first(data: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if name in data:
            return name
    raise ValueError(f"{where} has no {names[0]!r}, nor {names[1]!r}.")


def _scores(data: Any, where: str) -> dict[str, dict[str, float]]:
    """Kind of score to task to number, of a row's tasks."""
    found: dict[str, dict[str, float]] = {"accuracy": {}, "cross_entropy": {}, "kl": {}}
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is no object.")
    for task, score in data.items():
        at = f"{where}[{task!r}]"
        kinds = score if isinstance(score, Mapping) else {"accuracy": score}
        for kind in found:
            value = _number(kinds.get(kind), at)
            if value is not None:
                found[kind][str(task)] = value
    return found


def _numbers(data: Any, where: str) -> dict[str, float]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is no object of numbers.")
    read = {str(key): _number(value, where) for key, value in data.items()}
    return {key: value for key, value in read.items() if value is not None}


def _number(value: Any, where: str) -> Optional[float]:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if value is not None and not _is_number(value):
        raise ValueError(f"{where} holds {value!r}, which is no number.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
