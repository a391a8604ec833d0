"""What users write, as text: files as editors save them, JSON as programs write it, words as shells pass them on.

A byte order mark says how a file is encoded (Windows' editors and shells write one) and is no part of its text; without
one, text is UTF-8. Lines end as they do on Windows, Unix or old Macs. What is no text is refused, with its line.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from jprune.errors import JpruneError, UsageError

# UTF-32's mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}
_LINE_END = re.compile("\r\n?")


def decoded(content: bytes, where: str) -> str:
    """The text of a whole file, without its byte order mark, lines ended by a line feed.

    Raises:
      JpruneError: it is no text; names `where` and the line.
    """
    mark, encoding = _marked(content)
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise _no_text(where, content[: len(mark) + error.start].count(b"\n") + 1, error, encoding) from error
    text = _LINE_END.sub("\n", text)
    if (place := text.find("\0")) >= 0:
        raise JpruneError(
            f"{where} is not text: there is a NUL character in line {text.count(chr(10), 0, place) + 1}. If it is "
            "UTF-16 or the like, save it as UTF-8"
        )
    return text


def lines(file: BinaryIO, where: str) -> Iterator[str]:
    """The lines of a file that is open for reading bytes, one at a time, without what ends them.

    Raises:
      JpruneError: one that is no text, when it is reached; names `where` and the line.
    """
    mark, encoding = _marked(file.peek(4)[:4])  # type: ignore[attr-defined]  # buffered files and gzip's have it
    if encoding != "UTF-8":
        yield from decoded(file.read(), where).split("\n")
        return
    file.read(len(mark))
    number = 0
    for line in file:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _no_text(where, number + 1, error, encoding) from error
        for part in text.split("\r"):
            number += 1
            yield part


def json_of(content: bytes, where: str) -> Any:
    """What a JSON file says, see `parsed`.

    Raises:
      JpruneError: it is no text; names the line.
      json.JSONDecodeError: it is no JSON.
    """
    return parsed(decoded(content, where))[0]


def beside(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in one of the files beside a model; an empty one if it is not there, or holds something else.

    Raises:
      JpruneError: it is no JSON.
    """
    try:
        content = json_of(files.get(name, b"{}"), name)
    except json.JSONDecodeError as error:
        raise JpruneError(f"{name} beside the model is not JSON ({error}); download it again") from error
    return content if isinstance(content, dict) else {}


def parsed(text: str) -> tuple[Any, bool]:
    """What some JSON says, and whether halves of characters had to be replaced.

    JSON can write lone surrogates (such as U+D83D), which no encoding has; they become U+FFFD, as in browsers.

    Raises:
      json.JSONDecodeError: it is no JSON, or none that can be held (nested too deeply, numbers of thousands of digits).
    """
    try:
        value = json.loads(text)
        mended = _whole(value) if "\\u" in text or not text.isascii() else value
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(str(error).partition(";")[0], text, 0) from error
    return mended, mended is not value


def _whole(value: Any) -> Any:
    """The value without lone surrogates; itself if it has none."""
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value
    if isinstance(value, list):
        items = [_whole(item) for item in value]
        return items if any(a is not b for a, b in zip(items, value)) else value
    if isinstance(value, dict):
        pairs = {_whole(key): _whole(item) for key, item in value.items()}
        same = len(pairs) == len(value) and all(a is b and pairs[a] is value[b] for a, b in zip(pairs, value))
        return value if same else pairs
    return value


def argument(word: str, flag: str) -> str:
    """A word of the command line as its user meant it: UTF-8, whatever the locale says.

    Raises:
      UsageError: it is not UTF-8.
    """
    try:
        word.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(word).decode()
        except UnicodeError as error:
            raise UsageError(f"{flag} is not UTF-8 text ({error}); give it in UTF-8") from None
    return word


def _marked(start: bytes) -> tuple[bytes, str]:
    return next(((mark, name) for mark, name in _MARKS.items() if start.startswith(mark)), (b"", "UTF-8"))


def _no_text(where: str, line: int, error: UnicodeDecodeError, encoding: str) -> JpruneError:
    return JpruneError(f"{where}, line {line}: not {encoding} text ({error.reason}). Save the file as UTF-8")
