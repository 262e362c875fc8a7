# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rows as well-known data sets write them: what the model is shown, and what is scored."""

import base64

import pytest
from data.seen import lines, said, seen


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*turns, first="user"):
    """The small models' template around turns that alternate."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return "".join(
        f"<start>{roles[n % 2]}: {text}<end>\n" for n, text in enumerate(turns)
    )


WHICH = chat("[image]Which half?", "left")

# A row, what the model is shown, and what is scored of it.
IMAGES = {
    "LLaVA": (
        {
            "id": "000000033471",
            "image": "a.png",
            "conversations": [
                human("<image>\nWhich half?"),
                gpt("left"),
                human("Why?"),
                gpt("It is."),
            ],
        },
        WHICH + chat("Why?", "It is."),
        ["left<end>", "It is.<end>\n"],
    ),
    "LLaVA, text alone": (
        {"id": "1", "model": "", "conversations": [human("Hi"), gpt("Ho")]},
        chat("Hi", "Ho"),
        ["Ho<end>\n"],
    ),
    "ShareGPT4V, the image at the end": (
        {
            "image": "a.png",
            "conversations": [human("Which half?\n<image>"), gpt("left")],
        },
        chat("Which half?[image]", "left"),
        ["left<end>\n"],
    ),
    "images inside a sentence": (
        {
            "image": ["a.png", "b.png"],
            "conversations": [human("Is <image> like <image>?"), gpt("no")],
        },
        chat("Is [image] like [image]?", "no"),
        ["no<end>\n"],
    ),
    "a space after the placeholder": (
        {
            "image": "a.png",
            "conversations": [human("<image> Which half? "), gpt("left")],
        },
        WHICH,
        ["left<end>\n"],
    ),
    "a message of two images": (
        {"images": ["a.png", "b.png"], "messages": [user("<image><image>\n")]},
        chat("[image]") + "<start>assistant: ",
        [chat("")[:-6], "<end>\n<start>assistant: "],
    ),
    "no placeholder": (
        {"image": "a.png", "conversations": [human("Which half?"), gpt("left")]},
        WHICH,
        ["left<end>\n"],
    ),
    "a path inside a text": (
        {"conversations": [human("Picture 1: <img>a.png</img>\nWhich?"), gpt("left")]},
        chat("Picture 1: [image]Which?", "left"),
        ["left<end>\n"],
    ),
    "LLaMA-Factory's messages": (
        {
            "messages": [
                user("<image>Who?"),
                assistant("Kane"),
                user("And?<image>"),
                assistant("Goretzka"),
            ],
            "images": ["a.png", "b.png"],
        },
        chat("[image]Who?", "Kane", "And?[image]", "Goretzka"),
        ["Kane<end>", "Goretzka<end>\n"],
    ),
    "LLaMA-Factory's alpaca": (
        {
            "instruction": "<image>Which half?",
            "input": "",
            "output": "left",
            "images": ["a.png"],
            "system": "Be brief.",
            "history": [["Hi", "Ho"]],
        },
        "<start>system: Be brief.<end>\n" + chat("Hi", "Ho") + WHICH,
        ["Ho<end>", "left<end>\n"],
    ),
    "instruction and response": (
        {"image": "a.png", "instruction": "Which half?", "response": "left"},
        WHICH,
        ["left<end>\n"],
    ),
    "names in capitals": (
        {"Image": "a.png", "Question": "Which half?", "Answer": "left"},
        WHICH,
        ["left<end>\n"],
    ),
    "a list of answers": (
        {"image": "a.png", "question": "Which half?", "answers": ["left"]},
        WHICH,
        ["left<end>\n"],
    ),
    "VQA's ten answers": (
        {
            "image": "a.png",
            "image_id": 458752,
            "question": "Which half?",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": index}
                for index, answer in enumerate(["upper", "left", "left", "both"])
            ],
        },
        WHICH,
        ["left<end>\n"],
    ),
    "a number for an answer": (
        {"image": "a.png", "question": "How many?", "answer": 3},
        chat("[image]How many?", "3"),
        ["3<end>\n"],
    ),
    "query and response": (
        {"img": "a.png", "query": "Which half?", "response": "left"},
        WHICH,
        ["left<end>\n"],
    ),
    "prompt and completion in messages": (
        {
            "images": ["a.png"],
            "prompt": [user("Which half?")],
            "completion": [assistant("left")],
        },
        WHICH,
        ["left<end>\n"],
    ),
    "The Cauldron": (
        {
            "images": [{"bytes": None, "path": "a.png"}],
            "texts": [
                {"user": "Which half?", "assistant": "left"},
                {"user": "Why?", "assistant": "It is."},
            ],
        },
        WHICH + chat("Why?", "It is."),
        ["left<end>", "It is.<end>\n"],
    ),
    "parts that point at the images by number": (
        {
            "images": ["a.png", "b.png"],
            "messages": [
                user(
                    [{"type": "image", "index": 0}, {"type": "text", "text": "Which?"}]
                ),
                assistant([{"type": "text", "text": "left", "index": None}]),
                user([{"type": "image", "index": 1}]),
            ],
        },
        chat("[image]Which?", "left", "[image]") + "<start>assistant: ",
        ["left<end>"],
    ),
    "ScienceQA": (
        {
            "image": "a.png",
            "question": "Which is hard?",
            "choices": ["wool", "steel"],
            "answer": 1,
            "hint": "Think.",
            "task": "closed choice",
        },
        chat("[image]Think.\nWhich is hard?\nA. wool\nB. steel", "B. steel"),
        ["B. steel<end>\n"],
    ),
    "MMMU": (
        {
            "image_1": "a.png",
            "image_2": None,
            "question": "Is <image 1> wool?",
            "options": "['yes', 'no']",
            "answer": "B",
        },
        chat("Is [image] wool?\nA. yes\nB. no", "B. no"),
        ["B. no<end>\n"],
    ),
    "MMBench": (
        {"image": "a.png", "question": "Which?", "A": "x", "B": "y", "answer": "A"},
        chat("[image]Which?\nA. x\nB. y", "A. x"),
        ["A. x<end>\n"],
    ),
    "SEED-Bench": (
        {
            "image": "a.png",
            "question": "?",
            "choice_a": "x",
            "choice_b": "y",
            "answer": "B",
        },
        chat("[image]?\nA. x\nB. y", "B. y"),
        ["B. y<end>\n"],
    ),
    "AI2D": (
        {"image": "a.png", "question": "?", "options": ["x", "y"], "answer": "1"},
        chat("[image]?\nA. x\nB. y", "B. y"),
        ["B. y<end>\n"],
    ),
    "ChartQA": (
        {"image": "a.png", "query": "How many?", "label": ["7"]},
        chat("[image]How many?", "7"),
        ["7<end>\n"],
    ),
    "captions of COCO": (
        {"image": "a.png", "captions": ["One.", "Two.", "Two."]},
        chat("[image]Describe the image.", "Two."),
        ["Two.<end>\n"],
    ),
    "captions of a folder of images": (
        {"file_name": "a.png", "text": "One."},
        chat("[image]Describe the image.", "One."),
        ["One.<end>\n"],
    ),
    "a text that is answered": (
        {"image": "a.png", "text": "Which half?", "answer": "left"},
        WHICH,
        ["left<end>\n"],
    ),
    "a text that points at its image": (
        {"image": "a.png", "text": "<image>\nWhich half?"},
        chat("[image]Which half?") + "<start>assistant: ",
        ["<start>user: ", "Which half?<end>\n<start>assistant: "],
    ),
    "Anthropic's source": (
        [
            user(
                [
                    {"type": "image", "source": {"type": "url", "url": "a.png"}},
                    {"type": "text", "text": "Which half?"},
                ]
            ),
            assistant("left"),
        ],
        WHICH,
        ["left<end>\n"],
    ),
    "parts without a type": (
        [user([{"image": "a.png"}, {"text": "Which half?"}]), assistant("left")],
        WHICH,
        ["left<end>\n"],
    ),
}


@pytest.mark.parametrize("row, text, scored", IMAGES.values(), ids=IMAGES)
def test_rows_with_images(models, folder, row, text, scored):
    (sample,) = seen(models["vision"], lines(folder, row))
    assert (sample.text, sample.scored) == (text, scored)


HEARD = chat("[audio]What is it?", "One tone")

SOUNDS = {
    "ms-swift": (
        {
            "messages": [user("<audio>What is it?"), assistant("One tone")],
            "audios": ["a.wav"],
        },
        HEARD,
    ),
    "query and response": (
        {"query": "<audio>What is it?", "response": "One tone", "audios": ["a.wav"]},
        HEARD,
    ),
    "a path": (
        {"audio_path": "a.wav", "prompt": "What is it?", "answer": "One tone"},
        HEARD,
    ),
    "Qwen-Audio": (
        {"conversations": [human("<audio>a.wav</audio>What is it?"), gpt("One tone")]},
        HEARD,
    ),
    "LibriSpeech": (
        {"audio": {"path": "a.wav", "bytes": None}, "text": "HE SAID", "speaker_id": 1},
        chat("[audio]Write down what is said.", "HE SAID"),
    ),
    "Common Voice": (
        {"audio": "a.wav", "sentence": "He said."},
        chat("[audio]Write down what is said.", "He said."),
    ),
    "AudioCaps": (
        {"audio": "a.wav", "caption": "A dog.", "youtube_id": "x", "start_time": 30},
        chat("[audio]Describe what you hear.", "A dog."),
    ),
    "Clotho": (
        {"file_name": "a.wav", "caption_1": "One.", "caption_2": "Two."},
        chat("[audio]Describe what you hear.", "One."),
    ),
    "a transcript that is asked for": (
        {"audio": "a.wav", "prompt": "What does he say?", "text": "hello"},
        chat("[audio]What does he say?", "hello"),
    ),
}


@pytest.mark.parametrize("row, text", SOUNDS.values(), ids=SOUNDS)
def test_rows_with_sounds(models, folder, row, text):
    (sample,) = seen(models["audio"], lines(folder, row))
    assert sample.text == text
    assert sample.scored == [text.rsplit("assistant: ")[-1]]


TEXTS = {
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                human("Hi"),
                gpt("Ho"),
                {"from": "user", "value": "And?"},
                {"from": "chatgpt", "value": "No."},
            ]
        },
        "<start>system: Be kind.<end>\n" + chat("Hi", "Ho", "And?", "No."),
    ),
    "ShareGPT that begins with an answer": (
        {"conversations": [gpt("Ho"), human("And?"), gpt("No.")]},
        chat("Ho", "And?", "No.", first="assistant"),
    ),
    "messages under conversations": (
        {"conversations": [user("Hi"), assistant("Ho")]},
        chat("Hi", "Ho"),
    ),
    "messages as a text of JSON": (
        {"conversations": '[{"from": "human", "value": "Hi"}]'},
        chat("Hi") + "<start>assistant: ",
    ),
    "messages by their keys": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Ho"]}},
        chat("Hi", "Ho"),
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        chat("Add.\n1 and 2", "3"),
    ),
    "SQuAD": (
        {
            "context": "The sky is blue.",
            "question": "Which color?",
            "answers": {"text": ["blue"], "answer_start": [11]},
        },
        chat("The sky is blue.\nWhich color?", "blue"),
    ),
    "ARC": (
        {
            "question": "Which?",
            "choices": {"text": ["wool", "steel"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        chat("Which?\nA. wool\nB. steel", "B. steel"),
    ),
    "LIMA": ({"conversations": ["Hi", "Ho"]}, chat("Hi", "Ho")),
    "OpenOrca": (
        {"system_prompt": "Be kind.", "question": "Hi", "response": "Ho"},
        "<start>system: Be kind.<end>\n" + chat("Hi", "Ho"),
    ),
    "inputs and targets": (
        {"inputs": "Add 1 and 2.", "targets": "3"},
        chat("Add 1 and 2.", "3"),
    ),
    "an implicit prompt": ({"chosen": [user("Hi"), assistant("Ho")]}, chat("Hi", "Ho")),
    "question and answer in one": (
        {"qa_pairs": [{"question": "Hi", "answer": "Ho"}]},
        chat("Hi", "Ho"),
    ),
}


@pytest.mark.parametrize("row, text", TEXTS.values(), ids=TEXTS)
def test_rows_of_text(models, folder, row, text, caplog):
    (sample,) = seen(models["text"], lines(folder, row))
    assert sample.text == text
    assert said(caplog) == ""


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


def image_url(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def test_openai_images(models, folder):
    data = encoded(folder / "a.png")
    urls = [
        f"data:image/png;base64,{data}",
        (folder / "a.png").as_uri(),
        str(folder / "a.png"),
        "a.png",
        data,
    ]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user([{"type": "text", "text": "Which half?"}, image_url(url)]),
                assistant("left"),
            ]
        }
        for url in urls
    ]
    for sample in seen(models["vision"], lines(folder, *rows)):
        assert sample.text == "<start>system: Be brief.<end>\n" + chat(
            "Which half?[image]", "left"
        )
        assert sample.scored == ["left<end>\n"]


def test_openai_sounds(models, folder):
    sound = {"data": encoded(folder / "a.wav"), "format": "wav"}
    text = {"type": "input_text", "text": "What is it?"}
    parts = [
        {"type": "input_audio", "input_audio": sound},
        {"type": "audio_url", "audio_url": {"url": (folder / "a.wav").as_uri()}},
        {"type": "audio", "base64": sound["data"]},
    ]
    rows = [{"messages": [user([part, text]), assistant("One tone")]} for part in parts]
    assert [s.text for s in seen(models["audio"], lines(folder, *rows))] == [HEARD] * 3


def test_a_weight_of_zero_takes_a_turn_out_of_the_scores(models, folder):
    turns = [user("Hi"), {**assistant("Ho"), "weight": 0}, user("And?")]
    rows = [{"messages": [*turns, assistant("No.")]}]
    (sample,) = seen(models["text"], lines(folder, *rows))
    assert sample.scored == ["No.<end>\n"]
    with pytest.raises(ValueError, match="line 1 has no turn that is to be scored"):
        seen(models["text"], lines(folder, {"messages": turns}))


def test_media_in_a_message_of_its_own(models, folder):
    rows = [{"messages": [{**user("Which half?"), "images": ["a.png"]}]}]
    (sample,) = seen(models["vision"], lines(folder, *rows))
    assert sample.text == chat("[image]Which half?") + "<start>assistant: "
