"""
Calibration text that the source writes itself, where the user has none: sampled at temperature 1, so that it has the
distribution that the model expects.

R sequences, T tokens per sequence, V vocabulary.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import DynamicCache

from conversion.checkpoint.output_folder import replace_bytes
from conversion.errors import ConversionError
from conversion.source import Source
from conversion.source.model import default_dtype, load_original
from modeling_diff.diff_transformers_compat import cache_argument


SELF_TEXT = "self: sampled from the source at temperature 1"  # as the record names it
BATCH_ROWS = 64  # sequences that are continued together, as every step reads all weights
FILE = "text.safetensors"

logger = logging.getLogger(__name__)


def check_self_text(source: Source) -> None:
    """Checks that a source can write text.

    Raises:
        ConversionError: It has no language model head.
    """
    if not {"lm_head.weight", "model.embed_tokens.weight"} & set(source.reader.tensors):
        raise ConversionError(
            f"{source.folder}: has no language model head, so --calibration self has nothing to sample from; give text"
        )


def self_text(
    source: Source, folder: Path, num_tokens: int, row_tokens: int, seed: int, device: str, resume: bool | None
) -> torch.Tensor:
    """Returns text (R, T) that the source writes from its bos token on: the one of a stopped run, or a new sample.

    Args:
        source: The LLaMA.
        folder: Where the text is kept for a run that continues this one.
        num_tokens: Tokens of all sequences together.
        row_tokens: T, the bos token included.
        seed: Of the sample.
        device: Where the source is run.
        resume: False discards text that is there.

    Raises:
        ConversionError: Logits that are not finite.
    """
    path = folder / FILE
    wanted = {"source": source.reader.content(), "seed": seed, "shape": [num_tokens // row_tokens, row_tokens]}
    if resume is not False and (kept := read_text(path, wanted)) is not None:
        logger.info("the text that the source wrote before is used again: %s", path)
        return kept
    model = load_original(
        source.folder, source.model.config, dtype=default_dtype(source.model.config, source.reader)
    ).to(device)
    rows = sample(model.eval(), *wanted["shape"], seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, save({"rows": rows}, {"said": json.dumps(wanted)}))
    return rows


def read_text(path: Path, wanted: dict[str, Any]) -> torch.Tensor | None:
    """Returns the sequences in a file; None where there are none, or others than wanted.

    Args:
        path: The file.
        wanted: Source, seed and shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("said", "{}"))
            return file.get_tensor("rows").clone() if said == json.loads(json.dumps(wanted)) else None
    except (FileNotFoundError, SafetensorError, ValueError):
        return None


def has_text(folder: Path) -> bool:
    """Returns whether a source has written its text in this work folder."""
    return (folder / FILE).exists()


@torch.no_grad()
def sample(model: Any, num_rows: int, row_tokens: int, *, seed: int) -> torch.Tensor:
    """Samples sequences (R, T) token by token; without a bos token the first one is any of the vocabulary.

    After the end of a document the next one follows, as in packed text.

    Args:
        model: A causal language model.
        num_rows: R.
        row_tokens: T.
        seed: Of the sample.

    Raises:
        ConversionError: Logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    bos = model.config.bos_token_id
    known = isinstance(bos, int) and 0 <= bos < model.config.vocab_size
    drawn = []
    for count in torch.full((num_rows,), 1).split(BATCH_ROWS):
        first = torch.randint(model.config.vocab_size, (len(count), 1), generator=generator)
        tokens = [torch.full_like(first, bos) if known else first]
        cache = DynamicCache(config=model.config)
        while len(tokens) < row_tokens:
            latest = tokens[-1].to(model.device)
            output = model(input_ids=latest, use_cache=True, **cache_argument(cache))
            logits = output.logits[:, -1].float().cpu()  # (B, V)
            if not logits.isfinite().all():
                raise ConversionError(
                    "the source's logits are NaN or Inf, so it can write no text; look for NaN in its weights"
                )
            tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        drawn.append(torch.cat(tokens, dim=1))
    return torch.cat(drawn)
