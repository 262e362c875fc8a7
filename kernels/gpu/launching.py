# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How the Triton kernels are launched, and described for compilation ahead of time."""

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Union

import torch
from torch.library import wrap_triton

__all__ = ["TileConfig", "launch", "rows_contiguous", "shares_of", "size_hint"]


@dataclass(frozen=True)
class TileConfig:
    """One tiling of a kernel.

    Attributes:
        blocks: names of the kernel's constexpr sizes to their values, such as
            ``BLOCK_M`` or ``SPLIT_K``, as sorted pairs.
        num_warps: warps of a program.
        num_stages: of its software pipeline.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **blocks: int) -> "TileConfig":
        """The tiling with these block sizes."""
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def to_json(self) -> dict[str, Any]:
        return {
            "blocks": dict(self.blocks),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "TileConfig":
        """The tiling that :meth:`to_json` described.

        Raises:
            KeyError: a part is missing.
        """
        return cls.of(entry["num_warps"], entry["num_stages"], **entry["blocks"])


def size_hint(size: Union[int, torch.SymInt]) -> int:
    """A size to choose a tiling by: the real one, or an example of a symbolic one.

    It puts no guard on a symbolic size, so a graph traced with it serves every size.
    """
    if isinstance(size, int):
        return size
    hint: Optional[int] = size.node.hint
    return 1024 if hint is None else int(hint)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if neighbours in a row are no neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def shares_of(
    out: torch.Tensor, config: TileConfig, dtype: torch.dtype
) -> torch.Tensor:
    """(SPLIT_K, T, N) for the sums of each share of K; the result where K is not split.

    Args:
        out: (T, N), the result.
        config: the tiling.
        dtype: of the sums.
    """
    if config["SPLIT_K"] == 1:
        return out
    shape = (config["SPLIT_K"], *out.shape)
    return torch.empty(shape, dtype=dtype, device=out.device)


def launch(
    kernel: Any, grid: tuple[Any, ...], *args: Any, config: TileConfig, **meta: Any
) -> None:
    """Run a kernel, or record it where ``torch.compile`` or an export traces.

    Args:
        kernel: what ``@triton.jit`` made.
        grid: programs in each dimension.
        *args: the kernel's arguments, in order.
        config: its block sizes, warps and stages.
        **meta: its other constexprs.
    """
    # What wraps a kernel for the tracers takes longer than the launch itself.
    if type(args[0]) is not torch.Tensor:
        kernel = wrap_triton(kernel)
    kernel[grid](
        *args,
        **meta,
        **dict(config.blocks),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
