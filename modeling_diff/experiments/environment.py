"""What a measurement ran on, to stand next to its numbers."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from ..diff_attention_triton import triton


def environment(device: str) -> dict[str, str | int | float]:
    """
    Returns date, machine, load, versions and the commit of the running script.

    Args:
        device: `cuda` for the GPU's name, anything else for the processor's.
    """
    folder = Path(sys.argv[0]).resolve().parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": "none" if triton is None else triton.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
