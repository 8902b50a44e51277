"""Multiple-choice tasks without a model: the prompt by hand, files with mistakes, scores of known preferences."""

import functools
import statistics

import pytest

from _multiple_choice import Question, Result, Score, Subject, answers, evaluate, prompt, read_tasks
from tests.functional.questions import SHOTS, SUBJECTS, write, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_the_prompt_is_mmlus():
    row = ("Grass is", "pink", "white", "tan", "green")
    example = Question("Snow is", ("white", "blue", "red", "brown"), 0, "")
    question = Question(row[0], row[1:], 3, "")
    assert prompt("high_school_colors", [example], question, "letter") == (
        "The following are multiple choice questions (with answers) about high school colors.\n"
        "\n"
        "Snow is\n"
        "A. white\n"
        "B. blue\n"
        "C. red\n"
        "D. brown\n"
        "Answer: A\n"
        "\n"
        "Grass is\n"
        "A. pink\n"
        "B. white\n"
        "C. tan\n"
        "D. green\n"
        "Answer:"
    )
    assert answers(question, "letter") == [" A", " B", " C", " D"]
    assert "D. brown\nAnswer: white\n\nGrass" in prompt("x", [example], question, "text")
    assert answers(question, "text") == [" pink", " white", " tan", " green"]


def test_files_are_read_as_they_were_written(tasks):
    read = {subject.name: subject for subject in read_tasks(tasks, SHOTS)}
    assert list(read) == sorted(SUBJECTS)
    rows = read["high_school_colors"].examples
    assert [(q.text, *q.choices, "ABCD"[q.answer]) for q in rows] == SUBJECTS["high_school_colors"][:SHOTS]
    assert len(read["letters"].questions) == 4
    assert [len(subject.examples) for subject in read_tasks(tasks, 1)] == [1] * 4


GOOD = ("Q", "1", "2", "3", "4", "A")


@pytest.mark.parametrize(("rows", "words"), [
    ([GOOD, GOOD[:5]], "row 2: 5 columns"),
    ([GOOD, GOOD, (*GOOD[:5], "E")], "row 3: the answer must be A, B, C or D, not 'E'"),
    ([(*GOOD[:5], "AB")], "row 1: the answer must be A, B, C or D, not 'AB'"),
    ([], "holds no question"),
    ([("x" * 200_000, *GOOD[1:])], "cannot be read as CSV after 0 rows"),
])
def test_a_malformed_file_is_one_sentence(tmp_path, rows, words):
    write(tmp_path / "dev" / "x_dev.csv", [GOOD])
    write(tmp_path / "test" / "x_test.csv", rows)
    with pytest.raises(ValueError) as raised:
        read_tasks(tmp_path, 1)
    assert str(raised.value).startswith(str(tmp_path / "test" / "x_test.csv")) and words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_files_are_one_sentence(tmp_path):
    for path, words in ((tmp_path, "holds no test/<subject>_test.csv"), (tmp_path / "gone", "holds no test/")):
        with pytest.raises(ValueError, match=f"^{path} {words}"):
            read_tasks(path, 5)
    write(tmp_path / "test" / "x_test.csv", [GOOD])
    dev = tmp_path / "dev" / "x_dev.csv"
    with pytest.raises(ValueError, match=f"^{dev}, the worked examples for x_test.csv, does not exist"):
        read_tasks(tmp_path, 5)
    assert [len(subject.questions) for subject in read_tasks(tmp_path, 0)] == [1]
    write(dev, [GOOD, GOOD])
    with pytest.raises(ValueError, match=f"^{dev} holds 2 worked examples, and --num-shots asks for 5"):
        read_tasks(tmp_path, 5)
    (tmp_path / "test" / "x_test.csv").write_bytes(b"\xff,1,2,3,4,A\n")
    with pytest.raises(ValueError, match=r"x_test.csv is not UTF-8"):
        read_tasks(tmp_path, 0)


def characters(text):
    return list(map(ord, text))


def preferring(prefer):
    """Log-likelihoods of a model that thinks of each answer what `prefer(text, answer)` says."""
    def log_likelihoods(requests):
        texts = ["".join(map(chr, request.tokens)) for request in requests]
        return [prefer(text[: r.start], text[r.start :]) for r, text in zip(requests, texts, strict=True)]

    return log_likelihoods


def test_text_scores_are_per_character():
    question = Question("Q", ("a", "bcdefghij", "b", "c"), 1, "")
    subjects = [Subject("x", [], [question])]
    total = {" a": -2.0, " bcdefghij": -9.0, " b": -3.0, " c": -3.0}  # the sum prefers a, the mean bcdefghij
    options = dict(encode=characters, log_likelihoods=preferring(lambda text, answer: total[answer]))
    assert evaluate(subjects, **options, scoring="text", sequence_length=999).total == Score(1, 1)
    by_letter = preferring(lambda text, answer: total[" " + question.choices["ABCD".index(answer[1])]])
    options["log_likelihoods"] = by_letter
    assert evaluate(subjects, **options, scoring="letter", sequence_length=999).total == Score(1, 0)


def remember(seen, text, answer):
    seen[answer] = text
    return 0.0


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_examples_leave_from_the_front_and_then_the_question(tasks, scoring):
    (subject,) = (s for s in read_tasks(tasks, SHOTS) if s.name == "high_school_colors")
    question = subject.questions[0]
    subject = Subject(subject.name, subject.examples, [question])
    texts = [prompt(subject.name, subject.examples[first:], question, scoring) for first in range(SHOTS + 1)]
    longest = max(map(len, answers(question, scoring)))
    lengths = [len(text) + longest - 1 for text in texts]  # the last token is not read
    cases = [(lengths[0], texts[0], 0, 0), (lengths[0] - 1, texts[1], 1, 0), (lengths[1] - 1, texts[2], 1, 0),
             (lengths[2], texts[2], 1, 0), (lengths[2] - 5, texts[2][5:], 1, 1)]
    for sequence_length, expected, shortened, cut in cases:
        seen = {}
        result = evaluate([subject], characters, preferring(functools.partial(remember, seen)),
                       scoring=scoring, sequence_length=sequence_length)
        assert seen == {answer: expected for answer in answers(question, scoring)}
        assert (result.shortened, result.cut) == (shortened, cut)
    with pytest.raises(ValueError, match=r"high_school_colors_test.csv, row 1: the answer alone exceeds"):
        evaluate([subject], characters, lambda requests: [], scoring=scoring, sequence_length=longest - 1)


def test_a_token_that_spans_the_boundary_belongs_to_the_answer():
    def encode(text):  # ":" and " A" become one token
        return [*map(ord, text[:-3]), 1000 + ord(text[-1])] if text[-3:-1] == ": " else list(map(ord, text))

    seen = []
    question = Question("Q", ("1", "2", "3", "4"), 0, "")
    evaluate([Subject("x", [], [question])], encode, lambda requests: seen.extend(requests) or [0.0] * len(requests),
          scoring="letter", sequence_length=999)
    assert [request.tokens[request.start :] for request in seen] == [(1000 + ord(letter),) for letter in "ABCD"]
    with pytest.raises(ValueError, match="equal tokens"):
        evaluate([Subject("x", [], [question])], lambda text: [1] * len(text), lambda requests: [],
              scoring="letter", sequence_length=999)


def test_averages_and_standard_errors():
    result = Result({"a": Score(4, 1), "b": Score(10, 9)}, 0, 0)
    samples = {"a": [1, 0, 0, 0], "b": [1] * 9 + [0]}
    errors = {name: statistics.stdev(sample) / len(sample) ** 0.5 for name, sample in samples.items()}
    assert {name: s.standard_error for name, s in result.scores.items()} == pytest.approx(errors)
    assert result.total == Score(14, 10)
    assert result.macro_average == pytest.approx((0.25 + 0.9) / 2)
    assert result.macro_standard_error == pytest.approx((errors["a"] ** 2 + errors["b"] ** 2) ** 0.5 / 2)
    single = Result({"a": Score(1, 1), "b": Score(10, 9)}, 0, 0)
    assert single.scores["a"].standard_error is None and single.macro_standard_error is None
