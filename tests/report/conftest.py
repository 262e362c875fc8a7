# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What tests of reports have in common."""

import pytest

from torchao_masquant.report import page as page_module


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, where nobody looks at them."""
    monkeypatch.setattr(page_module, "to_svg", lambda figure: "<svg></svg>")
