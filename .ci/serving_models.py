"""Checkpoints for .ci/serving_checks.py, with what transformers generates from each."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from serving_prompts import NEW_TOKENS, prompts
from serving_quantized import NOT_QUANTIZED, SCHEMES, check_untouched, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_diff
from conversion import push_checkpoint, update_checkpoint_code
from modeling_diff.training import lora_config


SOURCE = Path(__file__).parents[1] / "examples/assets/tiny-llama"
# Its code does not hold the attention call where vLLM looks for it.
OLD_COMMIT = "5dc5cd9"
VARIANTS = {"v1": ["--uncalibrated"], "v2": []}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@torch.no_grad()
def randomize(model):
    """Moves all that a fresh conversion leaves at its start: it hides errors of lambda, norms and negative maps."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "diff_lambda" in name or "lambda_proj" in name:
            parameter.copy_(0.3 * noise)
        elif "norm" in name:
            parameter.mul_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "q_proj" in name:
            parameter.add_(parameter.std() * noise)
    return model


def greedy(model) -> list[list[int]]:
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **arguments)[0, len(prompt) :].tolist() for prompt in prompts()]


@torch.no_grad()
def log_probabilities(model, tokens) -> list[list[float]]:
    """Log probability of every token of prompt and continuation but the first."""
    rows = []
    for prompt, continuation in zip(prompts(), tokens, strict=True):
        input_ids = torch.tensor([prompt + continuation])
        scores = model(input_ids).logits[0, :-1].float().log_softmax(-1)
        rows.append(scores.gather(1, input_ids[0, 1:, None])[:, 0].tolist())
    return rows


def write_expected(folder: Path, name: str, model) -> None:
    tokens = greedy(model)
    expected = {"tokens": tokens, "log_probabilities": log_probabilities(model, tokens)}
    expected["bfloat16"] = log_probabilities(copy.deepcopy(model).to(torch.bfloat16), tokens)
    (folder / f"{name}.json").write_text(json.dumps(expected))


def save(folder: Path, name: str, model) -> None:
    model.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(SOURCE).save_pretrained(folder / name)
    write_expected(folder, name, model.eval())


def write_adapter(folder: Path, base: str) -> None:
    """An adapter with random weights, which vLLM accepts: LoRA alone, on lambda too in V2."""
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
    targets = LORA_TARGETS + (["lambda_proj"] if model.config.variant == "v2" else [])
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(folder / f"{base}_lora")
    write_expected(folder, f"{base}_lora", model.eval())


def write_pushed(folder: Path, name: str) -> None:
    """A copy of the files that `push --dry-run` lists, and of no others."""
    pushed = folder / f"{name}_pushed"
    pushed.mkdir()
    for file in push_checkpoint(folder / name, "someone/pushed", dry_run=True).files:
        shutil.copy(folder / name / file, pushed / file)
    shutil.copy(folder / f"{name}.json", folder / f"{name}_pushed.json")


def write_unservable_adapter(folder: Path, base: str) -> None:
    """An adapter of the full recipe, which trains more than LoRA."""
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
    get_peft_model(model, lora_config(model, r=8)).save_pretrained(folder / f"{base}_full")


def write_quantized(folder: Path, base: str) -> None:
    """The base in every scheme; what is expected is generated from the weights as they were rounded."""
    for scheme in SCHEMES:
        name = f"{base}_{scheme}"
        model = quantize(folder, base, name, scheme, NOT_QUANTIZED)
        check_untouched(folder, base, name)
        write_expected(folder, name, model)


def write_old(folder: Path, variant: str) -> None:
    """A random checkpoint converted by the code of OLD_COMMIT, with that code next to it, and again with today's."""
    old = f"{variant}_old"
    code = folder / "old_code"
    if not code.exists():
        code.mkdir()
        archive = subprocess.run(["git", "archive", OLD_COMMIT], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
    command = [sys.executable, "-m", "conversion", "convert", str(SOURCE), str(folder / old), "--variant", variant]
    subprocess.run([*command, "--dtype", "float32"], check=True, cwd=code, env=os.environ | {"PYTHONPATH": str(code)})
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder / old, dtype=torch.float32).eval()
    randomize(model).save_pretrained(folder / f"{old}_weights")
    shutil.copy(folder / f"{old}_weights" / "model.safetensors", folder / old)
    write_expected(folder, old, model)
    updated = folder / f"{variant}_updated"
    shutil.copytree(folder / old, updated)
    shutil.copy(folder / f"{old}.json", f"{updated}.json")
    update_checkpoint_code(updated)


def main() -> None:
    folder = Path(sys.argv[1])
    llama = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    save(folder, "llama", llama)
    for variant, options in VARIANTS.items():
        fresh = f"{variant}_fresh"
        command = [sys.executable, "-m", "conversion", "convert", str(SOURCE), str(folder / fresh), *options]
        subprocess.run([*command, "--variant", variant, "--dtype", "float32"], check=True)
        model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder / fresh, dtype=torch.float32)
        write_expected(folder, fresh, model.eval())
        write_pushed(folder, fresh)
        save(folder, f"{variant}_random", randomize(model))
        extras = {"differential_layers": [1, 3], "attention_bias": True, "attention_out_bias": False}
        config = modeling_diff.DiffLlamaConfig(**{**model.config.to_diff_dict(), **extras, "use_qk_norm": True})
        torch.manual_seed(0)
        mixed = modeling_diff.DiffLlamaForCausalLM(config)
        save(folder, f"{variant}_mixed", randomize(mixed))
        if variant == "v1":
            heads = {"differential_layers": None, "differential_heads": [[0], [], [1, 2], [0, 1], [0, 1, 2, 3]]}
            config = modeling_diff.DiffLlamaConfig(**{**config.to_diff_dict(), **heads})
            torch.manual_seed(0)
            save(folder, "v1_some_heads", randomize(modeling_diff.DiffLlamaForCausalLM(config)))
        write_adapter(folder, f"{variant}_random")
        write_old(folder, variant)
    write_unservable_adapter(folder, "v2_random")
    for name in ("llama", "v1_random", "v2_random"):
        write_quantized(folder, name)
    quantize(folder, "v2_random", "v2_random_lambda", "w8a8", ["lm_head"])


if __name__ == "__main__":
    main()
