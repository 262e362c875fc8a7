# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Modules that are given another class in place, with all that holds on to the old one.

A class says what a module does only where nothing on the instance says otherwise.
accelerate's hooks (``device_map``), adapters and monkeypatches put a ``forward`` on the
instance, which calls the one that was there before: a method that is bound to the module
and to its old class. :func:`change_class` finds those methods and binds them anew.
"""

import copyreg
import functools
from types import CellType, FunctionType, MethodType
from typing import Any, Callable, Iterator

from torch import nn

__all__ = ["Reclassed", "become", "become_original", "change_class"]


class Reclassed(nn.Module):
    """A module that :func:`become` gave a class of one kind and of its own."""

    #: what the module was before
    original_class: type

    @classmethod
    def members(cls, original: type) -> dict[str, Any]:
        """What the class that is both has of its own, ``__name__`` included.

        Args:
            original: the module's class.
        """
        return {
            "__name__": cls.__name__,
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
        }

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # type(model).from_pretrained() and the like make a module that is not changed.
        return cls.original_class(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made at run time, so that pickle would not find it.
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        make, arguments, *state = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            kind = type(self).__mro__[1]
            make, arguments = _remade, (kind, self.original_class)
        return (make, arguments, *state)


def _remade(kind: type, original: type) -> nn.Module:
    cls: Any = _class_of(kind, original)
    return object.__new__(cls)


@functools.lru_cache(maxsize=None)
def _class_of(kind: Any, original: Any) -> type:
    """A class that is both."""
    members = {**kind.members(original), "original_class": original}
    return type(members.pop("__name__"), (kind, original), members)


def become(module: nn.Module, kind: type) -> None:
    """Turn a module into one that is of a kind, too, in place.

    Args:
        module: of any class; a kind that it was turned into before is left behind.
        kind: what to turn it into, a subclass of :class:`Reclassed`.
    """
    become_original(module)
    original: type = type(module)
    change_class(module, _class_of(kind, original))


def become_original(module: nn.Module) -> None:
    """Give a module the class back that it had before :func:`become`."""
    if isinstance(module, Reclassed):
        change_class(module, module.original_class)


def change_class(module: nn.Module, cls: type) -> None:
    """Give a module another class in place, and a forward of its instance, too.

    Methods of the module's old class that are bound to it and held by its instance
    become those of the new class: in attributes (accelerate's ``_old_forward``), in what
    a function or a callable closes over, wraps or has as arguments. What calls them
    stays, and whoever takes it off puts the right one back. The function of the old
    class, which others may hold as well, becomes one that asks its module's class.
    """
    old = {
        c.__dict__[name]: name
        for c in type(module).__mro__
        for name in _OF_INSTANCES
        if name in c.__dict__ and hasattr(cls, name)
    }
    before = type(module)
    module.__class__ = cls
    of_classes = {
        id(value)
        for c in (*type(module).__mro__, *before.__mro__)
        for value in vars(c).values()
    }
    for held, replace in _held_by(module, of_classes):
        if not isinstance(held, MethodType):
            if held in old:
                replace(_OF_INSTANCES[old[held]])
        elif held.__self__ is module and held.__func__ in old:
            replace(MethodType(getattr(cls, old[held.__func__]), module))


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).generate(self, *args, **kwargs)


# What is put on instances, and what calls that of a module's class, whichever it has.
_OF_INSTANCES = {"forward": _forward, "generate": _generate}

Place = tuple[Any, Callable[[Any], None]]


def _held_by(module: nn.Module, of_classes: set[int]) -> Iterator[Place]:
    """Methods and functions that a module's instance holds, however deep.

    Args:
        module: whose ``__dict__`` is searched.
        of_classes: ``id`` of what is in its classes, which is no instance's.
    """
    seen: set[int] = set()
    waiting = [place for place in _items(module.__dict__) if callable(place[0])]
    while waiting:
        value, replace = waiting.pop()
        known = id(value) in seen or id(value) in of_classes
        seen.add(id(value))
        if known and not isinstance(value, (MethodType, FunctionType)):
            continue
        if isinstance(value, FunctionType):
            yield value, replace
        if isinstance(value, MethodType):
            yield value, replace
            waiting.append((value.__func__, _kept))
            if value.__self__ is not module and id(value.__self__) not in seen:
                seen.add(id(value.__self__))
                waiting += _items(getattr(value.__self__, "__dict__", {}))
        elif isinstance(value, dict):
            waiting += _items(value)
        # Modules look after what is theirs; a class is not one instance's.
        elif callable(value) and not isinstance(value, (type, nn.Module)) and not known:
            waiting += _places_in(value)


def _kept(value: Any) -> None:
    """Leave a method its function: it is bound anew as a whole."""


def _items(values: dict[Any, Any]) -> Iterator[Place]:
    for name, value in list(values.items()):
        yield value, functools.partial(values.__setitem__, name)


def _places_in(value: Any) -> Iterator[Place]:
    """What a callable refers to, each with what puts another in its place."""
    yield from _items(getattr(value, "__dict__", {}))
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _cell(cell)
        yield from _globals(value)
        yield from _items(value.__kwdefaults__ or {})
        for index, default in enumerate(value.__defaults__ or ()):
            yield default, functools.partial(_set_default, value, index)
    elif isinstance(value, functools.partial):
        yield value.func, functools.partial(_set_in_partial, value, None)
        yield from _items(value.keywords)
        for index, argument in enumerate(value.args):
            yield argument, functools.partial(_set_in_partial, value, index)


def _globals(function: FunctionType) -> Iterator[Place]:
    """What may hold a method among the globals that a function names: not functions,
    which would lead through the whole program."""
    names = function.__globals__
    for name in function.__code__.co_names:
        value = names.get(name)
        if isinstance(value, (MethodType, dict)):
            yield value, functools.partial(names.__setitem__, name)


def _cell(cell: CellType) -> Iterator[Place]:
    try:
        held = cell.cell_contents
    except ValueError:
        # Not filled yet, or not any more.
        return
    yield held, functools.partial(setattr, cell, "cell_contents")


def _set_default(function: FunctionType, index: int, value: Any) -> None:
    defaults = list(function.__defaults__ or ())
    defaults[index] = value
    function.__defaults__ = tuple(defaults)


def _set_in_partial(partial: functools.partial, at: Any, value: Any) -> None:
    function, args = partial.func, list(partial.args)
    if at is None:
        function = value
    else:
        args[at] = value
    partial.__setstate__(  # type: ignore[attr-defined]
        (function, tuple(args), partial.keywords, partial.__dict__)
    )
