"""`--loads`: is the model that people load the one that was measured?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from liborth_cli.errors import LiborthError, OutOfResources, first_line
from liborth_cli.verify.check import Check, Options, Part, Work
from liborth_cli.verify.result import Metric, Result, Table
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    from liborth_cli.stream.texts import Row

ROWS, LENGTH = 3, 32
"""Rows that are compared, and tokens of those that are drawn where no text was given."""
MOST = 1e-3
"""Nats a token that float32 may differ by."""
CHEAP = 4e9
"""Bytes of float32 weights up to which it runs without being asked for."""


def run(subject: Subject, options: Options) -> Result:
    """Load the directory with Transformers' own loader, and hold its losses against ours: mean nats a token of three rows.

    Everything else is measured on a model that is put together here, one block at a time. Where the two disagree (a head that
    is tied by one and not by the other, an adapter beside the weights, a tensor that one of them ignores), nothing that was
    measured is about the model that people will load. Rows are the first that were given, or drawn from the vocabulary.

    Raises:
        OutOfResources: when the weights do not fit into memory.
    """
    from liborth_cli.machine import too_large

    if too_much := too_large(_bytes(subject)):
        raise OutOfResources(f"--loads: the model takes {too_much}")
    rows = _rows(subject)
    mine = [float(s.loss.mean()) for s in subject.states.score_rows(rows, subject.states.weights["general"])]
    with subject.console.progress("Transformers' loader", 1, "models", brief=True) as progress:
        theirs = _load_and_score(subject, rows)
        progress.advance(1)
    if isinstance(theirs, str):
        return Result("loads", f"Transformers cannot load it: {theirs}.", False, {"loads": Metric.exact(np.inf, MEANING)})
    losses, ignored = theirs
    worst = max((abs(a - b) for a, b in zip(mine, losses, strict=True)), key=lambda d: d if np.isfinite(d) else np.inf)
    same = bool(worst <= MOST)
    verdict = f"Transformers' own loader gives the losses measured here, to {worst:.1e} nats a token on {len(rows)} rows."
    if not same:
        verdict = (
            f"Transformers' own loader gives ANOTHER model: {worst:.4f} nats a token apart on {len(rows)} rows, so nothing "
            f"that was measured here is about the model that people load{ignored}."
        )
    cells = tuple((subject.label(i, row), a, b) for i, (row, a, b) in enumerate(zip(rows, mine, losses, strict=True)))
    table = Table("Losses, nats a token", ("row", ">measured here", ">by Transformers"), cells)
    return Result("loads", verdict, same, {"loads": Metric.exact(worst, MEANING)}, [table])


MEANING = "largest difference to the losses by Transformers' own loader, nats a token"


def _load_and_score(subject: Subject, rows: list[Row]) -> tuple[list[float], str] | str:
    """Return the losses by Transformers and what it did not load, in words; or why it cannot load the directory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            subject.source.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        model, info = loaded
    except Exception as error:  # loaders fail in many ways, from KeyError to a config's own checks
        return first_line(error, 160)
    model, losses = model.to(subject.run.device).eval(), []
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row.ids).to(subject.run.device)
            log_p = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)
            each = -log_p.gather(-1, ids[1:, None])[:, 0]
            losses.append(float(each[torch.from_numpy(row.keep).to(each.device)].mean()))
    left = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ())]
    return losses, f" (it makes up or ignores {', '.join(sorted(map(str, left))[:3])})" if left else ""


def _rows(subject: Subject) -> list[Row]:
    """Take the first rows that fit the context; draw some where there are none."""
    from liborth_cli.stream.texts import Row

    context = subject.reader.context or LENGTH
    given = [row for name in ("retain", "fresh", "canaries") for row in subject.rows(name) if row.tokens <= context]
    if given:
        return given[:ROWS]
    draw, count = np.random.default_rng(subject.seed), min(LENGTH, context)
    return [
        Row(draw.integers(0, subject.reader.vocabulary, count + 1), np.ones(count, bool), 1.0, f"drawn: row {i + 1}")
        for i in range(ROWS)
    ]


def _bytes(subject: Subject) -> int:
    model = subject.states.model("general")
    return 4 * model.elements


def _lacks(subject: Subject, options: Options) -> str:
    if not subject.source.path.is_dir():
        return "a directory, which Transformers can load"
    try:
        subject.states.model("general")
    except LiborthError as error:
        return f"a language model that can be run here ({error})"
    return ""


def _costs(subject: Subject, options: Options) -> str:
    needed = _bytes(subject)
    return f"{needed / 1e9:.1f} GB of memory; ask for it with --loads" if needed > CHEAP else ""


CHECK = Check(
    name="loads",
    title="The model that people load",
    words="Transformers' own loader gives the losses measured here.",
    part=Part.RELIABILITY,
    run=run,
    metrics=("loads",),
    cheap=True,
    require=f"loads<={MOST:g}",
    lacks=_lacks,
    costs=_costs,
    work=lambda subject, options: Work(read=2 * sum(row.tokens for row in _rows(subject))),
    files=True,
)
