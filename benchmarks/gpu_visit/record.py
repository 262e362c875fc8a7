# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a visit has found so far: one JSON file, whole after every step."""

import json
from pathlib import Path
from typing import Any

from torchao_masquant.atomic_files import write_whole

__all__ = ["Record"]


class Record:
    """The file of a visit, which every stage adds to.

    Args:
        path: is made at the first entry; what is there is kept.
    """

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> dict[str, Any]:
        """What is there; empty where nothing is."""
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def write(self, stage: str, entry: Any) -> None:
        """Put an entry in the place of the stage's last one."""
        whole = {**self.read(), stage: entry}
        write_whole(self._path, json.dumps(whole, indent=1) + "\n", durable=True)
