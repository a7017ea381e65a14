"""The pretraining examples: packed rows, what is refused, resume to the same bits, twins of equal size."""

import json
import random
import shutil

import continue_pretraining
import pretrain_from_scratch
import pretraining_measures
import pytest
import torch
from tiny_tokenizers import word_tokenizer
from trainable_models import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_diff.training.pretraining_data import IGNORED, PackedRows, dataset_documents, text_files


WORDS = 90


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))]
    return word_tokenizer(words, "<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def texts(tmp_path):
    """Text files of 1, 8, ... words, no two alike; returns the pattern."""
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for i in range(12):
        words = [f"w{draw.randrange(3, WORDS)}" for _ in range(1 + 7 * i)]
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(words))
    return str(tmp_path / "texts" / "*.txt")


@pytest.fixture(params=["llama", "v1", "v2"])
def kind(request):
    return request.param


@pytest.fixture
def checkpoint(tmp_path, tokenizer, kind):
    tiny_model(kind).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    return tmp_path / kind


def run(folder, texts, output, *words):
    """The example as called, with small numbers; returns what it wrote."""
    arguments = ["--model", str(folder), "--data", texts, "--output", str(output), "--max-length", "32"]
    arguments += ["--max-steps", "4", "--per-device-train-batch-size", "2", "--save-steps", "2"]
    arguments += ["--logging-steps", "1", "--shuffle-rows", "3"]
    continue_pretraining.main([*arguments, *words])
    return json.loads((output / "continued.json").read_text())


def parts(row):
    """[(ids, labels)] of the documents that a row holds, by its positions."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    ends = [*starts[1:], len(row["position_ids"])]
    return [(row["input_ids"][i:j], row["labels"][i:j]) for i, j in zip(starts, ends, strict=True)]


def test_rows_hold_every_token_once_and_in_order(tokenizer, texts):
    rows = PackedRows(text_files([texts]), tokenizer, max_length=16, seed=1).first_pass()
    assert all(len(row[name]) == 16 for row in rows for name in row)
    stream = [token for row in rows for token in row["input_ids"]]
    documents = [[int(word[1:]) for word in text.split()] for text in read_all(texts)]
    order = split_at_eos(stream)[:-1]
    assert all(document[0] == 1 and document[1:] in documents for document in order)
    for row in rows:
        for ids, labels in parts(row):
            assert labels == [IGNORED, *ids[1:]]


def read_all(pattern):
    import glob

    return [open(path).read() for path in glob.glob(pattern)]


def split_at_eos(stream):
    documents = [[]]
    for token in stream:
        if token == 2:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def test_rows_depend_on_the_seed_alone(tokenizer, texts):
    def first(seed, count=40):
        rows = iter(PackedRows(text_files([texts]), tokenizer, max_length=16, seed=seed, shuffle_rows=5))
        return [next(rows)["input_ids"] for _ in range(count)]

    assert first(3) == first(3) != first(4)


def test_packed_documents_equal_separate_ones(tokenizer, texts, kind):
    """Loss and gradient of a packed row are those of its documents one by one, weighted by their labels."""
    rows = PackedRows(text_files([texts]), tokenizer, max_length=48).first_pass()
    row = max(rows, key=lambda row: len(parts(row)))
    assert len(parts(row)) >= 3
    model = tiny_model(kind)
    model.config.use_cache = False
    batch = {name: torch.tensor([values]) for name, values in row.items()}
    model(**batch).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    separate = [(torch.tensor([ids]), len(ids) - 1) for ids, _ in parts(row) if len(ids) > 1]
    for ids, count in separate:
        loss = model(input_ids=ids, labels=ids).loss * count / sum(count for _, count in separate)
        loss.backward()
    for name, parameter in model.named_parameters():  # float32, sums in another order
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_resume_equals_an_uninterrupted_run_bit_for_bit(checkpoint, texts, tmp_path):
    words = ["--eval-data", texts, "--eval-rows", "3", "--eval-steps", "2", "--gradient-accumulation-steps", "2"]
    whole = run(checkpoint, texts, tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run(checkpoint, texts, tmp_path / "resumed", *words, "--resume")
    for what in ("loss", "eval_loss", "lambda/mean", "lambda/mean/distance"):
        assert [e[what] for e in whole["log"] if what in e] == [e[what] for e in resumed["log"] if what in e]
    assert len([e for e in whole["log"] if "eval_loss" in e]) == 3
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert first == second
    assert first != (checkpoint / "model.safetensors").read_bytes()


def test_gradient_checkpointing_and_bf16_train(checkpoint, texts, tmp_path):
    plain = run(checkpoint, texts, tmp_path / "plain")
    saving = run(checkpoint, texts, tmp_path / "saving", "--gradient-checkpointing")
    rounded = run(checkpoint, texts, tmp_path / "rounded", "--bf16")
    losses = [[entry["loss"] for entry in result["log"] if "loss" in entry] for result in (plain, saving, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # float32
    assert losses[2] == pytest.approx(losses[0], rel=5e-2) and losses[2] != losses[0]  # 8 bits


def refused(folder, texts, output, *words):
    with pytest.raises(SystemExit) as stopped:
        run(folder, texts, output, *words)
    message = str(stopped.value)
    assert message.startswith("continue_pretraining: ") and "\n" not in message
    return message


def test_what_cannot_be_trained_is_refused_in_one_line(tokenizer, texts, tmp_path):
    folder, output = tmp_path / "v2", tmp_path / "out"
    tiny_model("v2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "w5 w6"}\n{"txt": "w5"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "déjà"}'.encode("latin-1"))
    assert "nowhere: no tokenizer can be loaded" in refused(tmp_path / "nowhere", texts, output)
    assert "no file matches" in refused(folder, str(tmp_path / "*.absent"), output)
    assert "no text" in refused(folder, str(tmp_path / "empty.txt"), output)
    assert "line 2 holds neither" in refused(folder, str(tmp_path / "bad.jsonl"), output)
    assert "latin.jsonl: not UTF-8" in refused(folder, str(tmp_path / "latin.jsonl"), output)
    assert "max_position_embeddings=64" in refused(folder, texts, output, "--max-length", "65")
    assert "no checkpoint" in refused(folder, texts, output, "--resume")
    assert "--seed" not in refused(folder, texts, output, "--query-factor", "0")
    nameless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    nameless.save_pretrained(folder)
    assert "no eos_token" in refused(folder, texts, output)
    nameless.add_tokens([f"extra{i}" for i in range(20)])
    nameless.save_pretrained(folder)
    assert "vocab_size" in refused(folder, texts, output)


def test_a_loss_of_nan_stops_the_run(tokenizer, texts, tmp_path):
    model = tiny_model("v1")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "v1")
    tokenizer.save_pretrained(tmp_path / "v1")
    assert "nan" in refused(tmp_path / "v1", texts, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_output_in_use_is_not_overwritten(tokenizer, texts, tmp_path):
    tiny_model("v2").save_pretrained(tmp_path / "v2")
    tokenizer.save_pretrained(tmp_path / "v2")
    run(tmp_path / "v2", texts, tmp_path / "out")
    assert "--resume" in refused(tmp_path / "v2", texts, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


def test_datasets_are_read_as_files_are(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    lines = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(3, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    datasets.Dataset.from_list(lines).save_to_disk(tmp_path / "saved")
    expected = PackedRows(text_files([str(tmp_path / "rows.jsonl")]), tokenizer, 16).first_pass()
    assert PackedRows(dataset_documents(str(tmp_path / "saved"), "train"), tokenizer, 16).first_pass() == expected


def test_rows_of_token_ids_are_taken_unchanged(tokenizer, tmp_path):
    """Without a bos or an eos that the data do not have, and refused where no token has such an id."""
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [7, 8, 9, 10, 11]}\n{"input_ids": [12, 13, 14]}\n')
    (row,) = PackedRows(text_files([str(path)]), tokenizer, max_length=8).first_pass()
    assert row["input_ids"] == [*range(7, 15)] and row["position_ids"] == [*range(5), *range(3)]
    assert row["labels"] == [IGNORED, *range(8, 12), IGNORED, 13, 14]
    path.write_text(f'{{"input_ids": [{WORDS}]}}')
    with pytest.raises(ValueError, match=f"token {WORDS}, expected whole numbers from 0 to {WORDS - 1}"):
        PackedRows(text_files([str(path)]), tokenizer, max_length=8).first_pass()


def test_a_dataset_that_is_nowhere_is_named_in_one_line(tokenizer, tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    tiny_model("v2").save_pretrained(tmp_path / "v2")
    tokenizer.save_pretrained(tmp_path / "v2")
    words = ["--model", str(tmp_path / "v2"), "--dataset", "nowhere", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^continue_pretraining: .*nowhere.*$"):
        continue_pretraining.main(words)


@pytest.mark.parametrize("size", pretrain_from_scratch.SIZES)
def test_twins_have_equal_parameters(size, tokenizer):
    size = pretrain_from_scratch.SIZES[size]

    class Vocabulary:
        bos_token_id = 1
        eos_token_id = 2
        pad_token_id = 0

        def __len__(self):
            return size.vocab_size

    with torch.device("meta"):
        twins = {
            name: pretrain_from_scratch.build_twin(name, size, Vocabulary(), "sdpa") for name in ("llama", "v1", "v2")
        }
    counts = {name: pretrain_from_scratch.count_parameters(model) for name, model in twins.items()}
    assert all(abs(count / counts["llama"] - 1) < 0.005 for count in counts.values())
    assert twins["v1"].config.map_dim == twins["v2"].config.map_dim == twins["llama"].config.head_dim
    assert twins["v1"].config.lambda_init[0] == pytest.approx(0.2)  # the paper's first layer


def test_lambda_by_layer_is_what_the_layers_use():
    v1, v2 = tiny_model("v1"), tiny_model("v2")
    rows = torch.randint(3, 90, (2, 9))
    assert pretraining_measures.lambda_by_layer(tiny_model("llama"), rows) == []
    for layer, value in zip(v1.model.layers, pretraining_measures.lambda_by_layer(v1, rows), strict=True):
        vectors = {name: vector.double() for name, vector in layer.self_attn.diff_lambda.named_parameters()}
        first = (vectors["lambda_q1"] @ vectors["lambda_k1"]).exp() - (
            vectors["lambda_q2"] @ vectors["lambda_k2"]
        ).exp()
        assert value == pytest.approx(first.item() + layer.self_attn.diff_lambda.lambda_init, rel=1e-5)
    for layer in v2.model.layers:
        torch.nn.init.zeros_(layer.self_attn.lambda_proj.weight)
    assert pretraining_measures.lambda_by_layer(v2, rows) == [0.5, 0.5]


def test_spread_is_the_sample_standard_deviation():
    assert pretraining_measures.in_words([1.0, 2.0, 4.0]) == "2.333 ± 1.528"
    assert pretraining_measures.in_words([0.5], percent=True) == "50.0%"


@pytest.mark.slow
def test_from_scratch_smoke_trains_three_models_and_goes_on(tmp_path, capsys):
    words = ["--smoke", "--output", str(tmp_path), "--seeds", "0", "1", "--max-steps", "4", "--device", "cpu"]
    pretrain_from_scratch.main(words)
    first = json.loads((tmp_path / "results.json").read_text())
    assert [row["seeds"] for row in first["rows"]] == [2, 2, 2] and len(first["runs"]) == 6
    for record in first["runs"]:
        assert record["curve"][-1]["heldout"] < record["curve"][0]["heldout"]
        assert len(record["final"]["lambda_by_layer"]) == (0 if record["model"] == "llama" else 2)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    (tmp_path / "v2-seed1.json").unlink()
    capsys.readouterr()
    pretrain_from_scratch.main(words)
    assert capsys.readouterr().out.count(", seed ") == 1  # only what was missing was run
    again = json.loads((tmp_path / "results.json").read_text())
    assert [run["final"] for run in again["runs"]] == [run["final"] for run in first["runs"]]
    with pytest.raises(SystemExit, match="another --output"):
        pretrain_from_scratch.main([*words, "--per-device-train-batch-size", "2"])
