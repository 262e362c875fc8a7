# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quality of every method and scheme on the small model, over training seeds.

    python benchmarks/quality.py [--variant outliers|plain] [--quick] [--json PATH]

Every method gets the same model, linears, calibration samples and held-out digits. A
row's bytes are those of the decoder's linears, factors, pairs and biases included.
The models of seeds 1 and 2 are in ``benchmarks/seeds``; ``--checkpoints`` takes others.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence

# The methods that ours are compared with.
sys.path.insert(0, str(Path(__file__).parents[1] / "research"))

import torch
from baselines.fingerprint import code_fingerprint
from baselines.quantizing import Quantizing, weight_bytes
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from torchao_masquant import MASQuantLinear
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.demo.compare import collect_statistics
from torchao_masquant.options import SCHEMES
from torchao_masquant.recipe import library_versions
from torchao_masquant.routing import Router
from torchao_masquant.testing import digits

SEEDS = Path(__file__).parent / "seeds"

#: Methods of the package: name to options.
OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": dict(method="rtn"),
    "smoothquant": dict(method="smoothquant"),
    "masquant-paper": dict(method="masquant-paper"),
    "masquant-paper, learned": dict(method="masquant-paper", epochs=2),
    "masquant": dict(),
    "masquant, 2 %": dict(rank=0.02),
    "masquant, no pair": dict(rank=0),
    "masquant, auto rank": dict(rank="auto"),
    "masquant, 8-bit pairs": dict(low_rank_bits=8),
    "masquant, learned": dict(epochs=4),
    "masquant, no shift": dict(shift=False),
    "masquant, nearest": dict(rounding="nearest"),
    "masquant, no clip": dict(clip=False),
    "masquant, no pair, no rotation": dict(rank=0, hadamard_size=1),
    "masquant, own factors": dict(separation=1.0),
    "masquant, own factors, no rotation": dict(separation=1.0, hadamard_size=1),
    "masquant, groups of 64": dict(group_size=64),
    "masquant, no rotation": dict(hadamard_size=1),
    "masquant, blocks of 16": dict(hadamard_size=16),
    "masquant, blocks of 16, no shift": dict(hadamard_size=16, shift=False),
    "masquant, blocks of 16, no pair": dict(hadamard_size=16, rank=0),
    # As it is exported for engines without this package.
    "masquant, exported": dict(rank=0, target="compressed-tensors"),
}

#: In the order in which they run: the first tell most.
MAIN = (
    "masquant",
    "smoothquant",
    "masquant-paper",
    "control",
    "pooled",
    "gptq",
    "mr-gptq",
    "masquant, 2 %",
    "masquant, no pair",
    "mas-unshared",
    "rtn",
    "awq",
    "mbq",
    "authors",
)
METHODS = (*MAIN, *(name for name in OPTIONS if name not in MAIN))

_WITHOUT_PAIRS = (
    "",
    "rtn",
    "smoothquant",
    "gptq",
    "mr-gptq",
    "awq",
    "mbq",
    "mas-unshared",
)

_QUICK = dict(schemes=["w4a8"], methods=["masquant", "smoothquant"], seeds=[0])


class Subject(Quantizing):
    """One trained model: its statistics, and its answers and inputs on held-out digits.

    Args:
        path: of a checkpoint; None for the package's own.
        variant: "outliers" or "plain".
        examples: held-out digits of each task.
    """

    def __init__(self, path: Optional[Path], variant: str, examples: int):
        if path is None:
            model: Any = digits.load_model(variant)
        else:
            model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                path, dtype=torch.float32
            ).eval()
        samples = digits.calibration_samples()
        session = collect_statistics(model, samples, progress=False)
        super().__init__(model, session, samples)
        self.tasks = {
            task: next(iter(digits.heldout_batches(task, examples)))
            for task in digits.TASKS
        }
        self.inputs = self._inputs()
        self.log_probs = {t: self._log_probs(self.model, t) for t in self.tasks}

    @torch.no_grad()
    def _log_probs(self, model: nn.Module, task: str) -> torch.Tensor:
        logits = model(**self.tasks[task].inputs).logits[:, -1]
        return torch.log_softmax(logits.double(), -1)

    @torch.no_grad()
    def _inputs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Leader of each input to tokens (T, K) and modality ids (T,) of 50 digits."""
        router = Router.for_model(self.model)
        router.skip_padding = True
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                x = args[0]
                ids = router.ids_for(name, x)
                if ids is None:
                    ids = torch.zeros(x.shape[:-1], dtype=torch.int64)
                keep = ids.reshape(-1) >= 0
                found.setdefault(name, []).append(
                    (x.reshape(-1, x.shape[-1])[keep], ids.reshape(-1)[keep])
                )

            return hook

        handles = [
            self.session.linears[leader].register_forward_pre_hook(look(leader))
            for _, leader in self.groups
        ]
        router.attach(self.model)
        for task in self.tasks:
            self.model(**next(iter(digits.heldout_batches(task, 50))).inputs)
        router.detach(self.model)
        for handle in handles:
            handle.remove()
        return {
            name: (torch.cat([x for x, _ in calls]), torch.cat([i for _, i in calls]))
            for name, calls in found.items()
        }

    def quantize(self, scheme: str, method: str, rank: Any) -> nn.Module:
        """A quantized copy."""
        if method in OPTIONS:
            return self.by_options(scheme, {"rank": rank, **OPTIONS[method]})
        return self.by_baseline(scheme, method, {"rank": rank})

    @torch.no_grad()
    def score(self, quantized: nn.Module) -> dict[str, Any]:
        """Tasks, centred SQNR and bytes of a quantized copy."""
        tasks = {}
        for task, batch in self.tasks.items():
            found, exact = self._log_probs(quantized, task), self.log_probs[task]
            right = found.gather(1, batch.answer_ids[:, None])
            tasks[task] = {
                "accuracy": (found.argmax(-1) == batch.answer_ids)
                .double()
                .mean()
                .item(),
                "cross_entropy": -right.mean().item(),
                "kl": (exact.exp() * (exact - found)).sum(-1).mean().item(),
            }
        ratios: dict[str, list[float]] = {name: [] for name in self.modalities}
        total = 0
        for weights, leader in self.groups:
            x, ids = self.inputs[leader]
            for name, weight in weights.items():
                module = quantized.get_submodule(name)
                if isinstance(module, MASQuantLinear):
                    y = torch.ops.masquant.linear(x, module.weight, ids, None)
                else:
                    bias, module.bias = module.bias, None
                    y = module.routed(x, ids)
                    module.bias = bias
                total += weight_bytes(module)
                exact = x.double() @ weight.double().t()
                for index, modality in enumerate(self.modalities):
                    own = exact[ids == index]
                    noise = (y[ids == index].double() - own).square().sum()
                    signal = (own - own.mean(0)).square().sum()
                    ratios[modality].append(10 * math.log10(signal / noise))
        return {
            "tasks": tasks,
            "sqnr": {name: statistics.mean(r) for name, r in ratios.items()},
            "bytes": total,
        }

    def dense(self) -> dict[str, Any]:
        """The same of the model itself, in bfloat16's bytes."""
        scores = self.score(self.quantize("w8a8", "rtn", 0))
        for task, batch in self.tasks.items():
            exact = self.log_probs[task]
            scores["tasks"][task] = {
                "accuracy": (exact.argmax(-1) == batch.answer_ids)
                .double()
                .mean()
                .item(),
                "cross_entropy": -exact.gather(1, batch.answer_ids[:, None])
                .mean()
                .item(),
                "kl": 0.0,
            }
        linears = self.session.linears.values()
        return scores | {
            "sqnr": {},
            "bytes": sum(2 * linear.weight.numel() for linear in linears),
        }


def _model_fingerprint(path: Optional[Path], variant: str) -> str:
    """Of a checkpoint, wherever it lies."""
    folder = digits.checkpoint_path(variant) if path is None else path
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def rows(
    arguments: argparse.Namespace, checkpoints: dict[int, Optional[Path]]
) -> Iterator[dict[str, Any]]:
    """One row for each seed, scheme and method, as they are ready."""
    # Imported once: what changes on disk later is another run's.
    code = code_fingerprint(Path(__file__))
    for seed, path in checkpoints.items():
        subject: Optional[Subject] = None
        weights = _model_fingerprint(path, arguments.variant)
        pairs = [("dense", "")] + [
            (scheme, method)
            for method in arguments.methods
            for scheme in arguments.schemes
        ]
        for scheme, method in pairs:
            key = [code, arguments.variant, seed, weights, arguments.examples]
            key += [scheme, method, str(arguments.rank)]
            name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
            kept = arguments.cache and arguments.cache / f"{name}.json"
            if kept and kept.exists():
                yield json.loads(kept.read_text())
                continue
            if subject is None:
                subject = Subject(path, arguments.variant, arguments.examples)
            start = time.perf_counter()
            if scheme == "dense":
                scores = subject.dense()
                seconds = 0.0
            else:
                quantized = subject.quantize(scheme, method, arguments.rank)
                seconds = time.perf_counter() - start
                scores = subject.score(quantized)
            row = {
                "variant": arguments.variant,
                "seed": seed,
                "scheme": scheme,
                "method": method,
                "options": OPTIONS.get(method, {}),
                "rank": _rank(method, arguments.rank),
                **scores,
                "seconds": seconds,
            }
            if kept:
                _write(kept, row)
            yield row


def _rank(method: str, rank: float) -> Any:
    """Of the pairs; None for a method without any."""
    if method in _WITHOUT_PAIRS:
        return None
    return OPTIONS.get(method, {}).get("rank", rank)


def _checkpoints(arguments: argparse.Namespace) -> dict[int, Optional[Path]]:
    found: dict[int, Optional[Path]] = {0: None}
    if arguments.checkpoints:
        given = enumerate(arguments.checkpoints, start=1)
        found |= dict(given)
    elif arguments.variant == "outliers":
        found |= {int(p.name.removeprefix("seed")): p for p in sorted(SEEDS.iterdir())}
    if arguments.seeds is not None:
        unknown = [seed for seed in arguments.seeds if seed not in found]
        if unknown:
            raise ValueError(
                f"there is no seed {unknown[0]} of variant {arguments.variant!r}: there "
                f"are {', '.join(map(str, found))}; --checkpoints adds others."
            )
        found = {seed: found[seed] for seed in arguments.seeds}
    for path in found.values():
        if path is not None and not (path / "config.json").is_file():
            raise ValueError(f"{path} is no checkpoint: it has no config.json.")
    return found


def _write(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1))


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Mean and sample standard deviation over seeds."""
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("scheme", "method", "accuracy %", "cross-entropy", "KL", "SQNR dB"):
        shown.add_column(column)
    shown.add_column("KiB", justify="right")
    together: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        together.setdefault((row["scheme"], row["method"]), []).append(row)
    order = ("dense", *SCHEMES)
    for (scheme, method), same in sorted(
        together.items(), key=lambda item: order.index(item[0][0])
    ):

        def cell(path: Callable[[dict], dict], scale: float, digits_: int) -> str:
            names = path(same[0])
            if not names:
                return ""
            values = [[scale * path(row)[n] for row in same] for n in names]
            means = " / ".join(f"{statistics.mean(v):.{digits_}f}" for v in values)
            if len(same) < 2:
                return means
            spread = max(statistics.stdev(v) for v in values)
            return f"{means} (±{spread:.{digits_}f})"

        def task(key: str) -> Callable[[dict], dict]:
            return lambda row: {t: row["tasks"][t][key] for t in row["tasks"]}

        shown.add_row(
            scheme,
            method,
            cell(task("accuracy"), 100, 1),
            cell(task("cross_entropy"), 1, 3),
            cell(task("kl"), 1, 4),
            cell(lambda row: row["sqnr"], 1, 1),
            f"{statistics.mean(row['bytes'] for row in same) / 1024:.0f}",
        )
    return shown


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variant", choices=("outliers", "plain"), default="outliers")
    parser.add_argument(
        "--schemes", nargs="+", choices=tuple(SCHEMES), metavar="SCHEME"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD")
    parser.add_argument("--rank", type=float, default=0.05, help="share of min(N, K)")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--checkpoints", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--examples", type=int, default=200, help="of each task")
    parser.add_argument("--quick", action="store_true", help="one scheme, one seed")
    parser.add_argument("--cache", type=Path, help="folder of rows that are ready")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        for name, value in _QUICK.items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
        arguments.examples = min(arguments.examples, 50)
    arguments.schemes = arguments.schemes or ["w8a8", "w4a8", "w4a4"]
    arguments.methods = arguments.methods or list(METHODS)
    unknown = set(arguments.methods) - set(METHODS)
    if unknown:
        parser.error(
            f"unknown method {sorted(unknown)[0]!r}: choose from {', '.join(METHODS)}."
        )
    if not 0 <= arguments.rank <= 1:
        parser.error(f"--rank is a share of min(N, K), 0 to 1, got {arguments.rank:g}.")
    held = len(digits.heldout()[digits.TASKS[0]].answer_ids)
    if not 2 <= arguments.examples <= held:
        parser.error(f"--examples must be 2 to {held}, got {arguments.examples}.")
    try:
        checkpoints = _checkpoints(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"there is no folder {arguments.json.parent} to write to.")
    if arguments.cache:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows(arguments, checkpoints):
        found.append(row)
        sqnr = " / ".join(f"{v:.1f}" for v in row["sqnr"].values())
        print(
            f"seed {row['seed']} {row['scheme']} {row['method']}: {sqnr} dB, "
            f"{row['seconds']:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table(found))
    if arguments.json:
        _write(
            arguments.json,
            {
                "variant": arguments.variant,
                "outliers_trained_in": arguments.variant == "outliers",
                "examples": arguments.examples,
                "versions": library_versions(),
                "rows": found,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
