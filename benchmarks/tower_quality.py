# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What quantized towers cost, on the small models and on a real LLM that sees and hears.

    python benchmarks/tower_quality.py [--models ...] [--seed 0] [--json PATH]

A row has its towers quantized, its decoder, or both, and is compared with the model of which
nothing is. The models and their data are those of ``quality.py`` and ``real_llm.py``.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

# The package finds what is imported from research/.
import real  # noqa: F401
import torch
from baselines.fingerprint import code_fingerprint
from real import examples, thinker
from real.scoring import Reference
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, Recipe, calibrate, masquant_config
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.recipe import library_versions
from torchao_masquant.testing import digits

REAL = "SmolLM2 with towers"
MODELS = (REAL, "digits, outliers", "digits, plain")

#: (scheme of the decoder, of the towers, method of the towers); None: high precision
ROWS = (
    (None, "w8a8", "rtn"),
    (None, "w8a8", "masquant"),
    (None, "w4a8", "rtn"),
    (None, "w4a8", "masquant"),
    ("w4a8", None, "masquant"),
    ("w4a8", "w8a8", "rtn"),
    ("w4a8", "w8a8", "masquant"),
)

_TOWERS = ("model.visual.*", "model.audio_tower.*")

Samples = list[dict[str, torch.Tensor]]


def _labelled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch whose last token, the answer, is the only one that is scored."""
    labels = torch.full_like(inputs["input_ids"], examples.IGNORED)
    labels[:, -1] = inputs["input_ids"][:, -1]
    return {**inputs, "labels": labels}


class Subject:
    """One of the models, and what it says of the held-out data.

    Args:
        name: of ``MODELS``.
        count: of held-out examples of each task.
    """

    def __init__(self, name: str, count: int):
        self.name = name
        if name == REAL:
            self.model: nn.Module = thinker.load_model()
            tasks = examples.heldout_samples(count, 2)
        else:
            self.model = digits.load_model(name.partition(", ")[2])
            tasks = {
                task: [_labelled(b.inputs) for b in found.batches(100, True)]
                for task, found in digits.heldout().items()
            }
        # Of what is not heard and not seen nothing changes.
        self.tasks = {t: s for t, s in tasks.items() if t not in ("text", "prose")}
        self.reference = Reference(self.model, self.tasks)
        self._recipes: dict[tuple[Any, ...], Recipe] = {}

    def samples(self, seed: int) -> Samples:
        """Calibration data; the small models have one set."""
        if self.name == REAL:
            return examples.calibration_samples(seed)
        return digits.calibration_samples()

    def recipe(self, seed: int, **options: Any) -> Recipe:
        """Of ``calibrate``, once for each."""
        key = seed, *options.items()
        if key not in self._recipes:
            # Little memory, for a few runs more.
            options |= {"progress": False, "max_statistics_bytes": 1 << 30}
            self._recipes[key] = calibrate(self.model, self.samples(seed), **options)
        return self._recipes[key]

    def quantized(
        self, seed: int, decoder: Optional[str], towers: Optional[str], method: str
    ) -> nn.Module:
        """A copy of the model."""
        model = copy.deepcopy(self.model)
        if decoder is not None:
            quantize_(
                model, masquant_config(self.recipe(seed, scheme=decoder, effort="fast"))
            )
        if towers is not None and method == "rtn":
            config = MASQuantConfig(
                step="convert", method="rtn", scheme=towers, include=_TOWERS
            )
            quantize_(model, config)
        elif towers is not None:
            found = self.recipe(seed, scheme=towers, include=_TOWERS)
            quantize_(model, masquant_config(found))
        return model


def rows(
    models: Sequence[str],
    seed: int,
    count: int,
    known: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """A row of each model and choice that is not known yet."""
    for name in models:
        subject: Optional[Subject] = None
        for decoder, towers, method in ROWS:
            key = {
                "model": name,
                "seed": seed,
                "decoder": decoder,
                "towers": towers,
                "method": method if towers else None,
            }
            if any(key.items() <= row.items() for row in known):
                continue
            subject = subject or Subject(name, count)
            model = subject.quantized(seed, decoder, towers, method)
            yield {**key, "tasks": subject.reference.score(model)}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    names = {"rtn": "round-to-nearest", "masquant": "ours", None: ""}
    lines = [
        "| model | decoder | towers | | accuracy, % (dense) | KL of the tasks, nats |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        tasks = row["tasks"].values()
        right, dense = (
            " / ".join(f"{100 * task[key]:.1f}" for task in tasks)
            for key in ("accuracy", "dense_accuracy")
        )
        kl = " / ".join(f"{task['kl']:.5f}" for task in tasks)
        parts = (row["model"], row["decoder"] or "-", row["towers"] or "-")
        lines.append(
            f"| {' | '.join(parts)} | {names[row['method']]} | {right} ({dense}) | {kl} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seed", type=int, default=0, help="of calibration data")
    parser.add_argument("--examples", type=int, default=96, help="of each task")
    parser.add_argument(
        "--json", type=Path, help="rows, written as they come; those of it stay"
    )
    arguments = parser.parse_args(argv)
    code = code_fingerprint(Path(__file__).parent / "real")
    found: list[dict[str, Any]] = []
    if arguments.json and arguments.json.is_file():
        found = json.loads(arguments.json.read_text())["rows"]
    given = arguments.models, arguments.seed, arguments.examples
    for row in rows(*given, list(found)):
        found.append(row)
        kl = " / ".join(f"{t['kl']:.5f}" for t in row["tasks"].values())
        print(list(row.values())[:5], kl, file=sys.stderr, flush=True)
        if arguments.json:
            content = {"versions": library_versions(), "code": code, "rows": found}
            write_whole(arguments.json, json.dumps(content, indent=1))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
