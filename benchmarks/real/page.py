# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The results as a Markdown table, and the page that carries it."""

import math
import statistics
from typing import Any, Callable, Sequence

from real.methods import METHODS, SCHEMES, TITLES
from real.prompts import TASKS, TEXT

__all__ = ["RESULTS", "table", "with_table"]

#: The file of rows that a page's table is of, where nothing else is said.
RESULTS = "real_llm.json"

_END = "<!-- end -->"

_HEAD = (
    "| scheme | method | accuracy, % | KL of the tasks, nats | text perplexity "
    "| text KL, nats | KiB | seeds |\n|---|---|---|---|---|---|---|---|"
)

Row = dict[str, Any]


def _spread(columns: Sequence[Sequence[float]]) -> str:
    """The largest sample standard deviation over seeds, if there are several."""
    if len(columns[0]) < 2:
        return ""
    return f" ± {max(statistics.stdev(column) for column in columns):.3f}"


def _means(rows: Sequence[Row], form: str, *of: Callable[[Row], float]) -> str:
    columns = [[value(row) for row in rows] for value in of]
    return " / ".join(form.format(statistics.mean(column)) for column in columns)


def _task(task: str, name: str, scale: float = 1.0) -> Callable[[Row], float]:
    return lambda row: scale * row["tasks"][task][name]


def _line(scheme: str, method: str, rows: Sequence[Row]) -> str:
    kl = [_task(task, "kl") for task in TASKS]
    text = _task(TEXT, "kl")
    cells = (
        scheme,
        TITLES[method],
        _means(rows, "{:.0f}", *(_task(task, "accuracy", 100) for task in TASKS)),
        _means(rows, "{:.3f}", *kl) + _spread([[k(row) for row in rows] for k in kl]),
        _means(rows, "{:.1f}", lambda row: math.exp(row["tasks"][TEXT]["loss"])),
        _means(rows, "{:.3f}", text) + _spread([[text(row) for row in rows]]),
        f"{rows[0]['bytes'] / 1024:.0f}",
        f"{len(rows)}",
    )
    return f"| {' | '.join(cells)} |"


def _dense(row: Row) -> str:
    accuracy = " / ".join(
        f"{100 * row['tasks'][task]['dense_accuracy']:.0f}" for task in TASKS
    )
    perplexity = math.exp(row["tasks"][TEXT]["dense_loss"])
    return f"| dense |  | {accuracy} |  | {perplexity:.1f} |  |  |  |"


def table(rows: Sequence[Row]) -> str:
    """Means over seeds, and the largest standard deviation of a cell over them."""
    lines = [_HEAD, *([_dense(rows[0])] if rows else [])]
    for scheme in SCHEMES:
        for method in METHODS:
            same = [r for r in rows if (r["scheme"], r["method"]) == (scheme, method)]
            if same:
                lines.append(_line(scheme, method, same))
    return "\n".join(lines)


def with_table(page: str, rows: Sequence[Row], name: str = RESULTS) -> str:
    """A page with the table of these rows in the place of its own.

    Args:
        page: Markdown, with a comment of the rows' file before the table.
        rows: of the results.
        name: of that file.

    Raises:
        ValueError: the page has no place for it.
    """
    begin = f"<!-- {name} -->"
    if page.count(begin) != 1 or _END not in page.partition(begin)[2]:
        raise ValueError(f"the page has no line {begin} with a line {_END} behind it.")
    before, _, rest = page.partition(begin)
    after = rest.partition(_END)[2]
    return f"{before}{begin}\n{table(rows)}\n{_END}{after}"
