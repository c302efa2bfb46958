"""The model's own tokenizer and chat template: records into token ids, and which of them carry loss.

What carries loss is found in the text, as spans of characters, and carried over to tokens by their offsets: a token across a
border belongs to what is learned. Templates are programs, so nothing is assumed of them that is not checked on their output.
"""

from __future__ import annotations

import datetime
import importlib.util
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from liborth_cli.checkpoint import documents
from liborth_cli.console import JsonObject
from liborth_cli.errors import BadInput, LiborthError, UsageError, first_line
from liborth_cli.stream.fields import EMPTY
from liborth_cli.stream.records import Message, Record

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
SENTENCEPIECE = ("tokenizer.model", "spiece.model")
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
TEMPLATE_SECONDS = 5.0
"""Longest a chat template may take for one conversation; real ones take a millisecond."""
MOST_CHARACTERS = 1 << 26
TODAY = datetime.datetime(2024, 7, 26)
"""What a chat template is told that today is: always the same day, for the same texts are the same tokens tomorrow. It is the
one that Llama's templates write when nobody tells them."""
_CODES = [*(f"%{code}" for code in "aAbBcdDeFfGhHIjklmMnprRStTuUVwWxXyYzZ"), *(f"%-{code}" for code in "deHIjklmMSUVWy")]
_DAY = "".join(f"|replace({code!r}, {TODAY.strftime(code)!r})" for code in _CODES)
_SAID = f"format|replace('%%', '\0'){_DAY}|replace('\0', '%')"
_NOW = f"{{% macro strftime_now(format) %}}{{{{ {_SAID} }}}}{{% endmacro %}}\n"
"""What is put before a template that asks for the date: its own `strftime_now`, which Transformers takes from the clock.
The line ends behind it, which is taken away again: what follows begins a line, as it did."""
_MARK = "\ue0d1liborth\ue0d2"
"""Stands for a message's content while its place is looked for."""


class TextEncoder:
    """Turns records into token ids and a mask of the tokens to be predicted."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer beside the weights.

        Raises:
            BadInput: when Transformers cannot load it without running its code.
            UsageError: when the packages that read it are not installed.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.folder = folder
        for file in folder.glob("*.json"):  # tokenizer.json and what else the library reads as a whole
            documents.check_size(file)
        _check_sentencepiece(folder)
        with _blamed(f"{folder}: its tokenizer cannot be loaded"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @classmethod
    def beside(cls, *folders: Path) -> TextEncoder | None:
        """Load the tokenizer of the last folder that has one, or return None where none has."""
        with_one = [folder for folder in folders if any((folder / name).is_file() for name in FILES)]
        return cls(with_one[-1]) if with_one else None

    @property
    def end(self) -> int | None:
        """The token that ends a text; None where the tokenizer has none."""
        return self._tokenizer.eos_token_id

    def encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a record.

        Returns:
            Ids (n,) and which of them carry loss when predicted (n,): all of a text, only the completion after a prompt,
            only what the assistant says in a conversation.

        Raises:
            BadInput: when a conversation meets a tokenizer without a chat template, or one that refuses it.
        """
        if record.ids is not None and record.keep is not None:
            return record.ids, record.keep
        if record.messages:
            text = self._rendered(record)
            spans = [self._span(record, text, n) for n, m in enumerate(record.messages) if _learned(record, n, m)]
            return self._tokenise(text, spans, special=False)
        if not record.prompt:
            ids = self._ids(record.text)
            return ids, np.ones(len(ids), bool)
        text, border = record.prompt + record.text, len(record.prompt)
        if not self._tokenizer.is_fast:  # no offsets: apart, so that the border never falls into a token
            prompt, completion = self.prompt(record.prompt), self._ids(record.text, special=False)
            ids = np.concatenate([prompt, completion])
            return ids, np.arange(len(ids)) >= len(prompt)
        return self._tokenise(text, [(border, len(text))], special=True)

    def passed_over(self, record: Record) -> list[str]:
        """Name what a conversation has and its chat template does not show: "tools", fields and parts of messages.

        Templates of models that think show the thoughts of the last turn only. Spaces, case and punctuation may change, and
        what tools return may be written otherwise.

        Raises:
            BadInput: as `encode`.
        """
        if not record.messages:
            return []
        text = self._rendered(record)
        found = ["tools"] if record.tools and self._try(record.messages, ()) == text else []
        shown = _letters(text)
        given = [
            (n, key, value) for n, m in enumerate(record.messages) for key, value in m.fields.items() if value not in EMPTY
        ]
        for field in sorted({key for _, key, _ in given}):
            mine = [(n, value) for n, key, value in given if key == field]
            # A template may show it of one message and not of another; where its words stand in the text it was shown.
            lost = (n for n, value in mine if isinstance(value, str) and _letters(value) not in shown)
            if self._without(record, field) == text or any(self._without(record, field, n) == text for n in lost):
                found.append(field)
        if any(_letters(m.content or "") not in shown for m in record.messages if m.role not in ("tool", "function")):
            found.append("parts of messages")
        return found

    def _without(self, record: Record, field: str, number: int | None = None) -> str | None:
        """Render a conversation without a field of one message, or of all."""
        some = [
            replace(m, fields={k: v for k, v in m.fields.items() if k != field}) if number in (n, None) else m
            for n, m in enumerate(record.messages)
        ]
        return self._try(some, record.tools)

    def prompt(self, text: str) -> np.ndarray:
        """Tokenise a prompt, (n,): with the tokens that begin a text, without those that end one."""
        ids = self._ids(text)
        return ids[:-1] if len(ids) > 1 and self.end is not None and ids[-1] == self.end else ids

    def plain(self, text: str) -> np.ndarray:
        """Tokenise what goes on from other tokens, (n,): without those that begin or end a text."""
        return self._ids(text, special=False)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Turn ids back into text, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    # Tokens ---------------------------------------------------------------------------------------------------------------

    def _ids(self, text: str, special: bool = True) -> np.ndarray:
        with _blamed(f"{self.folder}: its tokenizer fails on a text", tell=False):
            found = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            return np.array(found, np.int64).reshape(-1)

    def _tokenise(self, text: str, spans: Sequence[tuple[int, int]], special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a text, and mark the tokens that reach into a span."""
        if not self._tokenizer.is_fast:
            return self._piecewise(text, spans)
        with _blamed(f"{self.folder}: its tokenizer fails on a text", tell=False):
            found = self._tokenizer(
                text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
            )
            ids = np.array(found["input_ids"], np.int64)
            starts, stops = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
        # The end of a sequence that the tokenizer added; white space whose offsets are trimmed is as short, and no such token.
        if len(ids) > 1 and special and found["special_tokens_mask"][-1] and starts[-1] == stops[-1]:
            ids, starts, stops = ids[:-1], starts[:-1], stops[:-1]
        # Where offsets are trimmed, a token begins where the one before it ended.
        starts = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])) if len(ids) else starts
        keep = np.zeros(len(ids), bool)
        for start, stop in spans:
            keep |= (stops > start) & (starts < stop)
        return ids, keep

    def _piecewise(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        parts, place = [], 0
        for start, stop in spans:
            parts += [(text[place:start], False), (text[start:stop], True)]
            place = stop
        tokens = [(self._ids(part, special=False), learned) for part, learned in [*parts, (text[place:], False)] if part]
        return np.concatenate([ids for ids, _ in tokens]), np.concatenate(
            [np.full(len(ids), learned) for ids, learned in tokens]
        )

    # Conversations --------------------------------------------------------------------------------------------------------

    def _rendered(self, record: Record) -> str:
        """Render a whole conversation.

        Raises:
            BadInput: when there is no template, a role that it does not know, or the template fails.
        """
        where, source = record.where, self._template(record.tools)
        for number, message in enumerate(record.messages, 1):
            role = message.role
            if role not in ROLES and not re.search(f"['\"]{re.escape(role)}['\"]", source):
                name = repr(role) if re.fullmatch("[a-z_]{1,20}", role) else "one that is none"
                raise BadInput(f"{where}: message {number}: role {name} is not known to the chat template")
        try:
            return self._render(record.messages, record.tools)
        except TimeoutError:
            raise BadInput(f"{where}: the chat template does not end within {TEMPLATE_SECONDS:g} seconds") from None
        except LiborthError:
            raise
        except Exception as error:  # templates are programs: jinja2 errors, KeyError, TypeError
            line = (str(error).splitlines() or [""])[0]
            # A template may raise what a message says; only its own words are repeated.
            reason = line if line and line in source else type(error).__name__
            raise BadInput(f"{where}: the chat template refuses it: {reason[:120]}") from None

    def _span(self, record: Record, text: str, number: int) -> tuple[int, int]:
        """Find what one message of the assistant is in the rendered text: what it says, and what ends its turn."""
        messages, tools = record.messages, record.tools
        after = self._try(messages[: number + 1], tools)
        before = self._try(messages[:number], tools, prompt=True) if number else self._opening(after)
        if before and after and len(before) < len(after) and after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        # The template writes earlier turns otherwise than last ones, or takes no conversation that stops here.
        marked = [*messages[:number], replace(messages[number], content=_MARK), *messages[number + 1 :]]
        around = (self._try(marked, tools) or "").split(_MARK)
        if len(around) == 2 and text.startswith(around[0]) and text.endswith(around[1]):
            start, stop = len(around[0]), len(text) - len(around[1])
            if start <= stop:
                end = (self._try(marked[: number + 1], tools) or "").rpartition(_MARK)[2]
                return start, stop + _shared(end, around[1])
        raise BadInput(
            f"{record.where}: the chat template changes what message {number + 1} says, so it is not clear which tokens are "
            "the assistant's; give prompt and completion instead"
        )

    def _opening(self, after: str | None) -> str | None:
        """Return what stands before a first message of the assistant: perhaps a system turn, and its header."""
        user = (Message("user", "."),)
        without, asked = self._try(user, ()), self._try(user, (), prompt=True)
        if after is None or without is None or asked is None or not asked.startswith(without):
            return None
        header = asked[len(without) :]
        return after[: after.find(header) + len(header)] if header and header in after else None

    def _try(self, messages: Sequence[Message], tools: Sequence[JsonObject], prompt: bool = False) -> str | None:
        try:
            return self._render(messages, tools, prompt)
        except LiborthError:
            raise
        except Exception:
            return None

    def _template(self, tools: Sequence[JsonObject]) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=list(tools) or None))
        except Exception:
            raise BadInput(f"{self.folder}: a conversation, and the tokenizer beside this model has no chat template") from None

    def _render(self, messages: Sequence[Message], tools: Sequence[JsonObject], prompt: bool = False) -> str:
        # Jinja prints None as "None"; templates ask whether content is empty, and an empty text is.
        said = [{**message.as_json(), "content": message.content or ""} for message in messages]
        template = self._template(tools)
        template = _NOW + template if "strftime_now" in template else template
        with _time_limit(TEMPLATE_SECONDS):
            text = self._tokenizer.apply_chat_template(
                said, tools=list(tools) or None, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        if len(text) > MOST_CHARACTERS:
            raise BadInput(f"{self.folder}: its chat template writes {len(text):,} characters for one conversation")
        return text


def _learned(record: Record, number: int, message: Message) -> bool:
    return message.role == "assistant" and number not in record.silent


def _letters(text: str) -> str:
    """Return the letters and digits of a text, whatever their case."""
    return re.sub(r"\W+", "", text).casefold()


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _check_sentencepiece(folder: Path) -> None:
    """Say what is missing to read a SentencePiece model: Transformers then asks for tiktoken, which cannot."""
    if (folder / "tokenizer.json").is_file() or not any((folder / name).is_file() for name in SENTENCEPIECE):
        return
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [name for name, module in packages.items() if not _is_installed(module)]
    if missing:
        raise UsageError(
            f"{folder}: its tokenizer is a SentencePiece model, and reading that needs {' and '.join(missing)}: "
            "pip install 'liborth[sentencepiece]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


@contextmanager
def _blamed(message: str, tell: bool = True) -> Iterator[None]:
    """Turn whatever a library raises into one line: tokenizer files fail in many ways, from KeyError to Rust panics.

    Args:
        message: what failed.
        tell: also the library's own words; not where they may hold the text.
    """
    try:
        yield
    except (LiborthError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BadInput(f"{message}: {first_line(error, 160) if tell else type(error).__name__}") from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a Python program that runs longer; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError

    earlier = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
