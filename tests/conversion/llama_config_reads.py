"""Which config fields transformers' LLaMA and its relatives read: by the syntax trees of its code, and in one run."""

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


RELATIVES = ("llama", "mistral", "qwen2", "qwen3")
# What a LLaMA is built, loaded, run and decoded with, whole modules: more than LLaMA reads, never less.
MODULES = (
    *(f"models/{name}/modeling_{name}.py" for name in RELATIVES),
    *(f"models/{name}/configuration_{name}.py" for name in RELATIVES),
    "configuration_utils.py",
    "modeling_utils.py",
    "modeling_rope_utils.py",
    "modeling_flash_attention_utils.py",
    "masking_utils.py",
    "cache_utils.py",
    "activations.py",
    "fusion_mapping.py",
    "utils/generic.py",
    "utils/output_capturing.py",
    "loss/loss_utils.py",
    "integrations/sdpa_attention.py",
    "integrations/flex_attention.py",
    "integrations/flash_attention.py",
    "integrations/heterogeneity/configuration_utils.py",
    "generation/utils.py",
)
NAMES = (
    "config",
    "model_config",
    "text_config",
    "decoder_config",
    "layer_config",
    "effective_config",
    "config_to_return",
)


def fields_in_code() -> dict[str, str]:
    """Field to the first module that reads it, by `config.x`, `getattr(config, "x")` or `kwargs.pop("x")`."""
    root = Path(importlib.util.find_spec("transformers").origin).parent
    found: dict[str, str] = {}
    for module in MODULES:
        if (root / module).is_file():  # not every release has every module
            tree = ast.parse((root / module).read_text())
            of_config_class = "configuration_" in module or "rope_utils" in module
            for field in config_reads(tree, of_config_class):
                found.setdefault(field, module)
    return found


def config_reads(tree: ast.AST, of_config_class: bool) -> Iterator[str]:
    """Fields read in a syntax tree; in the config class's own code, of `self` and of the file's fields as well."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=owner, attr=field, ctx=ast.Load()):
                if _is_config(owner) or (of_config_class and _is_name(owner, "self")):
                    yield field
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[subject, ast.Constant(value=str(field)), *_]):
                if _is_config(subject) or (of_config_class and _is_name(subject, "self")):
                    yield field
            case ast.Call(func=ast.Attribute(attr="_getattr_without_heterogeneous_validation"), args=[first, *_]):
                yield from [first.value] if isinstance(first, ast.Constant) else []
            case ast.Call(func=ast.Attribute(value=owner, attr="pop" | "get"), args=[ast.Constant(value=field), *_]):
                if of_config_class and _is_name(owner, "kwargs"):
                    yield field
            case ast.Compare(left=ast.Constant(value=str(field)), ops=[ast.In()], comparators=[owner]):
                if of_config_class and _is_name(owner, "config_dict"):
                    yield field


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_config(node: ast.AST | None) -> bool:
    """`config`, `self.config`, `model.config` and their like, but not the configs of generation or quantization."""
    if isinstance(node, ast.Attribute):
        return node.attr == "config"
    return isinstance(node, ast.Name) and node.id in NAMES


@contextmanager
def recorded(seen: set[str]) -> Iterator[type[LlamaConfig]]:
    """A LlamaConfig that notes what is asked of it, whether it has it or not."""

    class NotingConfig(LlamaConfig):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    yield NotingConfig


@torch.no_grad()
def fields_in_a_run(folder: Path) -> set[str]:
    """Fields asked for while a LLaMA is loaded, run on a padded batch in both attentions, and decoded."""
    seen: set[str] = set()
    with recorded(seen) as config_class:
        config = config_class.from_pretrained(folder)
        ids = torch.arange(12).view(2, 6)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        for attention in ("sdpa", "eager"):
            model = LlamaForCausalLM.from_pretrained(folder, config=config, attn_implementation=attention).eval()
            model(ids, attention_mask=mask, labels=ids)
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    known = set(dir(LlamaConfig)) - set(LlamaConfig().to_dict())  # methods, and properties that are no fields
    return {name for name in seen if not name.startswith("__")} - known
