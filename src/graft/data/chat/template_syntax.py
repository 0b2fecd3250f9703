"""A template's syntax tree with a meter around whatever loops, grows or is written down."""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.visitor import NodeTransformer

MAX_NODES = 20_000
"""Most parts of a template: words, tags, operators. The longest in use have a few thousand."""

INNER = ("each", "made", "sized", "read")
"""Methods of the meter that a watched template calls, as filters with an underscore before them."""


def watched(source: nodes.Template) -> nodes.Template:
    """The tree of a template that is charged for its work.

    Raises:
        jinja2.TemplateSyntaxError: It has more parts than any template has.
    """
    count = sum(1 for _ in source.find_all(nodes.Node))
    if count > MAX_NODES:
        raise jinja2.TemplateSyntaxError(f"it has {count:,} parts, more than {MAX_NODES:,}", 1)
    found: nodes.Template = _Watched().visit(source)
    return found


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

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._written_down(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._written_down(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._written_down(node)


def _read(node: nodes.Expr) -> nodes.Expr:
    constant = isinstance(node, nodes.Const | nodes.List | nodes.Tuple)
    return node if constant else _filtered(node, "_read")


def _filtered(node: Any, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    if node is not None:
        made.set_lineno(node.lineno)
    return made


class Charging(CodeGenerator):
    """Writes `environment.written(...)` where Jinja writes `str(...)`."""

    def _output_child_pre(self, node: Any, frame: Any, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.written(")
