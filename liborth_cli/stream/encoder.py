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
        # Together, as they stand in running text; apart where the border would fall into a token. Tokenizers that mark words
        # read a completion that stands alone unlike the same text after its prompt.
        whole, start = self._ids(record.prompt + record.text), self._ids(record.prompt)
        prompt = self._without_end(start)
        if _begins(whole, prompt) and len(whole) > len(prompt):
            ids = whole if len(prompt) == len(start) else self._without_end(whole)
            completion = ids[len(prompt) :]
        else:
            completion = self._ids(record.text, special=False)
            ids = np.concatenate([prompt, completion])
        keep = np.ones(len(ids), bool)
        keep[: len(ids) - len(completion)] = False
        return ids, keep

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
