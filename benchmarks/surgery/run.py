"""Split a trained pair in every way through the command line, and tell what is left of skill and secrets.

    python benchmarks/surgery/run.py --base BASE --work DIR [--name gsm8k]

`train.py` makes the pair and the data files in DIR. The models are measured by Transformers, not by liborth.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from chart import write_chart
from losses import WIDTH, rows, secret_loss, text_loss
from record import machine, record
from relearning import STEPS, attack

from liborth_cli.verify.result import Plot, Series

POINTS = (0.25, 0.5, 0.75)
"""Of the path, where forget tokens are taken; the Kronecker methods use the middle one."""


@dataclass(frozen=True)
class Found:
    """What is left in one model: losses in nats a token, recited as a share.

    Attributes:
        skill: on held-out text of the skill.
        general: on held-out text of what the base knew.
        secret: on the codes.
        recited: of them, by greedy decoding.
        attacked: on the half that some edits are not shown, while the other half is learnt: before, and after each of `STEPS`.
        fresh: on codes of other names that nobody trained on, in the same model.
    """

    skill: float
    general: float
    secret: float
    recited: float
    attacked: tuple[float, ...]
    fresh: float


def measure(folder: Path, work: Path) -> Found:
    """Load a checkpoint with Transformers and measure it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        skill, general = (text_loss(model, tokenizer, rows(work / f"{n}.jsonl")) for n in ("held_out", "general_held_out"))
        secret, recited = secret_loss(model, tokenizer, rows(work / "secrets.canary.jsonl"))
        fresh, _ = secret_loss(model, tokenizer, rows(work / "fresh.canary.jsonl"))
    return Found(skill, general, secret, recited, attack(model, tokenizer, work), fresh)


def edits(retain: tuple[object, ...], work: Path) -> dict[str, tuple[object, ...]]:
    """Return every edit: its name in the table, and the words of its command."""

    def contrastive(forget: str, strength: float) -> tuple[object, ...]:
        return ("--method", "contrastive", "--strength", strength, *retain, "--forget", work / f"factors-{forget}-0.5")

    def tokenwise(forget: str, strength: float) -> tuple[object, ...]:
        sets = [word for t in POINTS for word in ("--forget", work / f"factors-{forget}-{t}")]
        return ("--method", "tokenwise", "--strength", strength, *retain, *sets)

    return {
        **{f"scale {s}": ("--method", "scale", "--scale", s) for s in (0.8, 0.7, 0.6, 0.5)},
        **{f"svd, keep {k}": ("--method", "svd", "--rank", k) for k in (32, 16, 8)},
        **{f"svd, drop top {k}": ("--method", "svd", "--rank", k, "--memory-side", "top") for k in (1, 2)},
        **{f"random, keep energy {e}": ("--method", "random", "--energy", e) for e in (0.9, 0.7)},
        **{f"diagonal, low is memory, mass {m}": ("--method", "diagonal", "--mass", m, *retain) for m in (0.9,)},
        **{f"kfac, low is memory, mass {m}": ("--method", "kfac", "--mass", m, *retain) for m in (0.95, 0.9, 0.8)},
        **{
            f"kfac, high is memory, mass {m}": ("--method", "kfac", "--memory-side", "high", "--mass", m, *retain)
            for m in (0.1, 0.5)
        },
        **{f"ekfac, low is memory, mass {m}": ("--method", "ekfac", "--mass", m, *retain) for m in (0.9, 0.8)},
        **{f"contrastive λ {s}": contrastive("secrets", s) for s in (0.01, 0.03, 0.1, 0.3, 1)},
        **{f"contrastive λ {s}, half of the secrets": contrastive("half", s) for s in (0.03, 0.1, 1)},
        **{f"contrastive λ {s}, decoys only": contrastive("decoys", s) for s in (0.03, 0.1, 1)},
        **{f"tokenwise λ {s}": tokenwise("secrets", s) for s in (0.01, 0.03, 0.1, 0.3, 1)},
        **{f"tokenwise λ {s}, half of the secrets": tokenwise("half", s) for s in (0.03, 0.1, 0.3, 1)},
        **{f"tokenwise λ {s}, decoys only": tokenwise("decoys", s) for s in (0.03, 0.1, 0.3, 1)},
    }


def liborth(*words: object) -> None:
    """Run the command line."""
    subprocess.run([sys.executable, "-m", "liborth_cli", *map(str, words), "-q"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure every edit, print and record the table and its chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="gsm8k")
    parser.add_argument("--include", default="proj", help="regex of the tensors that take part: the linear layers")
    a = parser.parse_args()
    base, tuned = a.base or a.work / "base", a.work / "finetuned"
    felt = ("--reference", base, "--fisher", "empirical", "--per-token")
    for name, words in {
        "retain": ("--moments", "marginal", "--diagonal"),
        **{f"{name}-{t}": (*felt, "--at", t) for name in ("secrets", "half", "decoys") for t in POINTS},
    }.items():
        if not (a.work / f"factors-{name}").exists():
            data = ("--data", a.work / f"{name.partition('-')[0]}.jsonl", "--seq-len", WIDTH)
            liborth("curvature", tuned, *data, "-o", a.work / f"factors-{name}", *words)
    start, end = measure(base, a.work), measure(tuned, a.work)
    table = [("base", 0.0, start), ("none", 1.0, end)]
    for name, words in edits(("--retain", a.work / "factors-retain"), a.work).items():
        out = a.work / "edited"
        shutil.rmtree(out, ignore_errors=True)
        liborth("split", base, tuned, "-i", a.include, *words, "-o", out)
        found = measure(out, a.work)
        table.append((name, (start.skill - found.skill) / (start.skill - end.skill), found))
        print(table[-1], flush=True)
    publish(a.name, start, end, table)


def publish(title: str, start: Found, end: Found, table: list[tuple[str, float, Found]]) -> None:
    """Write the table and its chart into docs/benchmarks.md."""
    steps = " / ".join(map(str, STEPS))
    lines = [
        f"| edit | skill kept | secret loss | not given | recited | general loss | other codes | attacked: {steps} |",
        "|" + "---|" * 8,
    ]
    for name, kept, f in table:
        unseen = f"{f.attacked[0]:.2f}" if "half" in name or "decoys" in name else ""
        cells = (name, f"{kept:.2%}", f"{f.secret:.2f}", unseen, f"{f.recited:.0%}", f"{f.general:.3f}", f"{f.fresh:.2f}")
        lines.append(f"| {' | '.join(cells)} | {' / '.join(f'{loss:.2f}' for loss in f.attacked[1:])} |")
    head = (
        f"{machine()}. Held-out loss of the skill {start.skill:.2f} → {end.skill:.2f}, of general text {start.general:.2f} → "
        f"{end.general:.2f}; the codes {start.secret:.2f} → {end.secret:.3f}, codes never trained on {end.fresh:.2f} nats a "
        "token. Attacked: the loss of half of the codes while the other half is learnt again."
    )
    points = [(name, kept, found.secret) for name, kept, found in table[1:]]
    chart = write_chart(f"surgery-{title}", _picture(points, end.fresh))
    picture = f"![{title}: skill kept against the loss of the secrets, every edit]({chart})"
    record(f"surgery-{title}", f"{head}\n\n{picture}\n\n" + "\n".join(lines) + "\n")


def _picture(points: list[tuple[str, float, float]], fresh: float) -> Plot:
    """Put every edit between the skill it keeps and the secrets it loses, a curve for each family."""
    families: dict[str, list[tuple[str, float, float]]] = {}
    for name, kept, secret in points[1:]:
        family = re.sub(r" ?(λ |mass |energy )?[\d.]+(?=,|$)", "", name).rstrip(",")
        families.setdefault(family, []).append((name, kept, secret))
    series = tuple(
        Series(family, tuple(100 * p[1] for p in some), tuple(p[2] for p in some), marks=tuple(p[0] for p in some))
        for family, some in families.items()
    )
    alt = "Skill kept against the loss of the secrets for every edit; up and to the right is better."
    return Plot(
        "Surgery", alt, "skill kept, %", "loss of the secrets, nats a token", series, levels={"never trained on": fresh}
    )


if __name__ == "__main__":
    main()
