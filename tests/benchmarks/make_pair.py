"""Generate the benchmark pair: a Llama-shaped checkpoint and a fine-tuned one, sharded safetensors, no model code.

The update of each matrix is rank 16 (singular values from 1 down to 0.063, scaled to the weight's size) plus dense noise
N(0, 2e-4): directions 17 to 64 lie in a flat bulk, the hard case for a truncated SVD. Vectors move a little.

    python tests/benchmarks/make_pair.py /tmp/pair                       # 374 M parameters, four shards
    python tests/benchmarks/make_pair.py /tmp/pair12 --layers 12         # half as deep
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, TOP, BOTTOM, NOISE = 16, 1.0, 0.063, 2e-4


def shapes(hidden: int, intermediate: int, layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name every tensor of a Llama with full attention heads and untied embeddings."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def tensor_pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one weight before and after fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        reference = torch.ones(shape)
        return reference.to(dtype), (reference + 0.01 * torch.randn(shape, generator=generator)).to(dtype)
    reference = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    left = torch.linalg.qr(torch.randn(shape[0], RANK, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], RANK, generator=generator))[0]
    sigma = torch.logspace(torch.tensor(TOP).log10(), torch.tensor(BOTTOM).log10(), RANK)
    update = (left * sigma) @ right.T + NOISE * torch.randn(shape, generator=generator)
    return reference, (reference.float() + update).to(dtype)


def make_pair(
    folder: Path, hidden: int, intermediate: int, layers: int, vocabulary: int, shards: int, dtype: torch.dtype
) -> None:
    """Write `folder`/base and `folder`/finetuned."""
    named = list(shapes(hidden, intermediate, layers, vocabulary))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": max(hidden // 64, 1),
        "num_key_value_heads": max(hidden // 64, 1), "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    per_shard = -(-len(named) // shards)
    for side in (0, 1):
        out = folder / ("base", "finetuned")[side]
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2))
        weight_map, total = {}, 0
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            part = named[shard * per_shard : (shard + 1) * per_shard]
            tensors = {
                name: tensor_pair(shape, dtype, shard * per_shard + i)[side].clone() for i, (name, shape) in enumerate(part)
            }
            save_file(tensors, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(t.nbytes for t in tensors.values())
        if shards > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    a = parser.parse_args()
    make_pair(a.folder, a.hidden, a.intermediate, a.layers, a.vocabulary, a.shards, getattr(torch, a.dtype))
