"""Odd rows: each finding on rows that have it and on rows that only look so."""

from __future__ import annotations

import random

import pytest

from graft.data.examples import Conversation, Example, Pair, Text
from graft.data.filters.content import content_of
from graft.data.filters.sanity import FINDINGS, Sanity
from graft.data.filters.scripts import OTHER

QUESTION = "What is the capital of France, and since when?"
ODD = {
    "blank_answer": ["", "  ...", "?!", "\u200b"],
    "copied_prompt": [QUESTION, QUESTION + "\n", QUESTION + " Paris.", "  " + QUESTION.replace(" ", "  ")],
    "repetitive": ["I do not know what to say. " * 12, "ha " * 40],
    "few_letters": ["".join(random.Random(1).choices("=|-+*/<>#@$%^&~_", k=90)) + " ab"],
    "mojibake": [
        "caf" + "é".encode().decode("latin-1"),
        "it" + "’".encode().decode("cp1252") + "s",
        "a\ufffdb",
    ],
    "placeholder": [
        "N/A",
        "<nooutput>",
        "Dear [Insert name],",
        "Lorem ipsum dolor",
        "Tom &amp; Jerry",
        "{{answer}}",
    ],
}
SOUND = [
    "Paris.",
    "4",
    "是的",
    "What is it?",
    "Paris has been the capital since 987. What is the capital of Spain?",
    " ".join(random.Random(0).choices([f"w{i}" for i in range(40)], k=200)),
    "x = [1, 2, 3]; y = {4: (5, 6)}; print(x + y)",
    "À São Paulo, « É » et Â sont des lettres; Ñandú.",
    "<p>Tom &amp; Jerry</p>",
    "Today's agenda: none",
    "R&D, AT&T; and so on",
    "la la la la la",
]


def findings(example: Example) -> tuple[str, ...]:
    return Sanity().look([content_of(example)])[0]


@pytest.mark.parametrize(
    ("name", "answer"), [(name, answer) for name, answers in ODD.items() for answer in answers]
)
def test_odd_answers_are_found_by_name(name: str, answer: str) -> None:
    assert findings(Pair(QUESTION, answer, "a:1")) == (name,)


@pytest.mark.parametrize("answer", SOUND)
def test_sound_answers_are_left_alone(answer: str) -> None:
    assert findings(Pair(QUESTION, answer, "a:1")) == ()
    assert findings(Text(answer, "a:1")) == ()


def test_a_short_prompt_may_begin_its_answer() -> None:
    assert findings(Pair("Rome", "Rome was not built in a day", "a:1")) == ()
    assert findings(Pair("def add(a, b):", "def add(a, b):\n    return a + b", "a:1")) == ()


def test_an_answer_of_tool_calls_alone_is_no_empty_one() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert findings(Conversation([{"role": "user", "content": "go"}, call], "a:1")) == ()


def test_findings_are_counted_and_told_with_their_first_place() -> None:
    sanity = Sanity()
    rows = [Pair("q", "ok", "a:1"), Pair("q", "", "a:2"), Pair("q", "N/A", "a:3"), Pair("q", " ", "a:4")]
    assert sanity.look(list(map(content_of, rows))) == [
        (),
        ("blank_answer",),
        ("placeholder",),
        ("blank_answer",),
    ]
    assert sanity.places["blank_answer"] == ["a:2", "a:4"]
    assert sanity.counts["blank_answer"] == 2
    told = sanity.told(dropped=["blank_answer"])
    assert told[0] == f"2 rows left out: {FINDINGS['blank_answer']} (blank_answer; the first: a:2)"
    assert told[1] == f"1 row: {FINDINGS['placeholder']} (placeholder; the first: a:3)"


TEXTS = {
    "Latin": "Wie geht es dir?",
    "Cyrillic": "Как дела? OK",
    "Greek": "Τι κάνεις;",
    "Arabic": "كيف حالك؟",
    "Devanagari": "आप कैसे हैं?",
    "Hangul": "어떻게 지내세요?",
    "Kana": "東京都は日本の首都である",
    "Han": "你好吗，我很好 OK",
    OTHER: "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
}


def test_scripts_are_told_apart() -> None:
    for name, text in TEXTS.items():
        sanity = Sanity()
        sanity.look([content_of(Text(text, "a:1"))])
        assert sanity.scripts == {name: 1}
    nothing = Sanity()
    nothing.look([content_of(Text("12 + 3 = 15", "a:1"))])
    assert nothing.scripts == {}


def test_rows_in_another_script_than_most_are_told_with_their_place() -> None:
    sanity = Sanity()
    rows = [Text(f"row {i}", f"a:{i}") for i in range(30)] + [Text(TEXTS["Cyrillic"], "a:30")]
    assert sanity.look(list(map(content_of, rows))) == [()] * 31
    assert sanity.told() == ["1 row in Cyrillic, most others in Latin (the first: a:30)"]
    named = Sanity(["Latin"])
    assert named.look(list(map(content_of, rows)))[30] == ("other_script",)
    both = Sanity(["Latin", "Cyrillic"])
    assert both.look(list(map(content_of, rows))) == [()] * 31
    assert both.told() == []


def test_no_rows_have_no_findings() -> None:
    assert Sanity().look([]) == []
    assert Sanity().told() == []
