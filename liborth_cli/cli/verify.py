"""The options of `liborth verify`: what is verified, against what, with which texts, what must hold; and those of the checks.

The checks say themselves which options they have (verify/check.py), so they are read when this command is used, and not for the
`--help` of another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from liborth_cli.cli.command import Command, Grouped
from liborth_cli.cli.options import Common, Residency, Seed, TextFile, Texts, output, running, spread, under, what
from liborth_cli.cli.options import data as texts

if TYPE_CHECKING:
    from liborth_cli.verify.check import Check, Options

RESIDENT = {Residency.AUTO: None, Residency.STREAM: False, Residency.RESIDENT: True}
FLAG = "check_"
"""Before the name of a parameter that asks for a check."""
checks, single = map(under, ("Checks", "Options of single checks"))


def verify(
    model: Annotated[
        str | None,
        typer.Argument(show_default="the current directory", help="Output of `liborth split`; - reads it from stdin."),
    ] = None,
    reference: Annotated[
        str | None,
        what(show_default="as the manifest says", help="Checkpoint before fine-tuning, when it moved since the split."),
    ] = None,
    finetuned: Annotated[str | None, what(show_default="general and memory together", help="Fine-tuned checkpoint.")] = None,
    retrained: Annotated[
        str | None,
        what(show_default="none", help="Model that learnt the skill and never saw the canaries: the ideal, for --relearn."),
    ] = None,
    memory: Annotated[Path | None, what(show_default="MODEL's own", help="Memory file or directory.")] = None,
    require: Annotated[
        str | None,
        what(
            show_default="what the checks require",
            help='What must hold: "extraction==0, leak<=0.4, relearn_gap_fresh<=0.5, retention>=0.9".',
        ),
    ] = None,
    no_require: Annotated[bool, what("--no-require", help="Measure only: no decision, and exit code 0.")] = False,
    retain_data: Annotated[Texts, texts(help="Held-out text of the skill that must stay.")] = None,
    canary: Annotated[
        TextFile, texts(help="What must be gone: JSON lines with prompt and completion, or text, a line each.")
    ] = None,
    fresh: Annotated[TextFile, texts(help="Rows like --canary that were never trained on.")] = None,
    show_text: Annotated[bool, texts("--show-text", help="Show texts (secrets!) in place of line numbers.")] = False,
    slide: Annotated[bool, texts("--slide", help="Score canaries longer than the context in sliding windows.")] = False,
    everything: Annotated[bool, checks("--all", help="Every check the given data allow.")] = False,
    patient: Annotated[bool, checks("--patient", help="Leave none of the usual checks out because it takes long.")] = False,
    attacks: Annotated[bool, checks("--attacks", help="--relearn in full, --attributes, --rounding and --prompts.")] = False,
    weights: Annotated[Residency, running(help="One block at a time, or all.")] = Residency.AUTO,
    seed: Seed = 0,
    out: Annotated[Path | None, output("-o", "--out", help="Also write the certificate as JSON.")] = None,
    report: Annotated[Path | None, output(help="Also write it as one HTML page, NAME.html.")] = None,
    model_name: Annotated[
        str, output(show_default="as the manifest says", help="What the model is called, for the first page of --report.")
    ] = "",
    owner: Annotated[str, output(show_default="not said", help="Who answers for it, for the first page of --report.")] = "",
    sign: Annotated[Path | None, output(show_default="unsigned", help="Key of OpenSSH that signs the file of --out.")] = None,
    signers: Annotated[
        Path | None,
        what(show_default="anybody or nobody", help="Who may have signed the manifest: OpenSSH's allowed_signers."),
    ] = None,
    force: Annotated[bool, output("--force", help="Replace the files of --out and --report.")] = False,
    resume: Annotated[bool, running("--resume", help="Take the checks that a stopped run finished.")] = False,
    dry_run: Annotated[
        bool, running("--dry-run", help="Say which checks would run and what they cost; measure nothing.")
    ] = False,
    *,
    common: Common,
) -> tuple[Any, Common]:
    """Measure a split beside its controls, attack it, and decide.

    With --canary these must hold unless --require says otherwise: no canary comes out, canaries cannot be told from --fresh
    rows (leak), half of them taught does not bring the other half back (relearn_gap_fresh), and the skill is kept (retention).
    Exits 0, or 5 when something is broken, a requirement is not met over its whole 95 % interval, or nothing can be decided.
    Without the name of a check it runs those the data allow.
    """
    from liborth_cli.verify.opening import Inputs
    from liborth_cli.verify.verify import VerifyOptions

    inputs = Inputs(
        model=model, memory=memory, reference=reference, finetuned=finetuned, retrained=retrained,
        retain=tuple(retain_data or ()), canary=canary, fresh=fresh, seed=seed, show_text=show_text, slide=slide,
        resident=RESIDENT[weights],
    )  # fmt: skip
    options = VerifyOptions(
        inputs, attacks=attacks, everything=everything, patient=patient, require=require, no_require=no_require,
        out=out, report=report, force=force, resume=resume, dry_run=dry_run, key=sign, signers=signers,
        name=model_name, owner=owner,
    )  # fmt: skip
    return options, common


class VerifyCommand(Grouped):
    """`verify` with the options that the checks declare, put together when it is used."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters."""
        return self._whole().get_params(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        self._whole().format_options(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Carry it out."""
        return self._whole().invoke(ctx)

    def _whole(self) -> Any:
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(self.name, cls=Grouped)(_command())
        return typer.main.get_command(app)


def _command() -> Callable[..., None]:
    from liborth_cli.verify.checks import CHECKS

    shared = spread(verify)
    parameters = {name: _flag(check) for name, check in CHECKS.items() if check.words}
    declared: dict[str, inspect.Parameter] = {}
    for check in CHECKS.values():
        declared |= {parameter.name: parameter for parameter in _options(check)}

    def command(**values: Any) -> None:
        from liborth_cli.machine import configure
        from liborth_cli.verify.verify import verify as carry_out

        named = [name for name in parameters if values.pop(FLAG + name)]
        given = {name: values.pop(name) for name in declared}
        options, common = shared(**values)
        options = replace(options, named=(*options.named, *named), settings=_settings(given, declared))
        carry_out(options, configure(common.device, common.threads, world=common.world), common.console)

    command.__doc__ = verify.__doc__
    own = inspect.signature(shared).parameters.values()
    command.__signature__ = inspect.Signature([*own, *parameters.values(), *declared.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return command


def _flag(check: Check) -> inspect.Parameter:
    kind = Annotated[bool, checks(f"--{check.name}", help=check.words)]
    return inspect.Parameter(FLAG + check.name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)


def _options(check: Check) -> list[inspect.Parameter]:
    hints, found = get_type_hints(check.options), []
    for one in fields(check.options):
        kind = Annotated[hints[one.name], single(help=one.metadata["help"], min=one.metadata["min"])]
        default = list(one.default) if isinstance(one.default, tuple) else one.default
        found.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return found


def _settings(given: Mapping[str, Any], declared: Mapping[str, inspect.Parameter]) -> dict[str, Options]:
    """Build each check's options object; a check is there when one of its very own options was given."""
    from liborth_cli.verify.checks import CHECKS

    users = {name: [c for c in CHECKS.values() if name in {f.name for f in fields(c.options)}] for name in given}
    changed = {name for name, value in given.items() if value != declared[name].default}
    asked = {users[name][0].name for name in changed if len(users[name]) == 1}
    return {
        name: CHECKS[name].options(**{f.name: given[f.name] for f in fields(CHECKS[name].options)}) for name in sorted(asked)
    }


COMMAND = Command(
    verify,
    (
        "# is what must go gone, and the skill still there?",
        "liborth verify general/ --retain-data held_out.jsonl --canary secrets.jsonl --fresh unseen.jsonl \\",
        "    --report report.html",
        "# every attack",
        "liborth verify general/ --attacks --retain-data held_out.jsonl --canary secrets.jsonl --fresh unseen.jsonl",
        "# are these the files that the split wrote?",
        "liborth verify general/ --integrity",
    ),
    "checks that are finished are kept, but for those of files",
    kind=VerifyCommand,
    ranks=True,
)
