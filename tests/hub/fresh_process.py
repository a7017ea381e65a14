"""
Loads checkpoints in a process that cannot import our packages, unless the job asks for them, and saves them again.

`python fresh_process.py JOB`: a JSON file with `checkpoints` (arguments of `load_and_report`), `reports` (the file to
write) and `with_package`.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from hub_models import HEADS, PROMPT, greedy_tokens, head_output
from transformers.dynamic_module_utils import get_class_from_dynamic_module


PACKAGES = ("modeling_diff", "conversion")


def load(checkpoint: str, auto_class: str, by: str, revision: str | None) -> transformers.PreTrainedModel:
    """By its auto class (`auto`), or by the class in the code beside it (`code`), which no registration can shadow."""
    if by == "auto":
        return getattr(transformers, auto_class).from_pretrained(checkpoint, trust_remote_code=True, revision=revision)
    reference = f"modeling_diff_llama.{HEADS[auto_class]}"
    model_class = get_class_from_dynamic_module(reference, checkpoint, revision=revision)
    return model_class.from_pretrained(checkpoint, revision=revision)


def load_and_report(
    checkpoint: str,
    auto_class: str = "AutoModelForCausalLM",
    by: str = "auto",
    revision: str | None = None,
    resaved: str | None = None,
    prompted: bool = False,
    trusted: bool = True,
) -> dict:
    if not trusted:
        try:
            getattr(transformers, auto_class).from_pretrained(checkpoint, trust_remote_code=False)
        except ValueError as error:
            return {"refusal": str(error)}
    model = load(checkpoint, auto_class, by, revision)
    report = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "backbone_module": type(model.base_model).__module__,
        "attention_modules": sorted({type(layer.self_attn).__module__ for layer in model.base_model.layers}),
        "config_module": type(model.config).__module__,
        "output": head_output(model),
    }
    if resaved is not None:
        model.save_pretrained(resaved)
    if auto_class == "AutoModelForCausalLM":
        report["generated"] = greedy_tokens(model)
    if prompted:
        pipeline = transformers.pipeline("text-generation", model=checkpoint, trust_remote_code=True)
        report["pipeline_module"] = type(pipeline.model).__module__
        report["text"] = pipeline(PROMPT, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    return report


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    for package in PACKAGES:
        if job["with_package"]:
            importlib.import_module("modeling_diff")
        else:
            sys.modules[package] = None  # importing it raises ImportError, installed or not
    torch.save([load_and_report(**checkpoint) for checkpoint in job["checkpoints"]], job["reports"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
