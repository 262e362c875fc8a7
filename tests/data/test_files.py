# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Files and tables of rows, in the forms and encodings that there are."""

import base64
import gzip
import json

import numpy as np
import pytest
from data.seen import said, seen
from PIL import Image

from torchao_masquant.data import read_conversations
from torchao_masquant.testing import model_folders

# A line separator of Unicode ends no line of a file.
ROWS = [
    {"image": "a.png", "question": "Which half?", "answer": "left"},
    {"image": "b.png", "question": "Why\u2028not?", "answer": "It is."},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False)
INDENTED = json.dumps(ROWS, ensure_ascii=False, indent=2)

FILES = {
    "lines.jsonl": LINES.encode(),
    "windows.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "blank.jsonl": f"\n{LINES}\n\n".encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "lines.json": LINES.encode(),
    "array.json": ARRAY.encode(),
    "array.jsonl": ARRAY.encode(),
    "indented.json": INDENTED.encode(),
    "indented.jsonl": INDENTED.encode(),
    "windows.json": b"\xef\xbb\xbf" + INDENTED.replace("\n", "\r\n").encode(),
    "packed.json.gz": gzip.compress(INDENTED.encode()),
    "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "table.csv": "image,question,answer\na.png,Which half?,left\n"
    "b.png,Why\u2028not?,It is.\n".encode(),
    "table.tsv": "image\tquestion\tanswer\r\na.png\tWhich half?\tleft\r\n"
    "b.png\tWhy\u2028not?\tIt is.\r\n".encode("utf-8-sig"),
}


def texts(conversations):
    return [
        [p.value for p in m.parts if p.kind == "text"]
        for c in conversations
        for m in c.messages
    ]


EXPECTED = [["Which half?"], ["left"], ["Why\u2028not?"], ["It is."]]


def test_files_of_rows(folder):
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
        found = read_conversations(folder / name)
        assert texts(found) == EXPECTED, name
        images = [c.messages[0].parts[0].value.name for c in found]
        assert images == ["a.png", "b.png"], name


def test_one_object_or_one_conversation_is_one_row(folder):
    path = folder / "data.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert texts(read_conversations(path)) == EXPECTED[:2]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    path.write_text(json.dumps(messages, indent=2))
    (conversation,) = read_conversations(path)
    assert [m.role for m in conversation.messages] == ["user", "assistant"]


def test_the_first_so_many_rows_alone_are_read(folder):
    path = folder / "data.json"
    path.write_text(json.dumps([*ROWS, {"image": "gone.png"}]))
    assert len(read_conversations(path, max_samples=2)) == 2


def test_an_image_inside_a_table(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((400, 400), 50).save(path)
    image = base64.b64encode(path.read_bytes()).decode()
    assert len(image) > 2**17
    data = tmp_path / "a.tsv"
    data.write_text(f"index\timage\tquestion\n0\t{image}\tWhich?\n")
    (conversation,) = read_conversations(data)
    assert conversation.messages[0].parts[0].value == path.read_bytes()


DAMAGED = {
    "a broken line": (
        "a.jsonl",
        LINES + '\n{"image": "a.png"',
        "a.jsonl, line 3 is no JSON",
    ),
    "a broken element": (
        "a.json",
        '[\n{"image": "a.png"},\n{"image" "b.png"}\n]',
        "a.json, line 3, row 1 is no JSON: Expecting ':'",
    ),
    "no comma": (
        "a.json",
        '[\n{"image": "a.png"}\n{"image": "b.png"}\n]',
        "a.json, line 2, row 0 is no JSON: the array does not go on",
    ),
    "an array that is cut off": (
        "a.json",
        INDENTED[:-30],
        "a.json, line 9, row 1 is no",
    ),
    "something after the array": ("a.json", ARRAY + "]", "something follows the array"),
    "an image that is not there": (
        "a.json",
        '[\n{"image": "a.png"},\n{"image": "gone.png"}\n]',
        "a.json, line 3, row 1: there is no image '",
    ),
    "COCO's lists": (
        "a.json",
        '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
        "a.json keeps its samples in several lists (images, annotations)",
    ),
    "a broken object": ("a.json", '{\n"image": a.png\n}', "a.json, line 2 is no JSON"),
    "a short line of a table": (
        "a.csv",
        "image,question\na.png\n",
        "a.csv, line 2 has not as many values as the first line has columns",
    ),
    "an open quote": (
        "a.csv",
        'image,question\na.png,"Why\n',
        "a.csv cannot be read after line 1",
    ),
    "null": ("a.json", "null", "a.json, line 1 is a NoneType, not a dict"),
}


@pytest.mark.parametrize("name, text, sentence", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named_by_its_line(folder, name, text, sentence):
    (folder / name).write_text(text)
    with pytest.raises((ValueError, OSError)) as caught:
        read_conversations(folder / name)
    assert sentence in str(caught.value)


def test_no_rows_are_refused(folder):
    for content in ("[]", "", " \n", "image,question\n"):
        path = folder / ("a.csv" if "image" in content else "a.json")
        path.write_text(content)
        with pytest.raises(ValueError, match="is empty: give at least one sample"):
            read_conversations(path)
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match="is empty: give at least one sample"):
        read_conversations(folder / "none")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl.*or 'synthetic'"):
        read_conversations(folder / "nowhere.jsonl")


def test_an_image_in_place_of_data_is_told(folder):
    with pytest.raises(ValueError, match="a.png' is no text .*give a file of .jsonl"):
        read_conversations(folder / "a.png")


# What the library datasets writes, and its folders


def images_of(datasets, folder):
    columns = {
        "image": [str(folder / "a.png"), str(folder / "b.png")],
        "question": ["Which half?", "Why\u2028not?"],
        "answers": [["left", "left", "right"], ["It is."]],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_tables_and_datasets_of_images(models, folder):
    datasets = pytest.importorskip("datasets")
    dataset = images_of(datasets, folder)
    dataset.to_parquet(folder / "a.parquet")
    dataset.save_to_disk(str(folder / "saved"))
    sources = [
        dataset,
        dataset.with_format("numpy"),
        dataset.to_iterable_dataset(),
        folder / "a.parquet",
        folder / "saved",
        next((folder / "saved").glob("*.arrow")),
    ]
    for source in sources:
        samples = seen(models["vision"], source)
        assert [s.scored for s in samples] == [["left<end>\n"], ["It is.<end>\n"]]
        assert samples[0].text.startswith("<start>user: [image]Which half?<end>")
    assert len(seen(models["vision"], folder / "a.parquet", max_samples=1)) == 1


def test_sounds_of_a_dataset_need_no_decoder(models, folder):
    datasets = pytest.importorskip("datasets")
    columns = {"audio": [str(folder / "a.wav")], "text": ["HE SAID"]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())
    dataset.to_parquet(folder / "a.parquet")
    for source in (dataset, folder / "a.parquet"):
        (sample,) = seen(models["audio"], source)
        assert sample.text.startswith("<start>user: [audio]")
        assert sample.scored == ["HE SAID<end>\n"]


def test_lists_of_images_in_a_dataset(models, folder):
    datasets = pytest.importorskip("datasets")
    messages = [{"role": "user", "content": "Is <image> like <image>?"}]
    columns = {"images": [[str(folder / "a.png"), str(folder / "b.png")]]}
    dataset = datasets.Dataset.from_dict({**columns, "messages": [messages]})
    dataset = dataset.cast_column("images", datasets.Sequence(datasets.Image()))
    (sample,) = seen(models["vision"], dataset)
    assert sample.text.startswith("<start>user: Is [image] like [image]?<end>")


def test_the_name_of_a_class_is_the_answer(models, folder):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(folder / "a.png")], "label": [1]}
    dataset = datasets.Dataset.from_dict(columns)
    names = datasets.ClassLabel(names=["cat", "dog"])
    (sample,) = seen(models["vision"], dataset.cast_column("label", names))
    assert sample.scored == ["dog<end>\n"]
    # A number alone says nothing.
    (sample,) = seen(models["vision"], dataset)
    assert sample.text.endswith("<start>assistant: ")


def test_a_broken_table_is_told(folder):
    pytest.importorskip("datasets")
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="a.parquet' is no parquet file"):
        read_conversations(folder / "a.parquet")


def test_a_table_names_the_library_that_reads_it(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / "a.parquet").touch()
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("{}")
    for name, kind in (("a.parquet", "a table"), ("saved", "a saved dataset")):
        with pytest.raises(ImportError, match=f"{name}' is {kind}.*pip install data"):
            read_conversations(folder / name)


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.jsonl", '{"file_name": "a.wav", "transcription": "He said."}'),
        ("metadata.csv", "file_name,transcription\na.wav,He said.\n"),
    ],
)
def test_a_folder_that_describes_its_files(models, folder, name, text):
    (folder / name).write_text(text)
    (sample,) = seen(models["audio"], folder)
    assert sample.scored == ["He said.<end>\n"]


def test_data_in_a_folder_of_images_is_named(folder, caplog):
    (folder / "train.json").write_text(ARRAY)
    assert len(read_conversations(folder)) == 2
    assert "left out: train.json; to read train.json, give that file" in said(caplog)


def test_a_folder_of_data_alone_is_refused(tmp_path):
    for index in range(2):
        (tmp_path / f"train-{index}.parquet").touch()
    with pytest.raises(
        ValueError, match="give one file of it, such as '.*train-0.parquet'"
    ):
        read_conversations(tmp_path)


def test_a_folder_of_folders_says_which_to_give(tmp_path, caplog):
    """As the hub has data sets, and as folders of images by class are laid out."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    (tmp_path / "README.md").write_text("# A data set")
    with pytest.raises(ValueError, match=r"not looked into: give one .* '.*/data'"):
        read_conversations(tmp_path)
    model_folders.write_image(tmp_path / "a.png")
    caplog.clear()
    assert len(read_conversations(tmp_path)) == 1
    assert "has folders that are not looked into: data." in said(caplog)


def test_rows_of_a_generator(models):
    pixels = np.zeros((8, 8, 3), np.uint8)
    rows = (
        {"image": pixels, "question": word, "answer": "No."} for word in ("A?", "B?")
    )
    assert len(seen(models["vision"], rows)) == 2


def test_a_text_in_a_folder_may_have_a_byte_order_mark(tmp_path):
    model_folders.write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeffWhich half?".encode())
    assert texts(read_conversations(tmp_path)) == [["Which half?"]]
    (tmp_path / "a.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match="a.txt' is no text in UTF-8"):
        read_conversations(tmp_path)
