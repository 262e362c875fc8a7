# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Broken recipes and checkpoints: a clear error or a harmless change, never a crash.

A few seconds by default; ``MASQUANT_FUZZ_EXAMPLES=20000 pytest`` with this file searches
longer.
"""

import contextlib
import copy
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import format_1
import pytest
import tiny_models
from before_loading import look_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLForConditionalGeneration

from torchao_masquant import Recipe, masquant_config

EXAMPLES = int(os.environ.get("MASQUANT_FUZZ_EXAMPLES", "30"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="MASQUANT_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What a reader may raise; anything else is a bug. Never MemoryError or RecursionError.
CLEAR = (ValueError, OSError)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """A huge allocation fails, rather than being made and never touched."""
    if sys.platform != "linux":
        yield
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# As many times the calls that the whole file takes as a damaged one may.
MOST_CALLS = 10


@contextlib.contextmanager
def counted_calls(most: float = float("inf")) -> Iterator[list[int]]:
    """How many functions are called inside; more than ``most`` fails.

    More would mean a search that the file has asked for. An allocation that it has
    asked for fails by itself, see above.
    """
    calls = [0]

    def count(frame: Any, event: str, arg: Any) -> None:
        calls[0] += event in ("call", "c_call")
        assert calls[0] <= most, f"more than {most} calls"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)
    # Also where something has caught what the count raised.
    assert calls[0] <= most, f"more than {most} calls"


def calls_of(read: Callable[[], None]) -> int:
    """Of a second time: the first one imports, and fills caches."""
    read()
    with counted_calls() as calls:
        read()
    return calls[0]


@pytest.mark.parametrize("caught", [False, True])
def test_a_search_is_found(caught):
    with pytest.raises(AssertionError, match="more than 50 calls"):
        with counted_calls(50):
            with contextlib.suppress(AssertionError if caught else OSError):
                while True:
                    len("")


# Values that a field of a header or of a config may be changed to.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 2**31, 2**40, 2**63, 10**30, 0.5, 1e308]),
    st.sampled_from([float("inf"), float("nan"), "", "F32", "I64", "text", "w4a8"]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 2**40), max_size=3),
    st.sampled_from([[], {}, [[]], {"a": 1}, [2**40, 2**40], [10**9, 10**9, 10**9]]),
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a piece of JSON."""
    if path:
        yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from _paths(inner, (*path, key))


@st.composite
def mutations(draw: st.DrawFn, whole: Any) -> Any:
    """JSON with one to three places changed, dropped or doubled."""
    changed = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_paths(changed))
        if not places:
            break
        *outer, last = draw(st.sampled_from(places))
        holder = changed
        for key in outer:
            holder = holder[key]
        action = draw(st.sampled_from(["change", "drop", "add", "swap"]))
        if action == "drop":
            del holder[last]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder[last]
        elif action == "swap" and isinstance(holder, dict):
            other = draw(st.sampled_from(list(holder)))
            holder[last], holder[other] = holder[other], holder[last]
        else:
            holder[last] = copy.deepcopy(draw(ODD))
    return changed


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _join(header: Any, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


@st.composite
def damaged_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with bytes flipped, cut off, put in or taken out; most in its header."""
    end = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from([8, end, len(damaged)]))
        place = draw(st.integers(0, max(0, min(size, len(damaged)) - 1)))
        action = draw(st.sampled_from(["flip", "flip", "set", "insert", "cut", "take"]))
        if action == "flip" and damaged:
            damaged[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "set" and damaged:
            damaged[place] = draw(st.integers(0, 255))
        elif action == "insert":
            damaged[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif action == "take":
            del damaged[place : place + draw(st.integers(1, 9))]
        else:
            del damaged[place:]
    return bytes(damaged)


def _is_clear(error: Exception) -> None:
    message = str(error)
    assert message.endswith(".") and "\n" not in message, message
    assert len(message) < 2000


# Recipes.


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.safetensors"
    tiny_models.recipe_of(tiny_models.PlainModel(), rank=2).save(path)
    return path


@pytest.fixture(scope="module")
def recipe_calls(recipe_file):
    return calls_of(lambda: _use_recipe(recipe_file))


def _use_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    quantize_(tiny_models.PlainModel(), masquant_config(recipe))


def _read_recipe(path: Path, content: bytes, calls: int) -> None:
    """Read it, and use it if it reads."""
    path.write_bytes(content)
    with counted_calls(MOST_CALLS * calls):
        try:
            _use_recipe(path)
        except CLEAR as error:
            _is_clear(error)


@FUZZ
@given(data=st.data())
def test_a_recipe_with_damaged_bytes(data, recipe_file, recipe_calls, tmp_path):
    content = data.draw(damaged_files(recipe_file.read_bytes()))
    _read_recipe(tmp_path / "x", content, recipe_calls)


@FUZZ
@given(data=st.data())
def test_a_recipe_with_a_changed_header(data, recipe_file, recipe_calls, tmp_path):
    """Names, types, shapes and offsets of its tensors."""
    header, values = _split(recipe_file.read_bytes())
    changed = data.draw(mutations(header))
    _read_recipe(tmp_path / "x", _join(changed, values), recipe_calls)


@FUZZ
@given(data=st.data())
def test_a_recipe_with_changed_metadata(data, recipe_file, recipe_calls, tmp_path):
    """What the recipe says of itself: options, modalities, layers."""
    header, values = _split(recipe_file.read_bytes())
    metadata = header["__metadata__"]
    changed = data.draw(mutations(json.loads(metadata["recipe"])))
    metadata["recipe"] = json.dumps(changed)
    _read_recipe(tmp_path / "x", _join(header, values), recipe_calls)


def test_a_recipe_whose_metadata_is_nested_too_deep(recipe_file, tmp_path):
    header, values = _split(recipe_file.read_bytes())
    for text in ("[" * 100_000, '{"a":' * 100_000):
        header["__metadata__"]["recipe"] = text
        (tmp_path / "x").write_bytes(_join(header, values))
        with pytest.raises(ValueError, match="is no recipe, or a damaged one"):
            Recipe.load(tmp_path / "x")


# Checkpoints.


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(format_1.FOLDER, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def checkpoint_calls():
    return calls_of(lambda: look_at(format_1.FOLDER))


def _read_checkpoint(folder: Path, calls: int) -> None:
    with counted_calls(MOST_CALLS * calls):
        try:
            look_at(folder)
        except CLEAR as error:
            _is_clear(error)


@FUZZ
@given(data=st.data())
def test_a_checkpoint_with_damaged_bytes(data, folder, checkpoint_calls):
    content = (format_1.FOLDER / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.draw(damaged_files(content)))
    _read_checkpoint(folder, checkpoint_calls)


@FUZZ
@given(data=st.data())
def test_a_checkpoint_with_a_changed_header(data, folder, checkpoint_calls):
    header, values = _split((format_1.FOLDER / "model.safetensors").read_bytes())
    changed = _join(data.draw(mutations(header)), values)
    (folder / "model.safetensors").write_bytes(changed)
    _read_checkpoint(folder, checkpoint_calls)


@FUZZ
@given(data=st.data())
def test_a_checkpoint_with_a_changed_config(data, folder, checkpoint_calls):
    config = json.loads((format_1.FOLDER / "config.json").read_text())
    # As a dict, which is what transformers hands on.
    changed = data.draw(mutations(config["quantization_config"]))
    config["quantization_config"] = changed
    (folder / "config.json").write_text(json.dumps(config))
    _read_checkpoint(folder, checkpoint_calls)


@pytest.mark.parametrize("shape", [[2**20, 2**20], [2**40], [2**31, 2**31, 2**31]])
def test_a_shape_of_a_terabyte_is_refused(shape, folder, recipe_file, tmp_path):
    """Also where the offsets say the same."""
    for path in (folder / "model.safetensors", recipe_file):
        for offsets in (None, [0, 4 * 2**40]):
            header, values = _split(path.read_bytes())
            name = next(n for n in header if n != "__metadata__")
            header[name]["shape"] = shape
            if offsets is not None:
                header[name]["data_offsets"] = offsets
            (tmp_path / "x.safetensors").write_bytes(_join(header, values))
            with pytest.raises(ValueError, match="cut off or damaged|a damaged one"):
                if path == recipe_file:
                    Recipe.load(tmp_path / "x.safetensors")
                else:
                    shutil.copy(tmp_path / "x.safetensors", path)
                    _read_and_raise(folder)
        shutil.copy(format_1.FOLDER / "model.safetensors", folder)


def _read_and_raise(folder: Path) -> None:
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
