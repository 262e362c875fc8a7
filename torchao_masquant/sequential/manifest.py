# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a calibration was begun with, to go on with the same and with nothing else."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.sample_checks import (
    NEEDED,
    check_sample,
    check_samples,
    no_samples,
)

__all__ = ["Manifest", "SampleSummary", "file_digests", "summarize_samples"]

_CHUNK = 1 << 22


class Manifest:
    """The record of a calibration's inputs, in a file of its folder.

    Args:
        path: of the file.
        entries: by what they are of, in words for a message ("model", "option rank"):
            digests or values that JSON holds.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any]):
        self.path = path
        # As JSON gives it back: tuples are lists.
        self.entries: dict[str, Any] = json.loads(json.dumps(dict(entries)))

    @property
    def digest(self) -> str:
        """Of all entries."""
        text = json.dumps(self.entries, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def begin(self) -> None:
        """Write the record, or compare with the one that is there.

        Raises:
            ValueError: it was begun with something else.
        """
        found = read_json(self.path)
        if found is None:
            text = json.dumps(self.entries, indent=1)
            write_whole(self.path, text, durable=True)
            return
        changed = [
            name
            for name in [*self.entries, *found]
            if self.entries.get(name) != found.get(name)
        ]
        if changed:
            raise ValueError(
                f"the calibration in {str(self.path.parent)!r} was begun with another "
                f"{changed[0]}{_values(found, self.entries, changed[0])}: go on with "
                "the same, or remove that folder to begin again."
            )


def _values(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    values = [str(entries.get(name, "not given")) for entries in (before, now)]
    if any(len(value) > 40 for value in values):
        return ""
    return f" ({values[0]}, now {values[1]})"


def read_json(path: Path) -> Optional[dict[str, Any]]:
    """What a JSON file holds; None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


class SampleSummary:
    """What can be known of samples without a model.

    Attributes:
        digest: of all their values.
        count: their number.
        tokens: (sequence x batch) of each, None where it is not known.
        nbytes: of all their tensors.
        kinds: names of inputs to the index of the longest sample that has just those.
    """

    def __init__(self) -> None:
        self.digest = ""
        self.tokens: list[Optional[int]] = []
        self.nbytes = 0
        self.kinds: dict[tuple[str, ...], int] = {}

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Index of the longest sample."""
        return max(range(self.count), key=lambda i: self.tokens[i] or 0)


def summarize_samples(samples: Iterable[Any]) -> SampleSummary:
    """Run through the samples once.

    Raises:
        TypeError: a sample is no mapping; ``samples`` can be run through only once.
        ValueError: there is none.
    """
    check_samples(samples)
    if iter(samples) is samples:
        raise TypeError(
            "samples are run through several times, and an iterator ends after the first: "
            "give a list, or an object whose __iter__ starts again."
        )
    summary, digest = SampleSummary(), hashlib.sha256()
    for index, sample in enumerate(samples):
        check_sample(sample, f"sample {index}")
        tokens = None
        for name in sorted(sample):
            value = sample[name]
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                summary.nbytes += value.nbytes
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(_bytes(value))
            else:
                digest.update(repr(value).encode())
        for name in ("input_ids", "modality_ids", "inputs_embeds"):
            value = sample.get(name)
            if isinstance(value, torch.Tensor) and value.dim() >= 2:
                tokens = value.shape[0] * value.shape[1]
                break
        summary.tokens.append(tokens)
        kind = tuple(sorted(sample))
        known = summary.kinds.get(kind)
        if known is None or (summary.tokens[known] or 0) < (tokens or 0):
            summary.kinds[kind] = index
    if not summary.count:
        raise no_samples(samples, "samples", NEEDED)
    summary.digest = digest.hexdigest()
    return summary


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def file_digests(files: Sequence[Path], cache: Path) -> dict[str, str]:
    """SHA-256 of files, read anew only where size or time of change differ.

    Args:
        files: large ones, read side by side.
        cache: a file to remember the digests in.
    """
    known = read_json(cache) or {}

    def entry(path: Path) -> dict[str, Any]:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        before = known.get(path.name, {})
        if before.get("mark") == mark:
            return before
        return {"mark": mark, "digest": _file_digest(path)}

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip([f.name for f in files], pool.map(entry, files)))
    if found != known:
        write_whole(cache, json.dumps(found), durable=True)
    return {name: entry["digest"] for name, entry in found.items()}


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
