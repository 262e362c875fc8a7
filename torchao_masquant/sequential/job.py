# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What all parts of a calibration from disk work on."""

from dataclasses import dataclass
from typing import Any

from torchao_masquant.conductor.team import Team
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.selection import Selected
from torchao_masquant.sequential.decoder_walk import DecoderWalk
from torchao_masquant.sequential.disk_model import DiskModel
from torchao_masquant.sequential.manifest import SampleSummary
from torchao_masquant.sequential.outputs import Outputs

__all__ = ["Job"]


@dataclass
class Job:
    """One call of :func:`~torchao_masquant.sequential.calibrate_sequential`.

    Attributes:
        disk: the model.
        selected: what is quantized of it.
        heads: parts of the recipe that need no data.
        walk: through its decoder.
        router: that tells the modalities of the tokens.
        options: of the solution.
        max_statistics_bytes: bound of the statistics of one pass, in bytes.
        outputs: where the results go.
        team: that shares the work.
        summary: of all samples.
        description: of the recipe and the checkpoint.
        progress: whether to show bars on a terminal.
    """

    disk: DiskModel
    selected: Selected
    heads: dict[str, LayerRecipe]
    walk: DecoderWalk
    router: Router
    options: SolverOptions
    max_statistics_bytes: int
    outputs: Outputs
    team: Team
    summary: SampleSummary
    description: dict[str, Any]
    progress: bool

    def __post_init__(self) -> None:
        #: names of the weights of each block
        self.names = [self.disk.names_under(name) for name in self.walk.names]
        #: numbers of the samples of this process
        self.mine = self.team.share_of(self.summary.count)

    @property
    def in_blocks(self) -> set[str]:
        """Names of the weights of all blocks."""
        return {name for names in self.names for name in names}

    @property
    def shows_bars(self) -> bool:
        """Whether this process shows a bar."""
        return self.progress and self.team.rank == 0

    def selected_of(self, index: int) -> Selected:
        """What is quantized of one block."""
        prefix = f"{self.walk.names[index]}."
        return self.selected.where(lambda name: name.startswith(prefix))
