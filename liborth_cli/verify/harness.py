"""`--harness TASKS`: run lm-evaluation-harness on the general and the fine-tuned checkpoint, and read its results.

Gao et al., "A framework for few-shot language model evaluation" (https://github.com/EleutherAI/lm-evaluation-harness). It is
not a dependency: its command `lm_eval` is run where it is installed, in a process of its own, on checkpoints that exist on
disk. What it measures, and with which error, is its own business; the interval is ±1.96 of the standard error it reports.

Options: `harness` (tasks, as lm_eval takes them: "arc_easy,hellaswag"), `limit` (documents a task).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from liborth_cli.errors import BadInput, UsageError
from liborth_cli.verify.result import Metric, Result, Table
from liborth_cli.verify.subject import Subject

CHECK = "harness"
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")


def run(subject: Subject) -> Result:
    """Run the harness and read what it found.

    Args:
        subject: with `options["harness"]`.

    Returns:
        One metric a task, `harness_TASK`, and `harness_TASK_change` against the fine-tuned model.

    Raises:
        UsageError: when the harness is not installed, or the tasks are not a list of names.
        BadInput: when it fails.
    """
    tasks = str(subject.need("options", CHECK, "TASKS, such as arc_easy,hellaswag").get("harness") or "")
    if not re.fullmatch(r"[A-Za-z0-9_.:|-]+(,[A-Za-z0-9_.:|-]+)*", tasks) or tasks.startswith("-"):
        raise UsageError(f"--harness {tasks}: write task names with commas between, such as arc_easy,hellaswag")
    program = shutil.which("lm_eval")
    if program is None:
        raise UsageError("--harness needs lm-evaluation-harness, and there is no lm_eval here: pip install lm_eval")
    places = {"general": subject.source.path}
    if subject.finetuned is not None:
        places["finetuned"] = subject.finetuned.path
    found: dict[str, dict[str, Any]] = {}
    with subject.console.progress("lm-evaluation-harness", len(places), "models") as progress:
        for name, path in places.items():
            found[name] = _evaluate(program, tasks, path if path.is_dir() else path.parent, subject)
            progress.advance(1)
    return _report(found)


def _evaluate(program: str, tasks: str, folder: Path, subject: Subject) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="liborth-harness-") as out:
        command = [program, "--model", "hf", "--model_args", f"pretrained={folder.resolve()}", "--tasks", tasks]
        command += ["--output_path", out, "--device", str(subject.run.device), "--seed", str(subject.seed)]
        if subject.options.get("limit") is not None:
            command += ["--limit", str(subject.options["limit"])]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
        files = sorted(Path(out).rglob("results*.json"))
        if done.returncode or not files:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise BadInput(f"lm_eval failed on {folder.name}: {lines[-1].strip()}")
        try:
            document = json.loads(files[-1].read_text(encoding="utf-8"))
            return {str(task): dict(values) for task, values in document["results"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"lm_eval wrote {files[-1].name} in a form that is not understood") from None


def _report(found: dict[str, dict[str, Any]]) -> Result:
    result, rows, sentences = Result(CHECK, "", facts={"results": found}), [], []
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
    result.verdict = f"lm-evaluation-harness: {'; '.join(sentences) or 'no task gave a number that is known here'}."
    columns = ("task", "measure", ">general", ">its standard error", ">fine-tuned")
    result.figures.append(Table("lm-evaluation-harness", columns, tuple(rows)))
    return result


def _main(values: dict[str, Any], wanted: str | None = None) -> tuple[str, float, float] | None:
    """Return name, value and standard error of a task's main number; keys are "name,filter" and "name_stderr,filter"."""
    for name in (wanted,) if wanted else PREFERRED:
        for key, value in values.items():
            measure, _, filtered = key.partition(",")
            if measure == name and isinstance(value, (int, float)):
                error = values.get(f"{measure}_stderr,{filtered}" if filtered else f"{measure}_stderr")
                return measure, float(value), float(error) if isinstance(error, (int, float)) else float("inf")
    return None
