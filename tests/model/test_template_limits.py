"""A template that loops for ever or fills the memory fails; one that makes a prompt does not."""

from __future__ import annotations

import tracemalloc

import pytest

from lvr_lite.errors import LvrError
from lvr_lite.model.prompt import render
from lvr_lite.toy.build import TEMPLATE

STATE = "{% set ns = namespace(s='a', n=2) %}"
SIXTY_TIMES = "{% for i in range(60) %}"
EACH = "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}"
END = "{% endfor %}"

ENDLESS = {
    "a long text": "{{ 'a' * 10**9 }}",
    "a long list": "{{ ([1] * 10**9)|length }}",
    "a large number": "{{ 10**(10**9) }}",
    "a product": STATE + SIXTY_TIMES + "{% set ns.n = ns.n * ns.n %}" + END,
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set s = 'a' * 99999 %}" + EACH,
    "writing": "{% for a in range(99999) %}" + "x" * 5000 + END,
    "doubling": STATE + SIXTY_TIMES + "{% set ns.s = ns.s ~ ns.s %}" + END,
    "doubling by +": STATE + SIXTY_TIMES + "{% set ns.s = ns.s + ns.s %}" + END,
    "doubling of blocks": "{% set s = 'a' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "nested lists": "{% set l = [1] %}" + "{% set l = [l, l] %}" * 60 + "{{ l }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a width": "{{ 'a'.ljust(10**9) }}",
    "a filter's width": "{{ 'a'|center(10**9) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a computed format": "{{ '{:{}}'.format('a', 10**9) }}",
    "a format by filter": "{{ '%999999999d'|format(1) }}",
    "replacing": "{{ ('a' * 9999).replace('', 'b' * 9999) }}",
    "replacing by filter": "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
    "joining": "{{ ('b' * 9999).join(['a'] * 9999) }}",
    "joining by filter": "{{ (['a'] * 9999)|join('b' * 9999) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "filler": "{{ lipsum(10**9) }}",
    "recursive loops": "{% for a in range(9) recursive %}"
    "{% if loop.depth < 30 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    "indent": "{{ ([[1]] * 9999)|tojson(indent=10**6) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a file": "{% include '/etc/passwd' %}",
    "insides": "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1] }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_fails_in_one_line_and_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LvrError, match="the chat template cannot be rendered") as caught:
            render(ENDLESS[name], "x", 1)
        assert "\n" not in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a' * 3 ~ 'b' ~ 1 }}", "aaab1"),
        ("{{ 'a' + 'b' }}{{ 2 ** 10 }}{{ 7 % 4 }}", "ab10243"),
        ("{% for i in range(3) %}{{ loop.index }}{{ ',' if not loop.last }}{% endfor %}", "1,2,3"),
        ("{% for i in [] %}{% else %}none{% endfor %}{{ [1, 2]|length }}", "none2"),
        ("{% for i in range(9) if i > 6 %}{{ i }}{% endfor %}", "78"),
        ("{% for i in [1, [2]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}", "12"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}", "<a>"),
        ("{{ 'a b'.split(' ')|join('-')|upper|replace('A', 'c') }}", "c-B"),
        ("{{ '%s-%d' % ('a', 3) }}{{ '{}'.format('b') }}", "a-3b"),
        ("{{ messages[0]['content'][-1]['text']|trim }}", "x"),
        ("{{ {'a': [1]}|tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ none }}{{ missing }}{{ missing|default('d') }}", "Noned"),
        (STATE + SIXTY_TIMES + "{% set ns.n = ns.n + i %}" + END + "{{ ns.n }}", "1772"),
    ],
)
def test_what_templates_do_stays(template: str, text: str) -> None:
    assert render(template, "x", 0) == text


def test_a_long_question_is_no_bomb() -> None:
    assert len(render(TEMPLATE, "x" * 100_000, 4)) > 100_000
