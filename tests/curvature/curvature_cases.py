"""Tiny random models of every family, and the slow and obvious way to compute what `liborth curvature` computes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 67, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**BASE, **GQA, attention_bias=True),
    "llama_tied": lambda: transformers.LlamaConfig(**BASE, **GQA, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**BASE, **GQA, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**BASE, **GQA),
    "qwen3": lambda: transformers.Qwen3Config(**BASE, **GQA, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**BASE, **GQA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**BASE, **GQA, head_dim=8, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**BASE, **GQA, head_dim=8, sliding_window=6),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**BASE),
    "olmo2": lambda: transformers.Olmo2Config(**BASE, **GQA),
    "phi": lambda: transformers.PhiConfig(**BASE),
    "phi3": lambda: transformers.Phi3Config(**{**BASE, "pad_token_id": 0}),
    "mixtral": lambda: transformers.MixtralConfig(**BASE, **GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **BASE, **GQA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "gptj": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4),
    "falcon": lambda: transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=67, alibi=False, bos_token_id=0, eos_token_id=1
    ),
}


def make_model(family: str, folder: Path, seed: int = 0, **changes: object) -> Path:
    """Save a random model; weights are large enough for attention and routing to have a say."""
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def make_tokens(folder: Path, rows: int = 6, length: int = 17, vocabulary: int = 67, seed: int = 0, name: str = "data") -> Path:
    """Save random token rows, some shorter than others (−1 pads them)."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, vocabulary, (rows, length))
    ids[1::3, length - 5 :] = -1
    path = folder / f"{name}.npy"
    np.save(path, ids)
    return path


def read_tokens(path: Path) -> list[torch.Tensor]:
    """Return the rows without their padding."""
    return [torch.from_numpy(row[row >= 0]) for row in np.load(path)]


class Oracle:
    """Hooks on the whole model, row by row, everything in the open: the definition the estimate is held against."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        self.model.eval()
        self.inputs: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.gradients: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.loss = 0.0
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            if isinstance(module, torch.nn.Linear) or kind in ("Conv1D", "FalconLinear") or kind.endswith("TopKRouter"):
                module.register_forward_hook(self._hook(f"{name}.weight"))
            elif type(module).__name__.endswith("Experts"):
                module.forward = self._experts(name, module)
        table = self.model.get_input_embeddings()
        self.table = next(name for name, module in self.model.named_modules() if module is table) + ".weight"
        table.register_forward_hook(self._hook(self.table))

    def run(
        self, rows: list[torch.Tensor], labels: list[torch.Tensor] | None = None, keep: list[torch.Tensor] | None = None
    ) -> None:
        for number, row in enumerate(rows):
            logits = self.model(row[None, :-1]).logits[0]
            target = row[1:] if labels is None else labels[number]
            mask = torch.ones(len(target), dtype=torch.bool) if keep is None else keep[number]
            losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            (losses * mask).sum().backward()
            self.loss += float((losses * mask).detach().sum())

    def matrix(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a of every token, (n, d_in), and g, (n, d_out)."""
        return torch.cat(self.inputs[name]), torch.cat(self.gradients[name])

    def _hook(self, name: str):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            x = args[0].detach()
            self.inputs[name].append(x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1))
            # Gemma's table multiplies what it looks up: the gradient at the look-up itself is larger by that.
            scale = getattr(module, "embed_scale", 1.0)
            if output.requires_grad:
                output.register_hook(lambda g: self.gradients[name].append(g.reshape(-1, g.shape[-1]) * scale))

        return hook

    def _experts(self, name: str, module: torch.nn.Module):
        def forward(hidden_states, top_k_index, top_k_weights):
            result = torch.zeros_like(hidden_states)
            for expert in range(module.num_experts):
                tokens, places = torch.nonzero(top_k_index == expert, as_tuple=True)
                if not len(tokens):
                    continue
                x = hidden_states[tokens]
                both = x @ module.gate_up_proj[expert].T
                self._note(f"{name}.gate_up_proj[{expert}]", x, both)
                gate, up = both.chunk(2, -1)
                middle = module.act_fn(gate) * up
                y = middle @ module.down_proj[expert].T
                self._note(f"{name}.down_proj[{expert}]", middle, y)
                result = result.index_add(0, tokens, y * top_k_weights[tokens, places, None])
            return result

        return forward

    def _note(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.inputs[name].append(x.detach())
        y.register_hook(self.gradients[name].append)


def oracle_name(layer: str) -> tuple[str, slice | None]:
    """Translate the name of an expert's stored matrix into the oracle's, and say which outputs of the fused one it is."""
    import re

    found = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight", layer)
    if found:
        inner, expert, which = f"{found[1]}.mlp.experts", found[2], found[3]
        place = {"1": slice(0, 48), "3": slice(48, 96), "2": None}[which]
        return f"{inner}.{'down_proj' if which == '2' else 'gate_up_proj'}[{expert}]", place
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", layer)
    if found:
        place = {"gate": slice(0, 24), "up": slice(24, 48), "down": None}[found[3]]
        return f"{found[1]}.{'down_proj' if found[3] == 'down' else 'gate_up_proj'}[{found[2]}]", place
    return layer.replace(".block_sparse_moe.gate.", ".mlp.gate."), None


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    scale = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / (scale or 1.0)
