"""Cases of chat templates: escapes from the sandbox, endless loops, texts that fill the memory, broken syntax."""

import json
from random import Random
from typing import Literal

from fuzz.bundles import renew_hashes
from fuzz.child import Box, Case
from fuzz.mutations import mutate_bytes, odd_text

__all__ = ["template_case"]

MESSAGES = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A template that works."""
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ raise_exception.__globals__['os'].system('touch escaped') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ lipsum.__globals__['os'].popen('touch escaped').read() }}",
    "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.globals }}{{ namespace.__init__.__globals__ }}",
    "{% import 'os' as os %}{{ os.system('touch escaped') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '../secret' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ [].__class__.__base__ }}",
    "{{ ''['format_map']({}) }}{{ ()|map(attribute='__class__')|list }}{{ (1).__class__.__base__.__subclasses__() }}",
)
BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if a %}{% endif %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 50 }}{% endfor %}{% endfor %}",
    "{{ 'x' * 4000000000 }}",
    "{{ 'x' * 10 ** 10 }}",
    "{% set t = namespace(x='ab') %}{% for i in range(40) %}{% set t.x = t.x + t.x %}{% endfor %}{{ t.x }}",
    "{% set t = namespace(x=[1]) %}{% for i in range(40) %}{% set t.x = t.x + t.x %}{% endfor %}{{ t.x|length }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 2 ** 100000000 % 7 }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ range(99999)|map('string')|join('x' * 99999) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x'|center(4000000000) }}",
    "{{ ('x' * 9999)|replace('x', 'y' * 999999) }}",
    "{{ ('a' * 99999)|wordwrap(1)|indent(999999) }}",
    "{{ 'x'.ljust(4000000000) }}{{ 'x'.zfill(3000000000) }}",
    "{% for a in range(99999) %}{% for b in messages * 99999 %}{% endfor %}{% endfor %}",
    "{{ range(99999)|list|batch(1)|list|tojson(indent=99999) }}{{ lipsum(n=999999) }}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'y' * 99999 }}{% endfor %}{% endfilter %}",
    "{{ (range(99999)|list * 999)|sum }}{{ (range(99999)|list * 9999)|sort|length }}",
)
PIECES = (
    "{{ message.content }}",
    "{{ messages }}",
    "{{ messages[0]['content'] }}",
    "{{ messages[-1].content }}",
    "{% if tools %}{{ tools|tojson }}{% endif %}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{{ nothing.at.all }}",
    "{{ nothing }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception('two\nlines \x1b[31m') }}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now(7) }}",
    "{{ messages|tojson }}",
    "{{ message|tojson(indent=2) }}",
    "{{ message.content|trim|upper|int }}",
    "{% generation %}{{ message.content }}{% endgeneration %}",
    "{%- generation -%}",
    "{% break %}",
    "{% for m in messages %}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
    "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(messages) }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join }}",
    "{% if messages[1] is mapping %}x{% endif %}",
    "{{ 'a'.encode('utf-8') }}",
    "{{ '\\ud800' }}",
    "{# comment",
    "{% raw %}{{ {% endraw %}",
    "{{",
    "%}",
    "{% unknown %}",
    "{% for x in %}",
    "{% call m() %}{% endcall %}",
    "\x00\x01",
    "<|im_start|>",
    "<|im_end|>",
)


def template_case(random: Random, box: Box) -> Case:
    """A chat template, in a file or in the bundle, for a command that renders chats."""
    what = random.random()
    expect: Literal["any", "refused"] = "any"
    if what < 0.2:
        name, template = "an escape", random.choice(ESCAPES) + random.choice(["", MESSAGES])
    elif what < 0.4:
        name, template, expect = "a bomb", random.choice(BOMBS) + random.choice(["", MESSAGES]), "refused"
    elif what < 0.7:
        name = "pieces"
        template = "".join(random.choice([*PIECES, odd_text(random)[:300]]) for _ in range(random.choice([1, 2, 5])))
        template = random.choice(
            [template, "{% for message in messages %}" + template + "{% endfor %}", template + MESSAGES]
        )
    else:
        name = "bytes"
        template = mutate_bytes(random, MESSAGES.encode()).decode("utf-8", "surrogateescape")
    content = template.encode("utf-8", "surrogateescape" if name == "bytes" else "surrogatepass")
    box.copy("bundle")
    box.copy("chats.jsonl")
    where = random.random()
    if where < 0.5:
        (box.work / "chat.jinja").write_bytes(content)
        option = ["--chat-template", "chat.jinja"]
    else:
        option = []
        _into_bundle(random, box, template, content)
    command = random.choice(
        [
            ["run", "bundle", "hello", "--max-new-tokens", "2", *option],
            ["run", "bundle", "hello", "--system", "be brief", "--max-new-tokens", "2", *option],
            ["eval", "bundle", "--data", "chats.jsonl", "--no-generate", "--limit", "2", *option],
        ]
    )
    return Case("templates", command, f"{name}: {template[:70]!a}", expect=expect)


def _into_bundle(random: Random, box: Box, template: str, content: bytes) -> None:
    """Let the bundle itself bring the template, under the right hashes."""
    bundle = box.work / "bundle"
    (bundle / "chat_template.jinja").write_bytes(content)
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["rendering"]["chat_template"] = template.encode("utf-8", "replace").decode("utf-8")
    file.write_text(json.dumps(manifest), encoding="utf-8")
    renew_hashes(bundle)
