"""Where chat templates run: Jinja with the globals and filters of transformers, no way out, and a budget.

The template's own syntax tree is changed before it is compiled, such that each loop, each text that is put
together and each list that is written down passes a `Meter`; calls, operators and filters are the sandbox's to
watch. What a template writes is the same as without.

Source: transformers `chat_template_utils.py` for what templates may use; the Jinja 3.1 manual, "Sandbox".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sized
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from graft.data import budget
from graft.data.budget import Meter, SpentError

MAX_NODES = 20_000
"""Most parts of a template: words, tags, operators. The longest in use have a few thousand."""

_OF_DICTS = frozenset(dir(dict))
_MAX_DIGITS = 4096
_MAX_SEPARATOR = 16
_NESTING = frozenset(("batch", "slice", "groupby", "pprint", "string"))
_HARMLESS = frozenset(
    [
        "abs",
        "attr",
        "count",
        "d",
        "default",
        "first",
        "float",
        "last",
        "length",
        "lower",
        "random",
        "round",
        "safe",
        "trim",
        "upper",
        "capitalize",
    ]
)
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
_INNER = ("_each", "_made", "_sized", "_read")


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates are charged for their work.

    Attributes:
        meter: The budget; `Meter.start` is called before each rendering.
        shared: What every template finds.
        spans: Where {% generation %} blocks begin and end, while a rendering that asks for them runs.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class: type[CodeGenerator]

    def __init__(self) -> None:
        self.meter = Meter()
        self.pieces: list[str] | None = None
        self.spans: list[tuple[int, int]] = []
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        self.code_generator_class = _Charging
        self.globals.pop("lipsum")  # words by chance, as many as one likes
        self.globals.update(
            raise_exception=_raise, strftime_now=self._strftime, dict=_Dict(), namespace=_Namespace
        )
        self.filters["tojson"] = _tojson
        self.shared = dict(self.globals)
        inner = {f"_{name}": getattr(self.meter, name) for name in ("each", "made", "sized", "read")}
        self.filters = {
            name: filter if name in _HARMLESS else self._charged(name, filter)
            for name, filter in self.filters.items()
        } | inner
        self.tests = {
            name: self._compared(test) if name in _ORDERED else test for name, test in self.tests.items()
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
        elif isinstance(__obj, _Dict) or isinstance(getattr(__obj, "__self__", None), _Dict):
            meter.made(result)
        return meter.sized(result)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """What an attribute that may not be reached is: at once an error, not only where it is used."""
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
        count = sum(1 for _ in source.find_all(nodes.Node))
        if count > MAX_NODES:
            raise jinja2.TemplateSyntaxError(f"it has {count:,} parts, more than {MAX_NODES:,}", 1)
        return super()._generate(_Watched().visit(source), *args, **more)

    def _charged(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        at = 1 if hasattr(filter, "jinja_pass_arg") else 0
        meter = self.meter

        @functools.wraps(filter)
        def charged(*args: Any, **kwargs: Any) -> Any:
            meter.charge(64)
            value, rest = args[at], args[at + 1 :]
            value, rest = _before(meter, name, value, rest, kwargs)
            return meter.sized(filter(*args[:at], value, *rest, **kwargs))

        return charged

    def _compared(self, test: Callable[..., Any]) -> Callable[..., Any]:
        def compared(value: Any, *args: Any) -> Any:
            for each in (value, *args):
                self.meter.read(each)
            return test(value, *args)

        return compared

    def _strftime(self, format: str) -> str:
        budget.printf(self.meter, format, [])
        return datetime.now().strftime(format)


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
    meter, pieces = environment.meter, []
    meter.start(lambda: budget.characters(values))
    environment.spans, environment.pieces = [] if spans is None else spans, None if spans is None else pieces
    try:
        # Outputs are charged as they are written, and a template's own text with each turn of a loop.
        for piece in template.root_render_func(
            template.new_context(environment.shared | values, shared=True)
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


class _Watched(NodeTransformer):
    """Puts a meter around what loops, grows or is written down."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.Const) else _filtered(part, "_made") for part in node.nodes
        ]
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "_sized")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        plain = isinstance(node.expr, nodes.Const)
        for operand in node.ops:
            if operand.op in ("in", "notin") or not plain and not isinstance(operand.expr, nodes.Const):
                operand.expr = _read(operand.expr)
        return node

    def _written_down(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(part, nodes.Const) for part in node.find_all(nodes.Expr))
        if constant or getattr(node, "ctx", "load") != "load" or not getattr(node, "items", ()):
            found: nodes.Node = node
            return found
        return _filtered(node, "_made")

    visit_List = visit_Tuple = visit_Dict = _written_down


def _read(node: nodes.Expr) -> nodes.Expr:
    constant = isinstance(node, nodes.Const | nodes.List | nodes.Tuple)
    return node if constant else _filtered(node, "_read")


def _filtered(node: Any, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    return made.set_lineno(node.lineno) if node is not None else made


class _Charging(CodeGenerator):
    """Writes `environment.written(...)` where Jinja writes `str(...)`."""

    def _output_child_pre(self, node: Any, frame: Any, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.written(")


class _Dict:
    """`dict`, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace`, which stores nothing under a private name."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Written out it could hold itself, or others many times over.
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a private name is stored: {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if separators and sum(map(len, separators)) > _MAX_SEPARATOR:
        raise SpentError(f"it writes JSON with separators of more than {_MAX_SEPARATOR} characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _before(meter: Meter, name: str, value: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Charge a filter before it runs.

    Raises:
        SpentError: It would make too much.
    """
    given = (*rest, *kwargs.values())
    numbers = [abs(each) for each in given if isinstance(each, int) and not isinstance(each, bool)]
    wide = [len(each) for each in given if isinstance(each, str)]
    if name == "replace" and len(rest) >= 2:
        budget.replaced(meter, str(value), str(rest[0]), str(rest[1]))
    elif name == "format":
        budget.printf(meter, value, [*rest, dict(kwargs)])
    elif name == "join":
        return budget.joined(meter, rest[0] if rest else kwargs.get("d", ""), value), rest
    elif name == "int" and isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise SpentError(f"it reads a number of more than {_MAX_DIGITS:,} digits")
    elif name in _NESTING or (name == "tojson" and (numbers or wide)):
        meter.made(value)
    if numbers or wide:
        meter.charge(64 * sum(numbers) + (sum(numbers) + sum(wide)) * _lines(name, value))
    if isinstance(value, str | bytes):
        meter.charge(len(value))
    elif isinstance(value, Sized):
        meter.charge(64 * len(value))
    elif isinstance(value, Iterator):
        return meter.each(value), rest
    return value, rest


def _lines(name: str, value: Any) -> int:
    """How often a filter may write its width or its text, at most."""
    if name == "tojson":
        return _depth(value)
    if not isinstance(value, str):
        return 1
    return len(value) + 1 if name in ("wordwrap", "urlize") else value.count("\n") + 1


def _depth(value: Any) -> int:
    """Lines times depth of a value written with indents, at most."""
    parts, depth, waiting = 0, 0, [value]
    while waiting:
        depth += 1
        inner: list[Any] = []
        for part in waiting:
            parts += 1
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list | tuple):
                inner += part
        waiting = inner
    return parts * depth
