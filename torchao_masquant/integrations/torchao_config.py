# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The classes that torchao may make of a config's JSON, and nothing else.

``torchao.core.config.config_from_dict`` calls what a module has under the name that the
JSON gives; here that can be no function.
"""

from torchao_masquant.config import MASQuantConfig

__all__ = ["MASQuantConfig"]
