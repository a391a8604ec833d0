"""A model's chat template: conversations to text, as transformers' `apply_chat_template` renders them.

Templates are programs in Jinja that come with a model, so they run in Jinja's sandbox, with the settings, filters and
functions that transformers documents for them.

Deviation: `strftime_now` is not there. A template that prints today's date (Llama 3.2) prints the date that it has for
this case, so the same data are the same tokens tomorrow, and training can resume.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jprune import texts
from jprune.errors import JpruneError
from jprune.packages import require

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """One template, compiled.

    Raises:
        JpruneError: it is not a template that Jinja understands.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        require("jinja2")
        import jinja2

        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise JpruneError(f"The model's chat template cannot be read: {error}.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with the words that make the model answer, if `add_generation_prompt`.

        Raises:
            JpruneError: the template does not take these messages (some demand that roles take turns, for instance).
        """
        import jinja2

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise JpruneError(f"the model's chat template does not take these messages ({error})") from error


def template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """The chat template among the files beside a model's weights; None if there is none."""
    written = files.get("chat_template.jinja")
    source = None if written is None else texts.decoded(written, "chat_template.jinja")
    if source is None:
        source = texts.beside(files, "tokenizer_config.json").get("chat_template")
    if source is None:
        source = texts.beside(files, "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several by name, for tools and the like
        named = [each for each in source if isinstance(each, dict)]
        source = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if source is not None and not isinstance(source, str):
        raise JpruneError(f"The model's chat template must be text, or a list of named texts; it is {source!r:.80}.")
    return None if source is None else ChatTemplate(source, special_tokens(files))


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens of a tokenizer by their role, such as {"eos_token": "</s>"}."""
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = texts.beside(files, name)
        for role in SPECIAL_TOKENS:
            token = content.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[role] = token
    return tokens


def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what a model says; the text within is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False):
        # Jinja's own would escape <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
