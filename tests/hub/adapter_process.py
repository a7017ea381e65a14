"""
Adapts a checkpoint by its own code, in a process that cannot import our packages.

`python adapter_process.py CHECKPOINT ORDER [SNIPPET]`: ORDER `peft_first` or `model_first`; SNIPPET is a file with
Python that makes `adapted` of `model`, by default a LoRA that names no targets. Prints JSON.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from fresh_process import PACKAGES
from hub_models import TOKENS


WITHOUT_TARGETS = """
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
"""


def main(checkpoint: str, order: str, snippet: str | None = None) -> None:
    for package in PACKAGES:
        sys.modules[package] = None  # importing it raises ImportError, installed or not
    if order == "peft_first":
        importlib.import_module("peft")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, quantization_config=four_bits if snippet else None
    )
    assert order == "peft_first" or "peft" not in sys.modules
    quantized = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    names = {"model": model}
    exec(Path(snippet).read_text() if snippet else WITHOUT_TARGETS, names)
    adapted = names["adapted"]
    torch.manual_seed(0)
    with torch.no_grad():  # LoRA's second matrices start at zero, and then its first ones learn nothing
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted(TOKENS, labels=TOKENS).loss.backward()
    trained = {name: bool(p.grad.abs().max() > 0) for name, p in adapted.named_parameters() if p.requires_grad}
    print(json.dumps({"trained": trained, "quantized": quantized}))


if __name__ == "__main__":
    main(*sys.argv[1:])
