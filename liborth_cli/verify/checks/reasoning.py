r"""`--reasoning`: does the edit cost reasoning? The fine-tuned and the general model, question by question.

- **GSM8K**: the prompt is "Question: …\nAnswer: …" for each of the solved examples (`--gsm8k-train`, 8 of them unless the
  context holds fewer) and then the question. The answer is written greedily, at most 256 tokens, cut where a new question
  begins. Needs all weights in memory.
- **MMLU**: the answer is the letter among A to D with the highest log-likelihood after "Answer:". Streams.
- **lm-evaluation-harness**, where it is installed (verify/harness.py).

Before and after are compared on the same questions: the change in accuracy with a paired bootstrap interval, and McNemar's
exact test. A question that does not fit the context with no example at all is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from liborth_cli.errors import BadInput, OutOfResources
from liborth_cli.verify import harness, statistics
from liborth_cli.verify.check import Check, Options, Part, option
from liborth_cli.verify.questions import LETTERS, Choice, Problem, extract, read_choices, read_problems, same_number
from liborth_cli.verify.result import Facts, Line, Result, Table
from liborth_cli.verify.rows import evenly
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.stream.encoder import TextEncoder

WRITTEN = 256
SHOTS = {"gsm8k": 8, "mmlu": 5}
TITLES = {"gsm8k": "GSM8K", "mmlu": "MMLU"}
Question = TypeVar("Question", Problem, Choice)


@dataclass(frozen=True)
class ReasoningOptions(Options):
    """Which questions, and how they are asked."""

    gsm8k: Path | None = option(None, "GSM8K test.jsonl, for --reasoning.")
    gsm8k_train: Path | None = option(None, "Solved examples to show, for --gsm8k.")
    mmlu: Path | None = option(None, "MMLU directory, for --reasoning.")
    harness: str | None = option(None, "Tasks for lm-evaluation-harness, for --reasoning.")
    shots: int | None = option(None, "Solved examples shown at most [default: 8 of GSM8K, 5 of MMLU].", least=0)
    limit: int | None = option(None, "Questions of each benchmark at most.", least=1)


@dataclass(frozen=True)
class Answers:
    """What every model answered.

    Attributes:
        right: by state, (questions,), bool.
        left_out: questions that do not fit the context.
        shots: solved examples shown, over the questions: fewest and most.
        subjects: of MMLU, subject → state → share that is right.
        written: of GSM8K, what the general model wrote, where texts may be shown.
    """

    right: dict[str, np.ndarray]
    left_out: int
    shots: tuple[int, int]
    subjects: dict[str, dict[str, float]] | None = None
    written: list[Line] | None = None


@dataclass
class BenchmarkFacts(Facts):
    """One benchmark.

    Attributes:
        left_out: questions that do not fit the context.
        examples: solved examples shown, fewest and most.
        lost: questions that only the fine-tuned model gets right.
        gained: those that only the general model does.
        mcnemar_p: of the two being no different.
        subjects: subject → state → share that is right.
        written: what the general model wrote.
    """

    left_out: int
    examples: list[int]
    lost: int | None = None
    gained: int | None = None
    mcnemar_p: float | None = None
    subjects: dict[str, dict[str, float]] | None = None
    written: list[Line] | None = None


@dataclass(frozen=True)
class HarnessFacts:
    """What the harness says of each model."""

    results: dict[str, harness.Tasks]


@dataclass
class ReasoningFacts(Facts):
    """What was measured."""

    gsm8k: BenchmarkFacts | None = None
    mmlu: BenchmarkFacts | None = None
    harness: HarnessFacts | None = None


def run(subject: Subject, options: ReasoningOptions) -> Result:
    """Measure the benchmarks that are given.

    Returns:
        `gsm8k`, `mmlu`: accuracy of the general model; `gsm8k_change`, `mmlu_change`: general minus fine-tuned; and one metric
        a task of the harness, `harness_TASK`, with `harness_TASK_change`.

    Raises:
        UsageError: when the harness is not installed.
        BadInput: when a file is not of its format, or no question fits the context.
    """
    facts = ReasoningFacts()
    result, sentences, rows = Result("reasoning", "", facts=facts), [], []
    if options.harness is not None:
        # First, for it may turn out not to be installed.
        facts.harness = HarnessFacts(harness.evaluate(subject, options.harness, options.limit))
        sentences.append(harness.report(facts.harness.results, result))
    for name, measure, given in (("gsm8k", _gsm8k, options.gsm8k), ("mmlu", _mmlu, options.mmlu)):
        if given is None:
            continue
        try:
            found = measure(subject, subject.reader.tokenizer("reasoning"), options)
        except OutOfResources as error:
            sentences.append(f"{TITLES[name]} was not measured: {error}.")
            continue
        sentence, told = _judge(name, found, subject, result)
        sentences.append(sentence)
        facts = replace(facts, **{name: told})
        rows += [
            (TITLES[name], state, float(len(right)), float(right.mean()), float(found.shots[1]))
            for state, right in found.right.items()
        ]
    if rows:
        columns = ("benchmark", "model", ">questions", ">right", ">examples shown")
        result.figures.append(Table("Reasoning", columns, tuple(rows)))
    result.verdict, result.facts = " ".join(sentences), facts
    return result


def _judge(name: str, found: Answers, subject: Subject, result: Result) -> tuple[str, BenchmarkFacts]:
    told = BenchmarkFacts(found.left_out, list(found.shots), subjects=found.subjects, written=found.written)
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
        told = replace(told, lost=int((before & ~after).sum()), gained=int((~before & after).sum()), mcnemar_p=p)
        verdict = "no change that could not be luck" if p > 0.05 else "a change that is not luck"
        sentence += (
            f", fine-tuned {before.mean():.1%}: {change.value:+.1%} ({change.low:+.1%} to {change.high:+.1%}), {verdict} "
            f"(McNemar p = {p:.2g})"
        )
    if found.left_out:
        sentence += f"; {found.left_out} more did not fit the context"
    return sentence + ".", told


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
    told: list[Line] = [
        {"question": p.question, "number": p.number, "written": text}
        for (p, _, _), text in zip(asked, written["general"], strict=True)
    ]
    return Answers(right, len(problems) - len(asked), _range(asked), written=told if subject.show_text else None)


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
    groups = np.array([choice.subject for choice, _, _ in asked])
    subjects = {
        str(group): {state: float(some[groups == group].mean()) for state, some in right.items()} for group in np.unique(groups)
    }
    return Answers(right, len(questions) - len(asked), _range(asked), subjects=subjects)


# Prompts ----------------------------------------------------------------------------------------------------------------


def _fit(
    questions: Sequence[tuple[Question, str, Sequence[tuple[str, str]]]], encoder: TextEncoder, room: int, where: str
) -> list[tuple[Question, str, int]]:
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


def _lacks(subject: Subject, options: ReasoningOptions) -> str:
    given = options.gsm8k or options.mmlu or options.harness is not None
    return "" if given else "--gsm8k FILE, --mmlu DIR or --harness TASKS"


CHECK = Check(
    name="reasoning",
    title="Reasoning",
    words="GSM8K and MMLU, before and after.",
    part=Part.TRANSFER,
    run=run,
    metrics=("gsm8k", "gsm8k_change", "mmlu", "mmlu_change"),
    options=ReasoningOptions,
    lacks=_lacks,
)
