"""Chat templates that mean harm: none gets out of the sandbox, none works for long or takes much memory."""

from __future__ import annotations

import resource
import time
from types import SimpleNamespace
from typing import Any

import pytest

from graft.data.chat import budget
from graft.data.chat.templates import ChatTemplate
from graft.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
GROW = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set ns.x = {grown} %}}{{% endfor %}}"
)
BOMBS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "a loop in a filter": (
        "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}"
    ),
    "a multiplied text": "{{ ('x' * 10**9) | length }}",
    "a multiplied constant": "{{ 'x' * 1000000000 }}",
    "a multiplied list": "{% set x = [1, 2] * 1000000000 %}",
    "a power": "{{ 10 ** 10000000000 }}",
    "a product": (
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
    ),
    "doubled by +": GROW.format(start="'x'", grown="ns.x + ns.x"),
    "doubled by ~": GROW.format(start="'x'", grown="ns.x ~ ns.x"),
    "doubled by join": GROW.format(start="'xy'", grown="(ns.x, ns.x) | join"),
    "doubled by a method": GROW.format(start="'xy'", grown="ns.x.join(['', '', ''])"),
    "doubled by replace": GROW.format(start="'xx'", grown="ns.x | replace('x', 'xx')"),
    "doubled by its method": GROW.format(start="'xx'", grown="ns.x.replace('x', 'xx')"),
    "doubled by %": GROW.format(start="'xx'", grown="'%s%s' % (ns.x, ns.x)"),
    "doubled by format": GROW.format(start="'xx'", grown="'{0}{0}'.format(ns.x)"),
    "doubled by its filter": GROW.format(start="'xx'", grown="'%s%s' | format(ns.x, ns.x)"),
    "doubled by JSON": GROW.format(start="'\\\\'", grown="ns.x | tojson"),
    "doubled lists": GROW.format(start="[1]", grown="ns.x + ns.x"),
    "a list that holds itself twice": GROW.format(start="[1]", grown="[ns.x, ns.x]") + "{{ ns.x }}",
    "a dict that holds itself twice": GROW.format(start="{}", grown="{'a': ns.x, 'b': ns.x}")
    + "{{ ns.x | tojson }}",
    "a tuple by dict()": GROW.format(start="{}", grown="dict(a=ns.x, b=ns.x)") + "{{ ns.x | string }}",
    "lists in batches": GROW.format(start="[1]", grown="(ns.x + ns.x) | batch(1000) | list") + "{{ ns.x }}",
    "a set block": GROW.format(start="'x'", grown="ns.x").replace(
        "{% set ns.x = ns.x %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a wide field of format": "{{ '{:1000000000}'.format(1) }}",
    "a field of a wide value": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "a wide centre": "{{ 'x' | center(1000000000) }}",
    "a wide line": "{{ 'x'.ljust(1000000000) }}",
    "many zeros": "{{ 'x'.zfill(1000000000) }}",
    "wide tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "a wide indent": "{{ 'x\ny' | indent(1000000000) }}",
    "a wide JSON": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "a translation": "{{ ('x' * 9999).translate({120: 'x' * 99999}) }}",
    "many bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}"
    ),
    "a block that writes itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a loop that calls itself": "{% for x in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "comparisons": (
        "{% set x = 'x' * 9999999 %}{% set y = 'x' * 9999999 %}"
        "{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}"
    ),
    "searches": (
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% if 'y' in x %}{% endif %}{% endfor %}"
    ),
    "words by chance": "{{ lipsum(n=1000000) }}",
    "a time of long words": "{{ strftime_now('%1000000000Y') }}",
}
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ strftime_now.__func__.__globals__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' | attr('__class__') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
]


def template_of(source: str) -> ChatTemplate:
    tokenizer: Any = SimpleNamespace(chat_template=None, special_tokens_map={"eos_token": "</s>"})
    return ChatTemplate(tokenizer, source)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_works_for_ever_is_stopped(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        template_of(BOMBS[name]).render(CHAT, where="rows.jsonl:3")
    # What may be made, at four bytes a character, three times over; and the interpreter's own.
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (12 * budget.BUDGET + (64 << 20)) >> 10
    )


def test_the_error_names_the_row_and_the_bound() -> None:
    with pytest.raises(DataError, match=f"{budget.BUDGET:,}") as caught:
        template_of(BOMBS["doubled by +"]).render(CHAT, where="rows.jsonl:3")
    assert caught.value.where == "rows.jsonl:3"


def test_a_constant_is_not_blown_up_while_it_is_compiled() -> None:
    template_of(BOMBS["a multiplied constant"])
    template_of("{{ 'x' | center(1000000000) }}")


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(DataError, match="sandbox"):
        template_of(source).render(CHAT)


def test_the_clock_stops_what_the_budget_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 10**6, 4))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(times)))
    with pytest.raises(DataError, match="seconds"):
        template_of("{% for i in range(9999) %}{{ i }}{% endfor %}" * 9).render(CHAT)


def test_a_template_of_too_many_parts_is_refused() -> None:
    with pytest.raises(DataError, match="parts"):
        template_of("{{ 1 }}" * 20_000)


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 500 + "{% endif %}" * 500]
)
def test_a_template_nested_without_end_is_refused(source: str) -> None:
    with pytest.raises(DataError):
        template_of(source).render(CHAT)


def test_a_long_conversation_has_a_larger_budget() -> None:
    long = [{"role": "user", "content": "x" * 10_000}] * 1000
    text = template_of("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}").render(
        long
    )
    assert len(text) == 1000 * (len("user: \n") + 10_000)
