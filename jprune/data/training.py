"""Training data of any kind for a model: one call chooses between text, token ids and instruction data."""

import dataclasses
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np

from jprune import paths
from jprune.data import chat, instructions, records, sources, windows
from jprune.data.batches import Batches, Rows, token_batches
from jprune.data.windows import Spec, Tokenizer
from jprune.models.config import DecoderConfig

logger = logging.getLogger(__name__)

INSTRUCTION_LENGTH = 256
"""LLM-Pruner's cutoff for its recovery data."""


@runtime_checkable
class Model(Protocol):
    """What is needed of a model; `jprune.checkpoints.Checkpoint` has it."""

    hf_config: dict

    @property
    def config(self) -> DecoderConfig:
        """What the decoder needs to know."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the model comes without one."""
        ...

    @property
    def side_files(self) -> dict[str, bytes]:
        """The files beside the weights, by name: the chat template and the names of the special tokens are there."""
        ...


def training_batches(
    spec: Spec,
    model: Model,
    *,
    batch_size: int,
    length: int | None = None,
    windows_at_most: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    train_on_prompt: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Shuffled, resumable batches to train `model` on.

    Args:
        spec: names a source (`jprune.data.sources`), or token ids [n, length]. Records of a `.jsonl`, `.jsonl.gz`,
            `.json`, `.parquet` or `hf:` source are text or instructions, as the fields of the first one say
            (`jprune.data.instructions`). Of a source with a split, the calibration (training) part.
        model: a checkpoint: its tokenizer, its special tokens and its chat template.
        batch_size: windows a batch, over all processes.
        length: tokens a window. By default, of text 2048, of instruction data 256, both cut to the model's context;
            of token ids, what the rows have.
        windows_at_most: the number of windows (of instruction data: records) to take, from the first on.
        epochs: how often to go through the data; None for ever.
        seed: of the order, from 0 to 2**32 - 1.
        train_on_prompt: of instruction data, take the loss on the prompts too. Text has no prompts.
        process_index: which of the equal parts of each batch this process gets, from 0.
        process_count: how many parts there are.

    Raises:
        JpruneError: a source that cannot be used, less of it than one batch, a record without an answer, ids outside
            the model's vocabulary, or a length beyond its context.
    """
    order = {
        "batch_size": batch_size,
        "epochs": epochs,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    found = records_of(spec, "calibration")
    if found is not None:
        examples, told = _conversations(found, str(spec), model, length, windows_at_most, train_on_prompt)
        return Batches(examples=examples, source=str(spec), notices=told, **order)  # type: ignore[arg-type]
    return token_batches(
        spec,
        model.tokenizer,
        length=length,
        windows_at_most=windows_at_most,
        vocab_size=model.config.vocab,
        context=model.config.context,
        eos_id=special_id(model, "eos"),
        **order,  # type: ignore[arg-type]
    )


def evaluation_batches(
    spec: Spec,
    model: Model,
    *,
    batch_size: int,
    length: int | None = None,
    windows_at_most: int | None = None,
    train_on_prompt: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches to measure a loss on: all windows once, in their order, of the evaluation part of a source.

    The last batch is filled up with rows of weight 0. Text is cut as for perplexity (`jprune.data.evaluation`);
    arguments and errors are those of `training_batches`.
    """
    found = records_of(spec, "evaluation")
    examples: Rows | instructions.Conversations
    if found is not None:
        examples, notices = _conversations(found, str(spec), model, length, windows_at_most, train_on_prompt)
        source = str(spec)
    else:
        text = windows.evaluation(
            spec,
            model.tokenizer,
            length=length,
            windows=windows_at_most,
            vocab_size=model.config.vocab,
            context=model.config.context,
        )
        examples, source, notices = Rows(text.tokens, text.source, None), text.source, text.notices
    return Batches(
        examples=examples,
        source=source,
        batch_size=batch_size,
        epochs=1,
        shuffle=False,
        process_index=process_index,
        process_count=process_count,
        notices=notices,
    )


def special_id(model: Model, role: str) -> int | None:
    """The id of the `bos`, `eos` or `pad` token: as the tokenizer's files say, else as config.json does; or None."""
    token = chat.special_tokens(model.side_files).get(f"{role}_token")
    if token is not None and model.tokenizer is not None:
        ids = model.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) == 1:
            return ids[0]
    named = model.hf_config.get(f"{role}_token_id")
    return (named[0] if named else None) if isinstance(named, list) else named


Found = tuple[Iterator[records.Record], records.Reader | None]
"""Records, and who reads them if it is a file."""


def records_of(spec: Spec, split: sources.Split) -> Found | None:
    """The records of instruction data; None for everything else, which is read as text or token ids."""
    if isinstance(spec, np.ndarray | windows.Windows):
        return None
    name = str(spec)
    reader = None
    if name.startswith("hf:"):
        if sources.is_text_dataset(name):
            return None
        _, dataset = sources.hugging_face_dataset(name, split)
        rows: Iterator[records.Record] = ((f"{name}, record {i}", row) for i, row in enumerate(dataset, start=1))
    elif name.endswith(records.ENDINGS) and (path := paths.given(name)).is_file():
        rows = reader = records.Reader(path)
    else:
        return None
    kind, rows = instructions.first(rows, name)
    return None if kind == "text" else (rows, reader)


def form_of(model: Model, source: str, length: int) -> instructions.Format:
    """How the instructions of a source become tokens of a model."""
    pad_id = special_id(model, "pad")
    return instructions.Format(
        tokenizer=windows.require_tokenizer(model.tokenizer, source),
        length=length,
        template=chat.template(model.side_files),
        eos_id=special_id(model, "eos"),
        pad_id=pad_id if pad_id is not None and 0 <= pad_id < model.config.vocab else 0,
        vocab_size=model.config.vocab,
    )


def _conversations(
    found: Found,
    source: str,
    model: Model,
    length: int | None,
    at_most: int | None,
    train_on_prompt: bool,
) -> tuple[instructions.Conversations, tuple[str, ...]]:
    """The windows, and what the user should know about how they were made."""
    rows, reader = found
    context = model.config.context
    length = min(INSTRUCTION_LENGTH, context) if length is None else windows.checked_length(length, context)
    if at_most is not None:
        windows.check_count("number of windows", at_most)
    form = dataclasses.replace(form_of(model, source, length), train_on_prompt=train_on_prompt)
    examples = instructions.Conversations(islice(rows, at_most), source, form)
    notices = (reader.notices if reader else ()) + examples.notices
    for notice in notices:
        logger.info(notice)
    return examples, notices
