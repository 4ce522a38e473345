"""Whether two texts are the same mathematical expression, decided exactly and within bounds.

May import: the standard library and `quotients`.

    same_value("2x + 2", r"$2 \\cdot (x + 1)$")    True
    same_value("9^9^9^9", "9")                     False: too large to decide

Texts come from data sets and from models, so nothing of them is evaluated as code. A parser reads
them into quotients of polynomials whose coefficients are exact fractions; two are equal where
cross products have the same terms, which needs no random points and no library. Square roots of
primes are variables whose square is known, and linearly independent over the fractions, so this
decides sums of roots as well. A function of an expression, or a power with a variable in its
exponent, is a variable named by what it is of: equal where its arguments are, and nothing more is
known of it. Each number, power, polynomial and text has a limit, and so has the work as a whole:
what goes beyond is not decided, and counts as different.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from lvr_lite.train.quotients import EXPONENT, Algebra, Quotient, UndecidedError

# Characters of an expression, and of a text that holds one in tags or in a box.
LENGTH = 400
WHOLE = 20_000
# Parentheses within parentheses, digits of a number as it is written.
DEPTH = 24
DIGITS = 40
FUNCTIONS = ("abs", "arccos", "arcsin", "arctan", "cos", "exp", "ln", "log", "sin", "sqrt", "tan")
# What stands for an operator or a constant, in unicode and in LaTeX.
WRITTEN = {
    "**": "^",
    "×": "*",
    "·": "*",
    "⋅": "*",
    "÷": "/",
    "−": "-",
    "²": "^2",
    "³": "^3",
    "π": " pi ",
    "√": " sqrt ",
    "{": "(",
    "}": ")",
    "[": "(",
    "]": ")",
}
COMMANDS = {"cdot": "*", "times": "*", "div": "/", "degree": "°", "circ": "°"}
# LaTeX that changes how a text looks, not what it says.
LOOKS = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[,;:! ])|[$~]")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])")
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?"
    r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<name>[A-Za-z]+(?:_\(?[A-Za-z0-9]+\)?)?)|(?P<sign>[-+*/^()=%°]))"
)
NAME = re.compile(r"\s*[A-Za-z][A-Za-z0-9_]*\s*(?:\(\s*[A-Za-z]\s*\))?\s*")


def same_value(one: str, other: str) -> bool:
    """Whether two texts are equal as expressions, "x = 4" and "4" among them.

    Takes milliseconds whatever they hold; False where it cannot be decided.
    """
    if _is_prose(one) and _is_prose(other):
        # Products of letters know no order, and words do.
        return False
    algebra = Algebra()
    try:
        left = _Statement.read(one, algebra)
        right = _Statement.read(other, algebra)
        return left.agrees(right)
    except UndecidedError:
        return False


def _is_prose(text: str) -> bool:
    return (
        len(text) <= LENGTH
        and re.fullmatch(r"[\w\s.,;:!?'-]*", text) is not None
        and not (re.search(r"[0-9]", text))
    )


@dataclass(frozen=True)
class _Statement:
    """What a text says: an expression; a name and what it equals; or an equation.

    name: "x" of "x = 4"; None without one.
    value: of an expression, or what a name equals; None for an equation.
    difference: left less right, where there are two sides.
    """

    algebra: Algebra
    name: str | None
    value: Quotient | None
    difference: Quotient | None

    @classmethod
    def read(cls, text: str, algebra: Algebra) -> _Statement:
        sides = _plain(text).split("=")
        if len(sides) > 4:
            raise UndecidedError
        named = len(sides) > 1 and NAME.fullmatch(sides[0]) is not None
        name = "".join(sides[0].split()) if named else None
        values = [_Parser(side, algebra).read() for side in sides[named:]]
        difference = None
        if len(sides) == 2:
            left = _Parser(sides[0], algebra).read()
            difference = algebra.add(left, algebra.negative(values[-1]))
        # Of "2 * 3 = 6" both sides are the value; "x + y = 2" has none.
        whole = all(algebra.equal(value, values[-1]) for value in values[:-1])
        return cls(algebra, name, values[-1] if whole else None, difference)

    def agrees(self, other: _Statement) -> bool:
        if self.value is not None and other.value is not None:
            same_name = None in (self.name, other.name) or self.name == other.name
            if same_name and self.algebra.equal(self.value, other.value):
                return True
        if self.difference is None or other.difference is None:
            return False
        if not self.difference.top:
            return False
        mirrored = self.algebra.negative(other.difference)
        return any(self.algebra.equal(self.difference, d) for d in (other.difference, mirrored))


def _plain(text: str) -> str:
    """The expression of a text: what stands in its tags or its last box, with plain operators."""
    if len(text) > WHOLE:
        raise UndecidedError
    tagged = TAGGED.search(text)
    text = tagged.group(1) if tagged else text
    *_, boxed = [None, *BOXED.finditer(text)]
    if boxed is not None:
        text = text[boxed.end() : _end_of_group(text, boxed.end())]
    text = text.strip().rstrip(".,;:!?").strip()
    if len(text) > LENGTH:
        raise UndecidedError
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", LOOKS.sub(" ", text.replace("\\%", "%")))
    for written, plain in WRITTEN.items():
        text = text.replace(written, plain)
    if len(text) > 2 * LENGTH:
        raise UndecidedError
    return text


def _end_of_group(text: str, start: int) -> int:
    """Where the brace that was opened before `start` is closed."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    return len(text)


# --------------------------------------------------------------------------------------------------
# reading


class _Parser:
    """Reads one side of a text.

    expression   term, with "+" and "-" between terms
    term         factor, with "*", "/" or nothing between factors
    factor       atom, with "%", "°" and "^ factor" after it; "-" before it
    atom         a number, a name, a function of an atom, an expression in parentheses
    """

    def __init__(self, text: str, algebra: Algebra) -> None:
        self._tokens = _tokens(text)
        self._place = 0
        self._depth = 0
        self._algebra = algebra

    def read(self) -> Quotient:
        value = self._expression()
        if self._kind != "end":
            raise UndecidedError
        return value

    @property
    def _kind(self) -> str:
        return self._tokens[self._place][0]

    @property
    def _text(self) -> str:
        return self._tokens[self._place][1]

    def _take(self, *signs: str) -> str | None:
        """The next token where it is one of these signs; it is passed then."""
        if self._kind != "sign" or self._text not in signs:
            return None
        self._place += 1
        return self._tokens[self._place - 1][1]

    def _deeper(self, read: Callable[[], Quotient]) -> Quotient:
        self._depth += 1
        if self._depth > DEPTH:
            raise UndecidedError
        value = read()
        self._depth -= 1
        return value

    def _expression(self) -> Quotient:
        value = self._term()
        while sign := self._take("+", "-"):
            term = self._term()
            value = self._algebra.add(value, self._algebra.negative(term) if sign == "-" else term)
        return value

    def _term(self) -> Quotient:
        value = self._factor()
        while True:
            before = self._tokens[self._place - 1]
            if sign := self._take("*", "/"):
                other = self._factor()
                join = self._algebra.multiply if sign == "*" else self._algebra.divide
                value = join(value, other)
            elif self._begins_atom(before):
                value = self._algebra.multiply(value, self._factor())
            else:
                return value

    def _begins_atom(self, before: tuple[str, str]) -> bool:
        """Whether what follows is a factor without a sign before it."""
        # "3 4" is no product, and words one after the other are prose.
        if self._kind == "number":
            raise UndecidedError
        if self._kind == "name" and before[0] == "name" and len(before[1]) > 2 < len(self._text):
            raise UndecidedError
        return self._kind in ("name", "function", "fraction") or (
            self._kind == "sign" and self._text == "("
        )

    def _factor(self) -> Quotient:
        return self._deeper(self._signed)

    def _signed(self) -> Quotient:
        if sign := self._take("+", "-"):
            value = self._factor()
            return self._algebra.negative(value) if sign == "-" else value
        value = self._atom()
        while sign := self._take("%", "°"):
            if sign == "%":
                value = self._algebra.multiply(value, self._algebra.number(Fraction(1, 100)))
        if not self._take("^"):
            return value
        if self._take("°"):
            return value
        return self._algebra.power(value, self._factor())

    def _atom(self) -> Quotient:
        kind, text = self._tokens[self._place]
        self._place += 1
        if kind == "number":
            return self._algebra.number(_number(text))
        if kind == "name":
            return self._algebra.variable(text)
        if kind == "function":
            return self._call(text)
        if kind == "fraction":
            top = self._factor()
            return self._algebra.divide(top, self._factor())
        if (kind, text) != ("sign", "("):
            raise UndecidedError
        value = self._deeper(self._expression)
        if not self._take(")"):
            raise UndecidedError
        return value

    def _call(self, name: str) -> Quotient:
        # sin^2(x) is the square of sin(x).
        exponent = self._atom() if name != "sqrt" and self._take("^") else None
        value = self._algebra.function(name, self._deeper(self._atom))
        return value if exponent is None else self._algebra.power(value, exponent)


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token; the last one is an end."""
    tokens: list[tuple[str, str]] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise UndecidedError
        place = match.end()
        kind = str(match.lastgroup)
        word = match[kind]
        if kind == "command":
            tokens.append(_command(word))
        elif kind == "name":
            tokens += _names(word)
        else:
            tokens.append((kind, word))
    return [*tokens, ("end", "")]


def _command(word: str) -> tuple[str, str]:
    """Of LaTeX. Letters of other alphabets are names."""
    if word in ("frac", "dfrac", "tfrac"):
        return "fraction", word
    if word in FUNCTIONS:
        return "function", word
    return ("sign", COMMANDS[word]) if word in COMMANDS else ("name", word)


def _names(word: str) -> list[tuple[str, str]]:
    """Two letters are a product, and so are x, y and z; a longer word is one name."""
    if word in FUNCTIONS:
        return [("function", word)]
    if word == "pi" or not (len(word) <= 2 or set(word) <= set("xyz")):
        return [("name", word.replace("(", "").replace(")", ""))]
    return [("name", letter) for letter in word]


def _number(text: str) -> Fraction:
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(mantissa) > DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > EXPONENT:
        raise UndecidedError
    value = Fraction(f"0{mantissa}0" if "." in mantissa else mantissa)
    return value * Fraction(10) ** int(exponent or 0)
