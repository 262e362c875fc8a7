# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators that a torchvision for CUDA lacks under a torch for CPUs.

vLLM imports torchvision, which describes them when it is imported; none of them is called.
"""

import importlib.abc
import importlib.util
import sys
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if hasattr(torch.ops.torchvision, "nms"):
            return
        self.library = torch.library.Library("torchvision", "FRAGMENT")
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        self.library.define(f"nms{boxes}")
        self.library.define(f"qnms{boxes}")
        self.library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height,"
            " int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
        )
        # Schemas go with what defines them.
        sys.modules["_torchvision_schemas"] = self.library  # type: ignore[assignment]


sys.meta_path.insert(0, _Finder())
