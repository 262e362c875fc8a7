# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM's cache in e4m3 costs on a real LLM that sees and hears, in several forms.

    python benchmarks/real_fp8_cache.py [--seeds 0 1] [--json PATH]

The model and the data are those of ``real_llm.py``; its weights are not quantized, and
transformers runs it with a cache that holds what vLLM's holds. A prompt's tokens attend to what
is held of each other, as they do in vLLM.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

# The package finds what is imported from research/.
import real  # noqa: F401
import torch
from baselines.fingerprint import code_fingerprint
from real.examples import TEXT, calibration_samples, heldout_samples
from real.thinker import load_model
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from vllm_bench.fp8_cache import Form, cut_off, fp8_cache

from torchao_masquant import CacheRecipe, calibrate_cache
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.recipe import library_versions

_SCALES = {"scales": lambda shared: shared.fp8_scales}
_CENTER = {**_SCALES, "key_center": True}
_ROTATED = {**_CENTER, "key_rotated": True}
_OURS = {**_ROTATED, "key_factor": True}

#: Forms; with True, values have a centre, too.
FORMS = {
    "vLLM on CPUs": (Form(cut_off), False),
    "to nearest": (Form(), False),
    "to nearest, scales": (
        Form(scales=lambda shared: (shared.largest / 448).tolist()),
        False,
    ),
    "keys and values less centres": (Form(**_CENTER), True),
    "keys rotated": (Form(key_rotated=True), False),
    "keys and values less centres, keys rotated": (Form(**_ROTATED), True),
    "**ours**": (Form(**_OURS), False),
    "ours, and values less a centre": (Form(**_OURS), True),
    "ours, and values less a centre and rotated": (
        Form(**_OURS, value_rotated=True),
        True,
    ),
}


@torch.no_grad()
def said(model: nn.Module, sample: Mapping[str, Tensor], cache: Cache) -> Tensor:
    """(B, T, V) log probabilities of what is scored of a sample."""
    given = {n: v for n, v in sample.items() if n != "labels"}
    scored = (sample["labels"] >= 0).sum(1).max().item()
    # The head is run for what is scored alone, and for what comes after it.
    logits = model(**given, past_key_values=cache, use_cache=True).logits
    return torch.log_softmax(
        (logits[:, -2:-1] if scored == 1 else logits[:, :-1]).double(), -1
    )


@torch.no_grad()
def as_they_are(
    recipe: CacheRecipe, model: nn.Module, samples: Sequence[Mapping[str, Any]]
) -> tuple[CacheRecipe, list[Tensor]]:
    """With the largest of keys from zero, for what takes no centre off; and values' means."""
    largest, sums, count = torch.zeros(len(recipe.shared), 2), [], 0
    for sample in samples:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**sample, past_key_values=cache, use_cache=True)
        seen = [(x.keys.abs().max(), x.values.abs().max()) for x in cache.layers]
        largest = torch.maximum(largest, torch.tensor(seen))
        sums.append(torch.stack([x.values.double().sum((0, 2)) for x in cache.layers]))
        count += cache.layers[0].values.shape[0] * cache.layers[0].values.shape[2]
    found = copy.copy(recipe)
    found.shared = [s._replace(largest=x) for s, x in zip(recipe.shared, largest)]
    return found, list((sum(sums) / count).float())


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--examples", type=int, default=96, help="of each task")
    parser.add_argument("--pieces", type=int, default=16, help="of prose")
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--json", type=Path, help="rows, written as they come")
    arguments = parser.parse_args(argv)
    model = load_model(arguments.layers)
    config = model.config.get_text_config()
    tasks = heldout_samples(arguments.examples, arguments.pieces)
    exact = {
        task: [said(model, s, DynamicCache(config=config)) for s in samples]
        for task, samples in tasks.items()
    }
    found: list[dict[str, Any]] = []
    code = code_fingerprint(Path(__file__).parent / "real")
    for seed in arguments.seeds:
        samples = calibration_samples(seed)
        centered = calibrate_cache(model, samples, progress=False)
        plain, means = as_they_are(centered, model, samples)
        for name, (form, less_means) in FORMS.items():
            recipe = centered if form.key_center else plain
            values = means if less_means else None
            scores = {}
            for task, asked in tasks.items():
                kl = torch.cat(
                    [
                        (known.exp() * (known - told)).sum(-1).mean(-1)
                        for known, told in (
                            (e, said(model, s, fp8_cache(recipe, form, values)))
                            for e, s in zip(exact[task], asked)
                        )
                    ]
                )
                scores[task] = {
                    "kl": kl.mean().item(),
                    "kl_error": kl.std().item() / len(kl) ** 0.5,
                }
            found.append({"seed": seed, "form": name, "tasks": scores})
            shown = " / ".join(f"{t['kl']:.4f}" for t in scores.values())
            print(f"{name}: {shown}", file=sys.stderr, flush=True)
            if arguments.json:
                content = {"versions": library_versions(), "code": code, "rows": found}
                write_whole(arguments.json, json.dumps(content, indent=1))
    print(table(found))
    return 0


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: means over seeds."""
    lines = [
        "| keys and values are rounded | KL of the tasks, nats | text KL, nats |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(row["form"] for row in found):
        of = [row["tasks"] for row in found if row["form"] == name]
        mean = {t: sum(r[t]["kl"] for r in of) / len(of) for t in of[0]}
        tasks = " / ".join(f"{kl:.4f}" for t, kl in mean.items() if t != TEXT)
        lines.append(f"| {name} | {tasks} | {mean[TEXT]:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
