"""lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness), where it is installed.

Its command `lm_eval` is run in a process of its own, on checkpoints that exist on disk. What it measures, and with which error,
is its own business; the interval is ±1.96 of the standard error it reports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from liborth_cli.errors import BadInput, UsageError
from liborth_cli.verify.result import Line, Metric, Result, Table
from liborth_cli.verify.subject import Subject

PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
"""The harness's measures, the one that is reported first."""
VALUES = (str, int, float, type(None))
Tasks = dict[str, Line]
"""What it says of each task, by the names of its measures."""


def evaluate(subject: Subject, tasks: str, limit: int | None) -> dict[str, Tasks]:
    """Run the harness on the general model, and on the fine-tuned one where that exists on disk.

    Args:
        subject: what is verified.
        tasks: names, with commas between.
        limit: documents of a task at most.

    Returns:
        State → task → measure → value.

    Raises:
        UsageError: when these are no names, or the harness is not installed.
        BadInput: when it fails.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.:|-]+(,[A-Za-z0-9_.:|-]+)*", tasks) or tasks.startswith("-"):
        raise UsageError("--harness: write task names with commas between, such as arc_easy,hellaswag")
    program = shutil.which("lm_eval")
    if program is None:
        raise UsageError("--harness needs lm-evaluation-harness, and there is no lm_eval here: pip install lm_eval")
    places = {"general": subject.source.path}
    if subject.finetuned is not None:
        places["finetuned"] = subject.finetuned.path
    options = ["--tasks", tasks, "--device", str(subject.run.device), "--seed", str(subject.seed)]
    options += ["--limit", str(limit)] if limit is not None else []
    found: dict[str, Tasks] = {}
    with subject.console.progress("lm-evaluation-harness", len(places), "models") as progress:
        for name, path in places.items():
            found[name] = _evaluate(program, path if path.is_dir() else path.parent, options)
            progress.advance(1)
    return found


def _evaluate(program: str, folder: Path, options: list[str]) -> Tasks:
    with tempfile.TemporaryDirectory(prefix="liborth-harness-") as out:
        command = [program, "--model", "hf", "--model_args", f"pretrained={folder.resolve()}", "--output_path", out, *options]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
        files = sorted(Path(out).rglob("results*.json"))
        if done.returncode or not files:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise BadInput(f"lm_eval failed on {folder.name}: {lines[-1].strip()}")
        try:
            results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
            return {task: {k: v for k, v in some.items() if isinstance(v, VALUES)} for task, some in results.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"lm_eval wrote {files[-1].name} in a form that is not understood") from None


def report(found: dict[str, Tasks], result: Result) -> str:
    """Add what the harness found to a result, and say it in a sentence.

    Args:
        found: of `evaluate`.
        result: gets a metric a task, `harness_TASK`, with `harness_TASK_change`, and a table.
    """
    rows, sentences = [], []
    for task, values in found["general"].items():
        after = _main(values)
        if after is None:
            continue
        name, value, error = after
        metric = Metric(value, value - 1.96 * error, value + 1.96 * error, f"{name} of {task}, by lm-evaluation-harness")
        key = re.sub(r"\W+", "_", task)
        result.metrics[f"harness_{key}"] = metric
        before = _main(found.get("finetuned", {}).get(task, {}), name)
        rows.append((task, name, value, error, before[1] if before else None))
        words = f"{task} ({name}) {value:.3f}"
        if before:
            # The errors are taken for independent, which is too wide for two models on the same documents.
            change, spread = value - before[1], 1.96 * (error**2 + before[2] ** 2) ** 0.5
            result.metrics[f"harness_{key}_change"] = Metric(change, change - spread, change + spread, f"{name}, change")
            words += f", fine-tuned {before[1]:.3f}"
        sentences.append(words)
    verdict = f"lm-evaluation-harness: {'; '.join(sentences) or 'no task gave a number that is known here'}."
    columns = ("task", "measure", ">general", ">its standard error", ">fine-tuned")
    result.figures.append(Table("lm-evaluation-harness", columns, tuple(rows)))
    return verdict


def _main(values: Line, wanted: str | None = None) -> tuple[str, float, float] | None:
    """Return name, value and standard error of a task's main number; keys are "name,filter" and "name_stderr,filter"."""
    for name in (wanted,) if wanted else PREFERRED:
        for key, value in values.items():
            measure, _, filtered = key.partition(",")
            if measure == name and isinstance(value, (int, float)):
                error = values.get(f"{measure}_stderr,{filtered}" if filtered else f"{measure}_stderr")
                return measure, float(value), float(error) if isinstance(error, (int, float)) else float("inf")
    return None
