# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``evaluate``: how good a model is, and how far from its reference."""

import contextlib
import datetime
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Union

import torch
from torch import nn

from torchao_masquant.evaluation.calls import logits_of, modality_ids_of
from torchao_masquant.evaluation.evaluation import Evaluation, LinearSQNR
from torchao_masquant.evaluation.scores import ScoreSums
from torchao_masquant.evaluation.sqnr import LinearComparison
from torchao_masquant.evaluation.token_scores import score_tokens
from torchao_masquant.evaluation.weights import (
    method_of,
    quantized_linears,
    scheme_of,
    weight_bytes,
)
from torchao_masquant.models.parts import head_of
from torchao_masquant.models.wrappers import unwrapped
from torchao_masquant.progress import progress_bar
from torchao_masquant.routing import Router, router_of
from torchao_masquant.sample_checks import check_sample, check_samples, no_samples
from torchao_masquant.samples import evaluation_mode

__all__ = ["check_reference", "evaluate"]

_LABELS = "labels"
_ALL = "all"

Samples = Iterable[Mapping[str, Any]]


def evaluate(
    model: nn.Module,
    dataset: Union[Mapping[str, Samples], Samples],
    reference: Optional[nn.Module] = None,
    *,
    progress: bool = True,
) -> Evaluation:
    """Score a model on labelled data, by task, by modality and against a reference.

    The data runs once, and no more than one sample's logits are held at a time.

    Args:
        model: a transformers model, quantized or not.
        dataset: name of each task to its samples, or the samples of one task, "all". A
            sample is a dict of the model's keyword inputs, and ``labels`` [batch,
            sequence], integers: the right token at each position, -100 where it is
            not scored. As in transformers, the label of a token is predicted by the
            logits of the token before it; labels are not handed to the model. Where
            ``input_ids`` do not tell the modalities, ``modality_ids`` [batch,
            sequence] do, as for :func:`~torchao_masquant.calibrate`.
        reference: the model before it was quantized: adds the divergence of the
            logits, and the signal-to-noise ratio of each quantized linear on the
            reference's inputs.
        progress: show a bar on a terminal.

    Returns:
        All scores. Both models are left as they were.

    Raises:
        ValueError: there is no data or no label; labels do not fit the logits; the
            reference has another architecture or vocabulary, or is quantized; a logit
            is nan; a sample is on another device.
        TypeError: a sample or its labels are of the wrong type.
    """
    # A compiled model is called as it is, and looked at as it was.
    called, model = model, unwrapped(model)
    comparison = None
    quantized = quantized_linears(model)
    if reference is not None:
        # Its linears are watched, which a compiled one would not let happen.
        reference = unwrapped(reference)
        check_reference(model, reference)
        if quantized:
            comparison = LinearComparison(reference, model)
    tasks = dataset if isinstance(dataset, Mapping) else {_ALL: dataset}
    if not tasks:
        raise ValueError("the dataset is empty: it has no task.")
    if any(isinstance(samples, torch.Tensor) for samples in tasks.values()):
        # One sample, of whose inputs each would be a task.
        check_samples(dataset, "the dataset")
    for task, samples in tasks.items():
        check_samples(samples, f"task {task!r} of the dataset")
    modalities = (router_of(model) or Router.for_model(model)).modalities
    router = Router.for_model(model, modalities)
    router.skip_padding = True
    sums = ScoreSums(tuple(modalities), reference is not None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            evaluation_mode(model, *([] if reference is None else [reference]))
        )
        if comparison is not None:
            stack.enter_context(comparison.observing())
        for task, samples in tasks.items():
            count = 0
            bar = progress_bar(
                samples,
                desc=f"Evaluating {task}",
                show=progress,
            )
            for count, sample in enumerate(bar, start=1):
                where = f"sample {count - 1} of task {task!r}"
                inputs, labels = _split(sample, model, where)
                logits = logits_of(
                    called, inputs, router_of(model), f"the model called with {where}"
                )
                shape = (logits.shape[0], logits.shape[1])
                ids = modality_ids_of(router, inputs, shape, where)
                other = None
                if reference is not None:
                    other = logits_of(
                        reference,
                        inputs,
                        None if comparison is None else comparison.router,
                        f"the reference called with {where}",
                    )
                scores = score_tokens(logits, other, labels, ids >= 0, where)
                sums.add(task, scores, ids.cpu())
            if count == 0:
                raise no_samples(
                    samples, f"task {task!r} of the dataset", "nothing can be scored"
                )
            if sums.labelled_tokens(task) == 0:
                raise ValueError(
                    f"task {task!r} has no labelled token: give its samples labels "
                    "other than -100, after the first token."
                )

    return Evaluation(
        model=type(model).__name__,
        modalities=tuple(modalities),
        tasks=sums.tasks(),
        by_modality=sums.by_modality(),
        by_content=sums.by_content(),
        weight_bytes=weight_bytes(model),
        quantized_linears=len(quantized),
        scheme=scheme_of(model),
        method=method_of(model),
        reference_weight_bytes=None if reference is None else weight_bytes(reference),
        name=_name(model),
        date=datetime.date.today().isoformat(),
        sqnr={}
        if comparison is None
        else {
            name: {m: LinearSQNR(r.plain, r.centered) for m, r in ratios.items()}
            for name, ratios in comparison.results.items()
        },
    )


def _name(model: nn.Module) -> Optional[str]:
    """The last part of the path of a folder; the whole of a name on the hub."""
    path = getattr(model, "name_or_path", None)
    if not isinstance(path, str) or not path:
        return None
    return Path(path).resolve().name if Path(path).is_dir() else path


def _split(
    sample: Any, model: nn.Module, where: str
) -> tuple[dict[str, Any], torch.Tensor]:
    """A sample's inputs and its labels."""
    check_sample(sample, where, model)
    if sample.get(_LABELS) is None:
        raise ValueError(
            f"{where} has no labels: give every token the right one, -100 where it is "
            "not scored."
        )
    return {k: v for k, v in sample.items() if k != _LABELS}, sample[_LABELS]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its sizes; experts' may be either way round, and are not once quantized."""
    sizes = tuple(parameter.shape)
    return (sizes[0], *sorted(sizes[1:])) if len(sizes) == 3 else sizes


def check_reference(model: nn.Module, reference: nn.Module) -> None:
    """Raise unless one can be the other before quantization.

    Args:
        model: quantized or not.
        reference: of the same architecture, names and shapes.

    Raises:
        ValueError: says what differs.
    """
    if quantized_linears(reference):
        raise ValueError(
            "the reference is quantized: give the model as it was before quantization."
        )
    sizes = [_vocabulary(m) for m in (model, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the reference has a vocabulary of {sizes[1]} tokens, the model one of "
            f"{sizes[0]}: give the model that was quantized."
        )
    shapes, expected = (
        {name: _shape(p) for name, p in m.named_parameters()}
        for m in (model, reference)
    )
    if shapes != expected:
        name = next(n for n in [*shapes, *expected] if shapes.get(n) != expected.get(n))
        raise ValueError(
            f"the reference is of another architecture than the model: {name} has "
            f"shape {expected.get(name, 'none')} there and "
            f"{shapes.get(name, 'none')} here; give the model that was quantized."
        )


def _vocabulary(model: nn.Module) -> Optional[int]:
    head: Any = head_of(model)
    return None if head is None else head.weight.shape[0]
