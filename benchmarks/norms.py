"""Does weight norm predict what is memory better than curvature does?

    python benchmarks/norms.py --work DIR [--pairs FOLDER …]        # the shipped pair, and pairs of the surgery benchmark

Matrix by matrix: its update is taken out of the fine-tuned model, and what the codes and the skill lose is what it held of
both. Each predictor of a matrix is ranked against that (Spearman); the interval is from 2,000 resamples of the matrices. Writes
the table of docs/origins.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from outcome import Pair, liborth, over_pairs
from scipy.stats import rankdata
from transformers import AutoModelForCausalLM

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.methods.kronecker import quadratic_form

PREDICTORS = {
    "norm before, ‖W_r‖": lambda f: f["before"],
    "norm after, ‖W_f‖": lambda f: f["after"],
    "growth of the norm, ‖W_f‖ − ‖W_r‖": lambda f: f["after"] - f["before"],
    "norm of the update, ‖U‖": lambda f: f["update"],
    "relative to the weight, ‖U‖/‖W_r‖": lambda f: f["update"] / f["before"],
    "retain curvature, tr A · tr G / size": lambda f: f["flat"],
    "retain curvature along U, ⟨U, HU⟩": lambda f: f["retain"],
    "… per ‖U‖²": lambda f: f["retain"] / f["update"] ** 2,
    "forget curvature along U, half way": lambda f: f["forget"],
    "… per retain curvature along U": lambda f: f["forget"] / f["retain"],
}
"""What is known of a matrix without cutting it; the last two need the codes."""
DRAWS = 2000


def known(pair: Pair, work: Path) -> dict[str, dict[str, float]]:
    """Return for every matrix its norms, and what both kinds of curvature feel of its update."""
    models = {
        side: AutoModelForCausalLM.from_pretrained(pair.folder / side, dtype=torch.float32) for side in ("base", "finetuned")
    }
    weights = {side: dict(model.named_parameters()) for side, model in models.items()}
    found = {}
    with FactorSet.open(work / "retain") as retain, FactorSet.open(work / "forget") as forget:
        for name in (name for name in retain.names if "proj" in name):
            tensor = retain.layers[name].tensor
            before, after = (weights[side][tensor].detach() for side in ("base", "finetuned"))
            update = (after - before).double()
            felt = {}
            for kind, held in (("retain", retain), ("forget", forget)):
                layer = held.layer(name)
                felt[kind] = quadratic_form(update, layer.gradient_covariance, layer.input_covariance)
            layer = retain.layer(name)
            flat = float(layer.input_covariance.diagonal().sum() * layer.gradient_covariance.diagonal().sum()) / update.numel()
            norms = {"before": float(before.norm()), "after": float(after.norm()), "update": float(update.norm())}
            found[tensor] = norms | felt | {"flat": flat}
    return found


@torch.no_grad()
def held(pair: Pair, tensors: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return what codes and skill lose, nats a token, when the update of one matrix is taken out, (matrices,) each."""
    tuned = AutoModelForCausalLM.from_pretrained(pair.folder / "finetuned", dtype=torch.float32).eval()
    base = dict(AutoModelForCausalLM.from_pretrained(pair.folder / "base", dtype=torch.float32).named_parameters())
    mine = dict(tuned.named_parameters())
    start = [pair.score(tuned, name)[0] for name in ("secrets", "held_out")]
    lost = []
    for tensor in tensors:
        kept = mine[tensor].clone()
        mine[tensor].copy_(base[tensor])
        lost.append([pair.score(tuned, name)[0] for name in ("secrets", "held_out")])
        mine[tensor].copy_(kept)
    codes, skill = (np.array(lost) - start).T
    return codes, skill


def spearman(x: np.ndarray, y: np.ndarray, seed: int = 0) -> str:
    """Return the rank correlation with its interval of 95 % over resampled matrices."""
    draw = np.random.default_rng(seed)

    def of(places: np.ndarray) -> float:
        return float(np.corrcoef(rankdata(x[places]), rankdata(y[places]))[0, 1])

    drawn = [of(draw.integers(0, len(x), len(x))) for _ in range(DRAWS)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return f"{of(np.arange(len(x))):+.2f} ({low:+.2f} to {high:+.2f})"


def lines(pair: Pair, work: Path) -> list[str]:
    """Measure one pair; return its table."""
    tuned = pair.folder / "finetuned"
    liborth("curvature", tuned, "--data", pair.folder / "retain.jsonl", "--truncate", "-o", work / "retain")
    words = ("--reference", pair.folder / "base", "--at", 0.5, "--fisher", "empirical", "--data", pair.folder / "secrets.jsonl")
    liborth("curvature", tuned, *words, "-o", work / "forget")
    facts = known(pair, work)
    codes, skill = held(pair, list(facts))
    rest = rankdata(codes) - rankdata(skill)
    targets = {"codes lost without it": codes, "skill lost without it": skill, "more codes than skill (ranks)": rest}
    table = [f"| known of a matrix | {' | '.join(targets)} |", "|" + "---|" * (len(targets) + 1)]
    for name, predictor in PREDICTORS.items():
        values = np.array([predictor(one) for one in facts.values()])
        table.append(f"| {name} | {' | '.join(spearman(values, target) for target in targets.values())} |")
    head = (
        f"**{pair.name}**: {len(facts)} matrices; without one of them the codes lose up to {codes.max():.2f} nats, the "
        f"skill up to {skill.max():.2f}."
    )
    print("\n".join([head, *table]), flush=True)
    return [head, "", *table, ""]


if __name__ == "__main__":
    over_pairs(__doc__, "norms", "origins.md", lines)
