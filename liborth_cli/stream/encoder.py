"""The model's own tokenizer, and which of the tokens carry loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from liborth_cli.errors import BadInput
from liborth_cli.stream.records import Record

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")


class TextEncoder:
    """Turns records into token ids and a mask of the tokens to be predicted."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer beside the weights.

        Raises:
            BadInput: when Transformers cannot load it without running its code.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.folder = folder
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizer files fail in many ways, from KeyError to Rust panics
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(f"{folder}: its tokenizer cannot be loaded: {reason}") from None

    @classmethod
    def beside(cls, folder: Path) -> TextEncoder | None:
        """Load the tokenizer, or return None where there is none."""
        return cls(folder) if any((folder / name).is_file() for name in FILES) else None

    def encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise a record.

        Returns:
            Ids (n,) and which of them carry loss when predicted (n,): all of a text, only the completion after a prompt,
            only what the assistant says in a conversation.

        Raises:
            BadInput: when a conversation meets a tokenizer without a chat template.
        """
        if record.messages:
            return self._conversation(record)
        if not record.prompt:
            ids = self._ids(record.text)
            return ids, np.ones(len(ids), bool)
        return self._completion(record)

    def _completion(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise prompt and completion as one text, as training does; a token across the border is the completion's."""
        if not self._tokenizer.is_fast:  # no offsets: apart, so that the border never falls into a token
            prompt, completion = self.prompt(record.prompt), self._ids(record.text, special=False)
            ids = np.concatenate([prompt, completion])
            return ids, np.arange(len(ids)) >= len(prompt)
        found = self._tokenizer(record.prompt + record.text, verbose=False, return_offsets_mapping=True)
        ids, spans = np.array(found["input_ids"], np.int64), found["offset_mapping"]
        if len(ids) > 1 and spans[-1][0] == spans[-1][1]:  # the end of a sequence, which the tokenizer added
            ids, spans = ids[:-1], spans[:-1]
        return ids, np.array([stop > len(record.prompt) for _, stop in spans])

    def prompt(self, text: str) -> np.ndarray:
        """Tokenise a prompt, (n,): with the tokens that begin a text, without those that end one."""
        return self._without_end(self._ids(text))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Turn ids back into text, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def _ids(self, text: str, special: bool = True) -> np.ndarray:
        return np.array(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], np.int64).reshape(-1)

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        """Drop the end-of-sequence token that some tokenizers add after a prompt."""
        end = self._tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and end is not None and ids[-1] == end else ids

    def _conversation(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        if not self._tokenizer.chat_template:
            raise BadInput(f"{record.where}: a conversation, and the tokenizer of {self.folder.name} has no chat template")
        ids = self._template(record, len(record.messages))
        keep = np.zeros(len(ids), bool)
        for number, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            before, after = self._template(record, number, prompt=True), self._template(record, number + 1)
            if not (_begins(ids, before) and _begins(ids, after)):
                raise BadInput(
                    f"{record.where}: the chat template rewrites earlier messages, so it is not clear what the assistant says; "
                    "give prompt and completion instead"
                )
            keep[len(before) : len(after)] = True
        return ids, keep

    def _template(self, record: Record, count: int, prompt: bool = False) -> np.ndarray:
        if not count:
            return np.empty(0, np.int64)
        try:
            text = self._tokenizer.apply_chat_template(
                list(record.messages[:count]), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates are programs: jinja2 errors, KeyError, TypeError
            raise BadInput(f"{record.where}: the chat template refuses it: {(str(error).splitlines() or ['?'])[0]}") from None
        return self._ids(text, special=False)


def _begins(whole: np.ndarray, part: np.ndarray) -> bool:
    return len(part) <= len(whole) and bool((whole[: len(part)] == part).all())
