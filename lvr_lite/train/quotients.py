"""Arithmetic of quotients of polynomials with exact coefficients, within bounds.

May import: the standard library.

Square roots of primes are variables whose square is known, and linearly independent over the
fractions. Each number, power and polynomial has a limit, and so has the work as a whole: what goes
beyond raises UndecidedError.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

# Of each power and number: its exponent, and the bits of a coefficient.
EXPONENT = 1000
BITS = 2000
# Terms of a polynomial, and products of terms of a whole comparison.
TERMS = 100
PRODUCTS = 5000
# Characters of the name of a function of an expression.
NAME_LENGTH = 4000
# Primes up to this bound are taken out of square roots.
LARGEST_PRIME = 1000


# Sorted (variable, exponent) pairs; and the coefficient of each.
Monomial = tuple[tuple[str, int], ...]
Polynomial = dict[Monomial, Fraction]
ONE: Polynomial = {(): Fraction(1)}


class UndecidedError(Exception):
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


class Algebra:
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
            raise UndecidedError
        top = self._times(one.top, other.bottom)
        return self._quotient(top, self._times(one.bottom, other.top))

    def power(self, base: Quotient, exponent: Quotient) -> Quotient:
        number = exponent.constant
        if number is None:
            return self.function("^", base, exponent)
        if abs(number) > EXPONENT:
            raise UndecidedError
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
        if len(key) > NAME_LENGTH:
            raise UndecidedError
        return self.variable(key)

    def square_root(self, value: Quotient) -> Quotient:
        """Raises UndecidedError for that of a negative number, and of a quotient of variables."""
        if value.bottom != ONE:
            raise UndecidedError
        number = value.constant
        if number is None:
            return self._root_variable(value.top)
        if number < 0:
            raise UndecidedError
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
            raise UndecidedError
        parts = [round(part ** (1 / degree)) for part in _as_floats(number)]
        root = Fraction(parts[0], max(1, parts[1]))
        if root**degree != number:
            raise UndecidedError
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
            raise UndecidedError
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
            raise UndecidedError
        return tuple(sorted((name, e) for name, e in exponents.items() if e)), roots

    def _checked(self, polynomial: Polynomial) -> Polynomial:
        kept = {monomial: factor for monomial, factor in polynomial.items() if factor}
        if len(kept) > TERMS:
            raise UndecidedError
        for factor in kept.values():
            if factor.numerator.bit_length() + factor.denominator.bit_length() > BITS:
                raise UndecidedError
        return kept


def _as_floats(number: Fraction) -> tuple[float, float]:
    try:
        return float(number.numerator), float(number.denominator)
    except OverflowError as error:
        raise UndecidedError from error


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
