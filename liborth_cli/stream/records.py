"""What a record means, before any tokenizer: a text, a prompt with its completion, a conversation, or token ids.

A record is taken whole or refused, by file, line and field. What a record says is never quoted: an error line ends up in
logs, and the record may be the secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from liborth_cli.checkpoint.documents import MAX_DEPTH
from liborth_cli.console import Json, JsonObject
from liborth_cli.errors import BadInput
from liborth_cli.stream.fields import AS_NAMED, EMPTY, FieldMap

IGNORED = -100
"""The label of a position that carries no loss, as in Transformers."""
FOREIGN_ROLES = {"gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant", "human": "user"}
"""Roles of other formats, and what a chat template calls them."""

KINDS = (
    ("messages",), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("text",), ("input_ids",),
)  # fmt: skip
_NEEDED = "text, prompt and completion, question and answer, instruction and output, messages, or input_ids"
_OTHERWISE = "--map prompt=NAME says which field is which"
_ALPACA = "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request.\n\n"
_WITH_INPUT = ", paired with an input that provides further context"
"""The prompt that Alpaca's training wrote (Taori et al. 2023)."""
_NOT_READ = {
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text is read"),
    **dict.fromkeys(("chosen", "rejected"), "preference pairs are not learned from; keep one answer, as completion"),
    "weight": "how often a row counts is called loss_weight here",
    "functions": "give them as tools",
}
"""Fields that change what a record means. One that is there and not empty is refused, never passed over."""
_NOT_IN_CHATS = {"system": "make it the first message", "chat_template_kwargs": "put what it says into the chat template"}
_NOT_IN_ALPACA = dict.fromkeys(("system", "history"), "make it a conversation, as messages")
_NAMEABLE = {
    *_NOT_READ, *_NOT_IN_CHATS, *_NOT_IN_ALPACA, *(name for kind in KINDS for name in kind), "conversations", "input",
    "response", "content", "role", "from", "value", "title", "id", "source", "labels", "tools", "loss_weight",
}  # fmt: skip
"""Field names that an error line may repeat; any other might be a line of data in a table without a header."""
_KEY = re.compile("[a-z][a-z_-]{0,23}")
"""Keys of JSON and parquet that it may repeat too: a word, without capitals and digits, as names and codes have."""
_MEDIA = {"image", "image_url", "audio", "input_audio", "video", "file", "tool_call", "tool_use", "tool_result", "thinking"}
_LOSS_FLAGS = ("weight", "train", "loss", "loss_weight")
_PACKED = ("position_ids", "cu_seqlens", "cu_seq_lens_q", "seq_lengths", "sequence_ids")
_LOSS_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
BESIDE_IDS = frozenset({"attention_mask", "labels", *_LOSS_MASKS, *_PACKED})
"""Fields that may stand beside `input_ids`."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        content: what is said; None where a tool is called and nothing said.
        fields: what else the chat template is told.
    """

    role: str
    content: str | None
    fields: JsonObject = field(default_factory=dict)

    def as_json(self) -> dict[str, Json]:
        """Return the fields that are read as this message."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True)
class Record:
    """One thing to learn from.

    Attributes:
        where: file and line, for messages.
        text: what is read; all of it carries loss unless there is a prompt.
        prompt: what stands before `text` and carries no loss.
        messages: a conversation in place of both, as a chat template takes it.
        tools: what the template is told of tools.
        silent: numbers of the assistant's messages that carry no loss.
        ids: token ids in place of all that, (n,).
        keep: which of them carry loss when predicted, (n,), bool.
        weight: how often it counts.
    """

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    silent: frozenset[int] = frozenset()
    ids: np.ndarray | None = None
    keep: np.ndarray | None = None
    weight: float = 1.0

    @property
    def is_plain(self) -> bool:
        """True for running text, which may be cut into windows."""
        return not self.prompt and not self.messages and self.ids is None

    def fields(self) -> JsonObject:
        """Return the fields that are read as this record."""
        found: dict[str, Json]
        if self.ids is not None:
            keep = np.ones(len(self.ids), bool) if self.keep is None else self.keep
            found = {"input_ids": self.ids.tolist(), "labels": np.where(keep, self.ids, IGNORED).tolist()}
        elif self.messages:
            said = [{**m.as_json(), **({"weight": 0} if i in self.silent else {})} for i, m in enumerate(self.messages)]
            found = {"messages": said, **({"tools": list(self.tools)} if self.tools else {})}
        else:
            found = {"prompt": self.prompt, "completion": self.text} if self.prompt else {"text": self.text}
        return {**found, **({"loss_weight": self.weight} if self.weight != 1.0 else {})}


def to_record(fields: Any, where: str, names: FieldMap = AS_NAMED, headed: bool = True) -> Record:
    """Recognise the kind of a record by its fields.

    Args:
        fields: an object, or a row of a table.
        where: file and line.
        names: what its fields are called.
        headed: whether its names cannot be data, as those of a table without a header are.

    Raises:
        BadInput: when it is none of the known kinds, or something in it is not understood.
    """
    if not isinstance(fields, Mapping):
        raise BadInput(f"{where}: {_what(fields)}, not an object with fields; a record needs {_NEEDED}")
    known = _tellable(fields, headed)
    if names:
        fields = names.apply(fields, where, known)
    kind = _kind_of(fields, [kind for kind in KINDS if names.fields & set(kind)] or KINDS, known, where)
    strange = {"messages": _NOT_IN_CHATS, "prompt": _NOT_IN_CHATS, "instruction": _NOT_IN_ALPACA}.get(kind[0], {})
    for name, why in {**_NOT_READ, **strange}.items():
        if fields.get(name) not in EMPTY:
            raise BadInput(f"{where}: {name} is not understood: {why}")
    weight = _number(fields["loss_weight"], f"{where}: loss_weight") if fields.get("loss_weight") is not None else 1.0
    if kind[0] == "input_ids":
        return _token_record(fields, where, weight)
    if kind[0] == "messages":
        return _conversation(_list(fields["messages"], where, "messages"), 0, fields.get("tools"), where, weight)
    if kind == ("prompt", "completion") and isinstance(fields["prompt"], (list, tuple)):
        prompt, answer = (_list(fields[name], where, name) for name in kind)
        return _conversation([*prompt, *answer], len(prompt), fields.get("tools"), where, weight)
    if fields.get("tools"):
        raise BadInput(f"{where}: tools are for conversations, and this is {' and '.join(kind)}")
    *before, text = (_text(fields[name], f"{where}: {name}") for name in kind)
    prompt = before[0] if before else ""
    if kind == ("question", "answer"):
        prompt = f"Question: {prompt}\nAnswer: "
    elif kind == ("instruction", "output"):
        prompt = _alpaca(prompt, _text(fields.get("input") or "", f"{where}: input"))
    return Record(where, text, prompt, weight=weight)


def _kind_of(fields: Mapping[str, Any], kinds: Sequence[tuple[str, ...]], known: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the first kind whose fields are all there, or say what is missing of one."""
    kind = next((kind for kind in kinds if all(fields.get(name) is not None for name in kind)), None)
    if kind is not None:
        return kind
    near = next((kind for kind in kinds if any(name in fields for name in kind)), ())
    for name in near:
        if name in fields and fields[name] is None:
            raise BadInput(f"{where}: {name} is empty (null)")
        if name not in fields:
            there = f" among {', '.join(known[:8])}; {_OTHERWISE}" if len(known) > 1 else ""
            raise BadInput(f"{where}: has {' and '.join(n for n in near if n in fields)}, and no {name}{there}")
    raise BadInput(f"{where}: {_describe(fields, known)}; a record needs {_NEEDED}; {_OTHERWISE}")


def _alpaca(instruction: str, given: str) -> str:
    """Write the prompt of an instruction, and of what is given with it."""
    more = f"### Input:\n{given}\n\n" if given else ""
    return f"{_ALPACA.format(more=_WITH_INPUT if given else '')}### Instruction:\n{instruction}\n\n{more}### Response:\n"


def _token_record(fields: Mapping[str, Any], where: str, weight: float) -> Record:
    """Make a record of token ids and what tokenisers write beside them.

    Args:
        fields: input_ids (n,); if there, attention_mask (n,), 0 for padding at either end; labels (n,), the ids themselves
            or −100 for no loss; or a mask of what carries loss. Without a mask, negative ids at the end are padding.
        where: file and row.
        weight: how often it counts.

    Raises:
        BadInput: when the parts do not fit together, or several sequences are packed into one row.
    """
    ids = _integers(fields["input_ids"], f"{where}: input_ids")
    real = np.flatnonzero(ids >= 0)
    span = slice(0, int(real[-1]) + 1 if len(real) else 0)

    def beside(name: str) -> np.ndarray | None:
        value = fields.get(name)
        found = None if value is None else _integers(value, f"{where}: {name}")
        if found is not None and len(found) != len(ids):
            raise BadInput(f"{where}: {len(ids):,} input_ids and {len(found):,} of {name}")
        return found

    mask = beside("attention_mask")
    if mask is not None:
        real = np.flatnonzero(mask)
        span = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
        if not bool((mask[span] == 1).all()):
            raise BadInput(f"{where}: attention_mask must be 1 for the tokens and 0 for padding before or after them")
    for name in _PACKED:
        if fields.get(name) is None:
            continue
        order = beside(name) if name == "position_ids" else None
        if order is None or not np.array_equal(order[span], np.arange(len(order[span]))):
            raise BadInput(f"{where}: {name}: several sequences in one row; give every sequence a row of its own")
    keep = np.ones(len(ids), bool)
    labels = beside("labels")
    if labels is not None:
        keep = labels != IGNORED
        if not np.array_equal(labels[keep], ids[keep]):
            raise BadInput(f"{where}: labels are neither the input_ids nor {IGNORED}; give them as they are, not shifted")
    for name in _LOSS_MASKS:
        loss = beside(name)
        keep = keep if loss is None else keep & (loss != 0)
    return Record(where, ids=ids[span], keep=keep[span], weight=weight)


# Conversations ------------------------------------------------------------------------------------------------------------


def _conversation(messages: list[Any], first: int, tools: Any, where: str, weight: float) -> Record:
    """Make a record of messages; what stands before message `first` carries no loss."""
    if not messages:
        raise BadInput(f"{where}: messages is empty")
    clean, silent = [], set(range(first))
    for number, message in enumerate(messages):
        clean.append(_message(message, f"{where}: message {number + 1}"))
        if not _learns(message, f"{where}: message {number + 1}"):
            silent.add(number)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadInput(f"{where}: tools is a text that is not JSON") from None
    known = _list(tools, where, "tools") if tools else []
    if not all(isinstance(tool, Mapping) for tool in known):
        raise BadInput(f"{where}: tools must be a list of objects")
    _check_unicode(known, f"{where}: tools")
    return Record(where, messages=tuple(clean), tools=tuple(known), silent=frozenset(silent), weight=weight)


def _message(message: Any, where: str) -> Message:
    """Check a message, and hand on all of it that is for the template."""
    if not isinstance(message, Mapping):
        raise BadInput(f"{where}: {_what(message)}, not an object with role and content")
    if not isinstance(message.get("role"), str):
        more = "; ShareGPT's from and value are called role and content here" if "from" in message else ""
        raise BadInput(f"{where}: has no role{more}")
    role = message["role"]
    if role in FOREIGN_ROLES:
        raise BadInput(f"{where}: role {role!r} is another format's; write {FOREIGN_ROLES[role]!r}")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, where) for part in content)
    elif content is None and not message.get("tool_calls"):
        raise BadInput(f"{where}: content is empty (null), and there are no tool_calls")
    elif content is not None:
        _text(content, f"{where}: content")
    rest = {k: v for k, v in message.items() if k not in ("role", "content", *_LOSS_FLAGS) and v is not None}
    _check_unicode(rest, where)
    return Message(role, content, rest)


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part, Mapping):
        raise BadInput(
            f"{where}: content has a part that is {f'of type {kind}' if kind in _MEDIA else 'no text'}; only text is read"
        )
    return _text(part.get("text", part.get("value")), f"{where}: a part of content")


def _learns(message: Mapping[str, Any], where: str) -> bool:
    """Tell whether a message may carry loss, by the flags of OpenAI, Mistral, axolotl and LLaMA-Factory."""
    for name in _LOSS_FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadInput(f"{where}: {name} must be 0 or 1 (or false or true); a message carries its loss or none")
        if not value:
            return False
        if message["role"] != "assistant":
            raise BadInput(f"{where}: {name} asks for loss on what is not the assistant's; only the assistant is learned from")
    return True


# Values -------------------------------------------------------------------------------------------------------------------


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where} is {_what(value)}, not a text")
    _check_unicode(value, where)
    return value


def _check_unicode(value: Any, where: str, depth: int = 0) -> None:
    """Refuse half a surrogate pair anywhere in a value: no tokenizer takes it."""
    if depth > MAX_DEPTH:
        raise BadInput(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise BadInput(f"{where} holds half of a surrogate pair: a text was cut inside a character (or \\ud… is a typo)")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_unicode(key, where, depth + 1)
            _check_unicode(each, where, depth + 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_unicode(each, where, depth + 1)


def _list(value: Any, where: str, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise BadInput(f"{where}: {name} is {_what(value)}, not a list")
    return list(value)


def _number(value: Any, where: str) -> float:
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not 0.0 <= found < float("inf"):
        raise BadInput(f"{where} must be a number, 0 or more")
    return found


def _integers(value: Any, where: str) -> np.ndarray:
    """Return int64 numbers, (n,); a copy that the caller may keep."""
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        found = np.empty(0, object)
    if found.shape == (0,) and found.dtype != object:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found.dtype == np.uint64 and int(found.max()) >> 63):
        raise BadInput(f"{where} must be a list of whole numbers")
    return found.astype(np.int64)


def _what(value: Any) -> str:
    kinds = {str: "a text", list: "a list", tuple: "a list", dict: "an object", bytes: "bytes", bool: "true or false"}
    return (
        "empty (null)"
        if value is None
        else kinds.get(type(value), "a number" if isinstance(value, (int, float)) else "no text")
    )


def _tellable(fields: Mapping[Any, Any], headed: bool) -> list[str]:
    """Return the names of fields that an error line may repeat."""
    return [name for name in map(str, fields) if name in _NAMEABLE or (headed and _KEY.fullmatch(name))]


def _describe(fields: Mapping[Any, Any], known: Sequence[str]) -> str:
    named = f": {', '.join(known[:8])}" if len(known) == len(fields) <= 8 else f", among them {', '.join(known[:8])}"
    return f"has {len(fields)} field{'s' if len(fields) != 1 else ''} of other names{named if known else ''}"
