"""Runs a test file again in a process of its own, where triton interprets its kernels."""

import os
import subprocess
import sys


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def assert_passes_interpreted(file):
    """TRITON_INTERPRET is read when kernels are decorated, so it is set before anything is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    process = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
