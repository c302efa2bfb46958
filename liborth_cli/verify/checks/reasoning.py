r"""`--reasoning`: does the edit cost reasoning? The fine-tuned and the general model, question by question.

- **GSM8K** (Cobbe et al. 2021, arXiv 2110.14168): JSON lines with `question` and `answer`, whose last line is "#### number".
  The prompt is "Question: …\nAnswer: …" for each of the solved examples (`--gsm8k-train`, 8 of them unless the context holds
  fewer) and then the question. The answer is written greedily, at most 256 tokens, cut where a new question begins; its number
  is the one after "####", else the last one. Right is equal as a number. Needs all weights in memory.
- **MMLU** (Hendrycks et al. 2020, arXiv 2009.03300): csv files, either `question,choice0,…,choice3,answer` with a header, or
  the original six columns without one; in DIR, or DIR/test with five solved examples a subject from DIR/dev. The answer is
  the letter among A to D with the highest log-likelihood after "Answer:". Streams.
- **lm-evaluation-harness** (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness), where it is installed: its
  command `lm_eval` is run in a process of its own, on checkpoints that exist on disk. What it measures, and with which error,
  is its own business; the interval is ±1.96 of the standard error it reports.

Before and after are compared on the same questions: the change in accuracy with a paired bootstrap interval, and McNemar's
exact test. A question that does not fit the context with no example at all is left out, and counted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liborth_cli.errors import BadInput, OutOfResources, UsageError
from liborth_cli.stream.records import read_json_lines
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Options, option
from liborth_cli.verify.result import Metric, Result, Table
from liborth_cli.verify.rows import evenly
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.stream.encoder import TextEncoder

LETTERS = "ABCD"
WRITTEN = 256
SHOTS = {"gsm8k": 8, "mmlu": 5}
TITLES = {"gsm8k": "GSM8K", "mmlu": "MMLU"}
NUMBER = re.compile(r"(?:(?<![\w)%])[-−])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?")
"""A minus after a digit is a dash: 15-20 are two numbers."""
PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
"""The harness's measures, the one that is reported first."""


@dataclass(frozen=True)
class ReasoningOptions(Options):
    """Which questions, and how they are asked."""

    gsm8k: Path | None = option(None, "GSM8K test.jsonl, for --reasoning.")
    gsm8k_train: Path | None = option(None, "Solved examples to show, for --gsm8k.")
    mmlu: Path | None = option(None, "MMLU directory, for --reasoning.")
    harness: str | None = option(None, "Tasks for lm-evaluation-harness, for --reasoning.")
    shots: int | None = option(None, "Solved examples shown at most (GSM8K 8, MMLU 5).", least=0)
    limit: int | None = option(None, "Questions of each benchmark at most.", least=1)


@dataclass(frozen=True)
class Problem:
    """One problem of GSM8K.

    Attributes:
        question: its text.
        answer: the worked solution, with its "#### number".
        number: the number alone, without separators.
    """

    question: str
    answer: str
    number: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class Choice:
    """One question of MMLU.

    Attributes:
        question: its text.
        choices: four answers.
        answer: number of the right one.
        subject: what it is about, from the file's name.
        where: file and row.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    where: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.question, *lines, "Answer:"])


@dataclass(frozen=True)
class Answers:
    """What every model answered.

    Attributes:
        right: by state, (questions,), bool.
        left_out: questions that do not fit the context.
        shots: solved examples shown, over the questions: fewest and most.
        facts: for the JSON document.
    """

    right: dict[str, np.ndarray]
    left_out: int
    shots: tuple[int, int]
    facts: dict[str, Any] = field(default_factory=dict)


def run(subject: Subject, options: ReasoningOptions) -> Result:
    """Measure the benchmarks that are given.

    Returns:
        `gsm8k`, `mmlu`: accuracy of the general model; `gsm8k_change`, `mmlu_change`: general minus fine-tuned; and one metric
        a task of the harness, `harness_TASK`, with `harness_TASK_change`.

    Raises:
        UsageError: when the harness is not installed.
        BadInput: when a file is not of its format, or no question fits the context.
    """
    result, sentences, rows = Result("reasoning", ""), [], []
    if options.harness is not None:
        # First, for it may turn out not to be installed.
        sentences.append(_harness(subject, options, result))
    for name, measure, given in (("gsm8k", _gsm8k, options.gsm8k), ("mmlu", _mmlu, options.mmlu)):
        if given is None:
            continue
        try:
            found = measure(subject, subject.reader.tokenizer("reasoning"), options)
        except OutOfResources as error:
            sentences.append(f"{TITLES[name]} was not measured: {error}.")
            continue
        sentences.append(_judge(name, found, subject, result))
        rows += [
            (TITLES[name], state, float(len(right)), float(right.mean()), float(found.shots[1]))
            for state, right in found.right.items()
        ]
    if rows:
        columns = ("benchmark", "model", ">questions", ">right", ">examples shown")
        result.figures.append(Table("Reasoning", columns, tuple(rows)))
    result.verdict = " ".join(sentences)
    return result


def _judge(name: str, found: Answers, subject: Subject, result: Result) -> str:
    changes = dict[str, float]()
    after, title = found.right["general"], TITLES[name]
    metric = statistics.share(after, statistics.alone(len(after)), f"share of {title} questions the general model gets right")
    result.metrics[name] = metric
    sentence = f"{title}: {metric.value:.1%} of {len(after)} questions right ({metric.low:.1%} to {metric.high:.1%})"
    before = found.right.get("finetuned")
    if before is not None:
        both = np.stack([after, before], 1).astype(np.float64)
        alone = statistics.alone(len(after))
        change = statistics.mean(both[:, 0] - both[:, 1], alone, subject.seed, "accuracy, general minus fine-tuned")
        p = statistics.mcnemar(before, after)
        result.metrics[f"{name}_change"] = change
        changes = {"lost": int((before & ~after).sum()), "gained": int((~before & after).sum()), "mcnemar_p": p}
        verdict = "no change that could not be luck" if p > 0.05 else "a change that is not luck"
        sentence += (
            f", fine-tuned {before.mean():.1%}: {change.value:+.1%} ({change.low:+.1%} to {change.high:+.1%}), {verdict} "
            f"(McNemar p = {p:.2g})"
        )
    if found.left_out:
        sentence += f"; {found.left_out} more did not fit the context"
    result.facts[name] = {**found.facts, **changes, "left_out": found.left_out, "examples": list(found.shots)}
    return sentence + "."


# GSM8K ------------------------------------------------------------------------------------------------------------------


def _gsm8k(subject: Subject, encoder: TextEncoder, options: ReasoningOptions) -> Answers:
    from liborth_cli.measure.generate import generate, hold

    assert options.gsm8k is not None
    states, given = subject.states, options.gsm8k_train
    problems = evenly(read_problems(options.gsm8k), options.limit)
    solved = [(problem.prompt, f" {problem.answer}") for problem in read_problems(given)] if given else []
    # Room is kept for half of the answer: a model that is cut off then has at least had the chance.
    room = (subject.reader.context or 1 << 30) - WRITTEN // 2
    shots = SHOTS["gsm8k"] if options.shots is None else options.shots
    asked = _fit([(p, p.prompt, solved[:shots]) for p in problems], encoder, room, str(options.gsm8k))
    prompts = [encoder.prompt(text) for _, text, _ in asked]
    right, written = {}, {}
    names = states.of(STATES)
    with subject.console.progress("GSM8K", len(names) * len(asked), "questions") as progress:
        for state in names:
            model = states.model(state)
            hold(model, states.weights[state])
            texts = [encoder.decode(ids) for ids in generate(model, prompts, WRITTEN, advance=progress.advance)]
            right[state] = np.array([same_number(extract(t), p.number) for t, (p, _, _) in zip(texts, asked, strict=True)])
            written[state] = texts
    found = Answers(right, len(problems) - len(asked), _range(asked))
    if subject.show_text:
        found.facts["written"] = [
            {"question": p.question, "number": p.number, "written": text}
            for (p, _, _), text in zip(asked, written["general"], strict=True)
        ]
    return found


def extract(text: str) -> str | None:
    """Return the number a written answer gives: the one after "####", else its last; None where there is none."""
    text = re.split(r"\n\s*Question:|\n\n\n", text)[0]
    marked = re.search(r"####\s*\$?\s*(" + NUMBER.pattern + ")", text)
    numbers = [marked[1]] if marked else NUMBER.findall(text)
    return numbers[-1].replace(",", "").replace("−", "-") if numbers else None


def same_number(found: str | None, wanted: str) -> bool:
    """Compare two numbers as numbers: 18, 18.0 and 36/2 are the same."""
    try:
        return found is not None and Fraction(found) == Fraction(wanted)
    except (ValueError, ZeroDivisionError):
        return False


# MMLU -------------------------------------------------------------------------------------------------------------------


def _mmlu(subject: Subject, encoder: TextEncoder, options: ReasoningOptions) -> Answers:
    assert options.mmlu is not None
    reader, shots = subject.reader, SHOTS["mmlu"] if options.shots is None else options.shots
    questions, examples = read_choices(options.mmlu)
    questions = evenly(questions, options.limit)
    solved = {group: [(c.prompt, f" {LETTERS[c.answer]}") for c in some] for group, some in examples.items()}
    answers = [f" {letter}" for letter in LETTERS]
    room = (reader.context or 1 << 30) + 1 - max(len(encoder.prompt(answer)) for answer in answers)
    asked = _fit([(c, c.prompt, solved.get(c.subject, [])[:shots]) for c in questions], encoder, room, str(options.mmlu))
    rows = [
        reader.answer(text, answers[letter], choice.where) for choice, text, _ in asked for letter in range(len(choice.choices))
    ]
    ends = np.cumsum([len(choice.choices) for choice, _, _ in asked])[:-1]
    wanted = np.array([choice.answer for choice, _, _ in asked])
    right, names = {}, subject.states.of(STATES)
    with subject.console.progress("MMLU", len(names) * sum(row.tokens for row in rows), "tokens") as progress:
        for state in names:
            scores = subject.states.score_rows(rows, subject.states.weights[state], progress.advance)
            losses = np.array([score.loss.sum() for score in scores])
            right[state] = np.array([each.argmin() for each in np.split(losses, ends)]) == wanted
    found = Answers(right, len(questions) - len(asked), _range(asked))
    groups = np.array([choice.subject for choice, _, _ in asked])
    found.facts["subjects"] = {
        str(group): {state: float(some[groups == group].mean()) for state, some in right.items()} for group in np.unique(groups)
    }
    return found


# Prompts ----------------------------------------------------------------------------------------------------------------


def _fit(
    questions: Sequence[tuple[Any, str, Sequence[tuple[str, str]]]], encoder: TextEncoder, room: int, where: str
) -> list[tuple[Any, str, int]]:
    """Put as many solved examples before each question as fit.

    Args:
        questions: each with its prompt and the examples to show, prompt and answer.
        encoder: the tokenizer.
        room: tokens a prompt may have.
        where: for the error line.

    Returns:
        The questions that fit, each with its whole prompt and the number of examples in it.

    Raises:
        BadInput: when none fits.
    """
    found, shortest, length = [], 1 << 62, 0
    for question, prompt, examples in questions:
        for count in range(len(examples), -1, -1):
            text = "".join(f"{asked}{answer}\n\n" for asked, answer in examples[:count]) + prompt
            length = len(encoder.prompt(text))
            if length <= room:
                found.append((question, text, count))
                break
        else:
            shortest = min(shortest, length)
    if not found:
        raise BadInput(
            f"{where}: no question fits the model's context; the shortest has {shortest:,} tokens, room is for {room:,}"
        )
    return found


def _range(asked: Sequence[tuple[Problem | Choice, str, int]]) -> tuple[int, int]:
    counts = [count for _, _, count in asked]
    return min(counts), max(counts)


# Files ------------------------------------------------------------------------------------------------------------------


def read_problems(file: Path) -> list[Problem]:
    """Read GSM8K's JSON lines.

    Raises:
        BadInput: when the file is missing or a line is not of this format.
    """
    problems = []
    for where, fields in read_json_lines(file):
        question, answer = (fields.get(name) if isinstance(fields, dict) else None for name in ("question", "answer"))
        found = re.search(r"####\s*(-?[\d,]*\.?\d+)\s*$", answer) if isinstance(answer, str) else None
        if found is None or not isinstance(question, str) or not isinstance(answer, str):
            raise BadInput(f'{where}: needs a question, and an answer that ends in "#### number"')
        problems.append(Problem(question, answer, found[1].replace(",", "")))
    if not problems:
        raise BadInput(f"{file}: no problems in it")
    return problems


def read_choices(folder: Path) -> tuple[list[Choice], dict[str, list[Choice]]]:
    """Read MMLU's csv files.

    Args:
        folder: a directory with csv files, or with `test` and perhaps `dev` below it; or one csv file.

    Returns:
        The questions, subject by subject, and solved examples by subject.

    Raises:
        BadInput: when there are none, or a row is not of this format.
    """
    if folder.is_file():
        return _choices(folder), {}
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such file or directory; --mmlu takes MMLU's csv files")
    tests = folder / "test" if (folder / "test").is_dir() else folder
    questions = [choice for file in sorted(tests.glob("*.csv")) for choice in _choices(file)]
    if not questions:
        raise BadInput(f"{tests}: no csv files with questions here; --mmlu takes MMLU's")
    examples: dict[str, list[Choice]] = defaultdict(list)
    for file in sorted((folder / "dev").glob("*.csv")) if tests != folder else []:
        for choice in _choices(file):
            examples[choice.subject].append(choice)
    return questions, dict(examples)


def _choices(file: Path) -> list[Choice]:
    subject = re.sub(r"_(test|dev|val)$", "", file.stem)
    try:
        rows = list(csv.reader(io.StringIO(_text(file), newline=""), strict=True))
    except csv.Error:
        raise BadInput(f"{file}: not a table") from None
    if rows and [cell.strip().lower() for cell in rows[0]][:1] == ["question"]:
        rows, first = rows[1:], 2
    else:
        first = 1
    found = []
    for number, row in enumerate(rows, first):
        answer = row[5].strip() if len(row) == 6 else ""
        index = (
            LETTERS.find(answer) if len(answer) == 1 and answer in LETTERS else int(answer) if answer in list("0123") else -1
        )
        if index < 0:
            raise BadInput(f"{file}: row {number}: needs a question, four choices and the answer (0 to 3, or A to D)")
        found.append(Choice(row[0], tuple(row[1:5]), index, subject, f"{file}: row {number}"))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); --mmlu needs it") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 text (byte {error.start:,})") from None


# The harness ------------------------------------------------------------------------------------------------------------


def _harness(subject: Subject, options: ReasoningOptions, result: Result) -> str:
    """Run lm-evaluation-harness, add what it found, and say it."""
    tasks = options.harness or ""
    if not re.fullmatch(r"[A-Za-z0-9_.:|-]+(,[A-Za-z0-9_.:|-]+)*", tasks) or tasks.startswith("-"):
        raise UsageError("--harness: write task names with commas between, such as arc_easy,hellaswag")
    program = shutil.which("lm_eval")
    if program is None:
        raise UsageError("--harness needs lm-evaluation-harness, and there is no lm_eval here: pip install lm_eval")
    places = {"general": subject.source.path}
    if subject.finetuned is not None:
        places["finetuned"] = subject.finetuned.path
    found: dict[str, dict[str, Any]] = {}
    with subject.console.progress("lm-evaluation-harness", len(places), "models") as progress:
        for name, path in places.items():
            found[name] = _evaluate(program, path if path.is_dir() else path.parent, subject, options)
            progress.advance(1)
    result.facts["harness"] = {"results": found}
    return _read_harness(found, result)


def _evaluate(program: str, folder: Path, subject: Subject, options: ReasoningOptions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="liborth-harness-") as out:
        command = [program, "--model", "hf", "--model_args", f"pretrained={folder.resolve()}", "--tasks", str(options.harness)]
        command += ["--output_path", out, "--device", str(subject.run.device), "--seed", str(subject.seed)]
        if options.limit is not None:
            command += ["--limit", str(options.limit)]
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


def _read_harness(found: dict[str, dict[str, Any]], result: Result) -> str:
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


def _main(values: dict[str, Any], wanted: str | None = None) -> tuple[str, float, float] | None:
    """Return name, value and standard error of a task's main number; keys are "name,filter" and "name_stderr,filter"."""
    for name in (wanted,) if wanted else PREFERRED:
        for key, value in values.items():
            measure, _, filtered = key.partition(",")
            if measure == name and isinstance(value, (int, float)):
                error = values.get(f"{measure}_stderr,{filtered}" if filtered else f"{measure}_stderr")
                return measure, float(value), float(error) if isinstance(error, (int, float)) else float("inf")
    return None


def _lacks(subject: Subject, options: ReasoningOptions) -> str:
    given = options.gsm8k or options.mmlu or options.harness is not None
    return "" if given else "--gsm8k FILE, --mmlu DIR or --harness TASKS"


CHECK = Check(
    name="reasoning",
    title="Reasoning",
    words="GSM8K and MMLU, before and after.",
    run=run,
    metrics=("gsm8k", "gsm8k_change", "mmlu", "mmlu_change"),
    options=ReasoningOptions,
    lacks=_lacks,
)
