# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a quantized cache costs on a real LLM that sees and hears, beside others.

    python benchmarks/real_kv_cache.py [--seeds 0 1] [--windows] [--json PATH]

The model and the data are those of ``real_llm.py``; its weights are not quantized. A cache
shows only in what is asked of it: prompts but for their last token are put into it, and the
answer is read from what that token attends to; of a piece of prose 64 tokens are put into it,
and the others follow by 16, each of which attends to all before it. With ``--windows`` the
rows are of prose alone, in pieces of 256 tokens and of 1024, and of how many tokens are held
as they are; without, none are.
"""

import argparse
import contextlib
import copy
import json
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence
from unittest import mock

# The package finds what is imported from research/.
import real  # noqa: F401
import torch
from baselines.fingerprint import code_fingerprint
from real.examples import TEXT, calibration_samples, heldout_samples
from real.thinker import load_model
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    QuantizedCache,
)

from torchao_masquant import CacheRecipe, Router, calibrate_cache
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.kv_cache import quantized_layer, rounded_tokens
from torchao_masquant.kv_cache.observed_keys import center_and_factor
from torchao_masquant.recipe import library_versions

_PREFIX, _STEP = 64, 16
_LONG = f"{TEXT}, long"


def plain(recipe: CacheRecipe) -> CacheRecipe:
    """No centres, no factors."""
    found = copy.copy(recipe)
    found.centers = [torch.zeros_like(center) for center in recipe.centers]
    found.factors = [torch.ones_like(factor) for factor in recipe.factors]
    return found


def per_channel(model: nn.Module, bits: int) -> Cache:
    """A cache of that form."""
    count = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[PerChannel(bits) for _ in range(count)])


@torch.no_grad()
def pooled(
    recipe: CacheRecipe, model: nn.Module, samples: Sequence[Mapping[str, Any]]
) -> CacheRecipe:
    """One centre and factor of all tokens, whatever their modality."""
    found = copy.copy(recipe)
    sums = [torch.zeros(c.shape[1:], dtype=torch.float64) for c in recipe.centers]
    squares, count = [torch.zeros_like(s) for s in sums], 0
    for sample in samples:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**sample, past_key_values=cache, use_cache=True)
        for layer, total, square in zip(cache.layers, sums, squares):
            keys = layer.keys.transpose(1, 2).flatten(0, 1).double()
            total += keys.sum(0)
            square += keys.square().sum(0)
        count += len(keys)
    both = [center_and_factor(torch.tensor(count), *of) for of in zip(sums, squares)]
    found.centers, found.factors = (
        [part.expand_as(c) for part, c in zip(parts, recipe.centers)]
        for parts in zip(*both)
    )
    return found


class PerChannel(DynamicLayer):
    """Keys of 32 tokens share a step and an offset for each channel, in float32; those that are
    not yet 32 are held as they are. KIVI's form for keys (arXiv 2402.02750), our code, with
    values as ours.

    Args:
        bits: of a code.
    """

    _GROUP = 32

    def __init__(self, bits: int):
        super().__init__()
        self._bits = bits

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the cache of transformers; whole groups are rounded for the calls after."""
        keys, values = super().update(key_states, value_states)
        whole = keys.shape[-2] // self._GROUP * self._GROUP
        groups = keys[..., :whole, :].unflatten(-2, (-1, self._GROUP))
        low, high = groups.amin(-2, keepdim=True), groups.amax(-2, keepdim=True)
        step = ((high - low) / (2**self._bits - 1)).clamp_min(1e-30)
        rounded = (((groups - low) / step).round() * step + low).flatten(-3, -2)
        self.keys = torch.cat((rounded, keys[..., whole:, :]), -2)
        held = rounded_tokens.round_tokens(value_states, self._bits)
        self.values = torch.cat(
            (values[..., : -value_states.shape[-2], :], held.values(values.shape[-1])),
            -2,
        )
        return keys, values


@contextlib.contextmanager
def unrotated() -> Iterator[None]:
    """Channels are rounded as they are."""
    with mock.patch.object(
        rounded_tokens, "rotation", lambda width, _: torch.eye(width)
    ):
        yield


@contextlib.contextmanager
def window(size: int) -> Iterator[None]:
    """So many tokens are held as they are, and those before them rounded by 32; of none, each
    as it comes."""
    at_once = 32 if size else 1
    with mock.patch.multiple(quantized_layer, WINDOW=size, AT_ONCE=at_once):
        yield


@torch.no_grad()
def answers(model: nn.Module, sample: Mapping[str, Tensor], cache: Cache) -> Tensor:
    """(B, T, V) log probabilities of what follows the tokens that are asked from a cache."""
    ids = sample["input_ids"]
    scored = (sample["labels"] >= 0).sum(1).max().item()
    length = ids.shape[1]
    start, step = (length - 2, 1) if scored == 1 else (_PREFIX, _STEP)
    given = {n: v for n, v in sample.items() if n != "labels"}
    given["input_ids"] = ids[:, :start]
    given["attention_mask"] = sample["attention_mask"][:, :start]
    model(**given, past_key_values=cache, use_cache=True)
    found = [
        model(
            input_ids=ids[:, at : min(at + step, length - 1)],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for at in range(start, length - 1, step)
    ]
    return torch.log_softmax(torch.cat(found, 1).double(), -1)


class Subject:
    """The model, held-out data, and what it says of these from an exact cache."""

    def __init__(
        self, examples: int, pieces: int, layers: Optional[int], windows: bool
    ):
        self.model = load_model(layers)
        self.config = self.model.config.get_text_config()
        self.tasks = heldout_samples(examples, pieces)
        if windows:
            prose = self.tasks[TEXT]
            # Pieces that follow each other are of one text.
            long = [{n: t.reshape(1, -1) for n, t in p.items()} for p in prose]
            self.tasks = {TEXT: prose, _LONG: long}
        self.exact = {
            task: [
                answers(self.model, s, DynamicCache(config=self.config))
                for s in samples
            ]
            for task, samples in self.tasks.items()
        }

    def scores(self, new_cache: Callable[[], Cache]) -> dict[str, dict[str, float]]:
        """Of each task KL in nats, its standard error over examples, and accuracy 0..1."""
        scores = {}
        for task, samples in self.tasks.items():
            found, right = [], []
            for sample, exact in zip(samples, self.exact[task]):
                told = answers(self.model, sample, new_cache())
                found.append((exact.exp() * (exact - told)).sum(-1).mean(-1))
                labels = sample["labels"][:, -told.shape[1] :]
                right.append((told.argmax(-1) == labels).double().mean(-1))
            kl, accuracy = torch.cat(found), torch.cat(right)
            scores[task] = {
                "kl": kl.mean().item(),
                "kl_error": kl.std().item() / len(kl) ** 0.5,
                "accuracy": accuracy.mean().item(),
            }
        return scores


def rows(subject: Subject, seed: int) -> Iterator[dict[str, Any]]:
    """A row of each cache."""
    model, samples = subject.model, calibration_samples(seed)
    recipe = calibrate_cache(model, samples, progress=False)
    one = pooled(recipe, model, samples)

    def scored(name: str, bits: int, new_cache: Callable[[], Cache]) -> dict[str, Any]:
        with window(0):
            scores = subject.scores(new_cache)
        return {"seed": seed, "cache": name, "bits": bits, "tasks": scores}

    if seed == 0:
        yield scored(
            "transformers, fp8", 8, lambda: QuantizedCache("fp8", model.config)
        )
    Router.for_model(model).attach(model)
    for bits in (8, 4):
        if seed == 0:
            with unrotated():
                yield scored(
                    "as they are", bits, lambda: plain(recipe).new_cache(model, bits)
                )
            yield scored("rotated", bits, lambda: plain(recipe).new_cache(model, bits))
            yield scored(
                "by channel, 32 tokens", bits, lambda: per_channel(model, bits)
            )
        yield scored("one centre", bits, lambda: one.new_cache(model, bits))
        yield scored("**ours**", bits, lambda: recipe.new_cache(model, bits))


def window_rows(subject: Subject, seed: int) -> Iterator[dict[str, Any]]:
    """Of each number of tokens that are held as they are, and KIVI's form."""
    model = subject.model
    recipe = calibrate_cache(model, calibration_samples(seed), progress=False)
    Router.for_model(model).attach(model)

    def scored(name: str, new_cache: Callable[[], Cache]) -> dict[str, Any]:
        return {"seed": seed, "cache": name, "tasks": subject.scores(new_cache)}

    yield scored("by channel, up to 31", lambda: per_channel(model, 4))
    for size in (0, 32, 64, 128):
        with window(size):
            yield scored(f"ours, {size}", lambda: recipe.new_cache(model, 4))


def window_table(found: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| 4 bits, and tokens as they are | KL of 256 tokens, nats | KL of 1024, nats |",
        "|---|---|---|",
    ]
    for row in found:
        short, long = (row["tasks"][t]["kl"] for t in (TEXT, _LONG))
        lines.append(f"| {row['cache']} | {short:.4f} | {long:.4f} |")
    return "\n".join(lines) + "\n"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: means over seeds, and the largest spread of those of a row."""
    kinds: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in found:
        kinds.setdefault((-row["bits"], row["cache"]), []).append(row)
    tasks = [task for task in found[0]["tasks"] if task != TEXT]
    lines = [
        "| bits | keys are rounded | accuracy, % | KL of the tasks, nats | text KL, nats | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for (bits, name), of in sorted(kinds.items(), key=lambda kind: kind[0][0]):

        def mean(task: str, what: str, form: str, scale: float = 1) -> str:
            return form.format(
                scale * sum(r["tasks"][task][what] for r in of) / len(of)
            )

        accuracy = " / ".join(mean(t, "accuracy", "{:.0f}", 100) for t in tasks)
        kl = " / ".join(mean(t, "kl", "{:.4f}") for t in tasks)
        text = mean(TEXT, "kl", "{:.4f}")
        lines.append(f"| {-bits} | {name} | {accuracy} | {kl} | {text} | {len(of)} |")
    return "\n".join(lines) + "\n"


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--examples", type=int, default=96, help="of each task")
    parser.add_argument("--pieces", type=int, default=8, help="of prose")
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--json", type=Path, help="rows, written as they come")
    parser.add_argument("--windows", action="store_true", help="how many are held")
    arguments = parser.parse_args(argv)
    asked = (arguments.examples, arguments.pieces, arguments.layers)
    subject = Subject(*asked, arguments.windows)
    made, shown = (window_rows, window_table) if arguments.windows else (rows, table)
    found: list[dict[str, Any]] = []
    code = code_fingerprint(Path(__file__).parent / "real")
    for seed in arguments.seeds:
        for row in made(subject, seed):
            found.append(row)
            kl = " / ".join(f"{t['kl']:.4f}" for t in row["tasks"].values())
            print(
                f"{row.get('bits', 4)} {row['cache']}: {kl}",
                file=sys.stderr,
                flush=True,
            )
            if arguments.json:
                content = {"versions": library_versions(), "code": code, "rows": found}
                write_whole(arguments.json, json.dumps(content, indent=1))
    print(shown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
