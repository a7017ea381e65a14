"""Tiny checkpoints of all heads with their code, and fresh processes that load them."""

import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from hub_models import HEADS, LICENSE_TEXT, VARIANTS, greedy_tokens, head_output
from loopback_hub import TOKEN
from tiny_tokenizers import word_tokenizer

import modeling_diff
from conversion import convert_checkpoint


HERE = Path(__file__).parent
TIMEOUT_S = 560

TINY = {"vocab_size": 48, "pad_token_id": 0, "initializer_range": 0.2}


@pytest.fixture(scope="session")
def tiny_config():
    return partial(tiny_models.tiny_config, **TINY, lambda_init_std=0.3)


def save_tokenizer(folder: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, TINY["vocab_size"]))]
    tokenizer = word_tokenizer(words, "<pad>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tiny_config, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """One saved checkpoint for each variant and head, with its code beside it."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {}
    for variant in VARIANTS:
        for auto_class, class_name in HEADS.items():
            torch.manual_seed(0)
            path = paths[variant, auto_class] = folder / f"{variant}-{class_name}"
            getattr(modeling_diff, class_name)(tiny_config(variant)).save_pretrained(path)
            if auto_class == "AutoModelForCausalLM":
                save_tokenizer(path)
    return paths


@pytest.fixture(scope="session")
def expected(saved) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """What each checkpoint gives when our package loads it by its own class."""
    results = {}
    for (variant, auto_class), path in saved.items():
        model = getattr(modeling_diff, HEADS[auto_class]).from_pretrained(path)
        results[variant, auto_class] = {"output": head_output(model)}
        if auto_class == "AutoModelForCausalLM":
            results[variant, auto_class]["generated"] = greedy_tokens(model)
    return results


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory):
    """`fresh_process(checkpoints, **environment)` gives a report for each checkpoint, in order."""

    def run(checkpoints: list[dict], with_package: bool = False, **environment: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("process")
        job, reports = folder / "job.json", folder / "reports.pt"
        job.write_text(json.dumps({"checkpoints": checkpoints, "reports": str(reports), "with_package": with_package}))
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if with_package:
            inherited["PYTHONPATH"] = str(Path(modeling_diff.__file__).parent.parent)
        home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        process = subprocess.run(
            [sys.executable, HERE / "fresh_process.py", job],
            cwd=folder,
            env=inherited | home | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert process.returncode == 0, process.stderr[-6000:]
        return torch.load(reports)

    return run


@pytest.fixture(scope="session")
def put_in_hub_cache():
    """`put_in_hub_cache(home, repo, revision, checkpoint)` imitates a download; the last one becomes `main`."""

    def put(home: Path, repo: str, revision: str, checkpoint: Path) -> None:
        cache = home / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = cache / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(revision)
        for file in checkpoint.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())

    return put


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tiny random LLaMA under a license of Meta's, with tokenizer, license files and card."""
    folder = tmp_path_factory.mktemp("sources") / "Llama-tiny"
    tiny_models.tiny_model("llama", **TINY, max_position_embeddings=64, rms_norm_eps=1e-5).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "LICENSE.txt").write_text(LICENSE_TEXT)
    (folder / "USE_POLICY.md").write_text("policy")
    (folder / "README.md").write_text("---\nlicense: llama3.2\nlanguage: en\n---\nA model.\n")
    return folder


@pytest.fixture(scope="session")
def converted(llama, tmp_path_factory) -> dict[str, Path]:
    """The LLaMA as V1 (with the paper's lambda, so that it can be exported) and V2, in several shards each."""
    folder = tmp_path_factory.mktemp("converted")
    for variant, options in (("v1", {"uncalibrated": True, "lambda_init": "paper"}), ("v2", {})):
        convert_checkpoint(llama, folder / variant, variant, max_shard_size="40KB", **options)
    return {variant: folder / variant for variant in VARIANTS}


@pytest.fixture(scope="session")
def run_pushes(tmp_path_factory):
    """`run_pushes(steps)` gives a report for each step of `push_process.run_step`, in order."""

    def run(steps: list[dict]) -> list[dict]:
        folder = tmp_path_factory.mktemp("pushes")
        job, reports = folder / "job.pickle", folder / "reports.pickle"
        job.write_bytes(pickle.dumps({"home": str(folder / "home"), "reports": str(reports), "steps": steps}))
        root = str(Path(modeling_diff.__file__).parent.parent)
        process = subprocess.run(
            [sys.executable, HERE / "push_process.py", job],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert process.returncode == 0, process.stderr[-6000:]
        return pickle.loads(reports.read_bytes())

    return run


@pytest.fixture(scope="session")
def run_calls():
    """`run_calls(calls, folder, **environment)` runs functions of `hub_process.py` by name; reports by name."""

    def run(calls: dict[str, tuple[str, dict]], folder: Path, with_package: bool = False, **environment: str) -> dict:
        folder.mkdir()
        job, reports = folder / "job.json", folder / "reports.pt"
        settings = {"calls": list(calls.values()), "reports": str(reports), "with_package": with_package}
        job.write_text(json.dumps(settings))
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if with_package:
            inherited["PYTHONPATH"] = str(Path(modeling_diff.__file__).parent.parent)
        process = subprocess.run(
            [sys.executable, HERE / "hub_process.py", job],
            cwd=folder,
            env=inherited | {"TQDM_DISABLE": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert process.returncode == 0, process.stderr[-6000:]
        assert TOKEN not in process.stdout + process.stderr
        return dict(zip(calls, torch.load(reports), strict=True))

    return run
