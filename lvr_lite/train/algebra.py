"""Whether two texts are the same mathematical expression, decided exactly and within bounds.

May import: the standard library.

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
from math import isqrt

# Characters of an expression, and of a text that holds one in tags or in a box.
LENGTH = 400
WHOLE = 20_000
# Parentheses within parentheses, digits of a number as it is written.
DEPTH = 24
DIGITS = 40
# Of each power and number: its exponent, and the bits of a coefficient.
EXPONENT = 1000
BITS = 2000
# Terms of a polynomial, and products of terms of a whole comparison.
TERMS = 100
PRODUCTS = 5000
# Primes up to this bound are taken out of square roots.
LARGEST_PRIME = 1000

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

# Sorted (variable, exponent) pairs; and the coefficient of each.
Monomial = tuple[tuple[str, int], ...]
Polynomial = dict[Monomial, Fraction]
ONE: Polynomial = {(): Fraction(1)}


class _UndecidedError(Exception):
    """The text is no expression, or one beyond the limits."""


@dataclass(frozen=True)
class Quotient:
    """top / bottom; bottom is not 0."""

    top: Polynomial
    bottom: Polynomial

    @property
    def constant(self) -> Fraction | None:
        """Its value where it has no variable."""
        if self.bottom != ONE or any(monomial for monomial in self.top):
            return None
        return self.top.get((), Fraction(0))

    def key(self) -> str:
        """Tells it from others; that of equal ones may differ."""
        return f"{sorted(self.top.items())}/{sorted(self.bottom.items())}"


def same_value(one: str, other: str) -> bool:
    """Whether two texts are equal as expressions, "x = 4" and "4" among them.

    Takes milliseconds whatever they hold; False where it cannot be decided.
    """
    if _is_prose(one) and _is_prose(other):
        # Products of letters know no order, and words do.
        return False
    algebra = _Algebra()
    try:
        left = _Statement.read(one, algebra)
        right = _Statement.read(other, algebra)
        return left.agrees(right)
    except _UndecidedError:
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

    algebra: _Algebra
    name: str | None
    value: Quotient | None
    difference: Quotient | None

    @classmethod
    def read(cls, text: str, algebra: _Algebra) -> _Statement:
        sides = _plain(text).split("=")
        if len(sides) > 4:
            raise _UndecidedError
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
        raise _UndecidedError
    tagged = TAGGED.search(text)
    text = tagged.group(1) if tagged else text
    *_, boxed = [None, *BOXED.finditer(text)]
    if boxed is not None:
        text = text[boxed.end() : _end_of_group(text, boxed.end())]
    text = text.strip().rstrip(".,;:!?").strip()
    if len(text) > LENGTH:
        raise _UndecidedError
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", LOOKS.sub(" ", text.replace("\\%", "%")))
    for written, plain in WRITTEN.items():
        text = text.replace(written, plain)
    if len(text) > 2 * LENGTH:
        raise _UndecidedError
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
# arithmetic


class _Algebra:
    """Arithmetic of quotients with one budget of work.

    radicands: of the variables that stand for square roots, what their square is.
    """

    def __init__(self) -> None:
        self.products = 0
        self.radicands: dict[str, Polynomial] = {}

    def number(self, value: Fraction) -> Quotient:
        return Quotient(self._checked({(): value}), ONE)

    def variable(self, name: str) -> Quotient:
        return Quotient({((name, 1),): Fraction(1)}, ONE)

    def equal(self, one: Quotient, other: Quotient) -> bool:
        return self._times(one.top, other.bottom) == self._times(other.top, one.bottom)

    def negative(self, value: Quotient) -> Quotient:
        return Quotient({monomial: -factor for monomial, factor in value.top.items()}, value.bottom)

    def add(self, one: Quotient, other: Quotient) -> Quotient:
        if one.bottom == other.bottom:
            return Quotient(self._plus(one.top, other.top), one.bottom)
        left = self._times(one.top, other.bottom)
        right = self._times(other.top, one.bottom)
        return self._quotient(self._plus(left, right), self._times(one.bottom, other.bottom))

    def multiply(self, one: Quotient, other: Quotient) -> Quotient:
        top = self._times(one.top, other.top)
        return self._quotient(top, self._times(one.bottom, other.bottom))

    def divide(self, one: Quotient, other: Quotient) -> Quotient:
        if not other.top:
            raise _UndecidedError
        top = self._times(one.top, other.bottom)
        return self._quotient(top, self._times(one.bottom, other.top))

    def power(self, base: Quotient, exponent: Quotient) -> Quotient:
        number = exponent.constant
        if number is None:
            return self.function("^", base, exponent)
        if abs(number) > EXPONENT:
            raise _UndecidedError
        if number.denominator == 2:
            base = self.square_root(base)
        elif number.denominator > 2:
            base = self._root(base, number.denominator)
        whole = self._whole_power(base, abs(number.numerator))
        return whole if number >= 0 else self.divide(self.number(Fraction(1)), whole)

    def function(self, name: str, *arguments: Quotient) -> Quotient:
        """A variable for a function's value."""
        if name == "sqrt":
            return self.square_root(arguments[0])
        key = f"{name}({', '.join(argument.key() for argument in arguments)})"
        if len(key) > 10 * LENGTH:
            raise _UndecidedError
        return self.variable(key)

    def square_root(self, value: Quotient) -> Quotient:
        """Raises _UndecidedError for that of a negative number, and of a quotient of variables."""
        if value.bottom != ONE:
            raise _UndecidedError
        number = value.constant
        if number is None:
            return self._root_variable(value.top)
        if number < 0:
            raise _UndecidedError
        # sqrt(2/3) = sqrt(6)/3
        outside, inside = _squares_apart(number.numerator * number.denominator)
        root = self.number(Fraction(outside, number.denominator))
        for prime in inside:
            root = self.multiply(root, self._root_variable({(): Fraction(prime)}))
        return root

    def _root_variable(self, radicand: Polynomial) -> Quotient:
        root = self.function("root", Quotient(radicand, ONE))
        ((((name, _),), _),) = root.top.items()
        self.radicands[name] = radicand
        return root

    def _root(self, value: Quotient, degree: int) -> Quotient:
        """The root of a number that has a rational one."""
        number = value.constant
        if number is None or number < 0 or degree > 10:
            raise _UndecidedError
        parts = [round(part ** (1 / degree)) for part in _as_floats(number)]
        root = Fraction(parts[0], max(1, parts[1]))
        if root**degree != number:
            raise _UndecidedError
        return self.number(root)

    def _whole_power(self, base: Quotient, exponent: int) -> Quotient:
        result = self.number(Fraction(1))
        while exponent:
            if exponent & 1:
                result = self.multiply(result, base)
            exponent >>= 1
            if exponent:
                base = self.multiply(base, base)
        return result

    def _quotient(self, top: Polynomial, bottom: Polynomial) -> Quotient:
        """A number below the line goes above it."""
        if list(bottom) != [()]:
            return Quotient(top, bottom)
        factor = 1 / bottom[()]
        return Quotient(self._times(top, {(): factor}), ONE)

    def _plus(self, one: Polynomial, other: Polynomial) -> Polynomial:
        total = dict(one)
        for monomial, factor in other.items():
            total[monomial] = total.get(monomial, Fraction(0)) + factor
        return self._checked(total)

    def _times(self, one: Polynomial, other: Polynomial) -> Polynomial:
        self.products += len(one) * len(other)
        if self.products > PRODUCTS:
            raise _UndecidedError
        total: Polynomial = {}
        for left, factor in one.items():
            for right, other_factor in other.items():
                monomial, roots = self._joined(left, right)
                product = {monomial: factor * other_factor}
                for radicand in roots:
                    product = self._times(product, radicand)
                for part, value in product.items():
                    total[part] = total.get(part, Fraction(0)) + value
        return self._checked(total)

    def _joined(self, one: Monomial, other: Monomial) -> tuple[Monomial, list[Polynomial]]:
        """The product of two monomials, and what the squares of roots in it are."""
        exponents = dict(one)
        for name, exponent in other:
            exponents[name] = exponents.get(name, 0) + exponent
        roots: list[Polynomial] = []
        for name in [name for name in exponents if name in self.radicands]:
            whole, exponents[name] = divmod(exponents[name], 2)
            roots += [self.radicands[name]] * whole
        if sum(exponents.values()) > EXPONENT:
            raise _UndecidedError
        return tuple(sorted((name, e) for name, e in exponents.items() if e)), roots

    def _checked(self, polynomial: Polynomial) -> Polynomial:
        kept = {monomial: factor for monomial, factor in polynomial.items() if factor}
        if len(kept) > TERMS:
            raise _UndecidedError
        for factor in kept.values():
            if factor.numerator.bit_length() + factor.denominator.bit_length() > BITS:
                raise _UndecidedError
        return kept


def _as_floats(number: Fraction) -> tuple[float, float]:
    try:
        return float(number.numerator), float(number.denominator)
    except OverflowError as error:
        raise _UndecidedError from error


def _squares_apart(number: int) -> tuple[int, list[int]]:
    """(root of the squares in it, primes that are left): 12 is (2, [3]). What is left after
    division by small primes counts as one prime.
    """
    if number == 0:
        return 0, []
    outside = 1
    inside: list[int] = []
    for prime in range(2, LARGEST_PRIME):
        while number % (prime * prime) == 0:
            number //= prime * prime
            outside *= prime
        if number % prime == 0:
            number //= prime
            inside.append(prime)
    root = isqrt(number)
    if root * root == number:
        return outside * root, inside
    return outside, [*inside, number]


# --------------------------------------------------------------------------------------------------
# reading


class _Parser:
    """Reads one side of a text.

    expression   term, with "+" and "-" between terms
    term         factor, with "*", "/" or nothing between factors
    factor       atom, with "%", "°" and "^ factor" after it; "-" before it
    atom         a number, a name, a function of an atom, an expression in parentheses
    """

    def __init__(self, text: str, algebra: _Algebra) -> None:
        self._tokens = _tokens(text)
        self._place = 0
        self._depth = 0
        self._algebra = algebra

    def read(self) -> Quotient:
        value = self._expression()
        if self._kind != "end":
            raise _UndecidedError
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
            raise _UndecidedError
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
            raise _UndecidedError
        if self._kind == "name" and before[0] == "name" and len(before[1]) > 2 < len(self._text):
            raise _UndecidedError
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
            raise _UndecidedError
        value = self._deeper(self._expression)
        if not self._take(")"):
            raise _UndecidedError
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
            raise _UndecidedError
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
        raise _UndecidedError
    value = Fraction(f"0{mantissa}0" if "." in mantissa else mantissa)
    return value * Fraction(10) ** int(exponent or 0)
