# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration data are short of, and what they hold that is not ordinary."""

import logging
from typing import Iterator

import torch

from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver import modality_spread

__all__ = ["CalibrationNotices"]

_LOGGER = logging.getLogger(__name__)

_FEW_TOKENS = 64


class CalibrationNotices:
    """Tells it by logging, each sentence once, however many sessions share the data.

    Args:
        options: of the solution.
    """

    def __init__(self, options: SolverOptions):
        self.options = options
        self.inputs: dict[str, modality_spread.InputSpread] = {}
        self._told = False

    def see(self, session: CalibrationSession) -> None:
        """Of the first session what the data are short of; remember the rest for ``tell``.

        Args:
            session: complete, and not solved for yet.
        """
        if not self._told:
            self._told = True
            _warn_of_few_tokens(session)
            _warn_of_one_sequence(session)
        if self.options.procedure.per_modality:
            for name, weights in _weights(session):
                self.inputs[name] = modality_spread.input_spread(
                    session.statistics[name], weights
                )

    def tell(self) -> None:
        """Of sinks, and of modalities that differ so much that options should, too."""
        for sentence in modality_spread.sinks_of(self.inputs):
            _LOGGER.info(
                "%s Centres and factors are made without them; what weights are rounded "
                "for counts them.",
                sentence,
            )
        bits, one_factor = (
            self.options.number_format.act_bits,
            not any(self.options.separations),
        )
        if one_factor and modality_spread.differ_by_much(self.inputs, bits):
            _LOGGER.warning("%s", modality_spread.verdict(self.inputs, bits))


def _weights(
    session: CalibrationSession,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Name of each input, and the weights (N, K) that read it."""
    all_weights = session.weights
    for leader, names in session.groups().items():
        weights: dict[str, torch.Tensor] = {}
        for name in names:
            weight = all_weights[name]
            if weight.dim() == 2:
                weights[name] = weight
            else:
                weights |= {f"{name}[{i}]": one for i, one in enumerate(weight)}
        yield leader, weights


def _warn_of_few_tokens(session: CalibrationSession) -> None:
    """Once for each modality that is too small a sample of what is to come."""
    fewest: dict[str, int] = {}
    for name, statistics in session.statistics.items():
        if name in session.left_out:
            continue
        for modality, moments in zip(statistics.modalities, statistics.moments):
            known = fewest.get(modality, moments.count)
            fewest[modality] = min(known, moments.count)
    for modality, count in fewest.items():
        if count < _FEW_TOKENS:
            _LOGGER.warning(
                "the calibration data has %d %s tokens: their ranges and covariances are "
                "guesses; add samples with %s (%d tokens or more).",
                count,
                modality,
                modality,
                _FEW_TOKENS,
            )


def _warn_of_one_sequence(session: CalibrationSession) -> None:
    if session.sequences == 1:
        _LOGGER.warning(
            "the calibration data is a single sequence: what the recipe learns of the "
            "model's activations is what this one holds; add samples (dozens, of all "
            "kinds that the model will meet)."
        )
