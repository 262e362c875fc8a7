# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a device does in a second: measured, or from its maker's paper."""

import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Sequence

from torchao_masquant.solver.cost import Work

__all__ = ["Machine", "Rates", "RestRates", "load_machine", "machine_names"]


@dataclass(frozen=True)
class Rates:
    """Of linears of one kind: seconds are the sum of these.

    Attributes:
        per_mac: seconds for a multiplication and addition.
        per_weight_byte: for a byte of the weight, however many tokens.
        per_value: for a value of the input or the output.
        per_call: for a call.
    """

    per_mac: float
    per_weight_byte: float
    per_value: float = 0.0
    per_call: float = 0.0

    def seconds(self, macs: float, weight_bytes: float, values: float) -> float:
        """Of one call."""
        return (
            macs * self.per_mac
            + weight_bytes * self.per_weight_byte
            + values * self.per_value
            + self.per_call
        )


@dataclass(frozen=True)
class RestRates:
    """Of what a decoder does beside its linears: seconds are the sum of these.

    Norms, positions, attention, activations, residuals, and the cache of keys and values,
    to which a call's are joined by a copy of all.

    Attributes:
        per_call: seconds for a call of a model, whatever it runs on.
        per_layer: for a decoder layer of it.
        per_value: for a value that goes into or comes out of one of its linears.
        per_pair: for a multiplication and addition of attention.
        per_cached_byte: for a byte of cache.
        per_read: for a value of the cache that a head of queries reads: where many
            share one of keys, it is read by each.
    """

    per_call: float
    per_layer: float
    per_value: float
    per_pair: float
    per_cached_byte: float
    per_read: float

    def seconds(
        self,
        layers: int,
        values: float,
        pairs: float,
        cached_bytes: float,
        reads: float,
    ) -> float:
        """Of one call of a model."""
        return (
            self.per_call
            + layers * self.per_layer
            + values * self.per_value
            + pairs * self.per_pair
            + cached_bytes * self.per_cached_byte
            + reads * self.per_read
        )


@dataclass(frozen=True)
class Machine:
    """A device.

    Attributes:
        name: what users call it.
        source: "measured", with what on, or "on paper".
        linear: rates of "dense", "w8a8", "w4a8" and "w4a16"; schemes with fewer bits
            run as those with as many bytes.
        rest: rates of what a decoder does beside its linears.
        statistics_per_mac: seconds for a multiplication and addition of float64.
        solver: seconds for one of each kind of operation that a solver does; on a GPU
            they have not been measured, and a CPU's stand in.
        link_bytes_per_second: between two devices.
        disk_bytes_per_second: of reading weights.
    """

    name: str
    source: str
    linear: dict[str, Rates]
    rest: RestRates
    statistics_per_mac: float
    solver: Work
    link_bytes_per_second: float
    disk_bytes_per_second: float
    notes: tuple[str, ...] = field(default=())

    def save(self, path: Path) -> None:
        """Write it as JSON, for ``load_machine``."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Machine":
        """Undo :meth:`save`.

        Raises:
            ValueError: something is missing.
        """
        try:
            return cls(
                **{
                    **record,
                    "linear": {k: Rates(**v) for k, v in record["linear"].items()},
                    "rest": RestRates(**record["rest"]),
                    "solver": Work(**record["solver"]),
                    "notes": tuple(record.get("notes", ())),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                "this is no machine's file: measure one with "
                "benchmarks/plan_constants.py."
            ) from error


# Published peaks: dense bfloat16 and int8 operations, memory and link (one direction).
_ON_PAPER = {
    "a100": (312e12, 624e12, 2.04e12, 300e9, 19.5e12),
    "h100": (989e12, 1979e12, 3.35e12, 450e9, 67e12),
    "h200": (989e12, 1979e12, 4.8e12, 450e9, 67e12),
}


def machine_names() -> Sequence[str]:
    """Of the machines that come with the package."""
    return ("cpu", *_ON_PAPER)


def load_machine(name: str) -> Machine:
    """A machine of the package, or of a file.

    Args:
        name: one of :func:`machine_names`, or the path of a JSON file that
            ``benchmarks/plan_constants.py`` wrote.

    Raises:
        ValueError: there is none.
    """
    measured = resources.files("torchao_masquant.planning") / "machines" / "cpu.json"
    cpu = Machine.from_json(json.loads(measured.read_text()))
    if name == "cpu":
        return cpu
    if name in _ON_PAPER:
        return _on_paper(name, cpu)
    if not Path(name).is_file():
        raise ValueError(
            f"there is no machine {name!r}: choose one of "
            f"{', '.join(machine_names())}, or give the path of a file that "
            "benchmarks/plan_constants.py wrote."
        )
    try:
        return Machine.from_json(json.loads(Path(name).read_text()))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _on_paper(name: str, cpu: Machine) -> Machine:
    dense, integer, memory, link, double = _ON_PAPER[name]
    rates = {
        "dense": Rates(2 / dense, 1 / memory),
        "w8a8": Rates(2 / integer, 1 / memory),
        "w4a8": Rates(2 / integer, 1 / memory),
        "w4a16": Rates(2 / dense, 1 / memory),
    }
    return Machine(
        name,
        "on paper: published peaks, which no kernel reaches",
        rates,
        RestRates(0.0, 0.0, 2 / memory, 2 / dense, 1 / memory, 0.0),
        2 / double,
        cpu.solver,
        link,
        cpu.disk_bytes_per_second,
        ("the solver's time is that of the CPU which was measured",),
    )
