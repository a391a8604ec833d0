"""Chat templates that mean harm are stopped; what transformers renders is compared in `test_instructions`."""

import os
import types

import pytest

from jprune.data import chat, renderer
from jprune.errors import JpruneError

TALK = [{"role": "user", "content": "Hi"}]
LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "numbers": "{{ 9 ** (9 ** 9) }}",
    "folded": "{{ 'a' * 10 ** 11 }}",
    "doubled": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "wide": "{{ 'a'.center(10 ** 11) }}",
    "filtered": "{{ 'a'|center(100000000000) }}",
    "long": "{{ 'a' * (2 ** 26 + 1) }}",
    "nested": "{% set n = namespace(a=[]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
}


@pytest.mark.parametrize("name", LOOPS)
def test_templates_that_do_not_end(monkeypatch, name):
    monkeypatch.setattr(renderer, "SECONDS", 0.3)
    with pytest.raises(JpruneError, match="chat template") as caught:
        chat.ChatTemplate(LOOPS[name], {}).render(TALK)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert chat.ChatTemplate("{{ messages[0].content }}!", {}).render(TALK) == "Hi!"  # the next one works


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception('no') }}",
        "{{ open('/etc/passwd').read() }}",
    ],
)
def test_templates_that_reach_out(source):
    with pytest.raises(JpruneError, match="does not take these messages"):
        chat.ChatTemplate(source, {}).render(TALK)


def test_text_of_every_kind_comes_back():
    text = "é\u2028\n\0\ud800🙂"
    assert chat.ChatTemplate("{{ messages[0].content }}", {}).render([{"content": text}]) == text


def test_an_interrupted_answer_is_not_the_next_one(monkeypatch):
    template = chat.ChatTemplate("{{ messages[0].content }}", {})

    process = renderer._process()

    def interrupted():
        raise KeyboardInterrupt

    reading = types.SimpleNamespace(stdin=process.stdin, stdout=types.SimpleNamespace(readline=interrupted), kill=print)
    monkeypatch.setattr(renderer, "_process", lambda: reading)
    with pytest.raises(KeyboardInterrupt):
        template.render(TALK)
    monkeypatch.undo()
    assert process.poll() is not None
    assert template.render([{"content": "2"}]) == "2"
    renderer._running[os.getpid()].kill()
    renderer._running[os.getpid()].wait()
    assert template.render([{"content": "3"}]) == "3"
