"""
Uploads to and downloads from a Hub, in a process of its own, with our package or without.

`python hub_process.py JOB`: a JSON file with `calls` (pairs of a function here and its keyword arguments), `reports`
(the file to write) and `with_package`.
"""

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from fresh_process import PACKAGES, load_and_report
from hub_models import TOKENS, head_output


def load_model(checkpoint: str, auto_class: str = "AutoModelForCausalLM", **options) -> transformers.PreTrainedModel:
    return getattr(transformers, auto_class).from_pretrained(checkpoint, trust_remote_code=True, **options)


def describe(model) -> dict:
    return {"module": type(model).__module__, "class": type(model).__name__, "output": head_output(model).float()}


def push_folder(folder: str, repo: str, **options) -> dict:
    """By our own `push`."""
    from conversion import push_checkpoint

    return {"notes": push_checkpoint(folder, repo, **options).notes}


def push_model(checkpoint: str, repo: str, auto_class: str = "AutoModelForCausalLM") -> dict:
    """By transformers' own `push_to_hub`, of a model loaded as users load it."""
    model = load_model(checkpoint, auto_class)
    model.push_to_hub(repo)
    if auto_class == "AutoModelForCausalLM":
        transformers.AutoTokenizer.from_pretrained(checkpoint).push_to_hub(repo)
    return describe(model)


def push_adapter(checkpoint: str, repo: str, to_save: str) -> dict:
    """A LoRA adapter with lambda, every number of it changed."""
    import peft

    model = load_model(checkpoint)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=[to_save])
    adapted = peft.get_peft_model(model, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or to_save in name, name
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.push_to_hub(repo)
    return {"output": head_output(adapted), "base": head_output(load_model(checkpoint))}


def train_and_push(checkpoint: str, repo: str, output_dir: str) -> dict:
    """One step of the Trainer, and its own upload."""
    model = load_model(checkpoint)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        output_dir,
        max_steps=1,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        hub_model_id=repo,
        push_to_hub=True,
        disable_tqdm=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    return {"output": head_output(trainer.model), "base": head_output(load_model(checkpoint))}


def convert(source: str, output: str, **options) -> dict:
    """A conversion; its refusal if it refuses."""
    from conversion import ConversionError, convert_checkpoint

    try:
        convert_checkpoint(source, output, **options)
    except ConversionError as error:
        return {"refusal": str(error)}
    return {"files": sorted(path.name for path in Path(output).iterdir())}


def update(target: str, **options) -> dict:
    """By our own `update-code`; its refusal if it refuses."""
    from conversion import ConversionError, update_checkpoint_code

    try:
        return asdict(update_checkpoint_code(target, **options))
    except ConversionError as error:
        return {"refusal": str(error)}


def load(checkpoint: str, auto_class: str = "AutoModelForCausalLM", **options) -> dict:
    return describe(load_model(checkpoint, auto_class, **options))


def load_without_trust(checkpoint: str) -> dict:
    return describe(transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False))


def load_quantized(checkpoint: str, method: str) -> dict:
    """As 8-bit weights, with how many layers became so."""
    if method == "bitsandbytes":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = load_model(checkpoint, quantization_config=config, device_map="cpu")
    kinds = [f"{type(module).__name__} {type(getattr(module, 'weight', None)).__name__}" for module in model.modules()]
    return describe(model) | {"quantized": sum("Linear8bitLt" in kind or "Int8Tensor" in kind for kind in kinds)}


def load_adapter(checkpoint: str, adapter: str) -> dict:
    """Onto a loaded base, and base and all by the adapter alone."""
    import peft

    adapted = peft.PeftModel.from_pretrained(load_model(checkpoint), adapter)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    return describe(adapted.get_base_model()) | {"alone": head_output(alone)}


def serve(checkpoint: str) -> dict:
    """What `transformers serve`, on which `transformers chat` rests, makes of a checkpoint."""
    try:
        from transformers.cli.serving.model_manager import ModelManager
    except NameError:  # transformers 5.6 without openai
        return {"refusal": None}

    manager = ModelManager(trust_remote_code=True, device="cpu")
    try:
        model = manager._load_model(f"{checkpoint}@main")
    except Exception as error:
        return {"refusal": f"{type(error).__name__}: {error}"}
    return {"module": type(model).__module__}


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    if job["with_package"]:
        import modeling_diff  # noqa: F401
    else:
        for package in PACKAGES:
            sys.modules[package] = None  # importing it raises ImportError, installed or not
    functions = globals() | {"load_and_report": load_and_report}
    torch.save([functions[name](**copy.copy(arguments)) for name, arguments in job["calls"]], job["reports"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
