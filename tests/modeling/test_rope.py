"""Every rope type LLaMA has, in both spellings, computed from the width of a map."""

import warnings

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_diff.modeling_diff_llama import DiffLlamaRotaryEmbedding


ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}
ROPE_THETA = 5000.0
MAP_DIM = 8


@pytest.fixture
def tokens_embedded():
    return torch.zeros(1, 100, 4), torch.arange(100)[None]


def new_spelling(rope_type):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": ROPE_THETA} | ROPE_TYPES[rope_type]}


def old_spelling(rope_type):
    scaling = None if rope_type == "default" else {"rope_type": rope_type} | ROPE_TYPES[rope_type]
    return {"rope_theta": ROPE_THETA, "rope_scaling": scaling}


@pytest.fixture
def llama_rotary(tiny_config):
    """LLaMA's rotary embedding for heads as wide as a map."""

    def build(rope_type):
        return LlamaRotaryEmbedding(tiny_config("llama", head_dim=MAP_DIM, **new_spelling(rope_type)))

    return build


@pytest.fixture
def diff_config(tiny_config, variant):
    def build(**settings):
        return tiny_config(variant, head_dim=2 * MAP_DIM if variant == "v1" else MAP_DIM, **settings)

    return build


@pytest.mark.parametrize("spell", [new_spelling, old_spelling])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rotary_angles_equal_llama_heads_of_map_width(diff_config, llama_rotary, tokens_embedded, rope_type, spell):
    ours = DiffLlamaRotaryEmbedding(diff_config(**spell(rope_type)))
    theirs = llama_rotary(rope_type)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling
    # 100 tokens are beyond the original 32, where dynamic and longrope compute their frequencies anew.
    for angles, expected in zip(ours(*tokens_embedded), theirs(*tokens_embedded), strict=True):
        assert angles.shape[-1] == MAP_DIM
        assert torch.equal(angles, expected)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rope_settings_survive_saving_and_loading(diff_config, tmp_path, rope_type):
    config = diff_config(**new_spelling(rope_type))
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_valid_rope_settings_warn_of_nothing(diff_config, caplog, capfd, rope_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diff_config(**new_spelling(rope_type)).rotary_config()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_long_inputs_generate_as_they_decode_without_cache(tiny_model, variant, random_ids, rope_type):
    width = 2 * MAP_DIM if variant == "v1" else MAP_DIM
    model = tiny_model(variant, head_dim=width, max_position_embeddings=256, **new_spelling(rope_type))
    input_ids = random_ids(1, 60)
    generated = model.generate(input_ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    if rope_type in ("dynamic", "longrope"):  # frequencies depend on the length: cached keys keep the older ones
        assert generated.shape == (1, 64)
    else:
        logits = model(generated[:, :-1], use_cache=False).logits[:, 59:]
        assert torch.equal(logits.argmax(-1), generated[:, 60:])
