# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears that share an input and their smoothing do that once, when compiled.

An Inductor pass: of equal calls of ``masquant::smooth_quantize`` in a graph, and of
``masquant::float_smooth_quantize``, the first one stays. That q/k/v and gate/up make equal calls is the work of
:mod:`torchao_masquant.linear`. On a GPU the graph has launches of the operator's
Triton kernel in its place, and of equal launches into new memory the first one stays;
likewise of those that smooth for ``masquant::weight_only_linear``.
"""

import functools
from typing import Any, Mapping

import torch

__all__ = ["merge_equal_calls", "register"]

# What stands between an input and its tokens.
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
_EMPTY = torch.ops.aten.empty.memory_format
# Of the kernels that read an input, smooth it, and write it for a product.
_KERNELS = tuple(
    f"torchao_masquant.kernels.gpu.{name}"
    for name in ("smooth_quantize", "float_smooth_quantize", "smooth")
)


def _rounding() -> tuple[Any, ...]:
    """The operators that smooth and round an input."""
    ops = torch.ops.masquant
    return ops.smooth_quantize.default, ops.float_smooth_quantize.default


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments of calls in one functional graph hold the same values."""
    if a is b:
        return True
    if isinstance(a, torch.fx.Node) and isinstance(b, torch.fx.Node):
        size, other = a.meta.get("val"), b.meta.get("val")
        if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
            return size.node.expr == other.node.expr
        return a.target in _VIEWS and _equal_calls(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.fx.Node) or isinstance(b, torch.fx.Node):
        return False
    return type(a) is type(b) and a == b


def _equal_calls(a: Any, b: Any) -> bool:
    return (
        a.target == b.target and _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
    )


def _launched(node: Any) -> tuple[Any, list[str]]:
    """The Python function of a launch's kernel, and its numbers of warps and stages."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    configs = [str(config) for config in getattr(kernel, "configs", ())]
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel, configs


def _is_prologue(node: Any) -> bool:
    return _launched(node)[0].__module__ in _KERNELS


def _equal_launches(a: Any, b: Any) -> bool:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    ours, theirs = dict(a.kwargs), dict(b.kwargs)
    constants = [
        kernel_side_table.get_constant_args(kwargs.pop("constant_args_idx"))
        for kwargs in (ours, theirs)
    ]
    # Each launch has a number of its own for the one kernel there is.
    del ours["kernel_idx"], theirs["kernel_idx"]
    values, others = dict(ours.pop("kwargs")), dict(theirs.pop("kwargs"))
    written = ours["tensors_to_clone"]
    if (
        _launched(a) != _launched(b)
        or constants[0] != constants[1]
        or written != theirs["tensors_to_clone"]
    ):
        return False
    for name in written:
        one, other = values.pop(name), others.pop(name)
        # Of memory that something was in before, a launch might leave some as it was.
        if one.target != _EMPTY or not _equal_calls(one, other):
            return False
    return _equal(ours, theirs) and _equal(values, others)


def _merge_launches(match: Any, *args: Any, **kwargs: Any) -> None:
    node = match.output_node()
    if not _is_prologue(node):
        return
    for other in match.graph.find_nodes(op="call_function", target=node.target):
        if other < node and _is_prologue(other) and _equal_launches(other, node):
            written = [
                node.kwargs["kwargs"][n] for n in node.kwargs["tensors_to_clone"]
            ]
            node.replace_all_uses_with(other)
            match.graph.erase_node(node)
            for empty in written:
                if not empty.users:
                    match.graph.erase_node(empty)
            return


def _merge_with_an_earlier(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    for other in graph.find_nodes(op="call_function", target=node.target):
        if other < node and _equal_calls(other, node):
            node.replace_all_uses_with(other)
            graph.erase_node(node)
            return


def _merge(match: Any, *args: Any, **kwargs: Any) -> None:
    _merge_with_an_earlier(match.graph, match.output_node())


def merge_equal_calls(graph: torch.fx.Graph) -> None:
    """Keep the first of equal calls that smooth and round an input in a graph."""
    for target in _rounding():
        for node in graph.find_nodes(op="call_function", target=target):
            _merge_with_an_earlier(graph, node)


@functools.lru_cache(maxsize=None)
def register() -> None:
    """Add the pass to Inductor, once for a process.

    Not at import: it brings the most of Inductor along, which eager users never need.
    """
    from torch._higher_order_ops.triton_kernel_wrap import (
        triton_kernel_wrapper_functional,
    )
    from torch._inductor.fx_passes.post_grad import pass_patterns
    from torch._inductor.pattern_matcher import (
        CallFunctionVarArgs,
        register_graph_pattern,
    )

    for target, merge in (
        *((target, _merge) for target in _rounding()),
        (triton_kernel_wrapper_functional, _merge_launches),
    ):
        register_graph_pattern(CallFunctionVarArgs(target), pass_dict=pass_patterns[0])(
            merge
        )
