"""Answers in a rendered conversation: many at once are found where each alone would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.data.chat import turns
from graft.data.chat.templates import ChatTemplate, read_template
from graft.data.chat.turns import find_turns
from graft.data.examples import Conversation

NAMES = [
    "alpaca",
    "chatml",
    "chatqa",
    "falcon-instruct",
    "gemma-it",
    "llama-2-chat",
    "mistral-instruct",
    "qwen2.5-instruct",
]
THINKING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '(thinks)' }}{% endif %}{{ m.content + '</>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

UNEVEN = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if loop.index0 == 4 %}{{ 'note: ' }}{% endif %}"
    "{{ m.content + ('</late>' if loop.index0 == 6 else '</>') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
OWN = {
    "thinking": THINKING,
    "uneven closing": UNEVEN.replace("== 4", "== 99"),
    "uneven lead": UNEVEN.replace("== 6", "== 99"),
}


def long_chat(contents: list[str]) -> Conversation:
    chat = [{"role": "system", "content": "S"}]
    for number, content in enumerate(contents):
        chat.append({"role": "user", "content": f"question {number}\n"})
        chat.append({"role": "assistant", "content": content})
    return Conversation(chat, "row 1")


CONTENTS = [
    [f"answer {number}" for number in range(9)],
    ["  spaced \n", "</s>", "a", "a", "\nassistant: no", "ends.", "[/INST] x", "### Response:\n"],
    ["a", "b", " ", "c", "d", "e"],
]


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_many_answers_are_found_where_each_alone_is(
    shared: Path, tokenizer: Any, name: str, contents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared / "tokenizers" / "chat_templates"
    source = OWN.get(name) or read_template(folder / f"{name}.jinja")
    template, chat = ChatTemplate(tokenizer, source), long_chat(contents)
    together = find_turns(template, chat)
    monkeypatch.setattr(turns, "_FEW", 1000)
    assert together == find_turns(template, chat)


@pytest.mark.parametrize("name", ["chatml", "chatqa", "llama-2-chat"])
def test_the_work_does_not_grow_with_the_square(
    shared: Path, tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(
        tokenizer, read_template(shared / "tokenizers" / "chat_templates" / f"{name}.jinja")
    )
    rendered = []
    render = ChatTemplate.render

    def counting(self: ChatTemplate, messages: Any, *args: Any, **more: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, *args, **more)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    chat = long_chat([f"answer {number}" for number in range(100)])
    find_turns(template, chat)
    assert sum(rendered) <= 4 * len(chat.messages)
