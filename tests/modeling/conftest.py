"""Tiny models of both variants whose every weight matters: no norm is at one, no lambda at its start."""

import os


# A pool of compiling processes costs more than it saves on models this small.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


VOCAB_SIZE = 96
PAD_TOKEN_ID = 0


@pytest.fixture(params=["v1", "v2"])
def variant(request):
    return request.param


@pytest.fixture
def tiny_config():
    def build(variant, **overrides):
        settings = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,  # LLaMA's 0.02 would leave every map uniform at this width
            "pad_token_id": PAD_TOKEN_ID,
        }
        return DiffLlamaConfig(variant=variant, **(settings | overrides))

    return build


@pytest.fixture
def tiny_model(tiny_config):
    """Builds a model in evaluation mode, of any class, with seeded weights."""

    def build(variant, model_class=DiffLlamaForCausalLM, seed=0, **overrides):
        torch.manual_seed(seed)
        model = model_class(tiny_config(variant, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture
def random_ids():
    """Token ids (batch_size, num_tokens) without padding, beginning or end tokens."""

    def build(batch_size, num_tokens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCAB_SIZE, (batch_size, num_tokens), generator=generator)

    return build
