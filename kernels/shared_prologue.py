# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears that share an input and their smoothing quantize it once, when compiled.

An Inductor pass: of equal calls of ``masquant::smooth_quantize`` in a graph the first
one stays. That q/k/v and gate/up make equal calls is the work of
:mod:`torchao_masquant.sharing`.
"""

import functools
from typing import Any

import torch

__all__ = ["merge_equal_calls", "register"]

# What stands between an input and its tokens.
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments of calls in one functional graph hold the same values."""
    if a is b:
        return True
    if isinstance(a, torch.fx.Node) and isinstance(b, torch.fx.Node):
        return (
            a.target == b.target and a.target in _VIEWS and _equal(a.args, b.args)
        ) and _equal(tuple(a.kwargs.items()), tuple(b.kwargs.items()))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, torch.fx.Node) or isinstance(b, torch.fx.Node):
        return False
    return type(a) is type(b) and a == b


def _merge_with_an_earlier(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    for other in graph.find_nodes(op="call_function", target=node.target):
        if other < node and _equal(other.args, node.args):
            node.replace_all_uses_with(other)
            graph.erase_node(node)
            return


def _merge(match: Any, *args: Any, **kwargs: Any) -> None:
    _merge_with_an_earlier(match.graph, match.output_node())


def merge_equal_calls(graph: torch.fx.Graph) -> None:
    """Keep the first of equal calls of ``masquant::smooth_quantize`` in a graph."""
    target = torch.ops.masquant.smooth_quantize.default
    for node in graph.find_nodes(op="call_function", target=target):
        _merge_with_an_earlier(graph, node)


@functools.lru_cache(maxsize=None)
def register() -> None:
    """Add the pass to Inductor, once for a process.

    Not at import: it brings the most of Inductor along, which eager users never need.
    """
    from torch._inductor.fx_passes.post_grad import pass_patterns
    from torch._inductor.pattern_matcher import (
        CallFunctionVarArgs,
        register_graph_pattern,
    )

    register_graph_pattern(
        CallFunctionVarArgs(torch.ops.masquant.smooth_quantize.default),
        pass_dict=pass_patterns[0],
    )(_merge)
