"""Checkpoints carry their code: from a folder and from the Hub's cache, in processes without our package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_models import HEADS, PROMPT, VARIANTS, head_output
from transformers import AutoTokenizer

import modeling_diff


CASES = [(variant, auto_class) for variant in VARIANTS for auto_class in HEADS]
ROADS = ("folder", "hub", "folder_saved_again", "hub_saved_again")
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def resaved(tmp_path_factory):
    """Where the fresh processes save each checkpoint again: `resaved(road, variant, auto_class)`."""
    folder = tmp_path_factory.mktemp("resaved")
    return lambda road, variant, auto_class: folder / f"{road}-{variant}-{auto_class}"


@pytest.fixture(scope="module")
def reports(saved, resaved, fresh_process, put_in_hub_cache, tmp_path_factory):
    """What each road found for each checkpoint, by (road, variant, auto class)."""
    home = tmp_path_factory.mktemp("home")
    addresses = {"folder": {}, "hub": {}}
    for (variant, auto_class), path in saved.items():
        addresses["folder"][variant, auto_class] = str(path)
        addresses["hub"][variant, auto_class] = repo = f"someone/{path.name}"
        put_in_hub_cache(home, repo, REVISION, path)
    found = {}
    for road, environment in (("folder", {}), ("hub", {"HF_HOME": str(home)})):
        job = [
            {
                "auto_class": auto_class,
                "checkpoint": addresses[road][variant, auto_class],
                "resaved": str(resaved(road, variant, auto_class)),
                "prompted": auto_class == "AutoModelForCausalLM",
            }
            for variant, auto_class in CASES
        ]
        job += [{"auto_class": "AutoModel", "checkpoint": job[0]["checkpoint"], "trusted": False}]
        cases = [*CASES, ("untrusted", "AutoModel")]
        found |= {(road, *case): report for case, report in zip(cases, fresh_process(job, **environment), strict=True)}
    again = [(road, *case) for road in addresses for case in CASES]
    job = [{"auto_class": case[2], "checkpoint": str(resaved(*case))} for case in again]
    for (road, *case), report in zip(again, fresh_process(job), strict=True):
        found[f"{road}_saved_again", *case] = report
    return found


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(params=ROADS)
def report(request, reports, case):
    return reports[request.param, *case]


def test_head_backbone_and_config_are_the_bundles_own(report, case):
    assert report["class"] == HEADS[case[1]]
    for part in ("module", "backbone_module"):
        assert report[part].startswith("transformers_modules."), part
        assert report[part].endswith(".modeling_diff_llama"), part
    assert report["backbone_module"] == report["module"]
    bundle = report["module"].removesuffix(".modeling_diff_llama")
    assert report["attention_modules"] == [f"{bundle}.diff_attention_modules"]
    assert report["config_module"].startswith("transformers_modules.")
    assert report["config_module"].endswith(".configuration_diff_llama")


def test_output_equals_that_of_the_package(report, case, expected):
    torch.testing.assert_close(report["output"], expected[case]["output"], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("road", ROADS)
def test_generate_continues_as_the_package(reports, expected, road, variant):
    case = (variant, "AutoModelForCausalLM")
    assert torch.equal(reports[road, *case]["generated"], expected[case]["generated"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("road", ["folder", "hub"])
@pytest.mark.transformers(since="5.16", reason="its pipeline joins prompt and continuation in another way")
def test_text_generation_pipeline_continues_as_the_package(reports, saved, road, variant):
    case = (variant, "AutoModelForCausalLM")
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(saved[case])
    tokenizer = AutoTokenizer.from_pretrained(saved[case])
    tokens = tokenizer(PROMPT, return_tensors="pt")
    continued = model.generate(**tokens, max_new_tokens=4, do_sample=False)[0]
    assert continued.shape[0] == tokens["input_ids"].shape[1] + 4
    prompt, new = continued.split((tokens["input_ids"].shape[1], 4))
    assert reports[road, *case]["text"] == PROMPT + tokenizer.decode(new)
    assert tokenizer.decode(prompt) == PROMPT
    assert reports[road, *case]["pipeline_module"].startswith("transformers_modules.")


@pytest.mark.parametrize("road", ["folder", "hub"])
def test_code_is_not_run_and_nothing_else_built_without_trust(reports, road):
    assert "trust_remote_code=True" in reports[road, "untrusted", "AutoModel"]["refusal"]


@pytest.mark.parametrize("road", ["folder", "hub"])
def test_saving_again_keeps_auto_map_weights_and_every_file_of_code(reports, saved, resaved, road, case):
    original = saved[case]
    again = resaved(road, *case)
    written = {file.name for file in original.iterdir() if "token" not in file.name}
    assert {file.name for file in again.iterdir()} == written
    for file in original.glob("*.py"):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, again))
    assert after == before
    assert after["auto_map"].keys() == {"AutoConfig", *HEADS}


@pytest.mark.parametrize("road", ["folder", "hub"])
def test_package_loads_what_a_fresh_process_saved(reports, resaved, expected, road, case):
    model = getattr(modeling_diff, HEADS[case[1]]).from_pretrained(resaved(road, *case))
    assert type(model).__module__ == "modeling_diff.modeling_diff_llama"
    torch.testing.assert_close(head_output(model), expected[case]["output"], rtol=0, atol=0)


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForCausalLM"])
def test_code_next_to_the_weights_names_a_transformers_that_is_too_old(saved, tmp_path, auto_class):
    """Before it imports anything that older releases lack, and without our package."""
    checkpoint = saved["v1", "AutoModelForCausalLM"]
    code = (
        "import transformers; transformers.__version__ = '4.57.6'\n"
        f"transformers.{auto_class}.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    assert "ImportError: DiffLlama needs transformers >= " in process.stderr.splitlines()[-1]
    assert "found transformers 4.57.6" in process.stderr.splitlines()[-1]
