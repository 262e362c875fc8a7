# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Spares Triton's interpreter work that it repeats at every call.

A third of its time goes into putting its own functions in the place of the language's
again at each call of a helper of a kernel, where a launch has done so already; a third
into shapes, which each value and each type of a block wraps anew, number by number; a
tenth into a table of all types, made anew for each value; and of what is left a third into
sums and products of 64 bits, by which overflows are found that are told to nobody.
"""

import functools
from typing import Any, Callable


def spare_repeated_work(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Has a launch replace each module's functions once, whatever helpers it calls.

    Args:
        replace: puts an attribute in the place of another.
    """
    from triton import language
    from triton.runtime import interpreter

    find, types = interpreter._get_np_dtype, {}

    def numpy_type(triton_type: Any) -> Any:
        # Of a block that of its elements, and of a pointer to anything the same.
        name = triton_type.scalar.name
        if name not in types:
            types[name] = find(triton_type)
        return types[name]

    core = language.core
    make_block, make_value = core.block_type.__init__, core.tensor.__init__
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = (element_ty.name, *sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self)
        vars(self).update(blocks[key], element_ty=element_ty)

    def value(self: Any, handle: Any, type: Any) -> None:
        key = type.name if type.is_block() else None
        if key not in shapes:
            make_value(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    plain = {core.tensor, core.dtype, int, float, bool, type(None)}

    def unwrapped(o: Any) -> Any:
        return o if type(o) in plain else unwrap(o)

    def same_type(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        """Not looked for: an assertion on a device, which is on in debug mode alone."""
        assert not self.builder.options.debug

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()

    @functools.lru_cache(maxsize=None)
    def languages(function: Callable[..., Any]) -> frozenset[str]:
        # The language or its core: the two that functions are replaced in.
        return frozenset(
            value.__name__
            for value in function.__globals__.values()
            if value is language or value is language.core
        )

    def patch_once(function: Callable[..., Any]) -> Any:
        if languages(function) in replaced:
            return None
        replaced.add(languages(function))
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    replace(interpreter, "_get_np_dtype", numpy_type)
    replace(core.block_type, "__init__", block_type)
    replace(core.tensor, "__init__", value)
    replace(core, "_unwrap_if_constexpr", unwrapped)
    replace(core.dtype, "__eq__", same_type)
    semantic = type(interpreter.interpreter_semantic)
    replace(semantic, "binary_op_sanitize_overflow_impl", overflow)
    replace(interpreter, "_patch_lang", patch_once)
    replace(interpreter.GridExecutor, "__call__", launch_anew)
