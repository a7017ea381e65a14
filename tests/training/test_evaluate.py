"""examples/studies/evaluate_models.py: its tasks, and lm-evaluation-harness through its Python API on local files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import evaluate_models
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import convert_checkpoint


ASSETS = evaluate_models.ASSETS
TEXT = "".join(f"line {i} of a text that is not about cities\n" for i in range(30))


def test_recall_documents_hold_the_answer_and_what_else_is_offered():
    documents = evaluate_models.recall_documents(TEXT, count=20, lines=8, seed=0)
    assert len({document["answer"] for document in documents}) == 4
    for document in documents:
        *lines, question = document["prompt"].split("\n")
        facts = [line for line in lines if line.startswith("The magic number")]
        assert len(lines) == 12 and len(facts) == 4
        assert f"{question} {document['choices'][document['answer']]}." in facts
        assert all(any(number in fact for fact in facts) for number in document["choices"])


def test_text_documents_are_the_text():
    assert "".join(document["text"] for document in evaluate_models.text_documents(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "x", "--lines", "99999"], "--lines"),
        (["--model", "x", "--text", "absent.txt"], "absent.txt"),
        (["--model", str(ASSETS), "nowhere"], r"^evaluate_models: nowhere: no tokenizer can be loaded.*$"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_measured(words, message):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    with pytest.raises(SystemExit, match=message):
        evaluate_models.main(words)


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        evaluate_models.main(["--smoke"])


def byte_perplexity(folder, text):
    """Nats a byte of all documents, each behind a bos, and, as the harness has it, that bos behind another."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = num_bytes = 0
    for document in evaluate_models.text_documents(text):
        ids = tokenizer(document["text"], return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id and ids.shape[1] < model.config.max_position_embeddings
        ids = torch.cat((ids[:, :1], ids), dim=1)
        with torch.no_grad():
            nats += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        num_bytes += len(document["text"].encode())
    return math.exp(nats / num_bytes)


@pytest.mark.slow
def test_harness_measures_what_the_definitions_say(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    convert_checkpoint(ASSETS, tmp_path / "v2", "v2", measure=False)
    text = "".join((ASSETS / "heldout.txt").read_text().splitlines(keepends=True)[:80])
    (tmp_path / "text.txt").write_text(text)
    script = Path(evaluate_models.__file__)
    command = [sys.executable, script, "--model", ASSETS, tmp_path / "v2", "--text", tmp_path / "text.txt"]
    command += ["--documents", "12", "--dtype", "float32", "--output", tmp_path / "new"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    llama, v2 = json.loads((tmp_path / "new/evaluation.json").read_text()).values()
    assert llama["recall"]["acc"] > 0.6  # chance is 0.25
    assert v2["recall"]["acc"] == llama["recall"]["acc"]  # the conversion is exact
    expected = byte_perplexity(ASSETS, text)
    for results in (llama, v2):  # float32 in batches against single documents
        assert results["held_out"]["byte_perplexity"] == pytest.approx(expected, rel=1e-3)
    assert "| recall | acc |" in done.stdout
