"""A LoRA adapter on its base model as the checkpoint it stands for: W + s·BA, formed block by block while it is read.

What PEFT's `merge_and_unload` would write, rounded once: s = alpha/r, or alpha/√r when rank-stabilised (Kalajdzievski 2023,
arXiv 2312.03732); with magnitudes (DoRA, Liu et al. 2024, arXiv 2402.09353) every output's row is scaled to its m. Whole
tensors that were trained beside it (`modules_to_save`, biases) take the place of the base's. Whatever else an adapter can be
is refused by name: an update that is half understood would be half removed.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from liborth_cli.checkpoint import documents, hub
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, torch_dtype
from liborth_cli.checkpoint.pair import EMBEDDING, HEAD, meet
from liborth_cli.checkpoint.quantised import quantised
from liborth_cli.checkpoint.reader import PIECE, Checkpoint, Shard, TensorInfo
from liborth_cli.errors import BadInput, PairMismatch, UsageError, shown

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?")
PLAIN_PATTERN = re.compile(r"(?:[\w.|^$-]|\\[d.]\+?)*")
"""Regular expressions that cannot take for ever, nor be malformed."""
CACHED_BLOCKS = 8
LIES_FLIPPED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
"""Values of `model_type` with linear layers that are stored (d_in, d_out): the modules named in `CONV1D`."""
CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
"""Last parts of the names of those modules."""
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "mipa", "lora_ga")
"""Initialisations that take the adapter's start out of the base: without the residual base the adapter means nothing."""


class Settings(BaseModel):
    """What adapter_config.json says, as far as it changes the arithmetic."""

    model_config = ConfigDict(extra="ignore")
    peft_type: str
    r: int = Field(default=8, ge=1, le=1 << 16)
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    lora_bias: bool = False
    use_qalora: bool = False
    use_bdlora: object = None
    alora_invocation_tokens: object = None
    layer_replication: object = None
    target_parameters: list[str] | None = None
    trainable_token_indices: object = None
    task_type: str | None = None

    def refusal(self) -> str | None:
        """Name what cannot be merged here, or return None."""
        if self.peft_type != "LORA":
            return f"an adapter of type {shown(self.peft_type)}"
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower().startswith(CHANGED_BASES):
            return f"initialised by {shown(self.init_lora_weights)}, which changes the base model"
        features = {
            "lora_bias": self.lora_bias,
            "use_qalora": self.use_qalora,
            "use_bdlora": self.use_bdlora,
            "alora_invocation_tokens": self.alora_invocation_tokens,
            "layer_replication": self.layer_replication,
            "target_parameters": self.target_parameters,
            "trainable_token_indices": self.trainable_token_indices,
        }
        strange = next((key for key in self.alpha_pattern or {} if not PLAIN_PATTERN.fullmatch(key)), None)
        if strange is not None:
            return f"an adapter with the alpha_pattern {shown(strange)}"
        return next((f"an adapter with {name}" for name, value in features.items() if value), None)

    def scale(self, module: str, rank: int) -> float:
        """Return s of one module, whose own alpha may stand in a pattern."""
        patterns = self.alpha_pattern or {}
        key = next((k for k in patterns if re.fullmatch(rf"(.*\.)?({k})", module)), None)
        alpha = self.lora_alpha if key is None else patterns[key]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Update:
    """The update of one tensor.

    Attributes:
        down: name of A, (r, d_in), in the adapter.
        up: name of B, (d_out, r).
        magnitude: name of m, (d_out,), or None without DoRA.
        scale: s.
        flipped: whether the tensor lies as (d_in, d_out).
    """

    down: str
    up: str
    magnitude: str | None
    scale: float
    flipped: bool


class Adapted(Checkpoint):
    """A base checkpoint with an adapter merged in while it is read; every read forms whole blocks, so that equal reads agree.

    Attributes:
        base: W.
        settings: of the adapter.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        """Hold the adapter against its base; the base stays open elsewhere.

        Raises:
            BadInput: when the adapter is damaged, or of a kind that is not merged here; names it.
            PairMismatch: when it belongs to another base.
        """
        self.base, self._folder = base, folder
        self.settings = documents.fit(Settings, documents.load_object(folder / CONFIG), folder / CONFIG)
        refusal = self.settings.refusal()
        if refusal:
            raise BadInput(f"{folder}: {refusal} is not merged here; merge it first (peft: merge_and_unload)")
        if quantised(base):
            raise PairMismatch(f"{base.path}: quantised; the adapter {folder.name} is merged into plain weights: give those")
        self._shard = Shard(folder / WEIGHTS)
        self._adapter = Checkpoint(folder, {WEIGHTS: self._shard}, None)
        super().__init__(base.path, base.shards, base.index)
        self.shards = {**base.shards, WEIGHTS: self._shard}
        self._updates: dict[str, Update] = {}
        self._whole: dict[str, str] = {}
        self._origin: dict[str, str] = {}
        self._arrange()
        self._block = functools.lru_cache(CACHED_BLOCKS)(self._form_block)
        self._factors = functools.lru_cache(2)(self._load_factors)
        self._norms = functools.lru_cache(2)(self._load_norms)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The base's directory and the adapter's, whose tokenizer counts."""
        return (*self.base.folders, self._folder)

    @property
    def rewritten(self) -> dict[str, bytes]:
        """config.json, where a base that ties its head has one of its own now: loaders that go by it would tie it again."""
        if not self.base.config or not any(HEAD.search(name) for name in self.tensors.keys() - self.base.tensors.keys()):
            return {}
        config = {**self.base.config, "tie_word_embeddings": False}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {**text, "tie_word_embeddings": False}
        return {"config.json": json.dumps(config, indent=2).encode() + b"\n"}

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the merged model in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    def frame(self, file: str) -> bytes | None:
        """Return None: no file holds the merged tensors, so there are no first bytes to keep."""
        return None

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read bytes [start, stop) of one merged tensor; see `Checkpoint.read`."""
        info = self.tensors[name]
        if name not in self._updates and name not in self._whole:
            return self.base.read(self._origin.get(name, name), start, stop, out)
        stop = info.nbytes if stop is None else stop
        result = np.empty(stop - start, np.uint8) if out is None else out[: stop - start]
        rows = self._rows_of_block(info)
        size = info.nbytes // max(info.shape[0] if info.shape else 1, 1) * rows
        for number in range(start // size if size else 0, -(-stop // size) if size else 0):
            first = number * size
            block = self._block(name, number)
            here, there = max(start, first), min(stop, first + len(block))
            result[here - start : there - start] = block[here - first : there - first]
        return result

    def check_unchanged(self) -> None:
        """Raise BadInput when a file of either changed since it was opened."""
        self.base.check_unchanged()
        self._shard.check_unchanged()

    def close(self) -> None:
        """Close the adapter; the base's files belong to whom it was opened by."""
        self._shard.close()

    def _arrange(self) -> None:
        """Find the tensor of the base that every tensor of the adapter changes, and hold the shapes together."""
        parts: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in self._adapter.tensors:
            name = key.removeprefix("base_model.model.")
            found = PARTS.fullmatch(name)
            if found:
                parts.setdefault(found[1].removesuffix(".base_layer"), {})[found[2]] = key
            elif "lora_" in name or "trainable_tokens" in name:
                raise BadInput(f"{self._shard.path}: {shown(key)} is not understood; merge it first (peft: merge_and_unload)")
            else:
                whole[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)] = key
        self._untie([*(f"{module}.weight" for module in parts), *whole])
        met = meet(self.tensors, [*(f"{module}.weight" for module in parts), *whole])
        for module, keys in parts.items():
            name = met.get(f"{module}.weight")
            if name is None:
                raise PairMismatch(f"{self._shard.path}: changes {shown(module)}, and {self.base.path} has no such layer")
            self._updates[name] = self._update(module, keys, self.tensors[name])
        for name, key in whole.items():
            self._replace(met.get(name, name), key)

    def _untie(self, changed: list[str]) -> None:
        """Give a model that ties its head a head of its own where the adapter changes one of the two and not the other.

        PEFT trains and runs such an adapter so: the layer that it wraps has weights of its own, the other the base's.
        """
        if any(HEAD.search(name) for name in self.base.tensors) or self.base.config.get("tie_word_embeddings") is False:
            return
        tables = [name for name in self.base.tensors if EMBEDDING.search(name)]
        if len(tables) != 1 or self.settings.task_type not in (None, "CAUSAL_LM"):
            return
        head = next((name for name in changed if HEAD.search(name)), None)
        if head is None and any(old == tables[0] for old in meet(tables, changed).values()):
            inner = "language_model." if tables[0].startswith("language_model.model.") else ""
            head = f"{inner}{'embed_out' if 'embed_in' in tables[0] else 'lm_head'}.weight"
        if head is not None:
            self._add(head, self.base.tensors[tables[0]])
            self._origin[head] = tables[0]

    def _add(self, name: str, like: TensorInfo) -> None:
        """Add a tensor behind the last one."""
        last = list(self.tensors.values())[-1]
        self.tensors[name] = replace(like, name=name, shard=last.shard, offset=last.offset + last.nbytes)

    def _update(self, module: str, keys: dict[str, str], info: TensorInfo) -> Update:
        down, up = keys.get("lora_A"), keys.get("lora_B")
        table = down is None and up is None
        if table:  # an embedding's factors lie the other way round: its update is (BA)ᵀ
            down, up = keys.get("lora_embedding_A"), keys.get("lora_embedding_B")
        magnitude = keys.get("lora_magnitude_vector")
        if down is None or up is None or bool(magnitude) != self.settings.use_dora or (table and magnitude):
            raise BadInput(f"{self._shard.path}: {shown(module)}: its parts are not those of a LoRA layer that is merged here")
        a, b = self._adapter.tensors[down], self._adapter.tensors[up]
        plain = all(len(t.shape) == 2 and DTYPES[t.dtype].editable for t in (a, b, info)) and a.shape[0] == b.shape[1]
        shape = tuple([b.shape[0], a.shape[-1]] if plain else [])
        square_flipped = info.shape == shape and shape[0] == shape[1] and self._lies_flipped(module)
        flipped = table or square_flipped or (info.shape != shape and info.shape == shape[::-1])
        if not plain or (info.shape[::-1] if flipped else info.shape) != shape:
            raise PairMismatch(
                f"{self._shard.path}: {shown(module)} is {list(b.shape)} · {list(a.shape)}, "
                f"and {shown(info.name)} of the base {list(info.shape)}"
            )
        if magnitude and math.prod(self._adapter.tensors[magnitude].shape) != shape[0]:
            raise PairMismatch(f"{self._shard.path}: {shown(module)} has magnitudes that do not fit its outputs")
        return Update(down, up, magnitude, self.settings.scale(module, a.shape[0]), flipped)

    def _lies_flipped(self, module: str) -> bool:
        """Tell how a square weight lies: PEFT asks the layer's class, and corrects what the adapter says of it."""
        family = self.base.config.get("model_type")
        if not isinstance(family, str):
            return self.settings.fan_in_fan_out
        return family in LIES_FLIPPED and module.rpartition(".")[2] in CONV1D

    def _replace(self, name: str, key: str) -> None:
        """Let a tensor of the adapter stand for one of the base; a head of its own is added behind the last tensor."""
        stored, old = self._adapter.tensors[key], self.tensors.get(name)
        if old is None and not name.endswith("lm_head.weight"):
            raise PairMismatch(f"{self._shard.path}: holds {shown(name)}, and {self.base.path} has no such tensor")
        like = old or next((t for t in self.base.tensors.values() if t.shape == stored.shape), None)
        if like is None or like.shape != stored.shape or not (DTYPES[like.dtype].editable and DTYPES[stored.dtype].editable):
            raise PairMismatch(
                f"{self._shard.path}: {shown(name)} is {list(stored.shape)}, which the base's config does not know of; "
                "merge it first (peft: merge_and_unload)"
            )
        self._whole[name] = key
        if old is None:
            self._add(name, like)

    def _rows_of_block(self, info: TensorInfo) -> int:
        return max(PIECE // max(math.prod(info.shape[1:]), 1), 1)

    def _form_block(self, name: str, number: int) -> np.ndarray:
        """Form the bytes of one block of rows, always the same rows, so that every reader sees the same bits."""
        from liborth_kernels.rounding import round_to

        info, step = self.tensors[name], self._rows_of_block(self.tensors[name])
        first, last = number * step, min((number + 1) * step, info.shape[0] if info.shape else 1)
        dtype, update = torch_dtype(info.dtype), self._updates.get(name)
        old = self._before(name, first, last)
        if update is None:
            return as_bytes(old.view(-1) if old.dtype == dtype else round_to(old.double().view(-1), dtype))
        merged = old.double() + self._change(name, first, last)
        if update.magnitude:
            norms = self._norms(name)
            merged *= norms if update.flipped else norms[first:last, None]
        return as_bytes(round_to(merged.view(-1), dtype))

    def _before(self, name: str, first: int, last: int) -> torch.Tensor:
        """Load rows [first, last) of W, from the adapter where it has a W of its own."""
        width, key = math.prod(self.tensors[name].shape[1:]), self._whole.get(name)
        side, name = (self.base, self._origin.get(name, name)) if key is None else (self._adapter, key)
        return side.load_elements(name, first * width, last * width).view(-1, width)

    def _change(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last) of s·BA as the tensor lies, float64."""
        down, up = self._factors(name)
        return down.T[first:last] @ up.T if self._updates[name].flipped else up[first:last] @ down

    def _load_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        update = self._updates[name]
        return self._adapter.load(update.down).double(), self._adapter.load(update.up).double() * update.scale

    def _load_norms(self, name: str) -> torch.Tensor:
        """Return m / ‖W + s·BA‖ for every output, (d_out,), from one pass over the tensor."""
        import torch

        update, info = self._updates[name], self.tensors[name]
        rows, step = info.shape[0], self._rows_of_block(info)
        parts = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            squares = (self._before(name, first, last).double() + self._change(name, first, last)).square_()
            parts.append(squares.sum(0) if update.flipped else squares.sum(1))
        squares = torch.stack(parts).sum(0) if update.flipped else torch.cat(parts)
        assert update.magnitude is not None
        return self._adapter.load(update.magnitude).double().view(-1) / squares.sqrt()


def is_adapter(path: Path) -> bool:
    """Tell whether a directory holds an adapter and no weights of its own."""
    whole = any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    return path.is_dir() and (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not whole


def open_model(path: Path, base: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint, or an adapter on its base.

    Args:
        path: a checkpoint, or an adapter's directory.
        base: the base of an adapter, open and kept so elsewhere; looked for under the name that the adapter gives it when None.

    Returns:
        The open checkpoint, to be closed.

    Raises:
        BadInput: when there is none, it is damaged, or the base is not found.
        PairMismatch: when the adapter belongs to another base.
    """
    if not is_adapter(path):
        return Checkpoint.open(path)
    if base is not None:
        return Adapted(base, path)
    settings = documents.fit(Settings, documents.load_object(path / CONFIG), path / CONFIG)
    if not settings.base_model_name_or_path:
        raise UsageError(f"{path}: an adapter that does not name its base model; name it as the reference")
    try:
        own = Checkpoint.open(hub.resolve(settings.base_model_name_or_path).path)
    except BadInput as error:
        raise BadInput(
            f"{path}: an adapter, and its base model cannot be opened ({error}); give that as the reference"
        ) from None
    return _Owning(own, path)


class _Owning(Adapted):
    """An adapter that opened its base itself, and closes it."""

    def close(self) -> None:
        super().close()
        self.base.close()
