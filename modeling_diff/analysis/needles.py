"""
Multi-needle retrieval: prompts of an exact length in tokens, and exact scoring.

Facts of the form "The magic number of Oslo is 4821." lie in a text; some of them are asked for at its end. The task is
the one of LWM (arXiv:2402.08268), as the Differential Transformer was measured on it (arXiv:2410.05258, section 3.3):
N needles, R of them asked for at a chosen depth, the other N - R, distractors, anywhere.
"""

import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


CITIES = (
    "Accra", "Almaty", "Amman", "Amsterdam", "Ankara", "Athens", "Baghdad", "Baku", "Bamako", "Bangkok", "Beirut",
    "Belgrade", "Berlin", "Bern", "Bogota", "Bratislava", "Brussels", "Bucharest", "Budapest", "Cairo", "Canberra",
    "Caracas", "Chicago", "Copenhagen", "Dakar", "Damascus", "Delhi", "Dhaka", "Doha", "Dublin", "Geneva", "Hanoi",
    "Harare", "Havana", "Helsinki", "Istanbul", "Jakarta", "Kabul", "Kigali", "Kyiv", "Lagos", "Lima", "Lisbon",
    "London", "Luanda", "Lusaka", "Madrid", "Manila", "Minsk", "Montreal", "Mumbai", "Muscat", "Nairobi", "Oslo",
    "Ottawa", "Paris", "Perth", "Prague", "Quito", "Rabat", "Riga", "Rome", "Santiago", "Sarajevo", "Seattle",
    "Seoul", "Sofia", "Stockholm", "Sydney", "Tallinn", "Tehran", "Tokyo", "Toronto", "Tunis", "Vienna", "Vilnius",
    "Warsaw", "Zagreb",
)  # fmt: skip
ATTEMPTS = 50  # ends of the text to try before its length cannot be met


@dataclass(frozen=True)
class Template:
    """
    How facts are told and asked for. `ask` is completed by the model, once for each city in turn.

    `intro` stands before the text, `question` between the text and the first `ask`; it may name {cities}.
    """

    fact: str = "\nThe magic number of {city} is {number}."
    ask: str = "\nThe magic number of {city} is"
    intro: str = ""
    question: str = ""

    def __post_init__(self):
        missing = [f"fact {{{name}}}" for name in ("city", "number") if f"{{{name}}}" not in self.fact]
        missing += [] if "{city}" in self.ask else ["ask {city}"]
        if missing:
            raise ValueError(f"template: {', '.join(missing)} is missing; fact and ask are completed with str.format")


# For models that were taught to follow instructions.
INSTRUCTION = Template(
    intro="Some magic numbers are hidden in the following text. Remember them.\n",
    question="\nWhat are the magic numbers of {cities}, as mentioned in the text?",
)


@dataclass(frozen=True)
class NeedleTask:
    """
    One cell of a measurement.

    `length_tokens` is what the model has read, special tokens included, when it is to write the first answer. `depth`
    is the share of the text before the asked needles, which stand together at the nearest line break; with None they
    lie anywhere, as the others do.
    """

    length_tokens: int
    depth: float | None = None
    needles: int = 1
    asked: int = 1
    digits: int = 4
    template: Template = field(default_factory=Template)
    cities: tuple[str, ...] = CITIES

    def __post_init__(self):
        if not 1 <= self.asked <= self.needles:
            raise ValueError(f"asked={self.asked}: ask for 1 to needles={self.needles} of them")
        if len(set(self.cities)) != len(self.cities) or self.needles > len(self.cities):
            raise ValueError(f"cities: {len(set(self.cities))} different names of {len(self.cities)}; give as many "
                             f"as there are needles ({self.needles}) or more, none twice")  # fmt: skip
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth}: a share of the text, 0 to 1, or None for anywhere")
        if self.digits < 1 or self.needles > 9 * 10 ** (self.digits - 1):
            raise ValueError(f"digits={self.digits}: too few for {self.needles} different numbers")


@dataclass(frozen=True)
class Needle:
    """A fact in a prompt: `span` and `number_span` are characters [start, end) of the prompt's text."""

    city: str
    number: str
    asked: bool
    span: tuple[int, int]
    number_span: tuple[int, int]


@dataclass(frozen=True)
class NeedlePrompt:
    """
    `text` ends where the first answer is to begin; `asked` are the needles in the order of asking; `body` are the
    characters [start, end) of the text with the needles in it, without what introduces and what asks.
    """

    text: str
    needles: tuple[Needle, ...]
    asked: tuple[Needle, ...]
    body: tuple[int, int]
    template: Template

    def transcript(self, answers: Sequence[str | None]) -> str:
        """The prompt for the next city, with what was answered so far left standing as it was answered."""
        end = self.template.fact.partition("{number}")[2].rstrip("\n")
        text = self.text
        for answer, needle in zip(answers, self.asked[1:], strict=False):
            text += (f" {answer}" if answer else "") + end + self.template.ask.format(city=needle.city)
        return text


def library_text(max_chars: int = 1_000_000) -> str:
    """Sources of the Python standard library, whole files in alphabetical order: text that every machine has."""
    parts, used = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        content = path.read_text(encoding="utf-8", errors="ignore")
        if not path.name.startswith("_") and content.isascii():
            parts.append(content)
            used += len(content)
        if used >= max_chars:
            break
    if not parts:
        raise ValueError("filler: the standard library's sources are not installed; give a text of your own")
    return "\n".join(parts)[:max_chars]


def count_tokens(tokenizer: Any, text: str) -> int:
    """As the model will read it, special tokens included."""
    return len(tokenizer(text, verbose=False).input_ids)


def make_prompts(task: NeedleTask, tokenizer: Any, filler: str, count: int, seed: int = 0) -> list[NeedlePrompt]:
    """
    `count` prompts of exactly `task.length_tokens` tokens; the same for the same task, tokenizer, filler and seed.

    Raises `ValueError` without a tokenizer or filler, and where the length cannot be met.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: missing; lengths are measured with the model's own, so load it and pass it")
    if not filler.strip():
        raise ValueError("filler: empty; give the text that needles are to lie in")
    key = f"{seed} {task.needles} {task.asked} {task.length_tokens} {task.depth} {task.digits}"
    source = random.Random(key)  # a string, so that a cell is the same whichever others are run
    chars_per_token = len(filler[:20_000]) / count_tokens(tokenizer, filler[:20_000])
    return [_make_prompt(task, tokenizer, filler, source, chars_per_token) for _ in range(count)]


def _make_prompt(
    task: NeedleTask, tokenizer: Any, filler: str, source: random.Random, chars_per_token: float
) -> NeedlePrompt:
    facts = _draw_facts(task, source)
    bare = count_tokens(tokenizer, _assemble(task, "", facts).text)
    if bare > task.length_tokens:
        raise ValueError(f"length_tokens={task.length_tokens}: {task.needles} needles and the question alone take "
                         f"{bare} tokens; ask for a longer prompt or fewer needles")  # fmt: skip
    chars = round((task.length_tokens - bare) * chars_per_token)
    ends = [i for i, char in enumerate(filler) if char == "\n" and i >= chars] or [len(filler)]
    for _ in range(ATTEMPTS):
        prompt = _fit(task, tokenizer, filler, facts, source.choice(ends), chars_per_token)
        if prompt is not None:
            return prompt
    raise ValueError(f"filler: {len(filler)} characters have no stretch of exactly the {task.length_tokens - bare} "
                     "tokens that are left beside needles and question; give a longer text")  # fmt: skip


def _draw_facts(task: NeedleTask, source: random.Random) -> list[tuple[str, str, float]]:
    """(city, number, depth) of each needle, the asked ones first and in the order of asking."""
    cities = source.sample(task.cities, task.needles)
    numbers = source.sample(range(10 ** (task.digits - 1), 10**task.digits), task.needles)
    depths = [source.random() for _ in cities]
    if task.depth is not None:
        depths[: task.asked] = [task.depth] * task.asked
    return [(city, str(number), depth) for city, number, depth in zip(cities, numbers, depths, strict=True)]


def _fit(
    task: NeedleTask, tokenizer: Any, filler: str, facts: list, end: int, chars_per_token: float
) -> NeedlePrompt | None:
    """Moves the beginning of the text until the prompt has its length; None if it jumps over it."""
    start, seen = max(0, end - round(task.length_tokens * chars_per_token)), set()
    while start not in seen:
        seen.add(start)
        prompt = _assemble(task, filler[start:end], facts)
        excess = count_tokens(tokenizer, prompt.text) - task.length_tokens
        if excess == 0:
            return prompt
        step = round(excess * chars_per_token) if abs(excess) > 3 else excess
        start = min(max(start + step, 0), end)
    return None


def _assemble(task: NeedleTask, text: str, facts: list[tuple[str, str, float]]) -> NeedlePrompt:
    """Puts the facts at line breaks of `text` (at spaces, if it has none), the question behind it."""
    template = task.template
    breaks = [0, *(i for i, char in enumerate(text) if char == ("\n" if "\n" in text else " ")), len(text)]
    placed = [
        (min(breaks, key=lambda place: abs(place - depth * len(text))), i) for i, (_, _, depth) in enumerate(facts)
    ]
    prompt, done, needles = template.intro, 0, {}
    for place, i in sorted(placed):
        city, number, _ = facts[i]
        prompt, done = prompt + text[done:place], place
        fact = template.fact.format(city=city, number=number)
        before = len(template.fact.partition("{number}")[0].format(city=city))
        begin = len(prompt)
        number_span = (begin + before, begin + before + len(number))
        needles[i] = Needle(city, number, i < task.asked, (begin, begin + len(fact)), number_span)
        prompt += fact
    asked = tuple(needles[i] for i in range(task.asked))
    question = template.question.format(cities=", ".join(needle.city for needle in asked))
    prompt += text[done:]
    body = (len(template.intro), len(prompt))
    prompt += question + template.ask.format(city=asked[0].city)
    return NeedlePrompt(prompt, tuple(needles.values()), asked, body, template)


def read_number(reply: str) -> str | None:
    """The first run of digits."""
    found = re.search(r"\d+", reply, re.ASCII)
    return found.group() if found else None


def score(answers: Sequence[str | None], needles: Sequence[Needle]) -> int:
    """How many answers are the number of the city that was asked for, to the last digit."""
    return sum(answer == needle.number for answer, needle in zip(answers, needles, strict=True))
