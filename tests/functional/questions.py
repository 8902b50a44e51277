"""A small question set in MMLU's layout, for the tests of evaluate.py."""

import csv

SUBJECTS = {
    "addition": [(f"What is {a} plus {b}?", *map(str, (a + b - 1, a + b, a + b + 1, a * b)), "B")
                 for a, b in ((2, 3), (4, 1), (5, 2), (3, 3), (7, 1), (2, 6))],
    "high_school_colors": [("Which is a color, not a fruit?", "red", "pear", "plum", "fig", "A"),
                           ('He said "sky",\nI said', "green", "gray, or so", "blue", "black", "C"),
                           ("Grass is", "pink", "white", "tan", "green", "D"),
                           ("Snow is", "white", "blue", "red", "brown", "A")],
    "opposites": [("The opposite of hot is", "warm", "dry", "cold", "wet", "C"),
                  ("The opposite of up is", "left", "down", "high", "out", "B"),
                  ("The opposite of day is", "week", "noon", "dawn", "night", "D")],
    "letters": [("Which letter follows p?", "q", "o", "r", "z", "A"),
                ("Which letter precedes f?", "d", "e", "h", "i", "B"),
                ("Which letter is a vowel?", "t", "k", "m", "u", "D"),
                ("Which letter looks like zero?", "x", "y", "o", "s", "C")],
}
SHOTS = 2
"""The first rows of a subject are its worked examples, the rest its questions."""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_tasks(folder):
    """The question set below `folder`, which is returned. The questions on letters contain their own examples."""
    for name, rows in SUBJECTS.items():
        write(folder / "dev" / f"{name}_dev.csv", rows[:SHOTS])
        write(folder / "test" / f"{name}_test.csv", rows[SHOTS:] if name != "letters" else rows)
    return folder
