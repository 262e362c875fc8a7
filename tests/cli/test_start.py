# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How the command line begins: what it imports, and what it lets libraries say."""

import importlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import torchao_masquant
from torchao_masquant import progress
from torchao_masquant.__main__ import main
from torchao_masquant.cli.commands import main_parser, with_all_arguments
from torchao_masquant.cli.noise import plain_messages
from torchao_masquant.testing import model_folders

HEAVY = ("numpy", "torch", "torchao", "transformers", "rich", "jinja2", "PIL")


def in_new_process(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
    )


_EXPLAINED = """
import contextlib, io, sys
from torchao_masquant.__main__ import main
for words in (["--version"], ["--help"], *([c, "--help"] for c in sys.argv[2:]),
              ["calibrate"], ["nonsense"], ["eval", "m", "d", "--max-samples", "x"]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try: main(words)
        except SystemExit: pass
    assert said.getvalue(), words
print([name for name in sys.argv[1].split() if name in sys.modules])
"""


def test_help_and_wrong_usage_import_no_library():
    names = [c for c in _commands() if c != "--help"]
    result = in_new_process(_EXPLAINED, " ".join(HEAVY), *names)
    assert result.stdout == "[]\n", result.stderr


def _commands() -> list[str]:
    (commands,) = (a.choices for a in main_parser()._actions if a.dest == "command")
    return list(commands)


def test_the_package_has_the_version_of_its_distribution(capsys):
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    settings = tomllib.loads(pyproject.read_text())
    assert "version" in settings["project"]["dynamic"]
    source = settings["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert source == "torchao_masquant.__version__"
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split()[1] == torchao_masquant.__version__


def test_public_names_are_there_when_they_are_asked_for():
    assert set(torchao_masquant._MODULES) == set(torchao_masquant.__all__)
    for name in torchao_masquant.__all__:
        assert getattr(torchao_masquant, name) is not None
        assert name in dir(torchao_masquant)
    with pytest.raises(AttributeError, match="has no attribute 'calibarte'"):
        torchao_masquant.calibarte  # noqa: B018


_IMPORTED = """
import sys
first, *rest = sys.argv[1:]
for name in (first, *rest):
    __import__(name)
import torch
print("MASQuantTensor" in str(torch.serialization.get_safe_globals()),
      hasattr(torch.ops.masquant, "int_linear"))
"""


@pytest.mark.parametrize(
    "names",
    [
        ["torchao_masquant", "torchao_masquant.options", "torch"],
        # These import torch, which imports ours in turn.
        ["torchao_masquant.recipe"],
        ["torchao_masquant.kernels.library", "torchao_masquant.config"],
    ],
    ids=" ".join,
)
def test_torch_knows_of_ours_whatever_is_imported_first(names):
    """A state_dict of a quantized model is loaded by one who imports nothing more."""
    result = in_new_process(_IMPORTED, *names)
    assert result.stdout == "True True\n", result.stderr


_ALONE = """
import importlib, os, sys, traceback
import torch, torchao, transformers
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each import is a fork's")
def test_each_public_name_may_be_the_first_that_is_imported():
    """None of their modules needs another one to have been imported before."""
    modules = sorted(
        {f"torchao_masquant.{m}" for m in torchao_masquant._MODULES.values()}
    )
    result = in_new_process(_ALONE, *modules)
    assert result.stdout == "", result.stderr


_QUIET = """
import logging, sys, warnings
from torchao_masquant.__main__ import main
import torchao_masquant.cli.eval as command
load_model = command.load_model
def load(*arguments):
    logging.getLogger("torchao_masquant.anything").warning("ours, %d", 1)
    warnings.warn("ours,\\n  too")
    return load_model(*arguments)
command.load_model = load
sys.exit(main(sys.argv[1:]))
"""


def test_libraries_are_quiet_and_warnings_of_ours_are_not(tmp_path):
    """Nor is anything else written to standard error where all is well."""
    model = model_folders.text_model(tmp_path / "model")
    result = in_new_process(_QUIET, "eval", model, "synthetic", "--max-samples", "1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "WARNING: ours, 1\nWARNING: ours, too\n"
    assert "answers" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("calibrate", "max-statistics-bytes", "smoothquant", "overwrite"):
        assert word in script


def test_names_that_help_tells_are_those_that_are_taken():
    """Help does not import what knows them."""
    lowering = importlib.import_module("torchao_masquant.deploy.lowering")
    sources = importlib.import_module("torchao_masquant.report.sources")
    digits = importlib.import_module("torchao_masquant.testing.digits")

    options = {}
    for command in _subparsers():
        for action in command._actions:
            options[command.prog.split()[-1], action.dest] = action
    assert options["export", "kernels"].choices == ("auto", *lowering.KERNELS)
    assert set(options["demo", "variant"].choices) == set(digits.VARIANTS)
    for name in (
        sources.RECIPE,
        sources.ANALYSIS,
        sources.EVALUATIONS,
        *sources.RESULTS,
    ):
        assert name in options["report", "sources"].help


def _subparsers():
    parser = with_all_arguments(main_parser())
    (commands,) = (a.choices for a in parser._actions if a.dest == "command")
    return commands.values()


# Progress


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch, capsys
):
    seconds = 0.0
    monkeypatch.setattr(progress, "_clock", lambda: seconds)
    for _ in progress.progress_bar(range(8), desc="Calibrating"):
        seconds += 12
    lines = capsys.readouterr().err.splitlines()
    counts = [line.partition(",")[0] for line in lines]
    assert counts == ["Calibrating: 3 of 8", "Calibrating: 6 of 8"]


def test_short_work_leaves_no_line(capsys):
    bar = progress.progress_bar(total=3, desc="Solving")
    for _ in range(3):
        bar.update()
        bar.set_description("Solving on")
    bar.close()
    list(progress.progress_bar(range(3), show=False))
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress.progress_bar(range(3), desc="Solving", file=sys.stderr))
    assert "3/3" in sys.stderr.getvalue()


def test_what_is_met_twice_is_told_once(capsys):
    logger = logging.getLogger("torchao_masquant.selection")
    with plain_messages():
        for name in ("gate", "router", "gate"):
            logger.warning("left out %s.", name)
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: left out gate.",
        "WARNING: left out router.",
    ]
