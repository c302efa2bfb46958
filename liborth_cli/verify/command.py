"""What `liborth verify` does, once its options are parsed: choose the checks, run them, decide, and write."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.writer import write_file
from liborth_cli.console import SCHEMA_VERSION, Console
from liborth_cli.errors import OutputConflict, UsageError, VerificationFailed
from liborth_cli.machine import Run
from liborth_cli.verify import CHECKS
from liborth_cli.verify.open import Request, open_subject, provenance
from liborth_cli.verify.result import Certificate, Requirement, Result
from liborth_cli.verify.subject import Subject
from liborth_cli.verify.table import print_certificate
from liborth_cli.verify.verdict import Condition, checks_for, decide, parse

CHEAP = ("integrity", "lmc", "canary", "sweep", "entanglement", "samples", "controls")
"""Checks that run when none is named; the others cost minutes, train, or need files of their own."""
WITH_CONTROLS = ("lmc", "canary", "sweep", "entanglement", "attacks", "tofu")
"""Checks whose numbers mean little without the controls beside them."""


@dataclass(frozen=True)
class Wanted:
    """What to run and what to do with it.

    Attributes:
        named: the checks the user named.
        everything: --all.
        require: the text of --require.
        out: JSON file to write, or None.
        report: HTML file to write, or None.
        force: replace existing files.
    """

    named: tuple[str, ...] = ()
    everything: bool = False
    require: str | None = None
    out: Path | None = None
    report: Path | None = None
    force: bool = False


def verify(request: Request, wanted: Wanted, run: Run, console: Console) -> Certificate:
    """Verify one checkpoint and print what was found.

    Args:
        request: what is verified, and with which data.
        wanted: which checks, which requirements, and where the result goes.
        run: device and threads.
        console: where the table goes (stdout), and progress.

    Returns:
        The certificate.

    Raises:
        VerificationFailed: when something is broken or a requirement is not met; everything is written first.
        LiborthError: the leaf says which; nothing is written then.
    """
    conditions = parse(wanted.require)
    write_report = _report_writer() if wanted.report else None
    for path in filter(None, (wanted.out, wanted.report)):
        _check_target(path, wanted.force)
    with ExitStack() as stack:
        subject = open_subject(request, run, console, stack)
        names, skipped = _choose(subject, wanted, conditions)
        demanded = {*wanted.named, *checks_for(conditions, [])}
        results = []
        for name in names:
            console.note(f"{name} …")
            result = _run(subject, name, name in demanded)
            if isinstance(result, str):
                skipped[name] = result
            else:
                results.append(result)
        requirements = decide(conditions, results)
        certificate = _certify(subject, results, requirements, skipped)
        certificate.provenance = {**provenance(subject, request), "not_run": skipped, "checks": [r.check for r in results]}
        certificate.provenance["require"] = [condition.text for condition in conditions]
    if wanted.out:
        temporary = wanted.out.with_name(wanted.out.name + ".tmp")
        write_file(temporary, _document(certificate))
        temporary.replace(wanted.out)
    if wanted.report and write_report:
        write_report(wanted.report, certificate)
    print_certificate(certificate, skipped, console)
    if not certificate.passed:
        raise VerificationFailed(certificate.sentences[0])
    return certificate


def _choose(subject: Subject, wanted: Wanted, conditions: Sequence[Condition]) -> tuple[list[str], dict[str, str]]:
    """Return the checks to run, in order, and those that cannot run with the reason."""
    skipped: dict[str, str] = {}
    if wanted.named and not wanted.everything:
        names = list(wanted.named)
        if any(name in WITH_CONTROLS for name in names) and not lacking(subject, "controls"):
            names.append("controls")
    else:
        names = []
        for name in CHECKS if wanted.everything else CHEAP:
            why = lacking(subject, name)
            if why and name not in wanted.named:
                skipped[name] = why
            else:
                names.append(name)
        names += [name for name in wanted.named if name not in names]
    names += checks_for(conditions, names)
    for name in names:
        if importlib.util.find_spec(f"liborth_cli.verify.{CHECKS[name]}") is None:
            raise UsageError(f"--{name} is not built in")
    return [name for name in CHECKS if name in names], skipped


def lacking(subject: Subject, name: str) -> str:
    """Say in words what a check would need that was not given; empty when it can run."""
    if importlib.util.find_spec(f"liborth_cli.verify.{CHECKS[name]}") is None:
        return "not built in"
    whole = subject.finetuned or subject.grown
    needs: dict[str, tuple[tuple[Any, str], ...]] = {
        "integrity": ((subject.manifest, "a manifest"),),
        "lmc": ((subject.retain, "--retain-data"), (subject.reference or subject.finetuned, "--reference")),
        "canary": ((subject.canaries, "--canary"),),
        "sweep": ((whole, "the memory file or --finetuned"), (subject.canaries or subject.retain, "--canary")),
        "entanglement": (
            (subject.reference, "--reference"), (subject.finetuned, "the memory file or --finetuned"),
            (subject.retain or subject.options.get("factors"), "--retain-data"),
        ),
        "samples": ((subject.options.get("samples"), "--samples"), (subject.finetuned, "the memory file or --finetuned")),
        "controls": (
            (subject.reference, "--reference"), (whole, "the memory file or --finetuned"), (subject.retain, "--retain-data"),
        ),
        "tofu": ((subject.options.get("tofu"), "--tofu"),),
        "reasoning": ((any(subject.options.get(n) for n in ("gsm8k", "mmlu", "harness")), "--gsm8k, --mmlu or --harness"),),
    }  # fmt: skip
    return " and ".join(what for value, what in needs.get(name, ()) if not value)


def _run(subject: Subject, name: str, demanded: bool) -> Result | str:
    """Run one check; when nobody named it and it lacks something, return why it was left out."""
    module = importlib.import_module(f"liborth_cli.verify.{CHECKS[name]}")
    try:
        return module.run(subject)
    except UsageError as error:
        if demanded:
            raise
        return str(error)


def _certify(subject: Subject, results: list[Result], requirements: list[Requirement], skipped: dict[str, str]) -> Certificate:
    broken = [result for result in results if result.passed is False]
    missed = [requirement for requirement in requirements if not requirement.met]
    passed = not broken and not missed
    sentences = []
    if broken or missed:
        sentences.append(" ".join([*(r.verdict for r in broken), *(r.sentence for r in missed)]))
    elif requirements:
        sentences.append(f"All {len(requirements)} requirements are met, over their whole 95 % intervals.")
    else:
        sentences.append("Nothing that was checked is broken. No requirement was given, so nothing was decided.")
    sentences += [r.sentence for r in requirements if r.met] + [r.verdict for r in results if r.passed is not False]
    if not results:
        why = "; ".join(f"{name} needs {what}" for name, what in skipped.items())
        raise UsageError(f"nothing to verify: {why}")
    return Certificate(subject.source.title, passed, sentences, requirements, results)


def _document(certificate: Certificate) -> bytes:
    document = {"schema_version": SCHEMA_VERSION, **certificate.to_json()}
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise OutputConflict(f"{path}: a directory; name a file")
    if not path.parent.is_dir():
        raise OutputConflict(f"{path}: there is no directory {path.parent}")
    if path.exists() and not force:
        raise OutputConflict(f"{path}: exists; replace it with --force")


def _report_writer() -> Callable[[Path, Certificate], None]:
    if importlib.util.find_spec("liborth_cli.verify.report") is None:
        raise UsageError("--report is not built in; --out FILE.json writes the same content")
    return importlib.import_module("liborth_cli.verify.report").write
