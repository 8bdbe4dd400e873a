"""Arithmetic word problems: a generator, the exact solver, and the text in which a solution is written.

    Ann has 12 pens. Bob has 5 more pens than Ann. Eve finds 3 cups. Bob gives Ann 4 pens. How many pens does Bob have?
    Bob 12+5=17       a step: whose number changes, and how
    Bob 17-4=13
    answer 13

A problem takes two to six steps and has one right answer. Some of its sentences do not matter: they speak of another
thing, or of people on whom the answer does not depend.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from latentrace.models.reasoner.countdown import LARGEST_NUMBER, is_right, only_tests, outcome

NAMES = ("Ann", "Bob", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo")
THINGS = ("pens", "cups", "coins", "cards", "books", "stamps", "shells", "keys")
TOGETHER, ANSWER = "together", "answer"
FEWEST_STEPS, MOST_STEPS = 2, 6
MOST_SENTENCES = 8
PROMPT_TOKENS = 96
"""More tokens than a problem has: programs pad to it, so that all problems share a compiled program."""

_NAME, _THING, _COUNT = f"({'|'.join(NAMES)})", f"({'|'.join(THINGS)})", r"(0|[1-9][0-9]*)"
_PATTERNS = {
    "has": rf"{_NAME} has {_COUNT} {_THING}",
    "more": rf"{_NAME} has {_COUNT} more {_THING} than {_NAME}",
    "fewer": rf"{_NAME} has {_COUNT} fewer {_THING} than {_NAME}",
    "times": rf"{_NAME} has {_COUNT} times as many {_THING} as {_NAME}",
    "buys": rf"{_NAME} (?:buys|finds) {_COUNT} {_THING}",
    "sells": rf"{_NAME} (?:sells|loses) {_COUNT} {_THING}",
    "half": rf"{_NAME} sells half of the {_THING}",
    "gives": rf"{_NAME} gives {_NAME} {_COUNT} {_THING}",
    "one": rf"How many {_THING} does {_NAME} have",
    "two": rf"How many {_THING} do {_NAME} and {_NAME} have",
}
_COMPILED = {kind: re.compile(pattern) for kind, pattern in _PATTERNS.items()}
_LINE = re.compile(rf"({'|'.join((*NAMES, TOGETHER))}) {_COUNT}([-+*/]){_COUNT}={_COUNT}\n")
_ANSWER = re.compile(rf"{ANSWER} {_COUNT}\n")


class Step(NamedTuple):
    """`left op right = result`, the new number of somebody's things (or of two people's together)."""

    who: str
    left: int
    op: str
    right: int
    result: int

    @property
    def is_right(self) -> bool:
        """Whether the arithmetic is."""
        return is_right(self.left, self.op, self.right, self.result)


class Solution(NamedTuple):
    """The steps on which the answer depends, in the order of the story, and the answer."""

    steps: tuple[Step, ...]
    answer: int


class _Amount(NamedTuple):
    """How many things somebody has, and the steps that it took."""

    value: int
    steps: tuple[tuple[int, Step], ...] = ()
    """numbered in the order of the story"""


class _Story:
    """Reads sentences one by one and keeps everybody's amounts."""

    def __init__(self) -> None:
        self.amounts: dict[tuple[str, str], _Amount] = {}
        self.count = 0

    def amount(self, who: str, thing: str) -> _Amount:
        if (who, thing) not in self.amounts:
            raise ValueError(f"how many {thing} {who} has is not said before it is needed")
        return self.amounts[who, thing]

    def step(self, who: str, op: str, right: int, *on: _Amount) -> _Amount:
        """What an amount becomes by one step; it takes the steps of all amounts `on` which it depends."""
        left = on[0].value
        if op == "/" and left % right:
            raise ValueError(f"{who} has {left}, which has no half in whole numbers")
        result = outcome(left, op, right)
        if not 0 <= result <= LARGEST_NUMBER:
            raise ValueError(f"{who} would have {result}; numbers go from 0 to {LARGEST_NUMBER}")
        self.count += 1
        steps = dict(pair for amount in on for pair in amount.steps) | {self.count: Step(who, left, op, right, result)}
        return _Amount(result, tuple(sorted(steps.items())))

    def read(self, kind: str, words: Sequence[str]) -> None:
        """A sentence of the story."""
        if kind == "has":
            who, count, thing = words
            if (who, thing) in self.amounts:
                raise ValueError(f"how many {thing} {who} has is said twice")
            self.amounts[who, thing] = _Amount(_number(count))
        elif kind in ("more", "fewer", "times"):
            who, count, thing, other = words
            if (who, thing) in self.amounts:
                raise ValueError(f"how many {thing} {who} has is said twice")
            op = {"more": "+", "fewer": "-", "times": "*"}[kind]
            self.amounts[who, thing] = self.step(who, op, _number(count), self.amount(other, thing))
        elif kind == "gives":
            who, other, count, thing = words
            giver, receiver = self.amount(who, thing), self.amount(other, thing)
            self.amounts[who, thing] = self.step(who, "-", _number(count), giver)
            self.amounts[other, thing] = self.step(other, "+", _number(count), receiver)
        else:
            who, thing = words[0], words[-1]
            op, right = ("/", 2) if kind == "half" else ("+" if kind == "buys" else "-", _number(words[1]))
            self.amounts[who, thing] = self.step(who, op, right, self.amount(who, thing))

    def answer(self, thing: str, *people: str) -> Solution:
        """The solution for what one or two people have."""
        total = self.amount(people[0], thing)
        if len(people) == 2:
            other = self.amount(people[1], thing)
            total = self.step(TOGETHER, "+", other.value, total, other)
        return Solution(tuple(step for _, step in total.steps), total.value)


def _number(text: str) -> int:
    if int(text) > LARGEST_NUMBER:
        raise ValueError(f"{text} is out of range: numbers go from 0 to {LARGEST_NUMBER}")
    return int(text)


def solve(question: str) -> Solution:
    """The solution of a problem, read from its text; ValueError where it cannot be understood or has no answer."""
    text = question.strip()
    sentences = re.findall(r"[^.?]+[.?]|[^.?]+$", text)
    if not sentences or not sentences[-1].endswith("?"):
        raise ValueError(f"expected sentences and a question such as 'How many pens does Ann have?'; found {text!r}")
    story = _Story()
    for position, sentence in enumerate(sentences):
        asks = position == len(sentences) - 1
        body = sentence.strip()[:-1]
        matches = ((kind, pattern.fullmatch(body)) for kind, pattern in _COMPILED.items())
        kind, match = next(((kind, match) for kind, match in matches if match), ("", None))
        if match is None or (kind in ("one", "two")) != asks or sentence.endswith("?") != asks:
            raise ValueError(f"sentence {position + 1}, {sentence.strip()!r}, is none that the reasoner was trained on")
        try:
            if asks:
                return story.answer(*match.groups())
            story.read(kind, match.groups())
        except ValueError as error:
            raise ValueError(f"sentence {position + 1}, {sentence.strip()!r}: {error}") from None
    raise AssertionError("unreachable: the last sentence asks")


def format_prompt(question: str) -> str:
    """The prompt of a problem: its text on one line, and a newline."""
    return " ".join(question.split()) + "\n"


def format_trace(solution: Solution) -> str:
    """The lines of a solution."""
    lines = [f"{step.who} {step.left}{step.op}{step.right}={step.result}\n" for step in solution.steps]
    return "".join([*lines, f"{ANSWER} {solution.answer}\n"])


def parse_trace(trace: str) -> Solution:
    """The steps and answer that a trace says (right or wrong); ValueError where a line is neither."""
    *lines, last = trace.splitlines(keepends=True) or [""]
    steps = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"expected a step such as 'Ann 12+5=17' and a newline; found {line!r}")
        who, left, op, right, result = match.groups()
        steps.append(Step(who, int(left), op, int(right), int(result)))
    match = _ANSWER.fullmatch(last)
    if match is None:
        raise ValueError(f"expected a last line such as 'answer 17' and a newline; found {last!r}")
    return Solution(tuple(steps), int(match[1]))


def verify(question: str, trace: str) -> bool:
    """Whether a trace ends in the right answer. Its steps may be others than the solver's, or none."""
    try:
        return parse_trace(trace).answer == solve(question).answer
    except ValueError:
        return False


def is_held_out(question: str) -> bool:
    """Whether a problem only ever tests: a fixed function of its text."""
    return only_tests(format_prompt(question))


def generate(rng: random.Random, steps: int | None = None, held_out: bool = False) -> tuple[str, Solution]:
    """A random problem, of `steps` steps (default: any number from two to six alike), and its solution.

    With `held_out` it is one that never trains, otherwise one that may.
    """
    wanted = rng.randint(FEWEST_STEPS, MOST_STEPS) if steps is None else steps
    while True:
        found = _attempt(rng, wanted)
        if found is not None and is_held_out(found[0]) == held_out:
            return found


def problems(seed: int, count: int, steps: int | None = None) -> list[str]:
    """`count` held-out problems."""
    rng = random.Random(seed)
    return [generate(rng, steps, held_out=True)[0] for _ in range(count)]


def _attempt(rng: random.Random, wanted: int) -> tuple[str, Solution] | None:
    """A random story about which a question of so many steps can be asked, or None."""
    thing, other = rng.sample(THINGS, 2)
    people = rng.sample(NAMES, rng.randint(2, 4))
    story, sentences = _Story(), []
    for kind, *words in _events(rng, story, people, thing, wanted + rng.randint(0, 1)):
        sentences.append(_sentence(rng, kind, words))
    for person in rng.sample(people, rng.randint(0, min(2, len(people)))):  # sentences about something else
        distraction = f"{person} has {rng.randint(2, 60)} {other}."
        sentences.insert(rng.randint(0, len(sentences)), distraction)
    named = [person for person in people if (person, thing) in story.amounts]
    pairs = [(a, b) for a in named for b in named if a != b]
    asked = [who for who in [*((person,) for person in named), *pairs] if _steps_of(story, thing, who) == wanted]
    if not asked or len(sentences) > MOST_SENTENCES:
        return None
    who = rng.choice(asked)
    try:
        solution = story.answer(thing, *who)
    except ValueError:
        return None
    ask = f"does {who[0]}" if len(who) == 1 else f"do {who[0]} and {who[1]}"
    return " ".join([*sentences, f"How many {thing} {ask} have?"]), solution


def _steps_of(story: _Story, thing: str, who: tuple[str, ...]) -> int:
    numbers = {number for person in who for number, _ in story.amounts[person, thing].steps}
    return len(numbers) + (len(who) == 2)


def _events(rng: random.Random, story: _Story, people: list[str], thing: str, count: int) -> Iterator[tuple[str, ...]]:
    """Random sentences of about `count` steps in all, as (kind, words); each is told to the story as well."""
    new = list(people)
    while story.count < count:
        known = [person for person in people if (person, thing) in story.amounts]
        if new and (not known or rng.random() < 0.5):
            who = new.pop()
            kind = rng.choice(("has", "more", "fewer", "times")) if known else "has"
            limit = {"has": 60, "times": 5}.get(kind, 30)
            words = [who, str(rng.randint(2, limit)), thing]
            if kind != "has":
                words.append(rng.choice(known))
        else:
            who = rng.choice(known)
            kind = rng.choice(("buys", "sells", "half", "gives"))
            words = [who, thing] if kind == "half" else [who, str(rng.randint(2, 30)), thing]
            others = [person for person in known if person != who]
            if kind == "gives":
                if not others:
                    continue
                words.insert(1, rng.choice(others))
        before = story.count, dict(story.amounts)
        try:
            story.read(kind, words)
        except ValueError:  # a negative or too large number, or no half: something else happens
            story.count, story.amounts = before
            if kind in ("more", "fewer", "times"):
                new.append(who)
            continue
        yield kind, *words


def _sentence(rng: random.Random, kind: str, words: list[str]) -> str:
    if kind == "has":
        return "{} has {} {}.".format(*words)
    if kind in ("more", "fewer"):
        return "{} has {} {kind} {} than {}.".format(*words, kind=kind)
    if kind == "times":
        return "{} has {} times as many {} as {}.".format(*words)
    if kind == "half":
        return "{} sells half of the {}.".format(*words)
    if kind == "gives":
        return "{} gives {} {} {}.".format(*words)
    verb = rng.choice({"buys": ("buys", "finds"), "sells": ("sells", "loses")}[kind])
    return "{} {verb} {} {}.".format(*words, verb=verb)
