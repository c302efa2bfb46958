"""Run the command in this process, the way a shell would, and hand back what it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from liborth_cli.cli import main
from liborth_cli.curvature.factor_set import FactorSet


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> Outcome:
    """Run `liborth ARGS`."""
    import signal

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["liborth", *map(str, args)])
    code: int | str | None = 0
    try:
        main.run()
    except SystemExit as stop:
        code = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    text = capsys.readouterr()
    return Outcome(int(code or 0), text.out, text.err)


def estimate(model: Path, data: Path | list[str | Path], out: Path, **changes: object) -> FactorSet:
    """Estimate through the library, quietly, and open the result."""
    from liborth_cli.console import Console
    from liborth_cli.curvature import estimate as library
    from liborth_cli.curvature.plan import CurvatureOptions, Resources
    from liborth_cli.machine import configure

    extra = {key: changes.pop(key) for key in ("memory", "scratch", "weights") if key in changes}
    reference = changes.pop("reference", None)
    run = configure(str(changes.pop("device", "cpu")), 1, bool(changes.pop("force", False)), bool(changes.pop("resume", False)))
    options = CurvatureOptions(**changes)  # type: ignore[arg-type]
    resources = Resources(extra.get("memory", 8 << 30), extra.get("scratch"), extra.get("weights", "auto"))  # type: ignore[arg-type]
    files = [str(path) for path in (data if isinstance(data, list) else [data])]
    base = str(reference) if reference else None
    request = library.CurvatureRequest(str(model), tuple(files), out, options, resources, base)
    library.estimate(request, run, Console(quiet=True, as_json=False))
    return FactorSet.open(out)
