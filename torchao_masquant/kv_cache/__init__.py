# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A cache of keys and values in 8 or 4 bits, with a centre of the keys per modality."""

from torchao_masquant.kv_cache.cache_recipe import CacheRecipe
from torchao_masquant.kv_cache.observed_keys import calibrate_cache

__all__ = ["CacheRecipe", "calibrate_cache"]
