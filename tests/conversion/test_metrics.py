"""Loss, KL and greedy agreement of two models, and the windows of text that they are measured on."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from conversion.data.held_out import STANDARD_NAME, STANDARD_TEXT, WINDOW_TOKENS, WINDOWS, read_held_out
from conversion.errors import ConversionError
from conversion.evaluation.metrics import text_metrics


ROOT = Path(__file__).parents[2]
VOCABULARY = 300


class Letters:
    """A token for each character, after a bos where special tokens are asked for."""

    bos_token_id = 299

    def encode(self, text, *, add_special_tokens, verbose):
        return [self.bos_token_id] * add_special_tokens + [ord(letter) % 256 for letter in text]


def test_metrics_are_those_of_float64_over_all_positions():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [torch.randn(length, 11, generator=generator, dtype=torch.float64) for length in (5, 9)] for _ in range(2)
    )
    windows = [torch.randint(11, (1, length), generator=generator) for length in (5, 9)]
    found = text_metrics([logits.float() for logits in ours], windows, [logits.float() for logits in theirs])
    q, p = (torch.cat(logits).log_softmax(-1) for logits in (ours, theirs))
    assert found.kl_nats == pytest.approx(kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-5)
    assert found.greedy_agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    for logits, loss in ((ours, found.loss_nats), (theirs, found.source_loss_nats)):
        parts = [
            -part.log_softmax(-1)[range(len(part) - 1), ids[0, 1:]] for part, ids in zip(logits, windows, strict=True)
        ]
        assert loss == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kl_of_rounding_is_never_printed_below_zero(dtype):
    """Of nearly equal distributions float32 sums end below 0 about every second time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = torch.randn(3, 500, generator=generator).to(dtype)
        nearly = logits * (1 + 1e-7)
        found = text_metrics([nearly], [torch.zeros(1, 3, dtype=torch.long)], [logits])
        assert found.kl_nats >= 0 and f"{found.kl_nats:.4f}" == "0.0000"


def test_standard_text_travels_with_the_package_and_is_that_of_the_small_llama():
    assert STANDARD_TEXT.parent == ROOT / "conversion" / "data"
    assert re.search(r'^"conversion\.data" = .*"\*\.txt"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert STANDARD_TEXT.read_bytes() == (ROOT / "examples/assets/tiny-llama/heldout.txt").read_bytes()
    assert "PSF License" in (STANDARD_TEXT.parent / "README.md").read_text()


class LettersAlone(Letters):
    """It has a bos, and leaves it to chat templates."""

    def encode(self, text, *, add_special_tokens, verbose):
        return super().encode(text, add_special_tokens=False, verbose=verbose)


def test_windows_come_without_a_bos_as_well_where_the_tokenizer_adds_none():
    assert read_held_out(Letters(), VOCABULARY, 512).without_bos == []
    found = read_held_out(LettersAlone(), VOCABULARY, 512)
    assert all(ids[0, 0] == Letters.bos_token_id for ids in found.windows)
    for window, ids in zip(found.without_bos, found.windows, strict=True):
        assert torch.equal(window, ids[:, 1:])


def test_windows_are_spread_over_the_text_behind_a_bos():
    found = read_held_out(Letters(), VOCABULARY, 512)
    text = STANDARD_TEXT.read_text()
    assert found.name == STANDARD_NAME and found.num_tokens == WINDOWS * WINDOW_TOKENS
    assert all(ids.shape == (1, WINDOW_TOKENS) and ids[0, 0] == Letters.bos_token_id for ids in found.windows)
    begins = [text.encode().find(bytes(ids[0, 1:].tolist())) for ids in found.windows]
    assert begins[0] == 0 and begins == sorted(begins) and begins[-1] > 80_000


def test_short_models_and_texts_get_shorter_and_fewer_windows(tmp_path):
    assert {ids.shape for ids in read_held_out(Letters(), VOCABULARY, 16).windows} == {(1, 16)}
    (tmp_path / "mine.txt").write_text("x" * 600)
    found = read_held_out(Letters(), VOCABULARY, 512, tmp_path / "mine.txt")
    assert found.name == "mine.txt" and [ids.shape[1] for ids in found.windows] == [256, 256]
    (tmp_path / "mine.txt").write_text("xyz")
    assert [ids.tolist() for ids in read_held_out(Letters(), VOCABULARY, 512, tmp_path / "mine.txt").windows] == [
        [[299, 120, 121, 122]]
    ]


@pytest.mark.parametrize(
    ("content", "tokenizer", "message"),
    [
        (None, Letters(), "does not exist, expected text"),
        ("", Letters(), "0 tokens, .* expected two at least"),
        ("x", Letters(), "1 tokens, .* expected two at least"),
        ("text", None, "no tokenizer"),
        (json.dumps({"input_ids": [1, 301]}), None, "token 301, expected whole numbers from 0 to 299"),
    ],
)
def test_text_that_cannot_be_measured_on_is_refused(tmp_path, content, tokenizer, message):
    path = tmp_path / ("rows.jsonl" if content and content.startswith("{") else "text.txt")
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConversionError, match=message):
        read_held_out(tokenizer, VOCABULARY, 512, path)


def test_tokenizer_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConversionError, match=r"gives token 299, but config\.json says vocab_size 200"):
        read_held_out(Letters(), 200, 512)
