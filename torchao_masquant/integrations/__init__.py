# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Saving and loading through transformers, and through torchao.

Importing this package does not import transformers: its parts that need it are
imported when they are first used.
"""

from torchao_masquant.integrations.attachment import attach_to_transformers
from torchao_masquant.integrations.registration import register_integrations

__all__ = ["attach_to_transformers", "register_integrations"]
