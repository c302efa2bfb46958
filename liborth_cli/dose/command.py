"""What `liborth split` does when it is given texts: curvature passes, probes, and the search for a dose."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.pair import grid
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console
from liborth_cli.curvature.factors import FactorSet
from liborth_cli.curvature.plan import MOST_TOKENS, CurvatureOptions
from liborth_cli.dose.courses import Course, allowed, courses
from liborth_cli.dose.frontier import Frontier
from liborth_cli.dose.gauge import Gauge
from liborth_cli.dose.passes import Passes, forget_options, retain_options
from liborth_cli.dose.reasons import knee, swollen, why
from liborth_cli.dose.search import choose, search, walk
from liborth_cli.dose.target import Target
from liborth_cli.dose.texts import Given, Reader, Texts, read_texts
from liborth_cli.dose.trials import Laboratory
from liborth_cli.errors import BadInput, UsageError, VerificationFailed
from liborth_cli.machine import Run
from liborth_cli.methods import METHODS
from liborth_cli.split import SplitOptions
from liborth_cli.split.factors import HELD, SOURCE
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Point

AUTO = "auto"
FORGOTTEN = {need for need, side in SOURCE.items() if side == "forget"}
"""What a method needs of the forget data; everything else is of the retain data."""
Wanted = list[tuple[str, CurvatureOptions]]
"""Passes to run: "retain" or "forget", and how."""
SUFFIX = ".factors"


@dataclass(frozen=True)
class Asked:
    """What the command line asks of the dose.

    Attributes:
        given: the texts.
        method: a key of METHODS, or "auto".
        probe: measure, and write nothing.
        target: what the edit must reach, or None when the amount was given.
        hard: cut, where the method has a choice.
        out: the output; the factors are kept beside it. None keeps nothing.
    """

    given: Given
    method: str
    probe: bool = False
    target: Target | None = None
    hard: bool = False
    out: Path | None = None


@dataclass
class Outcome:
    """What a split goes on with.

    Attributes:
        options: with the method, side and amount that were found.
        retain: factors of the retain data, or None.
        forget: factors of the forget data, one for each set.
        frontier: what was measured, or None.
        done: the table was the result; there is nothing to write.
        text: what was printed as the result but for the table, when `done`.
        document: for --json, when `done`.
    """

    options: SplitOptions
    retain: FactorSet | None
    forget: list[FactorSet]
    frontier: Frontier | None = None
    done: bool = False
    text: str = ""
    document: dict[str, Any] = field(default_factory=dict)

    def take(self, kind: str, factors: FactorSet) -> None:
        """Add a factor set that was measured: "retain" or "forget"."""
        if kind == "retain":
            self.retain = factors
        else:
            self.forget.append(factors)


class Dosing:
    """One run over a pair."""

    def __init__(
        self,
        asked: Asked,
        pair: tuple[Checkpoint, Checkpoint],
        sources: tuple[Source | None, Source],
        run: Run,
        console: Console,
    ) -> None:
        """Take what is asked; nothing is read yet."""
        self.asked, self.run, self.console = asked, run, console
        self.reference, self.finetuned = pair
        self.sources = sources

    def go(
        self, stack: ExitStack, options: SplitOptions, retain: FactorSet | None, forget: list[FactorSet], dry_run: bool
    ) -> Outcome:
        """Measure what is needed.

        Args:
            stack: closes what is opened.
            options: the split, with the amount that was given, if any.
            retain: factors that the user brought, or None.
            forget: factors that the user brought.
            dry_run: only say what would be done.

        Returns:
            What to go on with.

        Raises:
            LiborthError: the leaf says which; VerificationFailed when no method meets the target.
        """
        asked, held = self.asked, Outcome(options, retain, list(forget))
        alone = self.sources[0] is None
        if alone and (asked.probe or asked.target):
            raise UsageError("--probe and --target measure what fine-tuning taught: they need both checkpoints")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-dose-")))
        folder = asked.out.with_name(asked.out.name + SUFFIX) if asked.out else scratch
        model = BlockModel(Point(self.finetuned), torch.float32, self.run.device)
        stack.callback(model.close)
        beside = self.sources[1].path
        reader = Reader(beside if beside.is_dir() else beside.parent, model.vocabulary, model.context, asked.given.truncate)
        texts = read_texts(asked.given, reader, scratch if dry_run else folder, retain is not None, self.console)
        lanes = self._courses(options, held, texts.forget_tokens)
        needs = {need for lane in lanes for need in METHODS[lane.method].needs}
        passes = Passes(folder, self.reference, self.finetuned, self.sources, model, self.run, self.console)
        wanted = self._wanted(needs, texts, held, alone)
        if dry_run:
            return self._plan(passes, texts, wanted, held, stack)
        gauge = None
        if not alone:
            gauge = Gauge(model, texts, Point(self.finetuned, self.reference, 0.0), Point(self.finetuned))
            gauge.warn(self.console, asked.target is not None)
        target = self._check(gauge) if gauge else None
        for kind, how in wanted:
            path = passes.run_pass(kind, getattr(texts, kind), texts.files[kind], how)
            held.take(kind, stack.enter_context(FactorSet.open(path)))
        if gauge is None or not (asked.probe or target):
            return held
        return self._measure(held, lanes, gauge, target)

    def _measure(self, outcome: Outcome, lanes: Sequence[Course], gauge: Gauge, target: Target | None) -> Outcome:
        asked = self.asked
        frontier = Frontier(gauge.before, gauge.after, target=target)
        outcome.frontier = frontier
        laboratory = Laboratory(
            self.reference, self.finetuned, outcome.options, outcome.retain, outcome.forget, gauge, self.run, self.console
        )
        for lane in lanes:
            self.console.note(f"trying {lane.title} on {gauge.tokens:,} tokens a dose")
            with laboratory.on(lane) as bench:
                found = search(bench, target) if target else walk(bench)
                frontier.found.append(found)
                like = found.best or knee(found, gauge)
                if lane.method != "scale" and like.removed <= 1:
                    frontier.controls.append(bench.like(like))
        frontier.why = swollen(frontier)
        best = None
        if target is not None:
            mine = [one for one in frontier.found if asked.method in (AUTO, one.course.method)]
            best = choose(mine, target)
            frontier.chosen = best.best if best else None
            frontier.why += why(best, frontier, asked.method)
        if asked.probe or (target is not None and best is None):
            frontier.show(self.console, out=not self.console.as_json)
            outcome.document = {"dose": frontier.to_json()}
            outcome.done = True
        if target is not None and best is None:
            if self.console.as_json:
                self.console.result("", outcome.document)
            reached = "no method meets" if asked.method == AUTO else f"{asked.method} does not meet"
            raise VerificationFailed(f"{reached} --target {target.text}; nothing was written (the frontier is above)")
        if best is not None and best.best is not None and not outcome.done:
            frontier.show(self.console, out=False)
            outcome.options = replace(
                outcome.options, method=best.course.method, amount=best.best.amount, memory_side=best.course.side
            )
        return outcome

    def _courses(self, options: SplitOptions, held: Outcome, tokens: int) -> list[Course]:
        """Decide what is tried: the method asked for, or all that the data allow, and always `scale`."""
        asked, given = self.asked, self.asked.given
        names = [asked.method]
        if asked.method == AUTO:
            there = _there("retain", [held.retain] if held.retain else [], bool(given.retain))
            there += _there("forget", held.forget, bool(given.forget or given.patterns))
            if not held.forget and tokens > MOST_TOKENS and "tokens" in there:
                there.remove("tokens")
                self.console.note(f"tokenwise is not tried: {tokens:,} tokens to forget, and it takes {MOST_TOKENS:,} at most")
            names = allowed(there)
        measured = asked.probe or asked.target is not None
        if measured and "scale" not in names:
            names.append("scale")
        largest = max((min(grid(t.name, t.shape)[1:]) for t in self.finetuned.tensors.values() if len(t.shape) > 1), default=1)
        return courses(names, options.memory_side, largest, asked.hard)

    def _wanted(self, needs: set[str], texts: Texts, held: Outcome, alone: bool) -> Wanted:
        """Say which passes have to be run, and how."""
        wanted: Wanted = []
        if needs - FORGOTTEN and held.retain is None:
            if not texts.retain:
                raise UsageError("this method needs the curvature of what to keep: --retain-data, or --retain with factors")
            wanted.append(("retain", retain_options(sorted(needs), self.asked.given.seed)))
        if needs & FORGOTTEN and not held.forget:
            if not texts.forget:
                raise UsageError("this method needs the curvature of what must go: --forget-data, --forget-pattern or --forget")
            if "tokens" in needs and texts.forget_tokens > MOST_TOKENS:
                raise UsageError(
                    f"tokenwise takes the tokens to forget one by one, {MOST_TOKENS:,} at most, and these are "
                    f"{texts.forget_tokens:,}; give fewer rows, or use --method contrastive"
                )
            wanted += [("forget", how) for how in forget_options(needs, alone, texts.forget_tokens)]
        return wanted

    def _check(self, gauge: Gauge) -> Target | None:
        """Hold the target against what can be measured."""
        asked, target, after = self.asked, self.asked.target, gauge.after
        if (asked.probe or target) and after.general is None:
            raise UsageError("--probe and --target measure what is kept on --retain-data: it is missing")
        if target is None:
            return None
        names = target.names()
        if names & {"forget", "recited"} and after.forget is None:
            raise UsageError(
                "--target: forget and recited are measured on real secrets: give them with --forget-data; with patterns alone "
                "only retention and general can be asked for"
            )
        if "recited" in names and after.recited is None:
            raise UsageError("--target: recited needs prompts: give prompt and completion, or --forget-pattern")
        if "fresh" in names and after.fresh is None:
            raise UsageError("--target: fresh needs never-trained rows of the same form: --fresh, or --forget-pattern")
        if "retention" in names and after.retention is None:
            raise UsageError(
                "--target: no retain row shows the skill, so retention cannot be measured: add rows with --skill-data"
            )
        if asked.method == AUTO and after.forget is None:
            raise UsageError("--method auto compares methods by what they forget, and needs --forget-data")
        if after.forget is not None and names & {"forget", "recited"} and not gauge.memorised:
            raise BadInput(f"the forget data are not memorised ({after.forget:.3f} nats a token): there is no dose to look for")
        if after.fresh is None:
            self.console.note("no never-trained rows (--fresh, --forget-pattern): nothing tells when the secrets are overshot")
        return target.with_ceiling() if after.fresh is not None and after.forget is not None else target

    def _plan(
        self,
        passes: Passes,
        texts: Texts,
        wanted: Wanted,
        held: Outcome,
        stack: ExitStack,
    ) -> Outcome:
        """Say what would be measured; go on with the plan of the split when all its factors are there."""
        lines, document = list[str](), dict[str, Any]()
        missing = False
        for kind, how in wanted:
            text, planned = passes.plan(kind, getattr(texts, kind), how)
            lines.append(text)
            document.setdefault(kind, []).append(planned)
            if planned["cached"]:
                held.take(kind, stack.enter_context(FactorSet.open(passes.place(kind, getattr(texts, kind), how))))
            missing |= not planned["cached"]
        held.done = missing or self.asked.probe or self.asked.target is not None
        if self.asked.probe or self.asked.target is not None:
            lines.append("then doses are measured; nothing was written")
        elif not held.done:
            self.console.note("\n".join(lines))
        held.text, held.document = "\n".join(lines), {"curvature": document}
        return held


def _there(side: str, sets: Sequence[FactorSet], texts: bool) -> list[str]:
    """Return what methods may need of the "retain" or "forget" data: what all sets hold, or all, where texts are given."""
    needs = [need for need, source in SOURCE.items() if source == side]
    if not sets:
        return needs if texts else []
    return [need for need in needs if all(any(one.holds(HELD[need], name) for name in one.names) for one in sets)]
