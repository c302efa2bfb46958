"""What `liborth verify` does: open what was named, choose the checks, run them, decide, and write."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from liborth_cli import manifest
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.joint import agree_on_inputs
from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs
from liborth_cli.checkpoint.private import mode_in
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.signing import SUFFIX as SIGNED
from liborth_cli.checkpoint.signing import check_key, sign, signer_of
from liborth_cli.console import SCHEMA_VERSION, Console
from liborth_cli.errors import Stopped, UsageError, VerificationFailed, cut
from liborth_cli.machine import Run
from liborth_cli.ranks import World
from liborth_cli.stream.texts import DataFile
from liborth_cli.verify import report
from liborth_cli.verify.check import Check, Options
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.fresh import check_fresh
from liborth_cli.verify.kept import Kept, decode, encode
from liborth_cli.verify.opening import Inputs, open_subject, provenance
from liborth_cli.verify.outline import Outline
from liborth_cli.verify.power import weakness
from liborth_cli.verify.result import BEYOND, UNASKED, About, Certificate, Edit, Outcome, Result, Untried, Why
from liborth_cli.verify.subject import Need, Subject
from liborth_cli.verify.table import print_certificate
from liborth_cli.verify.verdict import Demand, Working, decide, demands, outcome_of, still_works

LINE = 280
"""Characters of an error line at most; the certificate has the rest."""
PAGES = (".html", ".htm")
"""How the name of a page ends."""
LAST = 253402300799
"""The last second of the year 9999."""
BEYOND_ALL = (
    "attacks with more training, in other languages, by jailbreaks or on hidden states; what is not among the rows given"
)
"""What no check tries."""


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify, how, and what to do with what is found.

    Attributes:
        inputs: what is verified, and with which data.
        named: the checks that were asked for; without any those run that the data allow.
        attacks: every check that attacks, as thoroughly as it can.
        everything: every check that the data allow.
        patient: what would run does, however long it takes.
        settings: check → its own options, where one of them was given: that asks for the check, too.
        require: the text of --require, or None for what the checks require by themselves.
        no_require: measure only: nothing is required, and no decision is no failure.
        out: JSON file to write, or None.
        report: HTML file to write, or None.
        force: replace existing files.
        resume: take the checks that a stopped run finished.
        key: of OpenSSH, to sign the JSON file with; None: unsigned.
        name: of the model, for people; "" for what the manifest calls it.
        owner: who answers for it, or "".
        dry_run: only say what would be done.
        signers: who may have signed the manifest (OpenSSH's allowed_signers); None: signatures are not looked at.
    """

    inputs: Inputs
    named: tuple[str, ...] = ()
    attacks: bool = False
    everything: bool = False
    patient: bool = False
    settings: Mapping[str, Options] = field(default_factory=dict)
    require: str | None = None
    no_require: bool = False
    out: Path | None = None
    report: Path | None = None
    force: bool = False
    resume: bool = False
    dry_run: bool = False
    key: Path | None = None
    signers: Path | None = None
    name: str = ""
    owner: str = ""

    def of(self, check: Check) -> Options:
        """Return a check's own options."""
        given = self.settings.get(check.name) or check.options()
        return check.thorough(given) if self.attacks else given

    @property
    def asked(self) -> tuple[str, ...]:
        """The checks that were asked for, in their order."""
        return (*self.named, *(name for name, check in CHECKS.items() if check.attack and self.attacks))


def verify(options: VerifyOptions, run: Run, console: Console) -> Certificate | Outline:
    """Certify one checkpoint, print what was found, and fail where it does not hold up; or say what would be done.

    Args:
        options: what, how, and where the result goes.
        run: device and threads.
        console: where the table goes (stdout), and progress.

    Returns:
        The certificate: passed, or undecided with `no_require`. Of a dry run what would be done.

    Raises:
        VerificationFailed: when something is broken, a requirement is not met, or nothing can be decided; everything is written
            first.
        LiborthError: the leaf says which; nothing is written then.
    """
    if options.dry_run:
        planned = outline(options, run, console)
        planned.show(console)
        return planned
    certificate = certify(options, run, console)
    print_certificate(certificate, console)
    if certificate.outcome == Outcome.FAILED or (certificate.outcome == Outcome.UNDECIDED and not options.no_require):
        raise VerificationFailed(cut(certificate.sentences[0], LINE))
    return certificate


def certify(options: VerifyOptions, run: Run, console: Console) -> Certificate:
    """Verify one checkpoint and write the files that were asked for; whatever is found is a result.

    Args:
        options: what, how, and where the result goes.
        run: device and threads.
        console: where progress goes.

    Raises:
        LiborthError: when it cannot be measured; nothing is written then.
    """
    asked = _demands(options)
    if run.world.first:
        _check_targets(options)
    if options.key is not None and options.out is None:
        raise UsageError("--sign signs the file of --out: give that, too")
    check_key(options.key)
    with ExitStack() as stack:
        subject = open_subject(options.inputs, run, console, stack)
        sides = [side for side in (subject.general, subject.reference, subject.finetuned) if side is not None]
        if run.world.first:
            _check_targets(options, *sides)
        agree_on_inputs(run.world, sides)
        check_fresh(subject)
        who = signer_of(subject.folder / manifest.FILE, options.signers) if options.signers is not None else ""
        doubts = _weak(subject, asked)
        chosen, skipped = _agreed(run.world, *_choose(subject, options, asked))
        lasting = {name: options.of(CHECKS[name]) for name in chosen if not CHECKS[name].files}
        kept = Kept(subject, options.inputs, lasting, options.resume)
        results = _run(subject, options, chosen, kept)
        certificate = _certify(subject, options, asked, results, skipped)
        certificate.sentences += doubts
        certificate = _signed(certificate, who) if who else certificate
    if run.world.first:
        _write(certificate, options)
        kept.forget()
    return certificate


def outline(options: VerifyOptions, run: Run, console: Console) -> Outline:
    """Say what a verification would do; nothing is measured and nothing is written.

    Args:
        options: what, and how.
        run: device and threads.
        console: where warnings go.

    Raises:
        LiborthError: when it could not be begun.
    """
    asked = _demands(options)
    with ExitStack() as stack:
        subject = open_subject(options.inputs, run, console, stack, probe=False)
        _weak(subject, asked)
        chosen, skipped = _agreed(run.world, *_choose(subject, options, asked))
        return Outline.of(subject, CHECKS, {name: options.of(CHECKS[name]) for name in chosen}, skipped)


def _demands(options: VerifyOptions) -> list[Demand]:
    if options.no_require and options.require is not None:
        raise UsageError("--require and --no-require contradict each other")
    return [] if options.no_require else demands(options.require, CHECKS, options.inputs.canary is not None)


def _weak(subject: Subject, asked: Sequence[Demand]) -> list[str]:
    """Warn of requirements that so many rows can hardly decide, and return the sentences."""
    if not subject.has(Need.CANARIES):
        return []
    rows = subject.data["canaries"].different, subject.data["fresh"].different if subject.has(Need.FRESH) else 0
    known = [(demand.condition, CHECKS[demand.check]) for demand in asked]
    found = [
        weakness(condition, check.power[condition.name], *rows)
        for condition, check in known
        if condition.name in check.power and not check.not_given(subject)
    ]
    for sentence in filter(None, found):
        subject.console.warn(sentence)
    return [f"Too few rows: {sentence}." for sentence in found if sentence]


def _agreed(world: World, chosen: list[str], skipped: Mapping[str, Untried]) -> tuple[list[str], dict[str, Untried]]:
    """Let rank 0 decide which checks run: what a check costs depends on the machine; between ranks goes plain data only."""
    plain = {name: (one.why.value, one.words) for name, one in skipped.items()}
    chosen, plain = world.broadcast((chosen, plain))
    return chosen, {name: Untried(Why(why), words) for name, (why, words) in plain.items()}


def _run(subject: Subject, options: VerifyOptions, chosen: Sequence[str], kept: Kept) -> list[Result]:
    """Run checks, but for those that a stopped run finished; return what they found."""
    results, world = [], subject.run.world
    for number, name in enumerate(chosen, 1):
        what = f"check {number} of {len(chosen)}: {name}"
        found = kept.take(name)
        if world.size > 1:
            found = decode(world.broadcast(found and encode(found)))
        subject.console.note(f"{what}, finished before" if found else f"{what} …")
        if found is None:
            try:
                found = CHECKS[name].run(subject, options.of(CHECKS[name]))
            except Stopped as error:
                error.kept, error.why_not = kept.any, kept.why_not and f"no check is kept: {kept.why_not}"
                raise
            kept.add(name, found)
        results.append(found)
    return results


def _choose(subject: Subject, options: VerifyOptions, asked: Sequence[Demand]) -> tuple[list[str], dict[str, Untried]]:
    """Return the checks to run, in order, and why the others do not.

    Raises:
        UsageError: when one that was named, or that a requirement of the user's needs, cannot run.
    """
    by_name = {*options.named, *options.settings, *(demand.check for demand in asked if not demand.default)}
    named = {*options.asked, *by_name}
    chosen, skipped = [], dict[str, Untried]()
    implied = {demand.check for demand in asked if not CHECKS[demand.check].files}
    implied |= {name for name, check in CHECKS.items() if not check.words and check.cheap}
    if any(CHECKS[name].controls for name in named):
        implied.add("controls")
    for name, check in CHECKS.items():
        usual = name in implied or options.everything or (check.cheap and not options.asked)
        # What else is missing may take building a model to find out: that is asked of a check that would run.
        missing = check.missing(subject, options.of(check)) if name in named or usual else check.not_given(subject)
        if name in named:
            # Of all attacks those are tried that these rows and this machine allow; one that was named is no offer.
            if missing and (name in by_name or check.not_given(subject)):
                raise UsageError(f"--{name} needs {missing}")
            if not missing:
                chosen.append(name)
                continue
            skipped[name] = Untried(Why.LACKING, missing)
        elif missing:
            skipped[name] = Untried(Why.LACKING, missing)
        elif not usual:
            skipped[name] = UNASKED
        elif not (options.everything or (options.patient and check.slow)) and (
            costs := check.costs(subject, options.of(check))
        ):
            skipped[name] = Untried(Why.COSTLY, costs)
        else:
            chosen.append(name)
    if not chosen:
        raise UsageError("nothing to verify: " + "; ".join(f"{name} needs {what.words}" for name, what in skipped.items()))
    return chosen, skipped


def _certify(
    subject: Subject, options: VerifyOptions, asked: Sequence[Demand], results: list[Result], skipped: dict[str, Untried]
) -> Certificate:
    forgetting = any(metric.forgetting for result in results for metric in result.metrics.values())
    requirements = decide(asked, results, skipped, still_works(subject) if forgetting and asked else Working(None))
    ran = {result.check for result in results}
    requirements = [r for r in requirements if not (r.default and CHECKS[r.check].files and r.check not in ran)]
    outcome, first = outcome_of(subject, CHECKS, results, requirements, (*options.asked, *options.settings))
    sentences = [first, *(r.sentence for r in requirements if r.met is not False and r.sentence not in first)]
    sentences += [result.verdict for result in results if result.passed is not False]
    seen, required = provenance(subject), [demand.condition.text for demand in asked]
    seen = replace(seen, checks=sorted(ran), require=required, retrained=options.inputs.retrained)
    certificate = Certificate(
        subject.source.title,
        outcome=outcome,
        sentences=sentences,
        requirements=requirements,
        results=results,
        not_tried={**skipped, BEYOND: Untried(Why.BEYOND, BEYOND_ALL)},
        provenance=seen,
        about=_about(subject, options),
    )
    certificate.sentences.append(certificate.left_out if skipped else "Every check was tried.")
    return certificate


def _about(subject: Subject, options: VerifyOptions) -> About:
    document, edit = subject.manifest, None
    titles = {side: one.title for side, one in document.inputs.items()} if document else {}
    if isinstance(document, manifest.Split):
        asked, divided = document.parameters, sum(one.action == "split" for one in document.tensors.values())
        edit = Edit(asked.method, asked.amount, divided, len(document.tensors), document.totals.removed)
    sides = {side: titles.get(side, "") for side in ("finetuned", "reference") if titles.get(side) != "none"}
    weights = len(document.weights) if document else 0
    return About(options.name, options.owner, _today(), **sides, weights=weights, edit=edit)


def _today() -> str:
    """Return the day in UTC, or that of SOURCE_DATE_EPOCH (reproducible-builds.org), where it is set."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime("%Y-%m-%d", time.gmtime(min(int(seconds), LAST) if seconds.isdecimal() else None))


def _check_targets(options: VerifyOptions, *read: Checkpoint | None) -> None:
    """Refuse what cannot be written, or is an input, before the work and not after it."""
    inputs = options.inputs
    named = [
        inputs.model or ".",
        inputs.reference,
        inputs.finetuned,
        inputs.retrained,
        inputs.memory,
    ]
    texts = [("--retain-data", name) for name in inputs.retain]
    texts += [(option, name) for option, name in (("--canary", inputs.canary), ("--fresh", inputs.fresh)) if name]
    places = [Path(name).expanduser() for name in named if name is not None and name != "-"]
    places += [file.path for option, name in texts if not (file := DataFile.parse(name, option)).hub]
    places += [checkpoint.path for checkpoint in read if checkpoint is not None]
    targets = [(options.out, "--out"), (options.report, "--report")]
    targets += [(_signature(options.out), "--sign")] if options.out and options.key else []
    check_outputs([Place(path, flag, Kind.FILE) for path, flag in targets if path], places, options.force)
    if options.report and options.report.suffix.lower() not in PAGES:
        raise UsageError(f"--report {options.report}: a browser shows a page only if its name ends in .html; name it so")


def _signed(certificate: Certificate, who: str) -> Certificate:
    """Say whose word the manifest is, and whether the files were held against it."""
    found = next((result.passed for result in certificate.results if result.check == "integrity"), None)
    rest = {
        True: "and the files are what it says",
        False: "but the files are not what it says",
        None: "but the files were not held against it: add --integrity",
    }[found]
    sentences = [*certificate.sentences, f"The manifest is signed by {who}, {rest}."]
    seen = certificate.provenance and replace(certificate.provenance, signed_by=who)
    return replace(certificate, sentences=sentences, provenance=seen)


def _write(certificate: Certificate, options: VerifyOptions) -> None:
    if options.out:
        document = {"schema_version": SCHEMA_VERSION, **certificate.to_json()}
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_file(options.out, text.encode(), mode_in(options.out.absolute().parent))
        if options.key:
            write_file(_signature(options.out), sign(text.encode(), options.key))
    if options.report:
        report.write(options.report, certificate)


def _signature(file: Path) -> Path:
    return file.with_name(file.name + SIGNED)
