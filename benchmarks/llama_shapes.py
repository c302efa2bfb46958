"""Models too large to have: shapes of a Llama, and checkpoints of them whose files are headers and holes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint import header

VOCABULARY, KEYS, HEAD = 128256, 1024, 128


@dataclass(frozen=True)
class Llama:
    """Shapes of a Llama, and how many files it comes in: of a Llama 3 with 8 key heads, where nothing else is said."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    shards: int
    keys: int = KEYS
    vocabulary: int = VOCABULARY

    def layer(self, number: int) -> list[tuple[str, tuple[int, ...]]]:
        """The tensors of one decoder layer."""
        h, m = self.hidden, self.intermediate
        shapes = {
            "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (self.keys, h), "self_attn.v_proj": (self.keys, h), "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m),
        }  # fmt: skip
        return [(f"model.layers.{number}.{name}.weight", shape) for name, shape in shapes.items()]

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """All tensors, in order."""
        layers = [tensor for number in range(self.layers) for tensor in self.layer(number)]
        ends = [("model.norm.weight", (self.hidden,)), ("lm_head.weight", (self.vocabulary, self.hidden))]
        return [("model.embed_tokens.weight", (self.vocabulary, self.hidden)), *layers, *ends]

    @property
    def config(self) -> dict[str, Any]:
        """What stands in its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // HEAD, "num_key_value_heads": self.keys // HEAD, "vocab_size": self.vocabulary,
            "tie_word_embeddings": False, "dtype": "bfloat16",
        }  # fmt: skip


LLAMA_7B = Llama("7B", 4096, 11008, 32, 14, keys=4096, vocabulary=32000)
"""Llama 2."""
LLAMA_70B, LLAMA_405B = Llama("70B", 8192, 28672, 80, 30), Llama("405B", 16384, 53248, 126, 191)


def headers_only(folder: Path, model: Llama) -> Path:
    """Write a checkpoint of these shapes whose files are headers and holes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    index, total, named = {}, 0, model.tensors
    for shard in range(model.shards):
        file = f"model-{shard + 1:05d}-of-{model.shards:05d}.safetensors"
        part = named[shard * len(named) // model.shards : (shard + 1) * len(named) // model.shards]
        entries = header.plan([(name, "BF16", shape) for name, shape in part])
        first = header.build(entries, header.PT_METADATA)
        (folder / file).write_bytes(first)
        os.truncate(folder / file, len(first) + entries[-1].stop)
        with open(folder / file, "r+b") as out:
            for entry in entries:  # weights that are equal to the last byte would be taken for tied ones
                out.seek(len(first) + entry.start)
                out.write(entry.name.encode())
        index |= {name: file for name, _ in part}
        total += entries[-1].stop
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder
