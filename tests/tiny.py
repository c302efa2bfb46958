"""Small checkpoints made on the spot: pairs of any dtype and layout, and real models of tiny shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from liborth_cli.checkpoint.reader import Checkpoint

OWNGPT = Path(__file__).parent / "data" / "owngpt"
"""A real base and fine-tuned pair, GPT-2 class (see its README)."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def save(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1, config: dict | None = None) -> Path:
    """Write a checkpoint directory through the real library, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def weights(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A few tensors as models have them: matrices both ways round, a vector, a stack of experts, a convolution."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    return {
        "embed.weight": draw(40, 16),
        "layers.0.up.weight": draw(24, 16),
        "layers.0.down.weight": draw(16, 24),
        "layers.0.norm.weight": draw(16),
        "layers.0.experts.gate_up": draw(3, 12, 16),
        "conv.weight": draw(8, 4, 3, 3),
        "layers.1.up.weight": draw(24, 16),
    }


def pair(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, step: float = 0.1) -> tuple[Path, Path]:
    """A reference and a fine-tuned checkpoint that differ by noise."""
    old = weights(dtype, 0)
    new = {
        name: (t.float() + step * d.float()).to(dtype)
        for (name, t), d in zip(old.items(), weights(seed=1).values(), strict=True)
    }
    return save(folder / "base", old, shards), save(folder / "finetuned", new, shards)


def matrices(folder: Path, shapes: Iterable[tuple[int, int]], shards: int) -> Path:
    """A directory with a pair of random matrices that differ by noise, `base` and `finetuned`."""
    g = torch.Generator().manual_seed(0)
    old = {f"layers.{i}.weight": torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}
    new = {name: t + 0.1 * torch.randn(t.shape, generator=g) for name, t in old.items()}
    save(folder / "base", old, shards), save(folder / "finetuned", new, shards)
    return folder


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit random: NaN payloads, infinities, −0.0 and subnormals included."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def llama(folder: Path, seed: int = 0, tie: bool = False, **config: int) -> Path:
    """A real Llama of tiny shape with random weights, saved by Transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}, tie_word_embeddings=tie))
    model.save_pretrained(folder)
    return folder


def few(folder: Path, count: int, length: int | None = None) -> Path:
    """Write the first held-out texts of the pair that ships, each as long as asked for, to a file of their own."""
    from liborth_cli.demo import DATA

    texts = [json.loads(line)["text"][:length] for line in (DATA / "held_out.jsonl").read_text().splitlines()[:count]]
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "few.jsonl"


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weight_files(folder: Path) -> dict[str, bytes]:
    """Of `files`, weights and their index: what a command wrote but for what tells the time or names its place."""
    return {name: data for name, data in files(folder).items() if name.endswith((".safetensors", ".index.json"))}


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, float32."""
    with Checkpoint.open(folder) as found:
        return {name: found.load(name).float() for name in found.tensors}


def copies(pair: Path, folder: Path, count: int) -> list[str]:
    """Directories with copies of a pair, as of machines that share no disk."""
    places = [folder / f"host{number}" for number in range(count)]
    for place in places:
        for side in ("base", "finetuned"):
            shutil.copytree(pair / side, place / side)
    return [str(place) for place in places]


def reseal(folder: Path, change: Callable[[dict], object], name: str = "liborth.manifest.json") -> None:
    """Change a manifest and give it the digest of what it now says, as somebody who lies would."""
    from liborth_cli import manifest

    file = folder / name
    document = json.loads(file.read_text())
    change(document)
    file.write_bytes(manifest.dump(document))


def flip(file: Path, position: int = -5) -> None:
    """Change one bit of one byte."""
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def private(out: Path) -> Path:
    """Where what is private of an output lies."""
    return out.with_name(out.name + ".private")
