"""Runs before every test module: no network, one thread a worker, and a skip that says why where there is no GPU."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from packaging.version import Version


def pytest_collection_modifyitems(items):
    installed = Version(transformers.__version__)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none here"))
        needed = item.get_closest_marker("transformers")
        if needed is not None and installed < Version(needed.kwargs["since"]):
            reason = f"transformers {installed} is older than {needed.kwargs['since']}: {needed.kwargs['reason']}"
            item.add_marker(pytest.mark.skip(reason=reason))
