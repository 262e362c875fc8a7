# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How a token's modality reaches the quantized linears of a model.

One :class:`Router` belongs to one model. It wraps the model's ``forward``: the
modality ids of a call are worked out from its ``input_ids``, the model's linears read
them, and they are taken back when the call ends, however it ends. Calls without
``input_ids`` say what their tokens are with :func:`token_modalities`.

The ids are per thread and per call: two threads may run one model at a time, and a
nested call gives the outer one its ids back.
"""

import contextlib
import inspect
import threading
from typing import Any, Iterator, Mapping, Optional, Sequence

import torch
from torch._subclasses.fake_tensor import is_fake

from torchao_masquant.modality import TEXT, modality_token_ids
from torchao_masquant.model_parts import token_reader

__all__ = ["Router", "token_modalities"]

# Ids of tokens that belong to no modality of a router.
_UNCALIBRATED = -1
_PADDING = -2

# Inputs of a forward that are no features of an image or a sound, of a kind that
# features may be of.
_NOT_FEATURES = (
    "attention_mask",
    "inputs_embeds",
    "labels",
    "past_key_values",
    "video_second_per_grid",
)


class _Call:
    """What the call at hand knows of its tokens."""

    # Set here, not in the class: Dynamo's guards tell a first call from a second one
    # by which attributes the instance has.
    def __init__(self) -> None:
        # False: outside of any call, or in one that could not tell.
        self.known: bool = False
        # Whether a token_modalities block told, and not a call's input_ids.
        self.declared: bool = False
        # (batch, sequence), or None where all tokens are of the base modality.
        self.ids: Optional[torch.Tensor] = None


class _PerThread(threading.local):
    # A plain object in thread-local storage, rather than attributes of the storage:
    # Dynamo replays writes to the former across a graph break, not to the latter.
    def __init__(self) -> None:
        self.call = _Call()


class _RoutedForward:
    """A model's ``forward``, with the modality ids of the call set around it.

    A wrapper and not a pair of hooks, since forward hooks are skipped for a
    KeyboardInterrupt, and for any exception in a compiled model.
    """

    def __init__(self, model: torch.nn.Module, router: "Router"):
        self.model = model
        self.router = router
        # Another library may have replaced the forward of this one instance.
        self.replaced = model.__dict__.get("forward")
        self.names = list(self.__signature__.parameters)

    def _forward(self) -> Any:
        return self.replaced or type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.router.call
        saved = call.known, call.declared, call.ids
        arguments = dict(zip(self.names, args)) | kwargs
        input_ids = arguments.get("input_ids")
        if input_ids is not None:
            call.ids = self.router.ids_of(
                input_ids,
                arguments.get("attention_mask"),
                carries_features=_carries_features(arguments),
            )
            call.known, call.declared = True, False
        elif not call.declared:
            # Nothing tells; the ids of a call around this one are not its own. (A
            # token_modalities block around it is meant for it, and stays in force.)
            call.known, call.ids = False, None
        try:
            return self._forward()(*args, **kwargs)
        finally:
            call.known, call.declared, call.ids = saved


class Router:
    """Modality ids of the tokens of one model's calls.

    Args:
        modalities: names, base first; ids index them.
        token_ids: placeholder token ids of each modality that the model can meet
            (see :func:`torchao_masquant.modality.modality_token_ids`); None where
            ``input_ids`` tell nothing and only :func:`token_modalities` does.
        skip_padding: give padding a negative id, for calibration to leave it out,
            instead of counting it as base.

    Raises:
        ValueError: no modality is named, or one is named twice.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        token_ids: Optional[Mapping[str, Sequence[int]]] = None,
        skip_padding: bool = False,
    ):
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(
                "a Router needs distinct names of modalities, base first, got "
                f"{tuple(modalities)}."
            )
        self.modalities = tuple(modalities)
        self.token_ids = (
            None if token_ids is None else {m: tuple(t) for m, t in token_ids.items()}
        )
        self.skip_padding = skip_padding
        self._per_thread = _PerThread()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model routes its own calls: it takes no call along.
        return {k: v for k, v in self.__dict__.items() if k != "_per_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._per_thread = _PerThread()

    @property
    def call(self) -> _Call:
        """The call that runs on this thread."""
        return self._per_thread.call

    def __repr__(self) -> str:
        source = "token_modalities" if self.token_ids is None else "input_ids"
        return f"Router(modalities={self.modalities}, from {source})"

    @property
    def is_complete(self) -> bool:
        """Whether it knows every modality that its model can meet."""
        return all(m in self.modalities for m in self.token_ids or ())

    @classmethod
    def for_model(
        cls, model: torch.nn.Module, modalities: Optional[Sequence[str]] = None
    ) -> "Router":
        """A router for ``model``, from its config where it has one.

        Args:
            model: the module whose calls carry ``input_ids``.
            modalities: names, base first; None for those that the config declares.

        Raises:
            ValueError: a modality that the config does not declare.
        """
        config = getattr(model, "config", None)
        token_ids = modality_token_ids(config) if config is not None else None
        if token_ids is None:
            return cls(modalities or (TEXT,))
        unknown = [m for m in modalities or () if m not in token_ids]
        if unknown:
            raise ValueError(
                f"{type(model).__name__}'s config declares the modalities "
                f"{tuple(token_ids)}, not {', '.join(unknown)}."
            )
        return cls(modalities or tuple(token_ids), token_ids)

    def attach(self, model: torch.nn.Module) -> None:
        """Route every call of ``model`` that carries ``input_ids``.

        Of a composite, those of its part that reads them.
        """
        model = token_reader(model)
        if self.token_ids is not None:
            model.forward = _RoutedForward(model, self)

    def detach(self, model: torch.nn.Module) -> None:
        """Undo :meth:`attach`."""
        model = token_reader(model)
        forward = model.__dict__.get("forward")
        if isinstance(forward, _RoutedForward) and forward.router is self:
            del model.forward
            if forward.replaced is not None:
                model.forward = forward.replaced

    def ids_of(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        carries_features: bool = True,
    ) -> Optional[torch.Tensor]:
        """Modality ids of the tokens of one call.

        Args:
            input_ids: (batch, sequence) token ids.
            attention_mask: (batch, sequence), zero where a token is padding, which
                counts as base; another shape, or one mask for each kind of layer in a
                dict, as ``generate()`` makes them, is not looked at.
            carries_features: whether the call brings images or sounds along. Looked
                at under ``torch.compile`` only, where the graph can't depend on the
                values of ``input_ids``: without features it is base-only, and asserts
                at run time that no placeholder token is there.

        Returns:
            (batch, sequence) int64 that indexes ``modalities``, or None where every
            token is of the base modality.

        Raises:
            ValueError: a token of a modality that this router was not made for.
        """
        assert self.token_ids is not None
        default = self._index(TEXT)
        ids = torch.full_like(input_ids, default, dtype=torch.int64)
        for modality, tokens in self.token_ids.items():
            for token in tokens:
                ids = ids.masked_fill(input_ids == token, self._index(modality))
        if (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.shape == input_ids.shape
        ):
            ids = ids.masked_fill(
                attention_mask == 0, _PADDING if self.skip_padding else 0
            )
        if _is_traced(ids):
            return self._ids_compiled(ids, default, carries_features)
        if ids.numel() == 0:
            return None
        uncalibrated, routed = torch.stack(
            ((ids == _UNCALIBRATED).any(), (ids != 0).any())
        ).tolist()
        if uncalibrated:
            raise ValueError(self._uncalibrated())
        return ids if routed else None

    def _index(self, modality: str) -> int:
        if modality in self.modalities:
            return self.modalities.index(modality)
        return _UNCALIBRATED

    def _uncalibrated(self) -> str:
        assert self.token_ids is not None
        missing = [m for m in self.token_ids if m not in self.modalities]
        return (
            f"the call has {' or '.join(missing)} tokens, but the model was quantized "
            f"for the modalities {self.modalities} only: calibrate with samples of "
            "every modality that it will meet."
        )

    def _ids_compiled(
        self, ids: torch.Tensor, default: int, carries_features: bool
    ) -> Optional[torch.Tensor]:
        if default == 0 and not carries_features:
            torch._assert_async(
                (ids == 0).all(),
                "a compiled call has placeholder tokens of an image or a sound, but "
                "no features of one",
            )
            return None
        if not self.is_complete:
            torch._assert_async((ids != _UNCALIBRATED).all(), self._uncalibrated())
        return ids

    def ids_for(self, name: str, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Modality ids of the tokens that a linear of the model is called with.

        Args:
            name: of the linear, for the messages.
            x: (batch, sequence, K), or (batch * sequence, K).

        Returns:
            ``x.shape[:-1]`` int64 on ``x``'s device, or None: all base.

        Raises:
            RuntimeError: the call's tokens are of unknown modality.
            ValueError: the ids are not those of ``x``'s tokens.
        """
        call = self.call
        # One modality needs no ids, but in calibration they tell padding.
        if len(self.modalities) == 1 and not (self.skip_padding and call.known):
            return None
        if not call.known:
            raise RuntimeError(
                f"{name}: the modality of its tokens is not known, since the call did "
                "not go through the model with input_ids; wrap it in "
                "torchao_masquant.token_modalities(model, ids)."
            )
        ids = call.ids
        if ids is None:
            return None
        if ids.shape != x.shape[:-1]:
            if x.dim() != 2 or ids.numel() != x.shape[0]:
                raise ValueError(
                    f"{name}: input of shape {tuple(x.shape)} does not match the "
                    f"modality ids of the call, of shape {tuple(ids.shape)}."
                )
            ids = ids.reshape(-1)
        return ids.to(x.device)

    @contextlib.contextmanager
    def explicit(self, ids: Optional[torch.Tensor]) -> Iterator[None]:
        """Declare the modality ids of the calls inside; see :func:`token_modalities`."""
        if ids is not None:
            ids = self._checked(ids)
        call = self.call
        saved = call.known, call.declared, call.ids
        call.known, call.declared, call.ids = True, True, ids
        try:
            yield
        finally:
            call.known, call.declared, call.ids = saved

    def _checked(self, ids: torch.Tensor) -> Optional[torch.Tensor]:
        if not isinstance(ids, torch.Tensor):
            raise TypeError(
                f"modality ids are integers that index {self.modalities}, in a tensor, "
                f"got a {type(ids).__name__}."
            )
        if (
            ids.dtype.is_floating_point
            or ids.dtype.is_complex
            or ids.dtype == torch.bool
        ):
            raise TypeError(
                f"modality ids are integers that index {self.modalities}, got "
                f"{ids.dtype}."
            )
        if _is_traced(ids) or ids.is_meta:
            return ids
        if ids.numel() == 0:
            return None
        least, most = torch.stack(torch.aminmax(ids)).tolist()
        if least < 0 or most >= len(self.modalities):
            raise ValueError(
                f"modality ids index {self.modalities}, so they lie in "
                f"0..{len(self.modalities) - 1}, got {least}..{most}."
            )
        return None if most == 0 else ids.to(torch.int64)


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is being made of what happens to ``tensor``.

    Not ``torch.compiler.is_compiling()``: that is true on every thread while one of
    them compiles, in eager calls too.
    """
    return torch.compiler.is_dynamo_compiling() or is_fake(tensor)


def _carries_features(arguments: Mapping[str, Any]) -> bool:
    """Whether a call's arguments hold features of an image or a sound."""
    return any(
        name not in _NOT_FEATURES
        and (
            (isinstance(value, torch.Tensor) and value.is_floating_point())
            or (isinstance(value, (list, tuple)) and len(value) > 0)
            # What the towers made of them, by kind: generate() runs them beforehand.
            or (
                isinstance(value, Mapping)
                and any(part is not None for part in value.values())
            )
        )
        for name, value in arguments.items()
    )


def router_of(module: torch.nn.Module) -> Optional[Router]:
    """The router that the linears of ``module`` (or itself) read, if they read one."""
    for child in module.modules():
        router = getattr(child, "router", None)
        if isinstance(router, Router):
            return router
    return None


@contextlib.contextmanager
def token_modalities(
    model: torch.nn.Module, ids: Optional[torch.Tensor]
) -> Iterator[None]:
    """Say of which modality the tokens are, where ``input_ids`` do not.

    For calls with ``inputs_embeds``, for custom loops over parts of a model, and for
    one quantized linear by itself::

        with token_modalities(model, ids):
            model(inputs_embeds=embeds)

    A call inside that does carry ``input_ids``, and whose model's config says which
    of them are placeholders, is routed by those, as always: so the decode steps of a
    ``generate(inputs_embeds=...)`` are right too.

    Args:
        model: a model with quantized or observed linears, a part of one, or one such
            linear.
        ids: (batch, sequence) integers that index ``recipe.modalities``, base first;
            for one linear, the shape of its input without the last dimension. None:
            every token is of the base modality.

    Raises:
        ValueError: ``model`` has no quantized linear, or an id is out of range.
        TypeError: ids are no integers.
    """
    router = router_of(model)
    if router is None:
        raise ValueError(
            f"{type(model).__name__} has no quantized linear to tell its tokens' "
            "modalities: quantize it with masquant_config(recipe) first."
        )
    with router.explicit(ids):
        yield
