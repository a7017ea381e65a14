"""
Imitates releases of transformers to come: each change is made to its source in a process of its own.

Prints a JSON object: for each change the error's class and message, or how many of the decoded tokens of V1 and V2 are
those of the definition, and the warnings about versions.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import transformers.generation
import transformers.masking_utils
import transformers.modeling_utils


LLAMA = "transformers.models.llama.modeling_llama"
MASKS = "transformers.masking_utils"
NEW_TOKENS = 4


def load_changed(name: str, change: Callable[[str], str]) -> None:
    """Loads a module of transformers from a copy of its source with a change in it."""
    source = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
    changed = change(source)
    assert changed != source, "the source has nothing to change"
    copy = Path(tempfile.mkdtemp()) / f"{name.rpartition('.')[2]}.py"
    copy.write_text(changed, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    parent, _, attribute = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], attribute, module)
    spec.loader.exec_module(module)


def replace_once(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{source.count(old)} times: {old}"
    return source.replace(old, new)


def rename_cache(source: str) -> str:
    start, end = source.index("class LlamaAttention"), source.index("class LlamaPreTrainedModel")
    layers = re.sub(r"\bcache\b", "kv_store", source[start:end])
    model = replace_once(
        source[end:],
        "                cache=cache,\n                use_cache",
        "                kv_store=cache,\n                use_cache",
    )
    return source[:start] + layers + model


def rename_mask(source: str) -> str:
    start, end = source.index("class LlamaAttention"), source.index("class LlamaPreTrainedModel")
    layers = re.sub(r"\battention_mask\b", "attn_mask", source[start:end])
    return source[:start] + layers + replace_once(source[end:], "attention_mask=causal_mask", "attn_mask=causal_mask")


def pass_unknown_keyword_to_attention(source: str) -> str:
    return replace_once(source, "self.self_attn(\n", "self.self_attn(\n            attention_window=4,\n")


def pass_unknown_keyword_to_layers(source: str) -> str:
    return replace_once(
        source,
        "decoder_layer(\n                hidden_states,\n",
        "decoder_layer(\n                hidden_states,\n                segment_ids=position_ids,\n",
    )


def call_attention_by_position(source: str) -> str:
    start, end = source.index("self.self_attn("), source.index("hidden_states = residual + hidden_states")
    call = (
        "self.self_attn(hidden_states, position_embeddings, attention_mask, cache, position_ids=position_ids, "
        "use_cache=use_cache, **kwargs)\n        "
    )
    return source[:start] + call + source[end:]


def return_tuples_from_layers(source: str) -> str:
    start, end = source.index("class LlamaDecoderLayer"), source.index("class LlamaPreTrainedModel")
    layer = replace_once(source[start:end], "        return hidden_states\n", "        return (hidden_states,)\n")
    model = replace_once(
        source[end:],
        "                **kwargs,\n            )\n\n        hidden_states = self.norm(",
        "                **kwargs,\n            )[0]\n\n        hidden_states = self.norm(",
    )
    return source[:start] + layer + model


def expect_three_values_of_attention(source: str) -> str:
    return replace_once(source, "hidden_states, _ = self.self_attn(", "hidden_states, _, _ = self.self_attn(")


def update_cache_with_unknown_keyword(source: str) -> str:
    return replace_once(source, "self.layer_idx, kwargs=kwargs)", "self.layer_idx, kwargs=kwargs, final=True)")


def drop_layer_idx(source: str) -> str:
    return replace_once(source, "self.layer_idx, kwargs=kwargs)", "kwargs=kwargs)")


def lose_the_cache(source: str) -> str:
    return replace_once(
        source, "            cache=cache,\n            use_cache", "            cache=None,\n            use_cache"
    )


def swap_cos_and_sin(source: str) -> str:
    return replace_once(source, "return cos.to(dtype=x.dtype), sin.to", "return sin.to(dtype=x.dtype), cos.to")


def rename_mask_argument(source: str) -> str:
    return source.replace(
        "        attention_mask=attention_mask,\n        allow_is", "        padding=attention_mask,\n        allow_is"
    )


def require_position_in_update() -> None:
    def update(self, key_states, value_states, layer_idx, position_ids, *args, **kwargs):
        raise AssertionError("never called")

    transformers.Cache.update = update


CHANGES: dict[str, Callable[[], None]] = {}
for change in (
    rename_cache,
    rename_mask,
    pass_unknown_keyword_to_attention,
    pass_unknown_keyword_to_layers,
    call_attention_by_position,
    return_tuples_from_layers,
    expect_three_values_of_attention,
    update_cache_with_unknown_keyword,
    drop_layer_idx,
    lose_the_cache,
    swap_cos_and_sin,
):
    CHANGES[change.__name__] = lambda change=change: load_changed(LLAMA, change)
CHANGES["rename_mask_argument"] = lambda: load_changed(MASKS, rename_mask_argument)
CHANGES["require_position_in_update"] = require_position_in_update
CHANGES["nothing"] = lambda: None


def decode(variant: str) -> float:
    """Share of greedy tokens, decoded through the cache with left padding, that the definition gives, too."""
    from diff_llama_by_definition import logits_by_definition
    from tiny_models import tiny_model

    model = tiny_model(variant, pad_token_id=0, eos_token_id=None)
    input_ids = torch.tensor([[5, 9, 3, 17, 30], [0, 0, 4, 8, 41]])
    visible = (input_ids != 0).long()
    generated = model.generate(input_ids, attention_mask=visible, max_new_tokens=NEW_TOKENS, do_sample=False)
    for _ in range(NEW_TOKENS):
        logits = logits_by_definition(model.state_dict(), model.config, input_ids, visible)
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
        visible = torch.nn.functional.pad(visible, (0, 1), value=1)
    return (generated == input_ids)[:, -NEW_TOKENS:].double().mean().item()


def outcome(change: str, version: str) -> dict:
    CHANGES[change]()
    sys.modules["transformers"].__version__ = version
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = {"equal": {variant: decode(variant) for variant in ("v1", "v2")}}
        except Exception as error:
            result = {"error": type(error).__name__, "message": str(error)}
    return result | {"warnings": [str(warning.message) for warning in caught if "DiffLlama" in str(warning.message)]}


def in_child(change: str, version: str) -> dict:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            result = outcome(change, version)
        except BaseException as error:
            result = {"error": "imitation failed", "message": repr(error)}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        result = json.loads(stream.read())
    os.wait()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    version = sys.argv[1]
    print(json.dumps({change: in_child(change, version) for change in sys.argv[2:] or CHANGES}))
