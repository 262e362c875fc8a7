# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is scored: the assistant's turns, wherever a chat template puts them."""

import pytest
from data.seen import seen
from transformers import AutoConfig, AutoTokenizer

from torchao_masquant.data import ProcessedConversations, read_conversations

SYSTEM = {"role": "system", "content": "Be kind."}


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


TWO = [SYSTEM, *turns("Hi", "<think>hm</think>\nHo", "And?", "42 is.")]

MARKS = "<start>{{ m.role }}\n{{ m.content }}<end>\n"
ASKS = "{% if add_generation_prompt %}<start>assistant\n{% endif %}"

# A template, and what is scored of two turns.
TEMPLATES = {
    "one that puts a system's words before": (
        "{% if messages[0].role != 'system' %}<start>system\nBe good.<end>\n{% endif %}"
        "{% for m in messages %}" + MARKS + "{% endfor %}" + ASKS,
        ["<think>hm</think>\nHo<end>", "42 is.<end>\n"],
    ),
    "one that gives the system's words to the last question": (
        "{% set told = messages[0].content %}{% set rest = messages[1:] %}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST]"
        "{% if loop.index0 >= rest | length - 2 %}{{ told }}\n{% endif %}"
        "{{ m.content }}[/INST]{% else %}{{ m.content }}<end>{% endif %}{% endfor %}",
        ["<think>hm</think>\nHo<end>", "42 is.<end>"],
    ),
    "one that drops thoughts but for the last": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<start>assistant\n"
        "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}<end>\n"
        "{% else %}" + MARKS + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n<think>\n{% endif %}",
        ["Ho<end>", "42 is.<end>\n"],
    ),
    "one that does not mark who speaks": (
        "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}",
        ["<think>hm</think>\nHo", "42 is.\n"],
    ),
}


def runs(folder, template, messages):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    (sample,) = ProcessedConversations(
        read_conversations([messages]),
        tokenizer,
        AutoConfig.from_pretrained(folder),
        labelled=True,
    )
    found, run = [], []
    for label in [*sample["labels"][0].tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


@pytest.mark.parametrize("template, scored", TEMPLATES.values(), ids=TEMPLATES)
def test_every_turn_of_the_assistant_is_scored(models, template, scored):
    assert runs(models["text"], template, TWO) == scored


def test_a_question_after_the_last_answer_is_not_scored(models):
    template = "{% for m in messages %}" + MARKS + "{% endfor %}" + ASKS
    assert runs(models["text"], template, turns("Hi", "Ho", "And?")) == ["Ho<end>"]


def test_an_answer_of_any_letters_is_scored_whole(models):
    template = "{% for m in messages %}" + MARKS + "{% endfor %}"
    for answer in ("Q", "Q.", "X~", "4", "45", "~", "#", "日本", "é", "QX"):
        found = runs(models["text"], template, turns("Hi", answer))
        assert found == [f"{answer}<end>\n"]


def test_a_template_that_leaves_answers_out_is_told(models):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="row 0: an answer cannot be scored, since"):
        runs(models["text"], template, turns("Hi", "Ho"))


def test_an_image_between_turns_is_not_scored(models, folder):
    image = {"type": "image", "path": str(folder / "a.png")}
    messages = turns("Hi", "Ho", [image], [{"type": "text", "text": "No."}, image])
    (sample,) = seen(models["vision"], [messages])
    assert sample.scored == ["Ho<end>", "No.", "<end>\n"]
