"""Tiny models of both variants whose every weight matters: no norm is at one, no lambda at its start."""

import os
from functools import partial


# A pool of compiling processes costs more than it saves on models this small.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import tiny_models


@pytest.fixture(params=["v1", "v2"])
def variant(request):
    return request.param


# What builds a tiny model; of V1 also one in which some heads of each layer are differential.
HEADS = {
    "v1": {"kind": "v1"},
    "v2": {"kind": "v2"},
    "v1, some heads": {"kind": "v1", "differential_heads": [[0, 3], [1]]},
}


@pytest.fixture(params=HEADS)
def heads(request):
    return HEADS[request.param]


@pytest.fixture
def tiny_config():
    return partial(tiny_models.tiny_config, pad_token_id=0)


@pytest.fixture
def tiny_model():
    return partial(tiny_models.tiny_model, noise=0.2, pad_token_id=0)


@pytest.fixture
def random_ids():
    return tiny_models.random_ids
