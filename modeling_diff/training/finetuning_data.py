"""Conversations, prompts with completions and plain text, as tokens and labels."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .documents import check_characters, is_json_lines, json_lines, text_pieces


Example = dict[str, list[int]]


def read_records(paths: list[Path]) -> list[dict]:
    """
    Returns the records of files: JSON lines unchanged, every other file as one `text`.

    Args:
        paths: Files ending in .jsonl, .ndjson or .json, one object per line, and text files.

    Returns:
        One object per line or text file, in the order of the files.

    Raises:
        ValueError: A file is missing, not UTF-8, or holds a line that is no such object.
    """
    records = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --data takes JSON lines or text files")
        if is_json_lines(path):
            records += [checked_record(record, place) for place, record in json_lines(path)]
        else:
            records.append({"text": "".join(text_pieces(path))})
    return records


def checked_record(record: Any, place: str) -> dict:
    """Returns a record; `ValueError` where it is no object, or a field that is read no text."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds {type(record).__name__}, expected one object per line")
    for name in fields_read(record):
        text = json.dumps(record[name], ensure_ascii=False) if name == "messages" else record[name]
        if not isinstance(text, str):
            raise ValueError(f"{place}: {name} is {type(text).__name__}, expected a string")
        check_characters(text, f"{place}: {name}")
    return record


def fields_read(record: dict) -> tuple[str, ...]:
    """Returns the first of the forms that a record has; null counts as absent, other fields are not read."""
    given = {name for name, value in record.items() if value is not None}
    forms = ("messages",), ("prompt", "completion"), ("text",)
    return next((form for form in forms if given.issuperset(form)), ())


def tokenize(records: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """
    Returns `input_ids` and `labels` of every record, -100 where there is no loss.

    Args:
        records: Records with `messages`, with `prompt` and `completion`, or with `text`.
        tokenizer: Tokenizer of the model; `messages` need its chat template, a completion its eos token.
        max_length: Largest number of tokens per example; `text` is cut into windows of it.

    Returns:
        One example per conversation and completion, and one per window of `text`.

    Raises:
        ValueError: There is no data, a record has none of these forms or is longer than `max_length`, or the
            tokenizer lacks what a record needs.
    """
    examples = []
    for number, record in enumerate(records, 1):
        form = fields_read(record)
        if form == ("messages",):
            if tokenizer.chat_template is None:
                raise ValueError(f"record {number} has messages, and the tokenizer no chat template: --chat-template")
            text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            examples.append(checked({"input_ids": ids, "labels": list(ids)}, number, max_length))
        elif form == ("prompt", "completion"):
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"record {number} has a completion, and the tokenizer no eos_token to end it; set one in "
                    "tokenizer_config.json"
                )
            prompt = tokenizer(record["prompt"]).input_ids
            prompt = prompt[:-1] if prompt and prompt[-1] == tokenizer.eos_token_id else prompt
            answer = [*tokenizer(record["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + answer
            examples.append(checked({"input_ids": prompt + answer, "labels": labels}, number, max_length))
        elif form == ("text",):
            ids = tokenizer(record["text"], verbose=False).input_ids
            windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            examples += [{"input_ids": window, "labels": list(window)} for window in windows if len(window) > 1]
        else:
            raise ValueError(
                f"record {number} has {sorted(record)}: messages, prompt and completion, or text is needed"
            )
    if not examples:
        raise ValueError("--data: no example in it, there is nothing to train on")
    return examples


def checked(example: Example, number: int, max_length: int) -> Example:
    """Returns an example; `ValueError` where it is longer than `max_length` tokens."""
    if len(example["input_ids"]) > max_length:
        raise ValueError(
            f"record {number} has {len(example['input_ids'])} tokens, and --max-length is {max_length}: shorten it or "
            "leave it out; nothing is cut off silently"
        )
    return example
