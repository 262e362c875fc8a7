# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Every python block and masquant command of the pages runs, in order."""

import inspect
import re
import shutil

import pytest
import torch
import torch._inductor.config
from packaging.version import Version
from pages import HUB_MODEL, ROOT, has_blocks, run_blocks

from torchao_masquant import calibrate
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.testing import digits, model_folders

PAGES_OF_FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES_OF_FILES, *sorted((ROOT / "tutorials").glob("*.md"))]
# What this one deploys, tests/deploy runs and looks at.
ELSEWHERE = ("deploy_with_aotinductor.md",)
PAGES = [p for p in ALL_PAGES if has_blocks(p) and p.name not in ELSEWHERE]


@pytest.fixture
def smaller_digits(one_layer, monkeypatch):
    """One layer of the small model, and a fifth of its calibration data."""
    samples = digits.calibration_samples
    monkeypatch.setattr(digits, "calibration_samples", lambda count=24: samples(count))


def _what_a_reader_has(folder):
    """A model, and data with images, where a page takes them for granted."""
    model_folders.vision_model(folder / "model")
    samples = model_folders.vision_samples(folder)
    shutil.copy(samples, folder / "held-out.jsonl")
    model_folders.write_image(folder / "cat.png", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch, request):
    if page.name == "digits.md":
        request.getfixturevalue("smaller_digits")
    if HUB_MODEL in page.read_text():
        _what_a_reader_has(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Where tests before this one compiled a class more often than Dynamo's limit allows,
    # Dynamo compiles it no more in this process.
    torch._dynamo.reset()
    if Version(torch.__version__) < Version("2.13"):
        # As docs/digits.md says.
        monkeypatch.setattr(torch._inductor.config, "assert_indirect_indexing", False)
    run_blocks(page)


def test_every_make_target_that_a_page_names_exists():
    pages = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))
    text = "\n".join(page.read_text() for page in pages)
    targets = set(re.findall(r"^make (\w+)", text, re.M))
    defined = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert targets and targets <= defined


def _anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
    }


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


# Tutorials name files of the reader's.
@pytest.mark.parametrize("page", PAGES_OF_FILES, ids=lambda page: page.name)
def test_files_that_a_page_sends_to_are_there(page):
    text = page.read_text()
    named = re.findall(r"`(?:python )?([\w./]+\.(?:py|cpp|sh))[ `]", text)
    for picture in re.findall(r"^```text$(.*?)^```$", text, re.M | re.S):
        named += re.findall(r"[\w/]+\.py\b", picture)
    for name in named:
        # A page about one folder leaves out what is above it.
        places = [ROOT / name, *ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}")]
        assert any(place.exists() for place in places), name


@pytest.mark.parametrize(
    "function, heading",
    [(calibrate, "# Options"), (calibrate_sequential, "## From disk")],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_the_page_of_options_has_each_with_its_default(function, heading):
    page = (ROOT / "docs" / "options.md").read_text().split(f"{heading}\n")[1]
    told = dict(re.findall(r"^\| `(\w+)` \|.*\| `([^`]*)`[^|]*\|[^|]*\|$", page, re.M))
    common = inspect.signature(calibrate).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("model", "samples"):
            continue
        if function is not calibrate and name in common:
            assert parameter.default == common[name].default
            continue
        assert name in told, name
        assert eval(told[name]) == parameter.default, name
