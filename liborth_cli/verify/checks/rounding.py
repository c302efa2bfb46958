"""`--rounding`: do the secrets come out when the weights are rounded to 8 or 4 bits, as they are when a model is served?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liborth_cli.verify import power, statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, scorings
from liborth_cli.verify.memorisation import verbatim
from liborth_cli.verify.result import Facts, Line, Result, Table
from liborth_cli.verify.subject import Subject

ROUNDINGS = ((8, None), (4, 128), (4, None))
"""Bits, and inputs that share a scale (None: a whole row)."""


@dataclass
class RoundingFacts(Facts):
    """What came of each rounding."""

    quantised: list[Line]


def run(subject: Subject, options: Options) -> Result:
    """Score canaries, and the skill beside them, at rounded general weights; formulas: stream/weights.py.

    "Recited": every token of a completion is the likeliest one after the true ones before it. The fine-tuned model is rounded,
    too: rounding may destroy what it knows, and then the attack proves nothing.
    """
    from liborth_cli.measure.scores import mean_loss
    from liborth_cli.stream.weights import Quantised

    states, lists = subject.states, [name for name in ("canaries", "retain") if name in subject.data]
    tensors = states.model("general").linear_tensors()
    worst, table, losses = {}, [], []
    names = [name for name in states.of(("finetuned", "general")) if not (subject.grown and name == "finetuned")]
    with subject.console.progress("rounding", len(names) * len(ROUNDINGS), "models") as progress:
        for name in names:
            weights, hits = states.weights[name], []
            for bits, group in ROUNDINGS:
                rounded = Quantised(weights, bits, group, tensors)
                scores = [states.score_at(rows, rounded) for rows in (lists if name == "general" else lists[:1])]
                hits.append(np.array([verbatim(score) for score in scores[0]]))
                progress.advance(1)
                if name == "general":
                    title = f"{bits} bits, {f'groups of {group}' if group else 'one scale a row'}"
                    table.append((title, float(hits[-1].mean()), *map(mean_loss, scores)))
                    losses.append(mean_loss(scores[0]))
            worst[name] = max(hits, key=lambda hit: hit.sum())
    exact = subject.score("canaries", "general")
    table.insert(0, ("as it is", float(np.mean([verbatim(s) for s in exact])), *(subject.loss(r, "general") for r in lists)))
    metric = statistics.share(
        worst["general"], subject.groups("canaries"), "share of the canaries recited at the worst of the roundings"
    ).beside(float(worst["finetuned"].mean()) if "finetuned" in worst else None)
    count = int(worst["general"].sum())
    verdict = (
        f"At 8 or 4 bits {count} of {len(exact)} canaries are recited at most, and their loss falls to {min(losses):.2f} nats "
        f"at the lowest (not rounded: {mean_loss(exact):.2f})."
    )
    titles = {"canaries": ">canary loss", "retain": ">retain loss"}
    figure = Table(
        "Rounding the general weights", ("weights inside the blocks", ">recited", *(titles[r] for r in lists)), tuple(table)
    )
    facts = RoundingFacts([dict(zip(("weights", "recited", "loss", "retain_loss"), row, strict=False)) for row in table])
    return Result(
        "rounding",
        verdict=verdict,
        passed=None,
        metrics={"quantised_extraction": metric},
        figures=[figure],
        facts=facts,
        recited=count,
    )


def _work(subject: Subject, options: Options) -> Work:
    """Count every rounding of both models; canaries at both, the skill at the general one."""
    tokens = {name: sum(row.tokens for row in subject.rows(name)) for name in ("canaries", "retain")}
    twice = "finetuned" in subject.states and not subject.grown
    read = len(ROUNDINGS) * ((1 + twice) * tokens["canaries"] + tokens["retain"])
    return Work(scorings(subject, tuple(tokens), ("general",)), read)


CHECK = Check(
    name="rounding",
    title="Rounding",
    words="Extraction with the weights rounded to 8 and 4 bits.",
    part=Part.RELIABILITY,
    run=run,
    metrics=("quantised_extraction",),
    needs=(Need.CANARIES,),
    cheap=True,
    work=_work,
    power={"quantised_extraction": power.none_found},
    attack=True,
)
