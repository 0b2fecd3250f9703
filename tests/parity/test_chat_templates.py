"""What our sandbox renders is, to the letter, what transformers renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from graft.data.chat.templates import ChatTemplate, read_template
from graft.data.examples import Conversation
from graft.errors import DataError

CALL = {
    "type": "function",
    "function": {"name": "find", "arguments": {"what": "caté", "n": [1, 2.5, None, True]}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "description": "é <b>", "parameters": {"type": "object"}},
    }
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "system": [{"role": "system", "content": " S \n"}, {"role": "user", "content": "q"}],
    "many turns": [{"role": r, "content": f" {r} {n}\n"} for n in range(3) for r in ("user", "assistant")],
    "tools": [
        {"role": "user", "content": "find it"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "[1]"},
        {"role": "tool", "content": "[2]"},
        {"role": "assistant", "content": "there"},
    ],
    "a thought": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "hm"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
    "system twice": [
        {"role": "system", "content": "S"},
        {"role": "system", "content": "T"},
        {"role": "user", "content": "q"},
    ],
    "out of order": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
}
SOURCES = {
    "macros": (
        "{% macro say(m, mark='#') %}{{ mark ~ m.role ~ ': ' }}"
        "{{ caller() if caller else m.content }}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% call say(m, mark='!') %}<{{ m.content | trim }}>"
        "{% endcall %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.n = ns.n + 1 %}"
        "{% set ns.s = ns.s + m.role ~ '|' %}{% endif %}{% endfor %}{{ ns.n }} {{ ns.s }}"
    ),
    "loops": (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{% if loop.first %}F{% endif %}"
        "{% if loop.last %}L{% endif %}"
        "{{ loop.previtem.role if loop.previtem is defined }}{% if loop.index == 3 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.cycle('a', 'b') }}"
        "{% else %}none{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for c in 'abc' %}"
        "{{ c }}{% endfor %}"
        "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}"
    ),
    "filters": (
        "{{ messages | tojson }}{{ tools | tojson(indent=2) if tools }}"
        "{{ messages | map(attribute='role') | join(', ') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ 'a-b' | replace('-', '+') | upper }}"
        "{{ '%s=%d' | format('n', 3) }}{{ '%s!' % 'x' }}{{ 'x' * 3 }}{{ [1, 2] + [3] }}{{ 2 ** 5 }}"
        "{{ 7 % 4 }}{{ 7 // 2 }}"
        "{{ messages[0].content.strip().split('e')[-1].ljust(9) }}|{{ 'a\nb' | indent(2) }}"
        "{{ {'a': messages[0].role} }}"
        "{{ '{:>5}|{}'.format('a', 'b') }}{{ ', '.join(['a', 'b']) }}"
        "{{ 'x' in messages[0].content }}{{ (1, messages[0].role) }}"
        "{{ [3, 1, 2] | sort | first }}{{ 'abc'[1:] }}{{ none }}{{ true }}{{ missing }}{{ 1.5 }}"
        "{{ '<b>' | e }}"
        "{{ dict(a=1).a }}{{ messages | length > 1 }}{{ 'a' if messages is sequence else 'b' }}"
        "{{ '5' | int + 1 }}"
    ),
    "blocks": (
        "{% set x %}<{{ messages[0].content }}>{% endset %}{{ x ~ x }}{% filter upper %}{{ x }}"
        "{% endfilter %}{% block b %}b{% endblock %}"
    ),
    "marks": (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "refusing": "{{ raise_exception('roles must ' ~ messages[0].role) }}",
    "layout": (
        "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n  {{ m.content }}\n    "
        "{% endif %}\n{%- endfor %}\n"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tinystories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tinystories)


def peer(tokenizer: Any, source: str, messages: Any, **more: Any) -> str | None:
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **more)
    except (jinja2.TemplateError, TypeError, KeyError):
        return None
    return text


def names() -> list[str]:
    shared = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers" / "chat_templates"
    return [*SOURCES, *sorted(path.name for path in shared.glob("*.jinja"))]


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("name", names())
def test_a_rendering_is_that_of_transformers(shared: Path, tokenizer: Any, name: str, ask: bool) -> None:
    folder = shared / "tokenizers" / "chat_templates"
    for source in (
        [SOURCES[name]] if name in SOURCES else [read_template(folder / name), (folder / name).read_text()]
    ):
        template = ChatTemplate(tokenizer, source)
        for chat in CHATS.values():
            for tools in (None, TOOLS):
                expected = peer(tokenizer, source, chat, tools=tools, add_generation_prompt=ask)
                if expected is None:
                    with pytest.raises(DataError, match="refuses"):
                        template.render(chat, tools, ask=ask)
                else:
                    assert template.render(chat, tools, ask=ask) == expected


def test_marks_stand_where_transformers_has_them(tokenizer: Any) -> None:
    for chat in CHATS.values():
        rendered, spans = render_jinja_template(
            [chat],
            chat_template=SOURCES["marks"],
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        template = ChatTemplate(tokenizer, SOURCES["marks"])
        assert template.render(chat) == rendered[0]
        assert template.marks(Conversation(chat, "row 1")) == [span for span in spans[0] if span[1] > span[0]]


def test_the_time_is_written_as_asked(tokenizer: Any) -> None:
    source = "{{ strftime_now('%Y') }}"
    assert ChatTemplate(tokenizer, source).render(CHATS["system"]) == peer(tokenizer, source, CHATS["system"])
