"""The sandbox of chat templates: transformers' own (immutable, no private names), with limits on steps and on values.

Steps are iterations, calls, filters and operators. Each value that a template makes is measured when it is made, its parts as
often as they occur in it, so that nothing that is made of it later can be large.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

LENGTH = 2**23
"""Most characters of a value that a template makes."""
_PART = 32
"""Characters that a number or a container counts as."""
STEPS = 500_000
"""Most steps of one rendering."""
SECONDS = 30.0
"""Longest rendering."""
_WIDTH = 1000
"""Highest number that a filter takes, as for indentation, and that pads a formatted value."""
_FILTERS = (
    *("abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("format", "groupby", "indent", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "title", "trim"),
    *("truncate", "unique", "upper", "wordcount"),
)
"""Filters of Jinja that are offered beside `join`, `replace` and `tojson`."""
_PADDING = ("batch", "indent", "slice", "tojson", "truncate")


class Rendering(threading.local):
    """Steps of the rendering in this thread, and the assistant's text in it if that is tracked."""

    steps = 0
    end = float("inf")
    _written: list[str] | None = None
    _assistant: list[tuple[int, int]] | None = None

    @contextmanager
    def tracking(self, written: list[str], assistant: list[tuple[int, int]]) -> Iterator[None]:
        """Append begin and end of each `{% generation %}` block to `assistant`; `written` is the text so far."""
        self._written, self._assistant = written, assistant
        try:
            yield
        finally:
            self._written = self._assistant = None

    def generated(self, text: str) -> None:
        if self._written is not None and self._assistant is not None:
            begin = sum(map(len, self._written))
            self._assistant.append((begin, begin + len(text)))

    def begin(self) -> None:
        self.steps, self.end = 0, time.monotonic() + SECONDS

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > STEPS or time.monotonic() > self.end:
            raise jinja2.TemplateRuntimeError(f"it takes more than {STEPS:,} steps, or {SECONDS:g} s")


rendering = Rendering()


class _Limits(NodeTransformer):
    """Passes what loops run over, and what literals and concatenations make, through functions with limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the visitor's names
        self.generic_visit(node)
        node.iter = _filtered(node.iter, " counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        changed: Any = self.generic_visit(node)
        return _filtered(nodes.List(changed.nodes, lineno=node.lineno), " joined")

    def _visit_literal(self, node: nodes.Literal) -> nodes.Node:
        changed: Any = self.generic_visit(node)
        return _filtered(changed, " bounded")

    visit_List = visit_Dict = _visit_literal  # noqa: N815


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks an assistant's text and writes it as it is."""

    tags = {"generation"}  # noqa: RUF012 - the base class has an instance variable

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        rendering.generated(text)
        return text


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if any(int(number) > _WIDTH for number in re.findall(r"\d+", format_spec)):
            raise jinja2.TemplateRuntimeError(f"{format_spec!r} pads with more than {_WIDTH} characters")
        return super().format_field(_bounded(value), format_spec)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_bounded,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        offered: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS if name in self.filters}
        own: dict[str, Callable[..., Any]] = {"join": _join, "replace": _replace, "tojson": _to_json}
        self.filters = {name: _limited(name, function) for name, function in {**offered, **own}.items()}
        self.filters |= {" counted": _counted, " joined": _joined, " bounded": _bounded}
        self.globals = {
            "range": self.globals["range"],
            "dict": _dict,
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def concat(self, parts: Iterable[str]) -> str:
        return _joined(parts)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        return super()._generate(_Limits().visit(source), *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, /, *arguments: Any, **options: Any) -> Any:
        rendering.step()
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str | bytes | int | float):
            if name in ("expandtabs", "translate", "maketrans"):
                raise jinja2.exceptions.SecurityError(f"{name} is not allowed")
            if name == "replace":
                return _replace(owner, *arguments, **options)
            if name == "join":
                return _join(arguments[0], owner)
            _check_numbers(arguments, LENGTH)
        return _bounded(super().call(context, called, *arguments, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None

        def form(*arguments: Any, **options: Any) -> str:
            named = arguments[0] if value.__name__ == "format_map" else options
            return str(_bounded(_Formatter(self).vformat(value.__self__, arguments, named)))

        return form


def _bounded(value: Any) -> Any:
    """Return a value; raise if it is too large, its parts counted as often as they occur."""
    size, pending = 0, [value]
    while pending:
        part = pending.pop()
        size += len(part) if isinstance(part, str | bytes) else _PART
        if isinstance(part, Mapping):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set):
            pending += part
        if size + len(pending) * _PART > LENGTH:
            raise jinja2.TemplateRuntimeError(f"it makes a value of more than {LENGTH:,} characters")
    return value


def _counted(values: Any) -> Iterator[Any]:
    for value in values:
        rendering.step()
        yield value


def _joined(parts: Iterable[Any]) -> str:
    pieces, size = [], 0
    for part in parts:
        pieces.append(str(_bounded(part)))
        size += len(pieces[-1])
        if size > LENGTH:
            raise jinja2.TemplateRuntimeError(f"it writes more than {LENGTH:,} characters")
    return "".join(pieces)


def _check_numbers(values: Iterable[Any], most: int) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > most:
            raise jinja2.TemplateRuntimeError(f"the number {value} is above {most:,}")


def _check_binop(operator: str, left: Any, right: Any) -> None:
    """Raise before an operation whose result would be too large."""
    rendering.step()
    if operator == "%" and isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        if "*" in text or any(int(number) > _WIDTH for number in re.findall(r"\d+", text)):
            raise jinja2.TemplateRuntimeError(f"% pads with more than {_WIDTH} characters")
        _bounded(right)
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 4096:  # about a thousand digits
            raise jinja2.TemplateRuntimeError(f"it makes a number of {bits:,} bits")
    elif operator == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(times, int) and hasattr(repeated, "__len__") and len(repeated) * times > LENGTH:
            raise jinja2.TemplateRuntimeError(f"it makes a value of more than {LENGTH:,} characters")


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Count the calls of a filter, and check its result, and numbers that pad it."""

    @wraps(function)
    def limited(*arguments: Any, **options: Any) -> Any:
        rendering.step()
        if name in _PADDING:
            _check_numbers((*arguments[1:], *options.values()), _WIDTH)
        return _bounded(function(*arguments, **options))

    return limited


def _join(values: Any, separator: Any = "", attribute: str | None = None) -> str:
    parts = list(_counted(values))
    if attribute is not None:
        parts = [part[attribute] for part in parts]
    separated = [piece for part in parts for piece in (separator, part)]
    return _joined(separated[1:])


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(_bounded(text)), str(old), str(new)
    if text.count(old) * len(new) > LENGTH:
        raise jinja2.TemplateRuntimeError(f"it makes a value of more than {LENGTH:,} characters")
    return str(text.replace(old, new, -1 if count is None else count))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(_bounded(value), ensure_ascii=ensure_ascii, indent=indent, **options)


def _dict(*pairs: Any, **values: Any) -> dict[Any, Any]:
    """Make a dict; the class itself would have methods."""
    return dict(*pairs, **values)


def _namespace(*pairs: Any, **values: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*pairs, **values).items():
        namespace[name] = value
    return namespace


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
