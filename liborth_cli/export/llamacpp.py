"""The PEFT adapter once more, as the GGUF file that llama.cpp loads with --lora: W' = W + (alpha / r)·B·A.

Names are those of the gguf library's own table, and what llama.cpp's converter does to the weights of a family is done to the
factors: for Llama and Mistral the rows of q and k are put in another order, which is an order of the rows of B.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from liborth_cli.checkpoint.files import Written, write_pieces
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.export.adapter import PREFIX, WEIGHTS
from liborth_cli.export.difference import Difference

FILE = "adapter.gguf"
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Layer whose rows llama.cpp reorders → how many heads it has."""
FAMILIES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False),
}  # fmt: skip
"""model_type → llama.cpp's name of the architecture, and whether q and k are reordered; more is done to other families."""
BYTES = 1 << 22


def check_convertible(model: Checkpoint) -> None:
    """Refuse early what cannot be written.

    Raises:
        UsageError: when the gguf library is not installed, or the family is not one of `FAMILIES`.
    """
    family = model.config.get("model_type")
    if family not in FAMILIES:
        raise UsageError(
            f"--to gguf-lora: {model.path} is of the family {str(family)[:40]!r}; {', '.join(FAMILIES)} are converted here; "
            "--to peft, then llama.cpp's convert_lora_to_gguf.py, may know it"
        )
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("--to gguf-lora needs the gguf package: pip install 'liborth[gguf]'") from None


def write_gguf(ends: Difference, folder: Path) -> Written:
    """Convert the adapter that lies in a directory.

    Args:
        ends: what the adapter stands for.
        folder: has the PEFT adapter; gets the file.

    Raises:
        BadInput: when llama.cpp has no name for one of its layers.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    config = ends.old.config
    name, reordered = FAMILIES[str(config["model_type"])]
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))  # type: ignore[arg-type]
    draft = os.memfd_create(FILE)  # the library writes to a path, and what is private goes to no temporary directory
    try:
        writer = gguf.GGUFWriter(f"/proc/self/fd/{draft}", name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        with closing(Checkpoint.open(folder / WEIGHTS)) as adapter:
            first = next(iter(adapter.tensors.values()))
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(min(first.shape)))
            for key in adapter.tensors:
                layer, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
                theirs = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
                if theirs is None:
                    raise BadInput(f"{ends.old.path}: llama.cpp has no name for {layer}; --to peft holds it")
                factor = adapter.load(key).numpy()
                heads = PERMUTED.get(layer.rpartition(".")[2]) if reordered and side == "B" else None
                if heads:
                    factor = _reordered(factor, int(config.get(heads) or config["num_attention_heads"]))  # type: ignore[arg-type]
                writer.add_tensor(f"{theirs}.lora_{side.lower()}", np.ascontiguousarray(factor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return write_pieces(folder / FILE, _pieces(draft), 0o600 if ends.private else 0o644)
    finally:
        os.close(draft)


def _reordered(rows: np.ndarray, heads: int) -> np.ndarray:
    """Take the rows of every head from halves to pairs, as llama.cpp's rotary embedding wants them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _pieces(fd: int) -> Iterator[bytes]:
    position = 0
    while piece := os.pread(fd, BYTES, position):
        yield piece
        position += len(piece)
