# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Results in a file and back."""

import copy
import json
import os

import pytest
import records

from torchao_masquant import Analysis, Evaluation

RECORDS = {
    "evaluation": records.evaluation(),
    "evaluation alone": records.evaluation(reference=False),
    "analysis": records.analysis(),
    "analysis of one modality": records.analysis(modalities=("text",), losses=False),
}


@pytest.fixture(params=RECORDS.values(), ids=RECORDS)
def record(request):
    return request.param


def test_a_record_survives_the_round_trip(record, tmp_path):
    # repr, since nan is not equal to itself.
    data = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert repr(type(record).from_json(data)) == repr(record)
    record.save(tmp_path / "record.json")
    assert repr(type(record).load(tmp_path / "record.json")) == repr(record)
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_analysis_of_before_modalities_were_compared_is_read():
    data = records.analysis().to_json()
    for study in data["inputs"].values():
        del study["spread"]
    found = Analysis.from_json(data)
    assert found.verdict == "" and found.spreads == {}
    assert "After the shift" not in str(found) and "own_factors" not in found.figures()


def test_a_failed_save_leaves_the_old_file(record, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    record.save(path)
    old = path.read_bytes()

    def no_room(*args):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(OSError, match="no room"):
        record.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["record.json"]


def test_one_kind_of_record_is_not_read_as_another():
    with pytest.raises(ValueError, match="this is no Analysis: expected the format"):
        Analysis.from_json(records.evaluation().to_json())
    for data in (None, [], {}, {"format": "torchao_masquant.evaluation.99"}):
        with pytest.raises(ValueError, match="this is no Evaluation"):
            Evaluation.from_json(data)


def _set(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is _set:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("model",), _set, "Evaluation holds the fields"),
        (("more",), 1, "Evaluation holds the fields"),
        (("tasks", "a", "accuracy"), "high", r"tasks\['a'\].accuracy is not what"),
        (("tasks", "a", "examples"), 1.5, "examples is not what"),
        (("tasks", "a", "examples"), True, "examples is not what"),
        (("tasks", "a"), [], r"tasks\['a'\] holds the fields"),
        (("tasks",), [], "tasks is not what"),
        (("modalities",), "text", "modalities is not what"),
        (("modalities",), ["text", 1], r"modalities\[1\] is not what"),
        (("weight_bytes",), None, "weight_bytes is not what"),
    ],
)
def test_a_damaged_record_is_told_in_a_sentence(path, value, message):
    data = copy.deepcopy(records.evaluation().to_json())
    _set(data, path, value)
    with pytest.raises(ValueError, match=message):
        Evaluation.from_json(data)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="x.json is no JSON file"):
        Evaluation.load(path)
    with pytest.raises(FileNotFoundError):
        Evaluation.load(tmp_path / "missing.json")
