"""Multiple-choice tasks in MMLU's layout: reading them, the few-shot prompt, and which answer a model prefers.

    DIR/dev/<subject>_dev.csv      worked examples
    DIR/test/<subject>_test.csv    questions

A row is question, A, B, C, D, letter of the answer; there is no header. The layout and the prompt are those of
https://github.com/hendrycks/test, the prompt without that code's second space before the subject.

Nothing here knows a model: it is an `Encode`, text to tokens, and a `LogLikelihoods`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

LETTERS = "ABCD"
SCORINGS = ("letter", "text")


@dataclass(frozen=True)
class Question:
    """One row of a file."""

    text: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    where: str
    """The file and the row, for messages."""


@dataclass(frozen=True)
class Subject:
    """Worked examples and questions of one subject."""

    name: str
    examples: list[Question]
    questions: list[Question]


@dataclass(frozen=True)
class Continuation:
    """Tokens of a prompt and of an answer after it, which begins at `start`, 1 or later."""

    tokens: tuple[int, ...]
    start: int


Encode = Callable[[str], list[int]]
LogLikelihoods = Callable[[Sequence[Continuation]], list[float]]
"""For each continuation the sum over its answer's tokens of log p(token | all before it), in nats."""


@dataclass(frozen=True)
class Score:
    """How many questions were answered correctly."""

    questions: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy as a mean over a sample of questions; None for a single question."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (self.questions - 1)) if self.questions > 1 else None


@dataclass(frozen=True)
class Result:
    """Scores by subject, and how many prompts did not fit."""

    scores: dict[str, Score]
    shortened: int
    """Prompts that lost worked examples."""
    cut: int
    """Of those, prompts that lost the beginning of the question too."""

    @property
    def total(self) -> Score:
        """Over all questions: its accuracy is the micro average."""
        scores = self.scores.values()
        return Score(sum(score.questions for score in scores), sum(score.correct for score in scores))

    @property
    def macro_average(self) -> float:
        """Mean of the subjects' accuracies."""
        return math.fsum(score.accuracy for score in self.scores.values()) / len(self.scores)

    @property
    def macro_standard_error(self) -> float | None:
        """None where a subject has a single question."""
        errors = [score.standard_error for score in self.scores.values()]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def read_tasks(directory: Path, num_shots: int) -> list[Subject]:
    """The subjects of `directory` by name, each with its first `num_shots` worked examples.

    Raises ValueError naming the file, and the row where one is wrong.
    """
    files = sorted((directory / "test").glob("*_test.csv"))
    if not files:
        raise ValueError(f"{directory} holds no test/<subject>_test.csv")
    subjects = []
    for path in files:
        name = path.name.removesuffix("_test.csv")
        questions, examples = read_questions(path), []
        if not questions:
            raise ValueError(f"{path} holds no question")
        if num_shots:
            dev = directory / "dev" / f"{name}_dev.csv"
            if not dev.is_file():
                raise ValueError(f"{dev}, the worked examples for {path.name}, does not exist")
            examples = read_questions(dev)[:num_shots]
            if len(examples) < num_shots:
                raise ValueError(f"{dev} holds {len(examples)} worked examples, and --num-shots asks for {num_shots}")
        subjects.append(Subject(name, examples, questions))
    return subjects


def read_questions(path: Path) -> list[Question]:
    """The rows of one file. Raises ValueError naming the file and the row, counted from 1."""
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row:
                    continue  # a blank line
                where = f"{path}, row {number}"
                if len(row) != 2 + len(LETTERS):
                    raise ValueError(f"{where}: {len(row)} columns where question, A, B, C, D and answer make 6")
                if row[-1] not in LETTERS or len(row[-1]) != 1:
                    raise ValueError(f"{where}: the answer must be A, B, C or D, not {row[-1][:40]!r}")
                questions.append(Question(row[0], tuple(row[1:-1]), LETTERS.index(row[-1]), where))
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV after {len(questions)} rows: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    return questions


def prompt(subject: str, examples: Sequence[Question], question: Question, scoring: str) -> str:
    """The prompt, up to the "Answer:" of `question`. Scoring `text` shows the examples' answers as text, too."""
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    shots = "".join(_ask(example) + answers(example, scoring)[example.answer] + "\n\n" for example in examples)
    return header + shots + _ask(question)


def _ask(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.text}{choices}\nAnswer:"


def answers(question: Question, scoring: str) -> list[str]:
    """What may follow the prompt: " A" to " D", or the texts of the choices."""
    return [f" {answer}" for answer in (LETTERS if scoring == "letter" else question.choices)]


def evaluate(
    subjects: Sequence[Subject], encode: Encode, log_likelihoods: LogLikelihoods, *, scoring: str, sequence_length: int
) -> Result:
    """Score every question: the answer with the largest log-likelihood, the first of equals, is the model's.

    Scoring `text` divides an answer's log-likelihood by its number of characters, the space before it included, so that
    tokenizers compare. Worked examples leave a prompt from the front until it and its longest answer fit
    `sequence_length`; where none is left, the prompt loses its beginning. Raises ValueError naming file and row for an
    answer that does not fit at all.
    """
    requests: list[Continuation] = []
    shortened = cut = 0
    asked = [(subject, question) for subject in subjects for question in subject.questions]
    for subject, question in tqdm(asked, desc="tokenizing", unit="question", disable=None, leave=False):
        added, lost = _fit(subject, question, encode, scoring, sequence_length)
        if scoring == "letter" and len({request.tokens for request in added}) < len(added):
            raise ValueError("the tokenizer makes equal tokens of two of the letters A, B, C, D")
        requests += added
        shortened += lost > 0
        cut += lost > len(subject.examples)
    values = iter(log_likelihoods(requests))
    right = dict.fromkeys((subject.name for subject in subjects), 0)
    for subject, question in asked:
        texts = answers(question, scoring)
        per_answer = [next(values) / (len(text) if scoring == "text" else 1) for text in texts]
        right[subject.name] += per_answer.index(max(per_answer)) == question.answer
    scores = {subject.name: Score(len(subject.questions), right[subject.name]) for subject in subjects}
    return Result(scores, shortened, cut)


def _fit(
    subject: Subject, question: Question, encode: Encode, scoring: str, sequence_length: int
) -> tuple[list[Continuation], int]:
    """The question's continuations, and what was lost: the number of examples, one more where the rest was cut."""
    longest = sequence_length + 1  # the last token is predicted, never read
    for dropped in range(len(subject.examples) + 1):
        text = prompt(subject.name, subject.examples[dropped:], question, scoring)
        added = [_continue(encode, text, answer, question.where) for answer in answers(question, scoring)]
        if max(len(request.tokens) for request in added) <= longest:
            return added, dropped
    # All lose as much, so that all answers follow the same tokens.
    excess = max(len(request.tokens) for request in added) - longest
    if min(request.start for request in added) <= excess:
        raise ValueError(f"{question.where}: the answer alone exceeds the sequence length, {sequence_length} tokens")
    return [Continuation(request.tokens[excess:], request.start - excess) for request in added], dropped + 1


def _continue(encode: Encode, text: str, answer: str, where: str) -> Continuation:
    """A token that spans the end of `text` belongs to the answer."""
    context, whole = encode(text), encode(text + answer)
    start = next((i for i, pair in enumerate(zip(context, whole)) if pair[0] != pair[1]), min(len(context), len(whole)))
    if not 0 < start < len(whole):
        raise ValueError(f"{where}: the tokenizer makes no token of its own of the answer {answer[:40]!r}")
    return Continuation(tuple(whole), start)
