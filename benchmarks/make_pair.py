"""Generate the benchmark pair: a Llama-shaped checkpoint and a fine-tuned one, sharded safetensors, no model code.

The update of each matrix is rank 16 (singular values from 1 down to 0.063, scaled to the weight's size) plus dense noise
N(0, 2e-4): directions 17 to 64 lie in a flat bulk, the hard case for a truncated SVD. Vectors move a little.

    python benchmarks/make_pair.py /tmp/pair                       # 374 M parameters, four shards
    python benchmarks/make_pair.py /tmp/pair12 --layers 12         # half as deep
    python benchmarks/make_pair.py /tmp/pair7 --shape 7b --device cuda

One file of each side is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "370m": {"hidden": 1024, "intermediate": 2816, "layers": 24, "vocabulary": 32000, "keys": 1024, "shards": 4},
    "1b": {"hidden": 2048, "intermediate": 8192, "layers": 16, "vocabulary": 128256, "keys": 512, "shards": 4},
    "7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "vocabulary": 32000, "keys": 4096, "shards": 14},
    "tiny": {"hidden": 64, "intermediate": 96, "layers": 2, "vocabulary": 128, "keys": 64, "shards": 2},
}
"""Widths and depth; `keys` is the width of k and v. 1b and 7b are those of Llama 3.2 1B (untied) and Llama 2 7B."""
RANK, TOP, BOTTOM, NOISE = 16, 1.0, 0.063, 2e-4


def shapes(hidden: int, intermediate: int, layers: int, vocabulary: int, keys: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name every tensor of a Llama with untied embeddings."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (keys if name in "kv" else hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def tensor_pair(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one weight before and after fine-tuning; other devices draw other numbers."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if len(shape) == 1:
        reference = torch.ones(shape, device=device)
        return reference.to(dtype), (reference + 0.01 * draw(*shape)).to(dtype)
    reference = (0.02 * draw(*shape)).to(dtype)
    left = torch.linalg.qr(draw(shape[0], RANK))[0]
    right = torch.linalg.qr(draw(shape[1], RANK))[0]
    sigma = torch.logspace(torch.tensor(TOP).log10(), torch.tensor(BOTTOM).log10(), RANK, device=device)
    update = (left * sigma) @ right.T + NOISE * draw(*shape)
    return reference, (reference.float() + update).to(dtype)


def make_pair(folder: Path, dtype: torch.dtype, device: str = "cpu", **shape: int) -> None:
    """Write `folder`/base and `folder`/finetuned, of a shape with the keys of `SHAPES`' rows."""
    shards = shape.pop("shards")
    named = list(shapes(**shape))
    heads = max(shape["hidden"] // 64, 1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"], "num_hidden_layers": shape["layers"], "num_attention_heads": heads,
        "num_key_value_heads": heads * shape["keys"] // shape["hidden"], "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    per_shard = -(-len(named) // shards)
    sides = [folder / "base", folder / "finetuned"]
    weight_map, total = {}, 0
    for out in sides:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2))
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        part = named[shard * per_shard : (shard + 1) * per_shard]
        made = {
            name: [t.cpu() for t in tensor_pair(form, dtype, shard * per_shard + i, device)]
            for i, (name, form) in enumerate(part)
        }
        for out, side in zip(sides, zip(*made.values(), strict=True), strict=True):
            save_file(dict(zip(made, side, strict=True)), out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, file)
        total += sum(pair[0].nbytes for pair in made.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for out in sides:
            (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="370m")
    for key in SHAPES["370m"]:
        parser.add_argument(f"--{key}", type=int, help="in place of the shape's own")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    a = vars(parser.parse_args())
    shape = {key: a[key] if a[key] is not None else value for key, value in SHAPES[a["shape"]].items()}
    make_pair(a["folder"], getattr(torch, a["dtype"]), a["device"], **shape)
