"""
Up to a Hub by every means there is, and down again in processes that cannot import our package.

The Hub is `loopback_hub.LoopbackHub`, the client the real one. Three processes: one uploads, with the package; one
loads all of it without the package and uploads again what it loaded; one loads that.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from hub_models import HEADS, VARIANTS, head_output
from loopback_hub import TOKEN, LoopbackHub
from safetensors.torch import load

import modeling_diff


CASES = [(variant, auto_class) for variant in VARIANTS for auto_class in HEADS]
LAMBDA = {"v1": "diff_lambda", "v2": "lambda_proj"}
METHODS = {name: find_spec(name) is not None for name in ("bitsandbytes", "torchao")}  # installed or not
ROADS = ("hub", "folder")
CAUSAL = "AutoModelForCausalLM"
OLDER_CODE = """

_forward = DiffLambda.forward
DiffLambda.forward = lambda self, hidden_states=None: _forward(self) + 0.25
"""
EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit('foreign code ran')\n"


def repo_of(variant: str, auto_class: str) -> str:
    return f"me/{variant}-{HEADS[auto_class]}"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("trips")


@pytest.fixture(scope="module")
def older(converted, home):
    """The V1 checkpoint with an older revision's code, as if it had computed lambda differently."""
    folder = home / "older"
    folder.mkdir()
    for file in converted["v1"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    code = folder / "modeling_diff_llama.py"
    code.write_text(code.read_text() + OLDER_CODE)
    return folder


@pytest.fixture(scope="module")
def uploads(hub, home, saved, converted, older, llama, run_calls):
    """What the uploading process says of each upload, by name."""
    foreign = {path.name: path.read_bytes() for path in llama.iterdir()}
    config = json.loads(foreign["config.json"]) | {"auto_map": {"AutoConfig": "evil.Config", CAUSAL: "evil.Model"}}
    foreign |= {"config.json": json.dumps(config).encode(), "evil.py": EVIL.encode()}
    hub.add("me/foreign", foreign, private=True)
    hub.add("me/escaping", foreign | {"additional_chat_templates/../../../../escaped.jinja": b"out"})
    hub.add("me/gated", foreign, gated=True)
    calls = {
        f"ours-{variant}": ("push_folder", {"folder": str(converted[variant]), "repo": f"me/Llama-{variant}"})
        for variant in VARIANTS
    }
    calls["older"] = ("push_folder", {"folder": str(older), "repo": "me/Llama-v1", "revision": "older"})
    exported = {"folder": str(converted["v1"]), "repo": "me/Llama-exported", "format": "diffllama"}
    calls["exported"] = ("push_folder", exported)
    for case in CASES:
        push = {"checkpoint": str(saved[case]), "repo": repo_of(*case), "auto_class": case[1]}
        calls[repo_of(*case)] = ("push_model", push)
    for variant in VARIANTS:
        adapter = {"checkpoint": f"me/Llama-{variant}", "repo": f"me/adapter-{variant}", "to_save": LAMBDA[variant]}
        calls[f"adapter-{variant}"] = ("push_adapter", adapter)
        train = {"checkpoint": str(saved[variant, CAUSAL]), "repo": f"me/trained-{variant}"}
        calls[f"trained-{variant}"] = ("train_and_push", train | {"output_dir": str(home / f"run-{variant}")})
    for name in ("foreign", "escaping", "gated"):
        calls[name] = ("convert", {"source": f"me/{name}", "output": str(home / f"from-{name}"), "variant": "v2"})
    return run_calls(calls, home / "up", with_package=True, **hub.environment(home / "up"))


@pytest.fixture(scope="module")
def downloads(hub, home, saved, converted, uploads, run_calls):
    """What the downloading process finds, by name."""
    places = {("hub", variant): f"me/Llama-{variant}" for variant in VARIANTS}
    places |= {("folder", variant): str(converted[variant]) for variant in VARIANTS}
    calls = {}
    for (road, variant), place in places.items():
        calls[f"plain-{road}-{variant}"] = ("load_and_report", {"checkpoint": place, "prompted": True})
        for device_map in ("auto", "cpu"):
            calls[f"{device_map}-{road}-{variant}"] = ("load", {"checkpoint": place, "device_map": device_map})
        for method in (name for name, installed in METHODS.items() if installed):
            calls[f"{method}-{road}-{variant}"] = ("load_quantized", {"checkpoint": place, "method": method})
        calls[f"serve-{road}-{variant}"] = ("serve", {"checkpoint": place})
        adapter = {"checkpoint": place, "adapter": f"me/adapter-{variant}"}
        calls[f"adapter-{road}-{variant}"] = ("load_adapter", adapter)
    for variant in VARIANTS:
        calls[f"trained-{variant}"] = ("load", {"checkpoint": f"me/trained-{variant}"})
    for case in CASES:
        again = {"checkpoint": repo_of(*case), "repo": f"{repo_of(*case)}-again", "auto_class": case[1]}
        calls[repo_of(*case)] = ("push_model", again)
    calls["exported"] = ("load_without_trust", {"checkpoint": "me/Llama-exported"})
    calls["older"] = ("load", {"checkpoint": "me/Llama-v1", "revision": "older"})
    calls["newer"] = ("load", {"checkpoint": "me/Llama-v1", "revision": "main"})
    return run_calls(calls, home / "down", **hub.environment(home / "down"))


@pytest.fixture(scope="module")
def second_downloads(hub, home, downloads, run_calls):
    calls = {
        repo_of(*case): ("load", {"checkpoint": f"{repo_of(*case)}-again", "auto_class": case[1]}) for case in CASES
    }
    return run_calls(calls, home / "again", **hub.environment(home / "again"))


@pytest.fixture(scope="module")
def plain(converted):
    """What our package computes from the converted folders."""
    return {
        variant: head_output(modeling_diff.DiffLlamaForCausalLM.from_pretrained(converted[variant]))
        for variant in VARIANTS
    }


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(params=ROADS)
def road(request):
    return request.param


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_foreign_code(report: dict) -> None:
    assert report["module"].startswith("transformers_modules."), report["module"]


def test_every_head_comes_down_as_it_went_up(downloads, expected, case):
    report = downloads[repo_of(*case)]
    assert_foreign_code(report)
    assert report["class"] == HEADS[case[1]]
    assert_same(report["output"], expected[case]["output"])


def test_every_head_comes_down_after_a_second_upload(second_downloads, expected, case):
    report = second_downloads[repo_of(*case)]
    assert_foreign_code(report)
    assert report["class"] == HEADS[case[1]]
    assert_same(report["output"], expected[case]["output"])


def test_push_to_hub_carries_all_code_and_the_whole_auto_map(hub, downloads, saved, case):
    for repo in (repo_of(*case), f"{repo_of(*case)}-again"):
        files = hub.files(repo)
        code = {path.name: path.read_bytes() for path in saved[case].glob("*.py")}
        assert {name: content for name, content in files.items() if name.endswith(".py")} == code
        assert json.loads(files["config.json"])["auto_map"].keys() == {"AutoConfig", *HEADS}
        if case[1] == CAUSAL:
            assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files.keys()


def test_our_upload_loads(downloads, plain, road, variant):
    report = downloads[f"plain-{road}-{variant}"]
    assert_foreign_code(report)
    assert_same(report["output"], plain[variant])


def test_pipeline_generates(downloads, road, variant):
    report = downloads[f"plain-{road}-{variant}"]
    assert report["pipeline_module"].startswith("transformers_modules.")
    assert len(report["text"].split()) > 3


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map_places_it(downloads, plain, road, variant, device_map):
    report = downloads[f"{device_map}-{road}-{variant}"]
    assert_foreign_code(report)
    assert_same(report["output"], plain[variant])


@pytest.mark.parametrize("method", METHODS)
def test_quantized_load_is_near(downloads, plain, road, variant, method):
    if not METHODS[method]:
        pytest.skip(f"{method} is not installed")
    report = downloads[f"{method}-{road}-{variant}"]
    assert_foreign_code(report)
    assert report["quantized"] >= 14, "seven projections in each of two layers"
    difference = (report["output"] - plain[variant]).abs().max() / plain[variant].abs().max()
    # 8-bit weights are off by up to 1/254 of a row's largest each; bitsandbytes rounds activations as well.
    assert 0 < difference < 0.1


def test_adapter_comes_down_with_its_lambda(uploads, downloads, road, variant):
    up = uploads[f"adapter-{variant}"]
    down = downloads[f"adapter-{road}-{variant}"]
    assert (up["output"] - up["base"]).abs().max() > 1e-2, "the adapter does something"
    assert_foreign_code(down)
    # float32; the base is the same to the bit, the sum of base and adapter is not always in one order
    torch.testing.assert_close(down["output"], up["output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(down["alone"], up["output"], rtol=1e-5, atol=1e-5)


def test_adapter_upload_holds_lambda_and_no_base(hub, uploads, variant):
    files = hub.files(f"me/adapter-{variant}")
    assert not any(name.startswith("model") for name in files)
    names = load(files["adapter_model.safetensors"])
    assert any(LAMBDA[variant] in name for name in names) and any("lora_A" in name for name in names)


def test_trainer_upload_comes_down_trained(hub, uploads, downloads, variant):
    up, down = uploads[f"trained-{variant}"], downloads[f"trained-{variant}"]
    assert (up["output"] - up["base"]).abs().max() > 1e-3, "it was trained"
    assert_foreign_code(down)
    assert_same(down["output"], up["output"])
    assert {"modeling_diff_llama.py", "tokenizer.json", "README.md"} <= hub.files(f"me/trained-{variant}").keys()


def test_export_comes_down_without_custom_code(hub, downloads, plain):
    report = downloads["exported"]
    assert report["module"] == "transformers.models.diffllama.modeling_diffllama"
    # float32, sums in another order
    torch.testing.assert_close(report["output"], plain["v1"], rtol=1e-4, atol=1e-4)
    assert not any(name.endswith(".py") for name in hub.files("me/Llama-exported"))


def test_older_and_newer_bundle_each_compute_by_their_own_code(downloads, plain):
    assert_same(downloads["newer"]["output"], plain["v1"])
    assert (downloads["older"]["output"] - plain["v1"]).abs().max() > 1e-3
    assert downloads["older"]["module"] != downloads["newer"]["module"]


def test_serve_refuses_loudly_rather_than_computing_something_else(downloads, road, variant):
    refusal = downloads[f"serve-{road}-{variant}"]["refusal"]
    if refusal is None:
        pytest.skip("this transformers does not import its server here")
    assert "not a checkpoint of transformers' own DiffLlama" in refusal


def test_foreign_code_is_neither_run_nor_copied(home, uploads):
    files = uploads["foreign"]["files"]
    assert "model.safetensors" in files and "evil.py" not in files
    assert not list(home.rglob("evil.py")) and not list(home.rglob("ran"))


def test_file_names_cannot_leave_the_folder(home, uploads):
    refused = uploads["escaping"]["refusal"]
    assert refused.startswith("me/escaping: the Hub's client refuses what it finds there (") and "\n" not in refused
    assert not list(home.parent.rglob("escaped.jinja")) and not (home / "from-escaping").exists()


def test_gated_source_is_refused_in_one_line(uploads):
    assert "access is restricted" in uploads["gated"]["refusal"] and "\n" not in uploads["gated"]["refusal"]


def test_no_token_in_anything_written(hub, home, second_downloads):
    for repo, repository in hub.repositories.items():
        for ref in repository.refs:
            for name, content in hub.files(repo, ref).items():
                assert TOKEN.encode() not in content, f"{repo} {name}"
    for path in home.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            assert TOKEN.encode() not in path.read_bytes(), path
