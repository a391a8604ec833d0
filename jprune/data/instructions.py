"""Instruction data: records of a question and its answer, or of a conversation, to tokens and loss weights.

A record of `instruction` (with an optional `input`, or `context`) and `output` (or `response`) becomes one prompt of
the Alpaca template and the answer (Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca), as in
LLM-Pruner's recovery; the model's BOS comes before, its EOS after. A record of `messages`, each with `role` and
`content`, is rendered with the model's own chat template, which has all special tokens in it.

Loss is taken on the tokens of the answers and on the token that ends each; on every token with `train_on_prompt`. Texts
are tokenised whole, so a token that begins in the prompt and ends in the answer counts as answer. One record is one
window: longer ones are cut, shorter ones are padded on the right, where causal attention never looks. No two records
share a window.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from jprune.annotations import Int
from jprune.data.chat import ChatTemplate
from jprune.data.records import Record, found
from jprune.data.stream import Batch
from jprune.data.windows import Tokenizer
from jprune.errors import JpruneError

logger = logging.getLogger(__name__)

Kind = Literal["text", "alpaca", "messages"]

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

INPUT, RESPONSE = ("input", "context"), ("output", "response")
INSTRUCTIONS = "'messages', or 'instruction' with 'output' (or 'response')"
EXPECTED = f"{INSTRUCTIONS}, or 'text'"


@dataclass(frozen=True, kw_only=True)
class Format:
    """How records become tokens.

    Attributes:
        tokenizer: the model's.
        length: tokens a window; records are cut and padded to it.
        template: the model's chat template, for messages.
        eos_id: ends the answer of an Alpaca record; None if the model has no such token.
        pad_id: fills the windows.
        vocab_size: ids from here on are refused.
        train_on_prompt: take the loss on the prompts too.
    """

    tokenizer: Tokenizer
    length: int
    template: ChatTemplate | None = None
    eos_id: int | None = None
    pad_id: int = 0
    vocab_size: int | None = None
    train_on_prompt: bool = False


class Conversations:
    """The records of instruction data as windows of tokens and weights.

    Attributes:
        length: tokens a window.
        sha256: of the tokens, their weights and the padding.
        notices: what the user should know about how they were made, one sentence each.

    Raises:
        JpruneError: a record without what is needed of it (says which, what it has and what was expected), or none
            whose answer begins within `length` tokens.
    """

    def __init__(self, records: Iterable[Record], source: str, form: Format):
        self._ids: list[np.ndarray] = []
        self._learnt: list[np.ndarray] = []
        self._pad_id = form.pad_id
        self.length = form.length
        cut = left_out = unstable = 0
        digest = hashlib.sha256(f"conversations {form.length} {form.pad_id}".encode())
        for record in records:
            ids, learnt, skipped = encode(record, form)
            unstable += skipped
            cut += len(ids) > form.length
            ids, learnt = ids[: form.length], learnt[: form.length]
            if not learnt[1:].any():
                left_out += 1
                continue
            learnt[0] = False  # nothing predicts the first token
            digest.update(f"{len(ids)}".encode() + ids.astype("<i4").tobytes() + learnt.tobytes())
            self._ids.append(ids)
            self._learnt.append(learnt)
        self.sha256 = digest.hexdigest()
        if not self._ids:
            raise JpruneError(
                f"{source}: none of its {left_out} records has an answer that begins within {form.length} tokens. "
                "Give longer windows, or other data."
            )
        read = left_out + len(self._ids)
        notes = (
            (cut, f"of {read} records longer than {form.length} tokens, and cut there"),
            (left_out, f"of {read} records left out: no answer begins within {form.length} tokens"),
            (unstable, "answers without loss: the chat template renders them otherwise once more is said"),
        )
        self.notices = tuple(f"{source}: {count} {what}." for count, what in notes if count)

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """The records of these numbers, padded."""
        tokens = np.full((len(indices), self.length), self._pad_id, np.int32)
        weights = np.zeros((len(indices), self.length), np.float32)
        for row, index in enumerate(indices):
            ids = self._ids[index]
            tokens[row, : len(ids)] = ids
            weights[row, : len(ids)] = self._learnt[index]
        return {"tokens": tokens, "weights": weights}


def kind(record: Record) -> Kind:
    """What a record is, by its fields.

    Raises:
        JpruneError: none of the kinds; says which fields it has and which were expected.
    """
    where, row = record
    if isinstance(row, dict):
        if "messages" in row:
            return "messages"
        if "instruction" in row:
            return "alpaca"
        if "text" in row:
            return "text"
    raise JpruneError(f"{where}: expected an object with {EXPECTED}; found {found(row)}.")


def alpaca(record: Record) -> tuple[str, str]:
    """The prompt and the answer of a record of `instruction`, `input` and `output`."""
    where, row = record
    values = {}
    for name, fields in (("instruction", ("instruction",)), ("input", INPUT), ("output", RESPONSE)):
        field = next((f for f in fields if isinstance(row, dict) and row.get(f) is not None), None)
        if field is None:
            if name == "input":
                values[name] = ""
                continue
            wanted = " or ".join(f"'{f}'" for f in fields)
            raise JpruneError(f"{where}: expected {INSTRUCTIONS}; found {found(row)}: the field {wanted} is missing.")
        if not isinstance(row[field], str):
            raise JpruneError(f"{where}: expected a string in field '{field}', found {type(row[field]).__name__}.")
        values[name] = row[field]
    prompt = ALPACA_WITH_INPUT if values["input"].strip() else ALPACA
    return prompt.format(instruction=values["instruction"], input=values["input"]), values["output"]


def encode(record: Record, form: Format) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids of a whole record, which of them are learnt, and how many answers had to be left out."""
    skipped = 0
    if kind(record) == "alpaca":
        prompt, answer = alpaca(record)
        ids = list(form.tokenizer.encode(prompt + answer, add_special_tokens=True))
        if form.eos_id is not None and ids[-1:] != [form.eos_id]:
            ids = [*ids, form.eos_id]
        spans = [(_common(ids, form.tokenizer.encode(prompt, add_special_tokens=True)), len(ids))]
    elif kind(record) == "messages":
        text, places, skipped = conversation(record, form.template)
        ids = list(form.tokenizer.encode(text, add_special_tokens=False))

        def token(place: int) -> int:
            return _common(ids, form.tokenizer.encode(text[:place], add_special_tokens=False))

        spans = []
        for start, end in places:
            if (begins := token(start)) >= form.length:  # cut off, with all that follow
                break
            spans.append((begins, token(end)))
    else:
        raise JpruneError(f"{record[0]}: expected {INSTRUCTIONS}, as in the first record; found {found(record[1])}.")
    outside = next((i for i in ids if form.vocab_size is not None and not 0 <= i < form.vocab_size), None)
    if outside is not None:
        raise JpruneError(
            f"{record[0]}: the tokenizer gives token id {outside}, outside the model's [0, {form.vocab_size}). "
            "Use the tokenizer that belongs to the model."
        )
    learnt = np.full(len(ids), form.train_on_prompt)
    for start, end in spans:
        learnt[start:end] = True
    return np.array(ids, np.int32), learnt, skipped


def conversation(record: Record, template: ChatTemplate | None) -> tuple[str, list[tuple[int, int]], int]:
    """The text of a record of `messages`, where in it the answers lie, and how many answers have no certain place.

    An answer reaches from the end of the generation prompt to the end of the token that ends it. It is found by
    rendering the conversation up to before and up to after it; a template that renders earlier turns otherwise once
    more is said (it may drop their reasoning) gives such an answer no certain place.
    """
    where, row = record
    messages = _messages(where, row["messages"])
    if template is None:
        raise JpruneError(
            f"{where}: 'messages' need a chat template, and the model has none. Put its chat_template.jinja beside the "
            "weights, or give records of 'instruction', 'input' and 'output'."
        )
    try:
        text = template.render(messages)
        places = []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers:
            before = template.render(messages[:i], add_generation_prompt=True)
            after = template.render(messages[: i + 1]).rstrip()  # without the line break between turns
            if text.startswith(before) and text.startswith(after) and len(before) < len(after):
                places.append((len(before), len(after)))
    except JpruneError as error:
        raise JpruneError(f"{where}: {error}.") from error
    return text, places, len(answers) - len(places)


def _messages(where: str, messages: Any) -> list[Mapping[str, Any]]:
    """Checked: objects with strings in `role` and `content`, at least one of them an answer."""
    if not isinstance(messages, list) or not messages:
        raise JpruneError(f"{where}: expected a list of objects in field 'messages', found {found(messages)}.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(f), str) for f in ("role", "content")):
            raise JpruneError(
                f"{where}, message {number}: expected strings in fields 'role' and 'content', found {found(message)}."
            )
    if not any(message["role"] == "assistant" for message in messages):
        roles = sorted({message["role"] for message in messages})
        raise JpruneError(f"{where}: expected a message of role 'assistant', the answer to learn; found roles {roles}.")
    return messages


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two lists have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def first(records: Iterator[Record], source: str) -> tuple[Kind, Iterator[Record]]:
    """The kind of the first record, and all records."""
    record = next(records, None)
    if record is None:
        raise JpruneError(f"{source} holds no records; expected objects with {EXPECTED}.")
    return kind(record), chain([record], records)
