"""A chat template is a program from outside: it ends soon, stays small and reaches nothing but its variables."""

import time

import pytest

from edge_ft.data.sandbox import LONGEST_TEMPLATE, render
from edge_ft.errors import DataError

MESSAGES = [{"role": "user", "content": "hello"}]
GROWING = "{% set ns = namespace(x=[1, 'ab']) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def write(template: str, **variables: object) -> str:
    return render(template, {"messages": MESSAGES, "add_generation_prompt": True, **variables})


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 3 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for i in range(99999) %}" + "{% if a %}{% endif %}" * 4000 + "{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | sort | length }}{{ 'a' in range(99999) }}{% endfor %}",
        "{{ ([[1]] * 90000) | sum(start=[]) | length }}",
        "{% set a = 'a' * 900000 %}{% for i in range(99999) %}{% set b = 'b' in a or a == a.upper() %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ '%1000000000d' % 1 }}{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format('x', 1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ 10 ** 10 ** 9 }}{{ (10 ** 999) ** 999 }}",
        "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
        "{{ range(99999) | join('a' * 900000) }}",
        "{{ dict.fromkeys(range(99999), 'x' * 900000) }}",
        *(GROWING.replace("STEP", step) for step in ("[ns.x, ns.x]", "dict(a=ns.x, b=ns.x)", "{'a': ns.x, 'b': ns.x}")),
        *(GROWING.replace("STEP", step) for step in ("ns.x + ns.x", "ns.x ~ ns.x", "ns.x * 9")),
        "{{ lipsum(n=100000) }}",
        "a" * (LONGEST_TEMPLATE + 1),
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    ],
)
def test_a_template_without_an_end_is_refused_soon(template: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match="cannot render this chat") as refused:
        write(template)
    assert time.process_time() - started < 4
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}{{ strftime_now.__closure__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",
        "{{ self._TemplateReference__context }}",
        "{% for i in messages %}{{ loop._iterable }}{% endfor %}",
        "{{ [messages] | map(attribute='__class__') | list }}",
    ],
)
def test_a_template_reaches_nothing_but_its_variables(template: str) -> None:
    try:
        written = write(template)
    except DataError:
        return
    assert written.strip("[]") in ("", "Undefined")


def test_the_limits_grow_with_the_chat() -> None:
    long = [{"role": "user", "content": "word " * 20_000}] * 60
    template = "{% for m in messages %}{{ m.content | trim | replace('word', 'text') }}{% endfor %}"
    assert len(write(template, messages=long)) == 60 * 99_999
    many = [{"role": "user", "content": "hello"}] * 2000
    template = (
        "{% for m in messages %}{{ m.content }}{% if loop.index0 == messages | length - 1 %}!{% endif %}{% endfor %}"
    )
    assert write(template, messages=many) == "hello" * 2000 + "!"


def test_what_templates_of_models_use_is_there() -> None:
    template = (
        "{%- set ns = namespace(found=false, all=[]) %}{% macro text(m) %}{{ m['content'] | trim }}{% endmacro %}"
        "{% for m in messages[::-1] if m.role != 'tool' %}{% set ns.found = 'hell' in m.content %}"
        "{% set ns.all = ns.all + [m.content] %}{{ text(m) ~ loop.length ~ loop.last }}{% continue %}{% endfor %}"
        "{{ ns.all | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} "
        "{{ tools | tojson }} {{ {'a': 'ü'} | tojson(indent=2) }} {% set block %}x{{ 1 + 1 }}{% endset %}{{ block }}"
        "{% if x is defined %}{% endif %} {{ messages[0].content.split('l')[-1].upper().startswith('O') }} "
        "{{ ('a' if ns.found else 'b') * 3 }} {{ 7 % 2 }}"
    )
    assert write(template, tools=[{"name": "f"}]) == (
        'hello1Truehello 1 [{"name": "f"}] {\n  "a": "ü"\n} x2 True aaa 1'
    )
