"""
Multi-needle retrieval: prompts of an exact length in tokens, and exact scoring.

Facts of the form "The magic number of Oslo is 4821." are placed in a text; some of them are asked for at its end. The
task is that of LWM (arXiv:2402.08268), as the Differential Transformer was measured on it (arXiv:2410.05258, section
3.3): N needles, R of them asked for and placed at a chosen depth; the other N - R are distractors, placed anywhere.
"""

import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


CITY_NAMES = """
Accra Almaty Amman Amsterdam Ankara Athens Baghdad Baku Bamako Bangkok Beirut Belgrade Berlin Bern Bogota Bratislava
Brussels Bucharest Budapest Cairo Canberra Caracas Chicago Copenhagen Dakar Damascus Delhi Dhaka Doha Dublin Geneva
Hanoi Harare Havana Helsinki Istanbul Jakarta Kabul Kigali Kyiv Lagos Lima Lisbon London Luanda Lusaka Madrid Manila
Minsk Montreal Mumbai Muscat Nairobi Oslo Ottawa Paris Perth Prague Quito Rabat Riga Rome Santiago Sarajevo Seattle
Seoul Sofia Stockholm Sydney Tallinn Tehran Tokyo Toronto Tunis Vienna Vilnius Warsaw Zagreb
"""
CITIES = tuple(CITY_NAMES.split())
ATTEMPTS = 50  # ends of the text to try before giving up on its length


@dataclass(frozen=True)
class Template:
    """
    Wording of facts and questions.

    Attributes:
        fact: A fact with {city} and {number}.
        ask: What the model completes, once for each {city} in turn.
        intro: What precedes the text.
        question: What stands between the text and the first `ask`; it may name {cities}.

    Raises:
        ValueError: A name in braces is missing.
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


# For models trained to follow instructions.
INSTRUCTION = Template(
    intro="Some magic numbers are hidden in the following text. Remember them.\n",
    question="\nWhat are the magic numbers of {cities}, as mentioned in the text?",
)


@dataclass(frozen=True)
class NeedleTask:
    """
    One cell of a measurement.

    Attributes:
        length_tokens: Tokens that the model has read before the first answer, special tokens included.
        depth: Share of the text before the asked needles, 0 to 1, which are placed together at the nearest line
            break; None to place them anywhere, as the others.
        needles: Number of needles.
        asked: Number of needles asked for, 1 to `needles`.
        digits: Digits of a number.
        template: Wording of facts and questions.
        cities: Distinct names to draw from, as many as needles or more.

    Raises:
        ValueError: A field is out of range.
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
            raise ValueError(
                f"cities: {len(set(self.cities))} different names of {len(self.cities)}; give as many as there are "
                f"needles ({self.needles}) or more, none twice"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth}: a share of the text, 0 to 1, or None for anywhere")
        if self.digits < 1 or self.needles > 9 * 10 ** (self.digits - 1):
            raise ValueError(f"digits={self.digits}: too few for {self.needles} different numbers")


@dataclass(frozen=True)
class Needle:
    """
    A fact in a prompt.

    Attributes:
        city: What the number belongs to.
        number: The number.
        asked: Whether it is asked for.
        span: Characters [start, end) of the fact in the prompt's text.
        number_span: Characters [start, end) of its number.
    """

    city: str
    number: str
    asked: bool
    span: tuple[int, int]
    number_span: tuple[int, int]


@dataclass(frozen=True)
class NeedlePrompt:
    """
    A prompt with needles.

    Attributes:
        text: The prompt up to the first answer.
        needles: All needles.
        asked: The needles asked for, in the order of asking.
        body: Characters [start, end) of the text with its needles, without introduction and question.
        template: Wording of facts and questions.
    """

    text: str
    needles: tuple[Needle, ...]
    asked: tuple[Needle, ...]
    body: tuple[int, int]
    template: Template

    def transcript(self, answers: Sequence[str | None]) -> str:
        """Returns the prompt for the next city, with the answers so far unchanged in it."""
        end = self.template.fact.partition("{number}")[2].rstrip("\n")
        text = self.text
        for answer, needle in zip(answers, self.asked[1:], strict=False):
            text += (f" {answer}" if answer else "") + end + self.template.ask.format(city=needle.city)
        return text


def library_text(max_chars: int = 1_000_000) -> str:
    """
    Reads sources of the Python standard library, complete files in alphabetical order: text that every machine has.

    Args:
        max_chars: The largest number of characters.

    Returns:
        The text.

    Raises:
        ValueError: The sources are not installed.
    """
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        content = path.read_text(encoding="utf-8", errors="ignore")
        if not path.name.startswith("_") and content.isascii():
            parts.append(content)
        if sum(map(len, parts)) >= max_chars:
            break
    if not parts:
        raise ValueError("filler: the standard library's sources are not installed; give a text of your own")
    return "\n".join(parts)[:max_chars]


def count_tokens(tokenizer: Any, text: str) -> int:
    """Counts tokens as the model will read them, special tokens included."""
    return len(tokenizer(text, verbose=False).input_ids)


def make_prompts(task: NeedleTask, tokenizer: Any, filler: str, count: int, seed: int = 0) -> list[NeedlePrompt]:
    """
    Makes prompts of exactly `task.length_tokens` tokens, equal for equal arguments.

    Args:
        task: The cell.
        tokenizer: The model's tokenizer.
        filler: The text that needles are placed in.
        count: Number of prompts.
        seed: Seed of cities, numbers, depths and cuts of the text.

    Returns:
        The prompts.

    Raises:
        ValueError: The tokenizer or the filler is missing, or the length cannot be met.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: missing; lengths are measured with the model's own, so load it and pass it")
    if not filler.strip():
        raise ValueError("filler: empty; give the text to place needles in")
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
        raise ValueError(
            f"length_tokens={task.length_tokens}: {task.needles} needles and the question alone take {bare} tokens; "
            "ask for a longer prompt or fewer needles"
        )
    chars = round((task.length_tokens - bare) * chars_per_token)
    ends = [i for i, char in enumerate(filler) if char == "\n" and i >= chars] or [len(filler)]
    for _ in range(ATTEMPTS):
        end = source.choice(ends)
        prompt = _fit(task, tokenizer, filler, facts=facts, end=end, chars_per_token=chars_per_token)
        if prompt is not None:
            return prompt
    raise ValueError(
        f"filler: {len(filler)} characters have no part of exactly the {task.length_tokens - bare} tokens that "
        "needles and question leave; give a longer text"
    )


def _draw_facts(task: NeedleTask, source: random.Random) -> list[tuple[str, str, float]]:
    """Draws (city, number, depth) of each needle, the asked ones first and in the order of asking."""
    cities = source.sample(task.cities, task.needles)
    numbers = source.sample(range(10 ** (task.digits - 1), 10**task.digits), task.needles)
    depths = [source.random() for _ in cities]
    if task.depth is not None:
        depths[: task.asked] = [task.depth] * task.asked
    return [(city, str(number), depth) for city, number, depth in zip(cities, numbers, depths, strict=True)]


def _fit(
    task: NeedleTask,
    tokenizer: Any,
    filler: str,
    *,
    facts: list[tuple[str, str, float]],
    end: int,
    chars_per_token: float,
) -> NeedlePrompt | None:
    """Moves the beginning of the text until the prompt has its length; None if it jumps over it."""
    start = max(0, end - round(task.length_tokens * chars_per_token))
    seen: set[int] = set()
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
    """Inserts the facts at line breaks of `text` (at spaces, if it has none), and appends the question."""
    template = task.template
    separator = "\n" if "\n" in text else " "
    breaks = [0, *(i for i, char in enumerate(text) if char == separator), len(text)]
    positions = [min(breaks, key=lambda at: abs(at - depth * len(text))) for _, _, depth in facts]
    prompt = template.intro
    copied = 0  # characters of the text that are in the prompt
    needles: dict[int, Needle] = {}
    for i in sorted(range(len(facts)), key=lambda i: (positions[i], i)):
        city, number, _ = facts[i]
        prompt += text[copied : positions[i]]
        copied = positions[i]
        fact = template.fact.format(city=city, number=number)
        start = len(prompt)
        number_start = start + len(template.fact.partition("{number}")[0].format(city=city))
        needles[i] = Needle(
            city=city,
            number=number,
            asked=i < task.asked,
            span=(start, start + len(fact)),
            number_span=(number_start, number_start + len(number)),
        )
        prompt += fact
    prompt += text[copied:]
    asked = tuple(needles[i] for i in range(task.asked))
    question = template.question.format(cities=", ".join(needle.city for needle in asked))
    return NeedlePrompt(
        text=prompt + question + template.ask.format(city=asked[0].city),
        needles=tuple(needles.values()),
        asked=asked,
        body=(len(template.intro), len(prompt)),
        template=template,
    )


def read_number(reply: str) -> str | None:
    """
    Reads the number in an answer.

    Args:
        reply: What the model wrote.

    Returns:
        The first run of digits, or None.
    """
    found = re.search(r"\d+", reply, re.ASCII)
    return found.group() if found else None


def score(answers: Sequence[str | None], needles: Sequence[Needle]) -> int:
    """
    Counts right answers.

    Args:
        answers: Numbers of `answer_prompts` for one prompt.
        needles: The needles asked for, in the same order.

    Returns:
        How many answers are the number of their needle, to the last digit.
    """
    return sum(answer == needle.number for answer, needle in zip(answers, needles, strict=True))
