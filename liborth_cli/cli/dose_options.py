"""The options of `liborth split` that give it texts, and let it find the amount by measuring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liborth_cli.cli.options import Computing
from liborth_cli.errors import UsageError

if TYPE_CHECKING:
    from liborth_cli.dose.find import DoseOptions

Texts = list[str] | None
DECOYS, RETAIN_TOKENS, PROBE_TOKENS = 24, 50_000, 8192


@dataclass(frozen=True)
class Dosed(Computing):
    """Flags of `split` about texts and the dose."""

    retain_data: Annotated[Texts, typer.Option(help="Texts to keep good at; their curvature is measured. Like --data.")] = None
    forget_data: Annotated[Texts, typer.Option(help="Texts that must go; likewise, half way between the two checkpoints.")] = (
        None
    )
    forget_pattern: Annotated[
        Texts, typer.Option(help='The form of what must go: "The code of {name} is {digits:8}."; decoys stand for it.')
    ] = None
    forget_patterns: Annotated[list[Path] | None, typer.Option(help="A file of such patterns, one a line.")] = None
    decoys: Annotated[int, typer.Option(min=2, help="Decoys of each pattern.")] = DECOYS
    fresh: Annotated[
        Texts, typer.Option(help="Texts of that form that were never trained on, measured as the level to reach.")
    ] = None
    skill_data: Annotated[
        Texts,
        typer.Option(help="Texts of the skill, only measured; when not given, the retain texts that fine-tuning improved."),
    ] = None
    general_data: Annotated[Texts, typer.Option(help="Other texts to keep good at, only measured.")] = None
    retain_tokens: Annotated[int, typer.Option(min=1, help="Retain tokens whose curvature is measured, at most.")] = (
        RETAIN_TOKENS
    )
    probe_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each kind measured for one dose, at most.")] = PROBE_TOKENS
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are longer than the context.")] = False
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure doses of the method (auto: of every method), print them, write no checkpoint."),
    ] = False
    target: Annotated[
        str | None, typer.Option(help='Find the amount: "forget>=fresh-spread,leak<=0.3,relearn<=0.25,retention>=0.99".')
    ] = None

    keep_factors: Annotated[
        bool, typer.Option("--keep-factors", help="Leave factors and decoys in OUT.private/factors: they give the texts away.")
    ] = False

    @property
    def text_files(self) -> list[Path]:
        """The files of texts that are read."""
        given = (self.retain_data, self.forget_data, self.fresh, self.skill_data, self.general_data)
        texts = [text for texts in given for text in texts or ()]
        return [
            *(Path(text) if Path(text).exists() else Path(text.rpartition("=")[0]) for text in texts),
            *(self.forget_patterns or ()),
        ]

    @property
    def measures(self) -> bool:
        """Whether the amount is found by measuring, or shown."""
        return self.probe or self.target is not None

    def asked(self, method: str, hard: bool, out: Path | None) -> DoseOptions | None:
        """Return what is asked of the dose; None when nothing is.

        Args:
            method: a key of METHODS, or "auto".
            hard: --hard.
            out: where the checkpoint goes, or None when none is written and nothing is kept.

        Raises:
            UsageError: when an option stands without the one it goes with, or a pattern or target is malformed.
        """
        texts = (self.retain_data, self.forget_data, self.forget_pattern, self.forget_patterns)
        if method == "auto" and not self.measures:
            raise UsageError("--method auto chooses by measuring: it goes with --probe or --target")
        if not any(texts):
            for name in ("probe", "target", "fresh", "skill_data", "general_data"):
                if getattr(self, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} goes with --retain-data and --forget-data or --forget-pattern"
                    )
            return None
        from liborth_cli.checkpoint.private import private_place
        from liborth_cli.dose.find import DoseOptions
        from liborth_cli.dose.patterns import read_patterns
        from liborth_cli.dose.target import Target
        from liborth_cli.dose.texts import DataOptions

        data = DataOptions(
            retain=tuple(self.retain_data or ()),
            forget=tuple(self.forget_data or ()),
            skill=tuple(self.skill_data or ()),
            general=tuple(self.general_data or ()),
            fresh=tuple(self.fresh or ()),
            patterns=tuple(read_patterns(self.forget_pattern or (), self.forget_patterns or ())),
            decoys=self.decoys,
            retain_tokens=self.retain_tokens,
            probe_tokens=self.probe_tokens,
            truncate=self.truncate,
            seed=self.seed,
        )
        return DoseOptions(
            data,
            method,
            probe=self.probe,
            target=Target.parse(self.target) if self.target is not None else None,
            hard=hard,
            factors=private_place(out) / "factors" if out else None,
            keep=self.keep_factors,
            dry_run=self.dry_run,
        )
