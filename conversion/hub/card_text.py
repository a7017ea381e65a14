"""The standing texts of a model card."""

STATUS = {
    "bit-exact": "It computes the same function: {promise}. Its default attention adds in another order, and differs "
    "by rounding. The negative maps separate from the positive ones once it is trained.",
    "equal": "It computes the same function as its source, up to rounding.",
    "parity": "**A raw conversion, not a usable model**: it has its source's weights, but subtracts "
    "attention maps that were trained to be added, and needs healing (distillation from its source) first.",
    "calibrated": "**Near its source, not equal to it**: its attention was fitted, layer by "
    "layer, on {tokens} tokens of text, and nothing was trained end to end. Measure it before use; healing "
    "(distillation from its source) brings it nearer.",
    "healed": "**Healed, and not equal to its source**: after the conversion it was trained on {tokens}. "
    "What that reached stands below; measure it on your own task before use.",
}
CONFIG_CHANGED = (
    "**`config.json` was changed after the conversion**: what is promised of its function held before, and what was "
    "measured then is left out."
)
# As in modeling_diff.diff_adapters, whose import brings torch and transformers: seconds that no help should wait for.
NEW_MODULES = {"v1": '["diff_lambda", "sub_norm"]', "v2": '["lambda_proj"]'}
LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

revision = "main"  # better: the full commit hash, from the repository's history
tokenizer = AutoTokenizer.from_pretrained({repo}, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({repo}, revision=revision, trust_remote_code=True)
```

{needs} The code comes with the weights and is run: read it first, and pin the revision that you have read, with
`code_revision` as well where code and weights are apart. With `diff-llama` installed, `import modeling_diff` before
loading does it without `trust_remote_code`."""
FINE_TUNE = """\
With the Trainer or TRL as any causal language model; give λ no weight decay and a learning rate of its own. With PEFT,
what is new has to be named, as adapters pass over it otherwise:

```python
from peft import LoraConfig, get_peft_model

lora = LoraConfig(
    task_type="CAUSAL_LM",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    modules_to_save={new_modules},
)
adapted = get_peft_model(model, lora)
```"""
LIMITS = """\
- It has its source's knowledge, errors and biases; nothing was added.
- `transformers serve` and `transformers chat` take a class of transformers' own by our name, and stop with a message.
- Numbers from short texts say little of long ones, and likelihood little of generation: measure both."""
CITATION = """\
```bibtex
@inproceedings{ye2025differential,
  title = {Differential Transformer},
  author = {Tianzhu Ye and Li Dong and Yuqing Xia and Yutao Sun and Yi Zhu and Gao Huang and Furu Wei},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://arxiv.org/abs/2410.05258}
}
@misc{ye2026differential,
  title = {Differential Transformer V2},
  author = {Tianzhu Ye and Li Dong and Yutao Sun and Furu Wei},
  year = {2026},
  url = {https://github.com/microsoft/unilm/tree/master/Diff-Transformer/Diff-Transformer-V2}
}
```"""
