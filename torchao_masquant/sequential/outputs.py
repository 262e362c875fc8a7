# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where the results of a calibration from disk go, and whether they are there."""

import os
from pathlib import Path
from typing import Optional, Union

import safetensors

from torchao_masquant.outputs import check_file, check_folder
from torchao_masquant.sequential.manifest import read_json

__all__ = ["ORIGIN", "Outputs"]

#: Name of the file in a finished checkpoint that says what it was made from.
ORIGIN = "masquant_calibration.json"


class Outputs:
    """Where results go, and whether they are there."""

    def __init__(
        self,
        output: Union[str, os.PathLike, None],
        recipe: Union[str, os.PathLike, None],
        overwrite: bool,
    ):
        self.overwrite = overwrite
        if output is None and recipe is None:
            raise ValueError(
                "name what to write: output=, a folder for the quantized checkpoint, or "
                "recipe=, a file."
            )
        # Links stay, and what they lead to is written.
        self.checkpoint, self.recipe = (
            None if path is None else Path(os.path.realpath(path))
            for path in (output, recipe)
        )
        if self.recipe is not None and self.checkpoint in (
            self.recipe,
            *self.recipe.parents,
        ):
            raise ValueError(
                f"the recipe would be written to {str(self.recipe)!r}, and the folder "
                f"{str(self.checkpoint)!r} takes that place: give another name."
            )
        main = self.checkpoint or self.recipe
        assert main is not None
        self.partial = main.with_name(f"{main.name}.partial")

    def check(self, original: Path) -> None:
        """Raise where a result could not be written in the end.

        Args:
            original: folder of the model, or its name on the hub.

        Raises:
            FileNotFoundError: the folder around it does not exist.
            ValueError: something else is there.
        """
        if self.checkpoint is not None:
            check_folder(self.checkpoint, sources=[original])
        if self.recipe is not None:
            check_file(self.recipe, "recipe", sources=[original])
        for path in (self.checkpoint, self.recipe):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise FileNotFoundError(
                    f"cannot write {str(path)!r}: there is no folder "
                    f"{str(path.parent)!r}."
                )
            if path.exists() and self._origin(path) is None and not self.overwrite:
                raise self._occupied(path)

    @staticmethod
    def _occupied(path: Path) -> ValueError:
        return ValueError(
            f"{str(path)!r} is there already, and not a result of this calibration: "
            "let it be overwritten, or give another name."
        )

    @staticmethod
    def _origin(path: Path) -> Optional[str]:
        """Digest of the manifest that a result was made by."""
        if path.is_dir():
            return (read_json(path / ORIGIN) or {}).get("digest")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("calibration")
        except (OSError, safetensors.SafetensorError):
            return None

    def finished(self, digest: str) -> bool:
        """Whether all results of a calibration are there.

        Raises:
            ValueError: one is of another calibration.
        """
        paths = [p for p in (self.checkpoint, self.recipe) if p is not None]
        there = [path for path in paths if path.exists()]
        ours = [path for path in there if self._origin(path) == digest]
        for path in there:
            if path not in ours and not self.overwrite:
                raise self._occupied(path)
        return len(ours) == len(paths)

    def is_written(self, digest: str) -> bool:
        """Whether the checkpoint of a calibration is there, or none is asked for."""
        path = self.checkpoint
        return path is None or (path.exists() and self._origin(path) == digest)
