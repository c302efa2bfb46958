"""What `split --dtype bfloat16` takes out, beside what float32 takes out and what another seed of the labels does.

    python benchmarks/split_bfloat16.py --work DIR [--pairs FOLDER …]        # the shipped pair: two minutes of one core

"Off" is the norm of the difference of what two splits remove, over what the float32 one removes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from outcome import Pair, liborth, over_pairs
from safetensors.torch import load_file

SPLITS = {"float32": (), "float32, another seed": ("--seed", 1), "bfloat16": ("--dtype", "bfloat16")}


def removed(pair: Pair, general: Path) -> torch.Tensor:
    """Return W_f − W_g of all tensors, in one vector, float32."""
    after, before = (load_file(folder / "model.safetensors") for folder in (general, pair.folder / "finetuned"))
    return torch.cat([(before[name].float() - after[name].float()).flatten() for name in sorted(after)])


def lines(pair: Pair, work: Path) -> list[str]:
    """Split one pair three times by each method; return its table."""
    texts = ("--retain-data", pair.folder / "retain.jsonl", "--forget-data", pair.folder / "secrets.jsonl", "--truncate")
    text = [f"**{pair.name}.**", "", "| method | passes | off | skill kept | codes, nats |", "|---|---|---|---|---|"]
    for method in ("tokenwise", "contrastive"):
        first = None
        for name, words in SPLITS.items():
            out = work / f"{method}, {name}"
            liborth("split", pair.folder / "base", pair.folder / "finetuned", "--method", method, *texts, *words, "-o", out)
            now, left = removed(pair, out), pair.left(out)
            first = now if first is None else first
            off = float((now - first).norm() / first.norm())
            text.append(f"| {method} | {name} | {off:.1%} | {pair.kept(left):.1%} | {left.codes:.2f} |")
            print(text[-1], flush=True)
    return [*text, ""]


if __name__ == "__main__":
    over_pairs(__doc__, "split-bfloat16", "curvature.md", lines)
