# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is called with tokens that are not the model's, and so is left out."""

import logging
import re
from collections import Counter
from typing import Sequence

__all__ = ["by_pattern", "warn_of_left_out"]

_LOGGER = logging.getLogger(__name__)


def warn_of_left_out(names: Sequence[str]) -> None:
    """Once, of the linears that are called with tokens of unknown modality.

    Args:
        names: of them; those of all layers become one pattern.
    """
    if not names:
        return
    _LOGGER.warning(
        "%d linears or expert weights are called with other tokens than the model is (a "
        "part of them, or what they were pooled to), of modalities that are not known, "
        "and stay in high precision: %s.",
        len(names),
        by_pattern(names),
    )


def by_pattern(names: Sequence[str]) -> str:
    """Names as text, those of all layers as one pattern."""
    patterns = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return ", ".join(f"{pattern} ({count})" for pattern, count in patterns.items())
