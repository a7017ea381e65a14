"""
Text as sequences of token ids, for calibration, healing and measurement alike: one reader and one stream of tokens.

R rows, T tokens per row.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import torch

from conversion.errors import ConversionError, file_errors, typed
from modeling_diff.analysis.tokens import token_fault
from modeling_diff.training.documents import Document, Tokenizer, document_tokens, read_documents


CHUNK_TOKENS = 1 << 20


def read_calibration(
    path: Path,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    row_tokens: int,
    vocab_size: int,
    *,
    whole_if_shorter: bool = False,
) -> torch.Tensor:
    """Returns the first `num_tokens` tokens of a text as sequences (R, T), each after a bos if there is one.

    Reads no further than needed. Text comes in pieces of lines; of JSON lines each holds `text` or `input_ids`; of a
    datasets folder the columns are called so.

    Args:
        path: Text, JSON lines, or a folder that `datasets` has saved.
        tokenizer: The source's; without one only `input_ids` will do.
        num_tokens: Of all sequences together, rounded down to whole ones.
        row_tokens: T, the bos included.
        vocab_size: Ids from here on are refused.
        whole_if_shorter: A shorter text gives as many whole sequences as it has, one at least.

    Raises:
        ConversionError: A file that is missing, empty, neither text nor JSON lines, or too short.
    """
    path = Path(path)
    bos = tokenizer.bos_token_id if tokenizer is not None else None
    body = row_tokens - (bos is not None)
    num_rows = num_tokens // row_tokens
    if num_rows < 1:
        raise ConversionError(
            f"calibration tokens {num_tokens}: fewer than one sequence of {row_tokens}; ask for more"
        )
    ids = list(islice(token_ids(path, tokenizer, vocab_size), num_rows * body))
    if not ids:
        raise ConversionError(f"{path}: empty, expected calibration text of {num_tokens} tokens")
    if len(ids) < body and whole_if_shorter:
        raise ConversionError(f"{path}: {len(ids)} tokens, fewer than one sequence of {body}; give more text")
    if len(ids) < num_rows * body and not whole_if_shorter:
        raise ConversionError(
            f"{path}: {len(ids)} tokens, expected {num_rows * body} (--calibration-tokens {num_tokens}, in sequences "
            f"of {row_tokens}); give more text, ask for fewer tokens, or leave --calibration-tokens out to use all"
        )
    num_rows = min(num_rows, len(ids) // body)
    return with_bos(torch.tensor(ids[: num_rows * body], dtype=torch.long).view(num_rows, body), bos)


def with_bos(rows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Returns rows (R, T) with a bos before each, (R, T + 1); unchanged without one."""
    return rows if bos is None else torch.cat((torch.full((len(rows), 1), bos), rows), dim=1)


def leaves_bos_out(tokenizer: Tokenizer | None) -> bool:
    """Returns whether a tokenizer has a bos, but puts none before a text: it leaves that to chat templates.

    Many heads attend to the first token, so a V1 that was fitted after a bos is further from its LLaMA without one.
    """
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    return tokenizer.encode("", add_special_tokens=True, verbose=False)[:1] != [tokenizer.bos_token_id]


def pack_rows(
    paths: Sequence[Path],
    tokenizer: Tokenizer | None,
    row_tokens: int,
    *,
    vocab_size: int,
    max_rows: int | None,
    file: Path,
) -> torch.Tensor:
    """
    Packs documents into rows of equal length: joined in one stream, which is cut.

    Text gets bos and eos around each document, where the tokenizer has them; `input_ids` are taken unchanged. A row
    may hold the end of one document and the beginning of the next, and attention reaches across; what does not fill
    the last row is dropped.

    Args:
        paths: Text files, JSON lines and folders that `datasets` saved.
        tokenizer: The checkpoint's tokenizer; without one only `input_ids` will do.
        row_tokens: Tokens per row.
        vocab_size: Number of tokens that the model knows.
        max_rows: Rows after which reading stops; None reads all.
        file: File to write the rows to.

    Returns:
        Token ids, int32 (R, T), mapped from the file.

    Raises:
        ConversionError: Data are missing, empty, neither text nor JSON lines, or less than a row.
        FilesError: The file cannot be written.
    """
    tokens = chain.from_iterable(token_ids(path, tokenizer, vocab_size, boundaries=True) for path in paths)
    wanted = tokens if max_rows is None else islice(tokens, max_rows * row_tokens)
    count = 0
    with file_errors(file), file.open("wb") as stream:
        while piece := array("i", islice(wanted, CHUNK_TOKENS)):
            stream.write(piece.tobytes())
            count += len(piece)
    if count < row_tokens:
        names = ", ".join(path.name for path in paths)
        raise ConversionError(
            f"{names}: {count} tokens, expected at least one sequence of {row_tokens}; give more text"
        )
    return map_rows(file, count // row_tokens, row_tokens)


def map_rows(file: Path, num_rows: int, row_tokens: int) -> torch.Tensor:
    """Returns rows (R, T) that `pack_rows` has written; pages come into memory as they are read."""
    flat = torch.from_file(str(file), shared=False, size=num_rows * row_tokens, dtype=torch.int32)
    return flat.view(num_rows, row_tokens)


def token_ids(path: Path, tokenizer: Tokenizer | None, vocab_size: int, *, boundaries: bool = False) -> Iterator[int]:
    """
    Yields the tokens of the documents of a file, or of a folder that `datasets` saved.

    Args:
        path: The file or folder.
        tokenizer: The checkpoint's tokenizer; without one only `input_ids` will do.
        vocab_size: Number of tokens that the model knows.
        boundaries: Whether to yield bos and eos, where the tokenizer has them, around documents of text.

    Raises:
        ConversionError: It is missing or cannot be read, holds text without a tokenizer, or an unknown token.
    """
    if not path.exists():
        raise ConversionError(f"{path}: does not exist, expected text; check the path")
    with reading_errors(path):
        yield from document_ids(read_documents(path), str(path), tokenizer, vocab_size, boundaries=boundaries)


def document_ids(
    documents: Iterable[Document], name: str, tokenizer: Tokenizer | None, vocab_size: int, *, boundaries: bool
) -> Iterator[int]:
    """Yields the tokens of documents, as `token_ids` does; `name` begins its messages."""
    bos, eos = ([], []) if not boundaries else special_ids(tokenizer)
    checked_ids([*bos, *eos], f"{name}: bos and eos", vocab_size)
    for number, document in enumerate(documents, 1):
        if document.input_ids is not None:
            yield from checked_ids(document.input_ids, f"{name}: input_ids of document {number}", vocab_size)
            continue
        if tokenizer is None:
            raise ConversionError(
                f"{name}: holds text, but the checkpoint has no tokenizer (tokenizer.json, or tokenizer_config.json "
                "with its vocabulary); give JSON lines with input_ids"
            )
        yield from bos
        for ids in document_tokens(document, tokenizer):
            yield from checked_ids(ids, f"{name}: the text", vocab_size)
        yield from eos


def special_ids(tokenizer: Tokenizer | None) -> tuple[list[int], list[int]]:
    """Returns the ids of bos and of eos, each none or one."""
    found = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    bos, eos = ([] if token is None else [token] for token in found)
    return bos, eos


def checked_ids(ids: Sequence[int], where: str, vocab_size: int) -> Sequence[int]:
    """Returns the ids. ConversionError for one that an embedding of `vocab_size` rows has no row for."""
    if fault := token_fault(ids, vocab_size):
        raise ConversionError(f"{where}: {fault}")
    return ids


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turns what `read_documents` raises into errors of a conversion."""
    try:
        with file_errors(path):
            yield
    except ValueError as error:
        raise ConversionError(str(error)) from error


def existing_paths(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    """Returns one path or several as a list.

    Raises:
        ConversionError: There is none, or one is not there.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ConversionError(f"{typed('data')}: no file was given; expected text, JSON lines or a datasets folder")
    found = [Path(path) for path in given]
    for path in found:
        if not path.exists():
            raise ConversionError(f"{path}: does not exist, expected training text; check the path")
    return found
