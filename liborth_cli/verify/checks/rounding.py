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
    too: rounding may destroy what it knows, and then the attack proves nothing. What the skill loses is for the table, and is
    measured on a sample of the retain rows.
    """
    from liborth_cli.measure.scores import mean_loss
    from liborth_cli.stream.weights import Quantised

    states, lists = subject.states, [name for name in ("canaries", "retain") if name in subject.data]
    tensors = states.model("general").linear_tensors()
    worst, table, losses = {}, [], []
    base = [statistics.totals(subject.score(rows, "general"))[0] for rows in lists[1:]]
    names = [name for name in states.of(("finetuned", "general")) if not (subject.grown and name == "finetuned")]
    with subject.console.progress("rounding", len(names) * len(ROUNDINGS), "models") as progress:
        for name in names:
            weights, hits = states.weights[name], []
            for bits, group in ROUNDINGS:
                title = f"{bits} bits, {f'groups of {group}' if group else 'one scale a row'}"
                rounded = f"{name}, {title}"
                states.weights[rounded] = Quantised(weights, bits, group, tensors)
                hits.append(np.array([verbatim(score) for score in subject.score("canaries", rounded)]))
                if name == "general":
                    losses.append(subject.loss("canaries", rounded))
                    table.append((title, float(hits[-1].mean()), losses[-1], *(subject.about(rounded, one) for one in base)))
                progress.advance(1)
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
    change = "" if not base or subject.sample.whole else f"; its change is of {subject.sample.words}"
    titles = {"canaries": ">canary loss", "retain": f">retain loss{change}"}
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
    both = ["general", *(["finetuned"] if "finetuned" in subject.states and not subject.grown else [])]
    scored = scorings(subject, ("canaries", "retain"), ("general",))
    scored |= scorings(subject, ("canaries",), [f"{name}, {one}" for name in both for one in ROUNDINGS])
    sample = [subject.sample.name] if "retain" in subject.data else []
    return Work(scored | scorings(subject, sample, [f"general, {one}" for one in ROUNDINGS]))


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
