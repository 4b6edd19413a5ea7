"""Chat templates are programs from outside: they run in jinja's sandbox, with a limit on their steps and texts.

Loops, calls, filters, comparisons and texts cost steps, by their size. An operation whose result can be far larger than
inputs is measured before it runs. So a template ends within a second or two, whatever it does.
"""
# ruff: noqa: N802, N815  - jinja's visitor calls a method by the name of the node

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache, wraps
from itertools import chain
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edge_ft.data.clock import strftime_now
from edge_ft.data.template_budget import CHUNK, Budget, TooExpensive, measure_call, measure_operator
from edge_ft.errors import DataError, EdgeFTError

__all__ = ["render"]

LONGEST_TEMPLATE = 100_000
"""Characters of a template; those of current models have at most 20,000."""
DROPPED = ("filesizeformat", "forceescape", "pprint", "random", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat needs, and that are slow on long texts or differ from call to call."""
WHOLE = ("==", "!=", ">", ">=", "<", "<=", "eq", "equalto", "ne", "gt", "greaterthan", "ge", "lt", "lessthan", "le")
"""Tests that read all that is in their operands."""
UNREAD = ("attr", "count", "d", "default", "first", "last", "length")
"""Filters that do not read the items of a list."""
LISTS = ("batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice")
"""Filters that read the items of a list, and not what is in these."""
COUNTED, WATCHED, SEARCHED, CUT = "counted items", "watched value", "searched value", "cut value"
JOINED, SPENT = "joined texts", "steps spent"
"""Filters that `_Instrument` puts into a template; their names have a space, so that a template cannot name them."""


_BUDGET: ContextVar[Budget] = ContextVar("budget")
"""Of the current rendering. There is none while a template is compiled: then no filter runs."""


class _Counted:
    """Items of a loop, each of which takes a step."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        spend = _BUDGET.get().spend
        for item in self._items:
            spend(1)
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Names(Namespace):
    """A namespace whose text does not grow with what is in it."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Instrument(NodeTransformer):
    """Puts the filters that take steps into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        weighed = self._weighed(node)
        node.iter = _filtered(node.iter, COUNTED)
        return weighed

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._weighed(node)

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        holds = {operand.op for operand in node.ops} <= {"in", "notin"}
        node.expr = _filtered(node.expr, WATCHED)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, SEARCHED if holds else WATCHED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, CUT)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, WATCHED)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, WATCHED) if node.ctx == "load" else node

    def _weighed(self, node: Any) -> nodes.Node:
        """Let each run of a body take as many steps as it is long."""
        weight = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        step = nodes.ExprStmt(_filtered(nodes.Const(weight // 2, lineno=node.lineno), SPENT), lineno=node.lineno)
        node.body = [step, *node.body]
        return node  # type: ignore[no-any-return]


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with a budget."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,
            finalize=_finalize,
        )
        # Jinja's own filter escapes HTML; chat templates expect that of transformers.
        self.filters["tojson"] = _to_json
        self.filters = {
            name: function if name in UNREAD else _watch(function, name, name not in LISTS)
            for name, function in self.filters.items()
            if name not in DROPPED
        }
        self.tests = {name: _watch(function, name, name in WHOLE) for name, function in self.tests.items()}
        self.filters |= {COUNTED: _Counted, WATCHED: _charged, SEARCHED: _searched, CUT: _touched}
        self.filters |= {JOINED: _joined, SPENT: _spent}
        self.globals.pop("lipsum")
        self.globals |= {"namespace": _Names, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Instrument().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree  # type: ignore[no-any-return]

    def concat(self, parts: Any) -> str:  # type: ignore[override]  # jinja has "".join here
        """Join the parts of the text that the template writes."""
        budget, texts, length = _BUDGET.get(), [], 0
        for part in parts:
            length += len(part)
            if length > budget.longest:
                budget.expect(length)
            budget.spend(1 + len(part) // CHUNK)
            texts.append(part)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure the result of an operator before it runs."""
        budget = _BUDGET.get()
        if operator == "+" and type(left) is type(right) is str:  # nearly always, and faster
            budget.expect(len(left) + len(right) + CHUNK)
            return left + right
        measure_operator(budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Take a step."""
        _BUDGET.get().spend(1)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Take a step."""
        _BUDGET.get().spend(1)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as jinja's own
        """Measure a call before it runs, and its result."""
        budget = _BUDGET.get()
        budget.spend(8)
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(__obj, LoopContext):
            args = tuple(map(_Counted, args))
        elif isinstance(owner, str | bytes | type):
            measure_call(budget, method.__name__, owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if __obj is dict or isinstance(owner, type):
            budget.charge(result)
        else:
            budget.touch(result)
        return result


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Return the text that a chat template writes.

    Args:
        template: Its jinja source.
        variables: What it reads: plain texts, numbers, lists and objects.

    Raises:
        DataError: the template is malformed, forbidden by the sandbox or too expensive, or refuses these messages.
        EdgeFTError: the command was interrupted.
    """
    token = _BUDGET.set(Budget(variables))
    try:
        return _compile(template).render(variables)
    except EdgeFTError:
        raise
    # An expression in a template can fail in any way that Python's operators can.
    except Exception as error:
        reason = str(error)[:300] or type(error).__name__
        raise DataError(
            f"the chat template cannot render this chat ({reason}): change the messages, or give another template with "
            "--chat-template FILE"
        ) from error
    finally:
        _BUDGET.reset(token)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    if len(template) > LONGEST_TEMPLATE:
        raise TooExpensive(f"it has {len(template)} characters, and at most {LONGEST_TEMPLATE} are read")
    # {% generation %} marks answers for other trainers; here it becomes a block that is always rendered.
    return _Environment().from_string(
        re.sub(r"(\{%-?\s*)(end)?generation\b", lambda at: at[1] + ("endif" if at[2] else "if true"), template)
    )


def _watch(function: Any, name: str, whole: bool) -> Callable[..., Any]:
    """Return a filter or test that takes the steps of what it reads, with all that is in it if `whole`."""

    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        given = [arg for arg in args if not isinstance(arg, Context | jinja2.Environment | nodes.EvalContext)]
        for arg in chain(given, kwargs.values()):
            (budget.charge if whole else budget.touch)(arg)
        if given:
            measure_call(budget, name, given[0], given[1:], kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):  # made here, where its items are counted
            result = list(_Counted(result))
        budget.touch(result)
        return result

    return watched


def _charged(value: Any) -> Any:
    _BUDGET.get().charge(value)
    return value


def _searched(value: Any) -> Any:
    """Take the steps of looking for something in a value: in an object it is one."""
    _BUDGET.get().charge(None if isinstance(value, dict) else value)
    return value


def _touched(value: Any) -> Any:
    _BUDGET.get().touch(value)
    return value


def _joined(parts: list[Any]) -> str:
    budget = _BUDGET.get()
    for part in parts:
        budget.charge(part)
    texts = list(map(str, parts))
    budget.expect(sum(map(len, texts)))
    return "".join(texts)


def _spent(steps: int) -> None:
    _BUDGET.get().spend(1 + steps)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Take the steps of a value that is written. That it asks for the context keeps jinja from running it early."""
    _BUDGET.get().charge(value)
    return value


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise TooExpensive("the form of its date is too long")
    return strftime_now(form)
