r"""`--gsm8k FILE` and `--mmlu DIR`: does the edit cost reasoning? The fine-tuned and the general model, question by question.

- **GSM8K** (Cobbe et al. 2021, arXiv 2110.14168): JSON lines with `question` and `answer`, whose last line is "#### number".
  The prompt is "Question: …\nAnswer: …" for each of the solved examples (`gsm8k_train`, 8 of them unless the context holds
  fewer) and then the question. The answer is written greedily, at most 256 tokens, cut where a new question begins; its number
  is the one after "####", else the last one. Right is equal as a number. Needs all weights in memory.
- **MMLU** (Hendrycks et al. 2020, arXiv 2009.03300): csv files, either `question,choice0,…,choice3,answer` with a header, or
  the original six columns without one; in DIR, or DIR/test with five solved examples a subject from DIR/dev. The answer is
  the letter among A to D with the highest log-likelihood after "Answer:". Streams.
- **lm-evaluation-harness**, where it is installed: harness.py.

Before and after are compared on the same questions: the change in accuracy with a paired bootstrap interval, and McNemar's
exact test. A question that does not fit the context with no example at all is left out, and counted.

Options: `gsm8k`, `gsm8k_train`, `mmlu`, `harness`, `limit` (questions of each, spread evenly), `shots` (examples at most).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from liborth_cli.errors import BadInput, OutOfResources, UsageError
from liborth_cli.measure.generate import generate, hold
from liborth_cli.measure.scores import Evaluator
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.verify import harness, resampling
from liborth_cli.verify.question_files import LETTERS, Choice, Problem, read_choices, read_problems, spread
from liborth_cli.verify.questions import completion_row, need_tokenizer
from liborth_cli.verify.result import Result, Table
from liborth_cli.verify.shared_model import shared_model
from liborth_cli.verify.subject import Subject

CHECK = "reasoning"
METRICS = ("gsm8k", "gsm8k_change", "mmlu", "mmlu_change")
WRITTEN = 256
SHOTS = {"gsm8k": 8, "mmlu": 5}
STATES = ("reference", "finetuned", "general")
TITLES = {"gsm8k": "GSM8K", "mmlu": "MMLU"}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass
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


def run(subject: Subject) -> Result:
    """Measure the benchmarks that are given.

    Args:
        subject: with `options["gsm8k"]` or `options["mmlu"]`, or both.

    Returns:
        `gsm8k`, `mmlu`: accuracy of the general model; `gsm8k_change`, `mmlu_change`: general minus fine-tuned.

    Raises:
        UsageError: when none is given, or the harness is not installed.
        BadInput: when a file is not of its format, or no question fits the context.
    """
    given = {name: subject.options[name] for name in TITLES if subject.options.get(name)}
    tasks = subject.options.get("harness")
    if not given and not tasks:
        raise UsageError("--reasoning needs --gsm8k FILE, --mmlu DIR or --harness TASKS")
    result, sentences, rows = Result(CHECK, ""), [], []
    if tasks:
        # First, for it may turn out not to be installed.
        others = harness.run(subject)
        result.metrics |= others.metrics
        result.figures += others.figures
        result.facts["harness"] = others.facts
        sentences.append(others.verdict)
    if not given:
        result.verdict = " ".join(sentences)
        return result
    encoder = need_tokenizer(subject, CHECK)
    for name, place in given.items():
        try:
            found = (_gsm8k if name == "gsm8k" else _mmlu)(subject, encoder, str(place))
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
    after, title = found.right["general"], TITLES[name]
    metric = resampling.share(int(after.sum()), len(after), f"share of {title} questions the general model gets right")
    result.metrics[name] = metric
    sentence = f"{title}: {metric.value:.1%} of {len(after)} questions right ({metric.low:.1%} to {metric.high:.1%})"
    before = found.right.get("finetuned")
    if before is not None:
        both = np.stack([after, before], 1).astype(np.float64)
        change = resampling.mean(both[:, 0] - both[:, 1], subject.seed, "accuracy, general minus fine-tuned")
        p = resampling.mcnemar(before, after)
        result.metrics[f"{name}_change"] = change
        found.facts |= {"lost": int((before & ~after).sum()), "gained": int((~before & after).sum()), "mcnemar_p": p}
        verdict = "no change that could not be luck" if p > 0.05 else "a change that is not luck"
        sentence += (
            f", fine-tuned {before.mean():.1%}: {change.value:+.1%} ({change.low:+.1%} to {change.high:+.1%}), {verdict} "
            f"(McNemar p = {p:.2g})"
        )
    if found.left_out:
        sentence += f"; {found.left_out} more did not fit the context"
    result.facts[name] = {**found.facts, "left_out": found.left_out, "examples": list(found.shots)}
    return sentence + "."


# GSM8K ------------------------------------------------------------------------------------------------------------------


def _gsm8k(subject: Subject, encoder: TextEncoder, file: str) -> Answers:
    model, given = shared_model(subject), subject.options.get("gsm8k_train")
    problems = spread(read_problems(file), subject.options.get("limit"))
    solved = [(problem.prompt, f" {problem.answer}") for problem in read_problems(str(given))] if given else []
    # Room is kept for half of the answer: a model that is cut off then has at least had the chance.
    room = (model.context or 1 << 30) - WRITTEN // 2
    asked = _fit([(p, p.prompt) for p in problems], lambda _: solved, encoder, room, _shots(subject, "gsm8k"), file)
    states = [state for state in STATES if state in subject.states]
    prompts = [encoder.prompt(text) for _, text, _ in asked]
    right, written = {}, {}
    with subject.console.progress("GSM8K", len(states) * len(asked), "questions") as progress:
        for state in states:
            hold(model, subject.states[state])
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
    return numbers[-1].replace(",", "") if numbers else None


def same_number(found: str | None, wanted: str) -> bool:
    """Compare two numbers as numbers: 18, 18.0 and 18.00 are the same."""
    return found is not None and float(found) == float(wanted)


# MMLU -------------------------------------------------------------------------------------------------------------------


def _mmlu(subject: Subject, encoder: TextEncoder, folder: str) -> Answers:
    model = shared_model(subject)
    questions, examples = read_choices(folder)
    questions = spread(questions, subject.options.get("limit"))
    solved = {group: [(c.prompt, f" {LETTERS[c.answer]}") for c in some] for group, some in examples.items()}
    answers = [f" {letter}" for letter in LETTERS]
    room = (model.context or 1 << 30) + 1 - max(len(encoder.prompt(answer)) for answer in answers)
    asked = _fit(
        [(c, c.prompt) for c in questions], lambda c: solved.get(c.subject, []), encoder, room, _shots(subject, "mmlu"), folder
    )
    rows = [
        completion_row(encoder, text, answers[letter], model.context, choice.where)
        for choice, text, _ in asked
        for letter in range(len(choice.choices))
    ]
    ends = np.cumsum([len(choice.choices) for choice, _, _ in asked])[:-1]
    wanted = np.array([choice.answer for choice, _, _ in asked])
    evaluator, right = Evaluator(model, rows), {}
    states = [state for state in STATES if state in subject.states]
    with subject.console.progress("MMLU", len(states) * sum(row.tokens for row in rows), "tokens") as progress:
        for state in states:
            losses = np.array([score.loss.sum() for score in evaluator.score(subject.states[state], progress.advance)])
            right[state] = np.array([each.argmin() for each in np.split(losses, ends)]) == wanted
    found = Answers(right, len(questions) - len(asked), _range(asked))
    groups = np.array([choice.subject for choice, _, _ in asked])
    found.facts["subjects"] = {
        str(group): {state: float(some[groups == group].mean()) for state, some in right.items()} for group in np.unique(groups)
    }
    return found


# Prompts ----------------------------------------------------------------------------------------------------------------


def _fit(
    questions: Sequence[tuple[Any, str]], solved: Any, encoder: TextEncoder, room: int, shots: int, where: str
) -> list[tuple[Any, str, int]]:
    """Put as many solved examples before each question as fit.

    Args:
        questions: each with its prompt.
        solved: gives the examples of a question, prompt and answer.
        encoder: the tokenizer.
        room: tokens a prompt may have.
        shots: examples at most.
        where: for the error line.

    Returns:
        The questions that fit, each with its whole prompt and the number of examples in it.

    Raises:
        BadInput: when none fits.
    """
    found, shortest, length = [], 1 << 62, 0
    for question, prompt in questions:
        examples = solved(question)[:shots]
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


def _shots(subject: Subject, name: str) -> int:
    given = subject.options.get("shots")
    return SHOTS[name] if given is None else int(given)


def _range(asked: Sequence[tuple[Problem | Choice, str, int]]) -> tuple[int, int]:
    counts = [count for _, _, count in asked]
    return min(counts), max(counts)
