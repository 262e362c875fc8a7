# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The modules of a model at which a router learns of a call's tokens.

Those are the model itself, its decoder, and what lies between them and generates: a
``generate()`` of the model may hand over to that of its language model, or call the
decoder. Others in between would only add frames to what is compiled.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Callable, Protocol

from torch import nn

from torchao_masquant.models.parts import decoder_path, token_reader
from torchao_masquant.reclassing import Reclassed, become, become_original

__all__ = ["RoutedModule", "add_router", "remove_router", "routers_of_calls"]


class HearsCalls(Protocol):
    """What is told of calls: a :class:`~torchao_masquant.routing.Router`."""

    @property
    def call(self) -> Any:
        """What it knows of the call that runs on this thread."""

    def is_inside(self, depth: int) -> bool:
        """Whether a call of a module is a part of a call whose tokens are known."""

    def begin(self, depth: int, arguments: Mapping[str, Any]) -> None:
        """Take note of the tokens of a call that begins."""

    def expect(self, arguments: Mapping[str, Any]) -> None:
        """Take note of the prompt of a ``generate()`` that begins."""


class RoutedModule(Reclassed):
    """A module whose calls tell routers of their tokens.

    Its class keeps the name and the signatures of the original one. It is a class, and
    no ``forward`` or ``generate`` on the instance, so that the methods are methods: for
    copies, pickle and whatever takes a model's forward apart or wraps it.
    """

    #: (router of linears inside, how many routed modules are around this one); of no
    #: type that transformers, which reads its classes' hints, could not find
    modality_routers: list[tuple[Any, int]]

    @classmethod
    def members(cls, original: type) -> dict[str, Any]:
        members: dict[str, Any] = {
            "__name__": original.__name__,
            "__qualname__": original.__qualname__,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        if _takes_tokens(original):
            members["forward"] = _routed_forward(original)
        if _generates(original):
            members["generate"] = _routed_generate(original)
        return members


def _takes_tokens(original: type) -> bool:
    parameters = inspect.signature(_method(original, "forward")).parameters
    return "input_ids" in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


def _generates(original: type) -> bool:
    return callable(getattr(original, "generate", None))


def _method(original: type, name: str) -> Callable[..., Any]:
    return getattr(original, name)


def _alike(method: Callable[..., Any], original: Callable[..., Any]) -> Any:
    """Let a method look like the original one from outside.

    Without ``__wrapped__``: who strips wrappers off a forward would strip it, too.
    """
    functools.update_wrapper(method, original)
    del method.__wrapped__  # type: ignore[attr-defined]
    method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return method


def _routed_forward(original: type) -> Any:
    inner = _method(original, "forward")
    names = _positional(inner)

    # A function around the forward and not a pair of hooks, since forward hooks are
    # skipped for a KeyboardInterrupt, and for any exception in a compiled model.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        routers = self.modality_routers
        if _are_inside(routers):
            return inner(self, *args, **kwargs)
        calls = _begin(routers, dict(zip(names, args)) | kwargs)
        try:
            return inner(self, *args, **kwargs)
        finally:
            _end(calls)

    return _alike(forward, inner)


# Loops of functions of their own, without a call of the model inside: where that breaks
# Dynamo's graph, it resumes in no loop.


def _are_inside(routers: list[tuple[HearsCalls, int]]) -> bool:
    """Whether a call is a part of one that all routers know the tokens of."""
    return all(router.is_inside(depth) for router, depth in routers)


def _begin(
    routers: list[tuple[HearsCalls, int]], arguments: dict[str, Any]
) -> list[tuple[Any, Any]]:
    """Tell routers of a call; returns what :func:`_end` undoes that with."""
    calls: list[tuple[Any, Any]] = []
    try:
        for router, depth in routers:
            if not router.is_inside(depth):
                calls.append((router.call, router.call.tokens()))
                router.begin(depth, arguments)
    except BaseException:
        _end(calls)
        raise
    return calls


def _end(calls: list[tuple[Any, Any]]) -> None:
    for call, tokens in calls:
        call.take(tokens)


def _positional(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's parameters after ``self``."""
    return tuple(inspect.signature(method).parameters)[1:]


def _routed_generate(original: type) -> Any:
    inner = _method(original, "generate")
    names = _positional(inner)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args)) | kwargs
        saved = [(r.call, r.call.prompts) for r, _ in self.modality_routers]
        for router, _ in self.modality_routers:
            router.expect(arguments)
        try:
            return inner(self, *args, **kwargs)
        finally:
            for call, prompts in saved:
                call.prompts = prompts

    return _alike(generate, inner)


def add_router(model: nn.Module, router: HearsCalls) -> None:
    """Tell a router of the tokens of the calls of ``model``, its decoder and what
    generates between them. Without effect where it is told already."""
    depth = 0
    path = _to_decoder(model)
    for module in path:
        kept = module.original_class if isinstance(module, Reclassed) else type(module)
        at_an_end = module in (path[0], token_reader(model), path[-1])
        if not _generates(kept) and not (at_an_end and _takes_tokens(kept)):
            continue
        if not isinstance(module, RoutedModule):
            become(module, RoutedModule)
            assert isinstance(module, RoutedModule)
            module.modality_routers = []
        if router not in [known for known, _ in module.modality_routers]:
            module.modality_routers.append((router, depth))
        depth += 1


def remove_router(model: nn.Module, router: HearsCalls) -> None:
    """Undo :func:`add_router`."""
    for module in list(model.modules()):
        if not isinstance(module, RoutedModule):
            continue
        module.modality_routers[:] = [
            entry for entry in module.modality_routers if entry[0] is not router
        ]
        if not module.modality_routers:
            become_original(module)
            del module.modality_routers


def routers_of_calls(model: nn.Module) -> list[Any]:
    """What :func:`add_router` told of the calls of ``model``, the first one first."""
    told: list[tuple[Any, int]] = getattr(model, "modality_routers", [])
    return [router for router, _ in told]


def _to_decoder(model: nn.Module) -> list[nn.Module]:
    """A model, its decoder, and what lies between them, from outside to inside."""
    path = decoder_path(model)
    modules = [model]
    for name in path.split(".") if path else ():
        modules.append(modules[-1].get_submodule(name))
    return modules
