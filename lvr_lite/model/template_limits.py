"""A chat template's limits: a program of somebody else, which may loop for ever or fill the memory.
May import: jinja2.

jinja's sandbox keeps a template from files and from Python's insides, not from `'a' * 10**9` or
from loops within loops. Here each iteration, call and filter is a step, and each character that is
made or written is counted; beyond the limits the template fails. A template is rendered with
`limited()` around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Of one rendering: steps, and characters that are made on the way. A prompt takes some hundred
# steps.
STEPS = 20_000
CHARACTERS = 4 << 20
# Of one text or list, of an exponent's result in bits, and of a number that says a width.
LONGEST = 256 << 10
BITS = 4096
WIDEST = 1000
# Filters whose numbers are values, or shorten.
TAKE_ANY_NUMBER = ("default", "d", "int", "float", "round", "truncate", "sum", "min", "max")
# What says a width of four digits or one that is computed, in either kind of format.
WIDE_FORMAT = re.compile(r"[0-9]{4}|%[^a-zA-Z%]*\*|\{[^{}]*\{")
# Names under which the rewritten template calls its limits.
COUNTED, JOINED = "lvr_counted", "lvr_joined"


class _Budget:
    """What is left of a rendering's limits."""

    def __init__(self) -> None:
        self.steps = STEPS
        self.characters = CHARACTERS

    def take(self, steps: int = 0, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise TemplateError(
                f"it takes more than {STEPS} steps or makes more than {CHARACTERS} characters"
            )


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited() -> Iterator[None]:
    """One rendering, compiling included."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _take(steps: int = 0, characters: int = 0) -> None:
    if (budget := _budget.get()) is not None:
        budget.take(steps, characters)


def _size(value: object, most: int = LONGEST) -> int:
    """Characters and items of a value, and of what is in it. Raises TemplateError beyond `most`."""
    total = 0
    waiting = [value]
    while waiting:
        part = waiting.pop()
        total += len(part) if isinstance(part, str | list | tuple | dict) else 1
        if total > most:
            raise TemplateError(f"it makes a value of more than {most} characters")
        if isinstance(part, list | tuple):
            waiting.extend(part)
        elif isinstance(part, dict):
            waiting.extend([*part, *part.values()])
    return total


def _made(value: Any) -> Any:
    """A value that a step made."""
    _take(1, _size(value) if isinstance(value, str | list | tuple | dict) else 0)
    return value


def _counted(items: Iterable[object], weight: int = 0) -> Iterator[object]:
    """What a loop goes through. weight: characters that its body writes."""
    for item in items:
        _take(1, weight)
        yield item


def _joined(parts: list[object]) -> str:
    texts = [str(part) for part in parts if _size(part) >= 0]
    _size(texts)
    return str(_made("".join(texts)))


def _check_growth(name: str, text: object, arguments: tuple[object, ...]) -> None:
    """Before a filter or a method of a text is called. Raises TemplateError where its result would
    be too large.
    """
    numbers = [a for a in arguments if isinstance(a, int) and not isinstance(a, bool)]
    if name not in TAKE_ANY_NUMBER and any(abs(number) > WIDEST for number in numbers):
        raise TemplateError(f"{name} is given a number beyond {WIDEST}")
    if name == "replace" and isinstance(text, str) and len(arguments) >= 2:
        old, new = str(arguments[0]), str(arguments[1])
        if len(text) + text.count(old) * len(new) > LONGEST:
            raise TemplateError(f"it makes a value of more than {LONGEST} characters")
    if name == "join":
        items = text if isinstance(text, list | tuple) else arguments[0] if arguments else ()
        between = arguments[0] if isinstance(text, list | tuple) and arguments else text
        _size([items, [between] * len(items) if isinstance(items, list | tuple) else between])
    if name in ("format", "format_map") and WIDE_FORMAT.search(str(text)):
        raise TemplateError("it formats to a width of four digits or more, or to a computed one")
    if name == "translate":
        raise TemplateError("it calls translate")


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # wraps also copies what tells jinja to pass the environment first.
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        own = arguments[1:] if hasattr(function, "jinja_pass_arg") else arguments
        if isinstance(own[0], str | list | tuple | dict):
            _size(own[0])
        _check_growth(name, own[0], (*own[1:], *options.values()))
        return _made(function(*arguments, **options))

    return call


def _written(value: Any) -> Any:
    """What stands between {{ and }}."""
    return _made(value)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox with the limits of this module."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        for name, function in list(self.filters.items()):
            self.filters[name] = _limited_filter(name, function)
        self.filters[COUNTED] = _counted
        self.filters[JOINED] = _joined
        # Text of any length.
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _limited_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template's tree, in which loops are counted and joined texts measured."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            weight = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
            arguments: list[nodes.Expr] = [nodes.Const(weight)]
            loop.iter = nodes.Filter(loop.iter, COUNTED, arguments, [], None, None)
        _replace_concatenations(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Raises TemplateError where the result would be too large."""
        if operator == "%" and isinstance(left, str):
            _check_growth("format", left, ())
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(max(1, left.bit_length()) * abs(right))
        if operator == "+" and isinstance(left, str | list | tuple):
            _size([left, right])
        return _made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *arguments: Any, **options: Any) -> Any:
        """A call in the template: of a macro, of a function, of a method of a value."""
        # The sandbox wraps what formats.
        own = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(own, str | int | bytes):
            _check_growth(function.__name__, own, (*arguments, *options.values()))
        if isinstance(function, LoopContext) and arguments and hasattr(arguments[0], "__len__"):
            _take(len(arguments[0]))
        if isinstance(function, Macro):
            # Its own text, of which no more is known here than that it is in the template.
            _take(10)
        return _made(super().call(context, function, *arguments, **options))


def _check_product(left: object, right: object) -> None:
    for value, count in ((left, right), (right, left)):
        repeats = isinstance(value, str | list | tuple) and isinstance(count, int)
        if repeats and isinstance(count, int) and _size(value) * max(0, count) > LONGEST:
            raise TemplateError(f"it makes a value of more than {LONGEST} characters")
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise TemplateError(f"it makes a number of more than {BITS} bits")


def _replace_concatenations(node: nodes.Node) -> None:
    """Put a call of `_joined` in the place of each `~`."""
    for name, value in list(node.iter_fields()):
        values = value if isinstance(value, list) else [value]
        for place, child in enumerate(values):
            if not isinstance(child, nodes.Node):
                continue
            _replace_concatenations(child)
            if isinstance(child, nodes.Concat):
                parts = nodes.List(child.nodes, lineno=child.lineno)
                joined = nodes.Filter(parts, JOINED, [], [], None, None, lineno=child.lineno)
                if isinstance(value, list):
                    value[place] = joined
                else:
                    setattr(node, name, joined)
