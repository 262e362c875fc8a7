# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is not read is named once; where the model would be shown something else, refused."""

import pytest
from data.seen import lines, said, seen

from torchao_masquant.data import read_conversations
from torchao_masquant.data.conversations import conversation_of

ASKED = {"image": "a.png", "question": "Which half?", "answer": "left"}


def test_columns_that_are_not_read_are_named_once(folder, caplog):
    rows = [
        {**ASKED, "rationale": "It is.", "id": "7", "image_id": 3, "score": 0.5},
        {**ASKED, "rationale": "It is.", "regions": [{"phrase": "a hat"}]},
        {**ASKED, "rationale": "", "image_url": "b.png"},
    ]
    read_conversations(lines(folder, *rows))
    assert said(caplog) == (
        "columns and keys that are not read: 'rationale' (data.jsonl, line 1 and 1 more); "
        "'regions' (data.jsonl, line 2); 'image_url' (data.jsonl, line 3)."
    )


def test_keys_of_messages_and_of_parts_are_named(folder, caplog):
    part = {"type": "image", "path": "a.png", "max_pixels": 512, "detail": "low"}
    message = {"role": "user", "content": [part], "name": "Kim", "reasoning": ""}
    read_conversations(lines(folder, [message], [message]))
    assert said(caplog) == (
        "columns and keys that are not read: 'max_pixels' of a part of type 'image' "
        "(data.jsonl, line 1 and 1 more); 'name' of a message (data.jsonl, line 1 and 1 "
        "more)."
    )


def test_what_is_asked_in_place_of_a_question_is_told_once(models, folder, caplog):
    rows = [
        {"image": "a.png"},
        {"image": "b.png"},
        {"image": "a.png", "caption": "It."},
    ]
    samples = seen(models["vision"], lines(folder, *rows))
    assert [s.text.count("Describe the image.") for s in samples] == [1, 1, 1]
    assert said(caplog) == (
        "data.jsonl, line 1 and 2 more: no question is there: 'Describe the image.' is "
        "asked in its place."
    )


def test_a_row_by_itself_is_told_of_at_once(folder, caplog):
    conversation_of({**ASKED, "rationale": "It is."}, "line 3", folder)
    assert said(caplog) == "columns and keys that are not read: 'rationale' (line 3)."


def test_which_of_several_answers_is_scored_is_told(folder, caplog):
    rows = [{**ASKED, "answer": ["left", "right"]}, {**ASKED, "answer": ["a", "a"]}]
    first, _ = read_conversations(lines(folder, *rows))
    assert first.messages[1].parts[0].value == "left"
    assert said(caplog) == (
        "data.jsonl, line 1: of several texts under 'answer' the most frequent is read, "
        "or the first."
    )


def message(*parts):
    return [{"role": "user", "content": list(parts)}]


REFUSED = {
    "a question under another name": (
        {"image": "a.png", "img_question": "Which half?", "answer": "left"},
        "has a medium, and words under 'img_question', which is not read",
    ),
    "words under another name": (
        {"image": "a.png", "remarks": [{"en": "A square."}]},
        "has a medium, and words under 'remarks', which is not read",
    ),
    "an image under another name": (
        {"pic": "a.png", "question": "Which half?"},
        "has media under 'pic', which is not read",
    ),
    "bytes under another name": (
        {"question": "Which?", "pixels": {"bytes": "iVBORw0KGgo=", "path": None}},
        "has media under 'pixels', which is not read",
    ),
    "the number of an image that is not there": (
        {"image_id": 458752, "question": "Which half?"},
        "has media under 'image_id', which is not read",
    ),
    "the name of a video that is not there": (
        {"video_name": "v_k", "Q": "What happens?", "A": "He runs."},
        "has media under 'video_name', which is not read",
    ),
    "a caption of nothing": (
        {"youtube_id": "x", "caption": "A dog."},
        "has 'caption', and no image or sound that it is about",
    ),
    "more placeholders than images": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image><image>"}],
        },
        "its text says <image> where no image is left: it has 1",
    ),
    "a placeholder and no image": (
        {"messages": [{"role": "user", "content": "<image>What?"}]},
        "its text says <image> where no image is left: it has 0",
    ),
    "a placeholder of another kind": (
        {"image": "a.png", "prompt": "<audio>What?"},
        "its text says <audio> where no audio is left: it has 0",
    ),
    "more images than placeholders": (
        {"images": ["a.png", "b.png"], "prompt": "<image>Which half?"},
        "has 1 image(s) that no message points at, beside others",
    ),
    "a number that is too large": (
        {"image_1": "a.png", "question": "What is <image 2>?"},
        "points at image 2, and has 1 of them",
    ),
    "a choice that is not there": (
        {"question": "Which?", "choices": ["wool", "steel"], "answer": 2},
        "answer is the number, from 0, the letter or the text of one of 2 choices, got 2",
    ),
    "two choices at once": (
        {"question": "Which?", "choices": ["wool", "steel"], "answer": "AB"},
        "answer is the number, from 0, the letter or the text of one of 2 choices",
    ),
    "tool calls": (
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        "got None; tool calls are not read",
    ),
    "an empty answer": ({**ASKED, "answer": " "}, "its answer is empty"),
    "an empty question": ({**ASKED, "question": ""}, "its question is empty"),
    "an answer that is a truth": (
        {**ASKED, "answer": True},
        "answer is a text, got True",
    ),
    "an image that is a number": (
        {**ASKED, "image": 3},
        "an image is a path, an address",
    ),
    "an image in an unknown dict": (
        {**ASKED, "image": {"a": 1}},
        "an image in a dict has 'bytes', 'data', 'url' or 'path', got the keys 'a'",
    ),
    "a sound without a rate": (
        {"audio": [0.1, 0.2], "prompt": "What?"},
        "an audio is a path, an address, base64, bytes or a decoded audio, got 0.1",
    ),
    "damaged base64": (
        {**ASKED, "image": "data:image/png;base64,iVBO!"},
        "the base64 of an image is damaged",
    ),
    "no base64": ({**ASKED, "image": "data:image/png,iVBO"}, "'data:image/...;base64,"),
    "base64 of something else": (
        {**ASKED, "image": "data:image/png;base64,QUJD"},
        "what is given as an image, 3 bytes, cannot be read as one",
    ),
    "a history of texts": ({**ASKED, "history": ["Hi"]}, "history is a list of pairs"),
    "a system that is a list": ({**ASKED, "system": ["Hi"]}, "system is a text"),
    "messages that are a text": ({"messages": "Hi"}, "messages is a list of messages"),
    "nothing in it": ({}, "has none of 'messages', 'image'"),
    "unknown keys": ({"imgae": "a.png"}, "its keys are 'imgae'"),
    "no messages": ({"messages": []}, "at least one message"),
    "no role": ({"messages": [{"content": "a"}]}, "'role' and 'content'"),
    "no content": ({"messages": [{"role": "user"}]}, "a text or a list of parts"),
    "a part that is a text": (message("a"), "a part of a message is a dict"),
    "an unknown type": (
        message({"type": "imge", "path": "a.png"}),
        "unknown content type 'imge'",
    ),
    "a part without a source": (message({"type": "image"}), "has no source"),
    "a video that is not there": (
        message({"type": "video", "path": "a.mp4"}),
        "there is no video",
    ),
    "an image that is none": ({"image": "data.jsonl"}, "is no image that can be read"),
    "a sound that is none": ({"audio": "data.jsonl"}, "is no sound that can be read"),
    "an empty text": ({"text": " "}, "its text is empty"),
    "a prompt that is a number": ({"prompt": 3}, "prompt is a text, got 3"),
    "a task that is a number": ({"text": "a", "task": 3}, "task is a name"),
}


@pytest.mark.parametrize("row, sentence", REFUSED.values(), ids=REFUSED)
def test_what_would_change_what_the_model_sees_is_refused(folder, row, sentence):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_conversations(lines(folder, row))
    assert str(caught.value).startswith("data.jsonl, line 1")
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400


def test_megabytes_are_not_printed(folder):
    with pytest.raises(ValueError) as caught:
        read_conversations(lines(folder, [{"content": "x" * 10_000}]))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "model, row",
    [
        ("vision", {"text": "An <image> of a cat."}),
        ("audio", {"messages": [{"role": "user", "content": "<|AUDIO|>What?"}]}),
    ],
)
def test_a_models_own_token_in_a_text_is_refused(models, folder, model, row):
    with pytest.raises(
        ValueError, match="line 1 has '<.*' in its text, which the model"
    ):
        seen(models[model], lines(folder, row))


def test_a_text_may_speak_of_files(models, folder, caplog):
    row = {
        "text": "Open a.png.",
        "title": "How to open a.png",
        "url": "http://a.b/c.html",
    }
    (sample,) = seen(models["text"], lines(folder, row))
    assert sample.text == "Open a.png."
    assert "'title'" in said(caplog) and "'url'" in said(caplog)


def test_the_class_of_a_text_is_not_its_answer(models, folder, caplog):
    row = {"text": "A great film.", "label": "positive"}
    (sample,) = seen(models["text"], lines(folder, row))
    assert sample.text == "A great film."
    assert "'label'" in said(caplog)


def test_keys_beside_a_question_and_its_answer_are_named(folder, caplog):
    turn = {"user": "Hi", "assistant": "Ho", "source": "vqa"}
    read_conversations(lines(folder, {"texts": [turn]}))
    assert "'source' of a message (data.jsonl, line 1)" in said(caplog)


def test_a_row_whose_image_is_none_is_text(models, folder):
    row = {**ASKED, "image": None, "image_id": "7"}
    (sample,) = seen(models["vision"], lines(folder, row))
    assert sample.text.startswith("<start>user: Which half?<end>")
