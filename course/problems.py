"""The problem sets as data: sets/problems.csv has a line for each problem, SETS the rest."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple


class Problem(NamedTuple):
    number: str        # "4.4"
    place: str         # "ppo.py::gae": the function that is emptied
    points: int
    compare: str = "values"  # or "gradients" too, of a step between network and loss; "real tokens": both, on the mask
    seconds: int = 40        # wall clock limit
    tolerance: float = 1e-6
    hint: str = ""           # one clause, after a wrong value

    @property
    def key(self):
        """The name of the function. `draw_KEY` is in setN.py, and visible cases in cases/KEY.json."""
        return self.place.rpartition("::")[2].rpartition(".")[2]

    @property
    def file(self):
        return self.place.partition("::")[0]

    @property
    def set(self):
        return int(self.number.partition(".")[0])


class Set(NamedTuple):
    title: str
    written: int        # points of the written questions, graded by hand
    problems: list
    by_machine: int = 0  # points of sets 6 and 7, which have no problems


def read_problems():
    with open(Path(__file__).resolve().parent / "sets" / "problems.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kinds = Problem.__annotations__
            yield Problem(**{name: kinds[name](text) for name, text in row.items()})


PROBLEMS = list(read_problems())
SETS = {number: Set(title, written, [p for p in PROBLEMS if p.set == number], by_machine)
        for number, title, written, by_machine in (
            (1, "Words as actions", 12, 0), (2, "A policy that speaks", 10, 0), (3, "What people prefer", 18, 0),
            (4, "PPO", 10, 0), (5, "Without a critic, without a reward model", 12, 0), (6, "The bug hunt", 10, 40),
            (7, "Open end", 20, 20))}


def variant_seed(course, student):
    """The hexadecimal seed of a student's variant; the common variant for two empty texts."""
    return hashlib.sha256(f"{course.strip()}\n{student.strip().lower()}".encode()).hexdigest()


def points_of(number):
    """The points of a set that are graded by machine."""
    return SETS[number].by_machine or round(sum(problem.points for problem in SETS[number].problems))
