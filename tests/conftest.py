"""Runs before every test module: no network, one thread a worker, and a skip that says why where there is no GPU."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate
import pytest
import torch
import transformers
from packaging.version import Version


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none here"))
        for package in (accelerate, transformers):
            needed = item.get_closest_marker(package.__name__)
            if needed is not None and Version(package.__version__) < Version(needed.kwargs["since"]):
                older = f"{package.__name__} {package.__version__} is older than {needed.kwargs['since']}"
                item.add_marker(pytest.mark.skip(reason=f"{older}: {needed.kwargs['reason']}"))
