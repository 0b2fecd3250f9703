"""Where chat templates run: Jinja with the globals and filters of transformers, no way out, and a budget.

The template's own syntax tree is changed before it is compiled, such that each loop, each text that is put
together and each list that is written down passes a `Meter`; calls, operators and filters are the sandbox's
to watch. What a template writes is the same as without.

Source: transformers `chat_template_utils.py` for what templates may use; the Jinja 3.1 manual, "Sandbox".

"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graft.data.chat import budget
from graft.data.chat.budget import Meter
from graft.data.chat.template_syntax import INNER, Charging, watched
from graft.data.chat.template_words import Dict, SafeNamespace, charged, raise_exception, tojson

_OF_DICTS = frozenset(dir(dict))
_ORDERED = frozenset(
    [
        "in",
        "==",
        "eq",
        "equalto",
        "!=",
        "ne",
        ">",
        "gt",
        "greaterthan",
        "ge",
        ">=",
        "<",
        "lt",
        "lessthan",
        "<=",
        "le",
    ]
)


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates are charged for their work.

    Args:
        day: What templates take for today; the day of each rendering if left out.

    Attributes:
        meter: The budget; `Meter.start` is called before each rendering.
        common: What every template finds.
        spans: Where {% generation %} blocks begin and end, while a rendering that asks for them runs.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class: type[CodeGenerator]

    def __init__(self, day: date | None = None) -> None:
        self.meter = Meter()
        self._day = day
        self.pieces: list[str] | None = None
        self.spans: list[tuple[int, int]] = []
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        self.code_generator_class = Charging
        self.globals.pop("lipsum")  # words by chance, as many as one likes
        self.globals.update(
            raise_exception=raise_exception,
            strftime_now=self._strftime,
            dict=Dict(),
            namespace=SafeNamespace,
        )
        self.common: dict[str, Any] = dict(self.globals)
        self.filters["tojson"] = tojson
        self.filters = {name: charged(self.meter, name, each) for name, each in self.filters.items()}
        self.filters |= {f"_{name}": getattr(self.meter, name) for name in INNER}
        self.tests = {
            name: self._compared(test) if name in _ORDERED else test  # type: ignore[arg-type]
            for name, test in self.tests.items()
        }

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What `obj.attribute` is; of a message mostly a key, which is looked up without a detour."""
        if type(obj) is dict and attribute not in _OF_DICTS:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def written(self, value: Any) -> str:
        """A value as the template writes it."""
        meter = self.meter
        if type(value) is not str:
            if not isinstance(value, str | int | float | jinja2.Undefined):
                meter.made(value)
            value = str(value)
        meter.left -= len(value)
        if meter.left < 0:
            meter.look()
        text: str = value
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make something large."""
        if operator == "+" and type(left) is str and type(right) is str:
            meter = self.meter
            meter.left -= len(left) + len(right)
            if meter.left < 0:
                meter.look()
            return left + right
        budget.binary(self.meter, operator, left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        """Call whatever a template calls."""
        meter = __self.meter
        meter.charge(meter.event)
        if isinstance(__obj, Macro):
            if (__obj.catch_varargs and len(args) > len(__obj.arguments)) or __obj.catch_kwargs:
                meter.made([*args, *kwargs.values()])
        elif isinstance(__obj, LoopContext):
            args = (meter.each(args[0]), *args[1:]) if args else args
        else:
            owner = getattr(__obj, "__self__", None) or getattr(
                getattr(__obj, "__wrapped__", None), "__self__", None
            )
            if isinstance(owner, str | bytes | int):
                args = budget.method(meter, owner, getattr(__obj, "__name__", ""), args, kwargs)
            if any(isinstance(value, list | tuple | dict) for value in (*args, *kwargs.values())):
                meter.made([*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, list | tuple):
            meter.charge(64 * len(result))
        elif isinstance(__obj, Dict) or isinstance(getattr(__obj, "__self__", None), Dict):
            meter.made(result)
        return meter.sized(result)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """What an attribute that may not be reached is: at once an error, not only where it is used.

        Raises:
            jinja2.exceptions.SecurityError: Always.
        """
        raise jinja2.exceptions.SecurityError(
            f"the attribute {attribute!r} of {type(obj).__name__!r} is not for templates"
        )

    def compiled(self, source: str) -> jinja2.Template:
        """Compile a template.

        Raises:
            jinja2.TemplateSyntaxError: It is none, or has more parts than any has.
        """
        self.meter.event = 64 + len(source)
        self.meter.start(lambda: 0)
        return self.from_string(source)

    def _generate(self, source: nodes.Template, *args: Any, **more: Any) -> str:
        return super()._generate(watched(source), *args, **more)

    def _compared(self, test: Callable[..., Any]) -> Callable[..., Any]:
        def compared(value: Any, *args: Any) -> Any:
            for each in (value, *args):
                self.meter.read(each)
            return test(value, *args)

        return compared

    def _strftime(self, format: str) -> str:
        budget.printf(self.meter, format, [])
        now = datetime.now() if self._day is None else datetime.combine(self._day, time())
        return now.strftime(format)


def render(template: jinja2.Template, values: dict[str, Any], spans: list[tuple[int, int]] | None) -> str:
    """Write a template out under its budget.

    Args:
        template: From `Environment.compiled`.
        values: The variables.
        spans: Receives where {% generation %} blocks begin and end; None where nobody asks.

    Raises:
        SpentError: The template does more work than it may.
        jinja2.TemplateError: The template refuses the values, or cannot run.
    """
    environment = template.environment
    assert isinstance(environment, Environment)
    pieces: list[str] = []
    environment.meter.start(lambda: budget.characters(values))
    environment.spans, environment.pieces = [] if spans is None else spans, None if spans is None else pieces
    try:
        # Outputs are charged as they are written, and a template's own text with each turn of a loop.
        for piece in template.root_render_func(
            template.new_context(environment.common | values, shared=True)
        ):
            pieces.append(piece)  # noqa: PERF402 - a block looks at what stands before it
        return "".join(pieces)
    finally:
        environment.pieces = None


class Generation(jinja2.ext.Extension):
    """The block {% generation %}, which says what of a conversation the model writes."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way of naming them

    def parse(self, parser: Any) -> nodes.Node:
        """Read the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _written(self, context: Any, caller: Macro) -> str:
        text: str = caller()
        environment = self.environment
        assert isinstance(environment, Environment)
        if environment.pieces is not None:
            begin = sum(map(len, environment.pieces))
            environment.spans.append((begin, begin + len(text)))
        return text
