"""A model's chat template: conversations to text, as transformers' `apply_chat_template` renders them.

Templates are programs in Jinja that come with a model, so they run in Jinja's sandbox, in a process that may take
little memory and time, with the settings, filters and functions that transformers documents for them.

Deviation: `strftime_now` is not there. A template that prints today's date (Llama 3.2) prints the date that it has for
this case, so the same data are the same tokens tomorrow, and training can resume.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jprune import texts
from jprune.data import renderer
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
        self._special_tokens = dict(special_tokens)
        self._source = source
        try:
            renderer.render(source, None)
        except JpruneError as error:
            raise JpruneError(f"The model's chat template cannot be read: {error}.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with the words that make the model answer, if `add_generation_prompt`.

        Raises:
            JpruneError: the template does not take these messages (some demand that roles take turns, for instance),
                or takes too much time or memory for them.
        """
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return renderer.render(self._source, given | self._special_tokens)
        except JpruneError as error:
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
