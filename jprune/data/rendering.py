"""A process that renders chat templates, which are programs by strangers: little memory, and nothing to look at.

`jprune.data.renderer` starts this file and kills it when it takes too long. It imports nothing of jprune. Requests and
answers are lines of JSON: {"source", "variables"} is answered with {"text"} or {"error"}.
"""

import functools
import json
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30
"""Bytes that this process may have."""
LONGEST = 1 << 26
"""Characters that a rendered text may have."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what a model says; the text within is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False) -> str:
    # Jinja's own would escape <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(4)
def _compiled(source: str) -> jinja2.Template:
    """A template, with the settings, filters and functions that transformers documents."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        template = _compiled(request["source"])
        if request["variables"] is None:
            return {"text": ""}
        text = template.render(request["variables"])
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB"}
    except Exception as error:  # whatever a template may raise
        return {"error": str(error) or type(error).__name__}
    return {"text": text} if len(text) <= LONGEST else {"error": f"it gives more than {LONGEST:,} characters"}


def main() -> None:
    """Answers until there are no more requests."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
