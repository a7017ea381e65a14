"""
One calibrated conversion by the checkout that PYTHONPATH names, for calibration.py, which starts it in a process.

    PYTHONPATH=CHECKOUT python examples/benchmarks/calibration_run.py SOURCE TARGET '{"calibration": "text.txt"}'

Prints one line of JSON: CPU seconds by stage, peak memory, and the estimate of checkouts that hand one out. Options
that an older checkout does not know are left out and named, so nothing but `conversion` is imported from it.
"""

import argparse
import inspect
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import conversion
from conversion import convert_checkpoint


class StageClock:
    """CPU seconds of this process by stage, from the progress that a calibration reports."""

    def __init__(self) -> None:
        self.began: dict[tuple[int, str], float] = {}
        self.ended: dict[tuple[int, str], float] = {}

    def __call__(self, layer: int, num_layers: int, stage: str, done: float) -> None:
        now = time.process_time()
        self.began.setdefault((layer, str(stage)), now)
        self.ended[layer, str(stage)] = now

    def seconds(self) -> dict[str, float]:
        """Returns the sum over layers, by stage."""
        totals: dict[str, float] = {}
        for key, began in self.began.items():
            totals[key[1]] = totals.get(key[1], 0.0) + self.ended[key] - began
        return totals


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns those of `options` that this checkout's `convert_checkpoint` takes."""
    parameters = inspect.signature(convert_checkpoint).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def peak_bytes() -> int:
    """Returns the most memory this process has held; getrusage would count the process that started it as well."""
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a LLaMA")
    parser.add_argument("target", help="folder to create")
    parser.add_argument("options", type=json.loads, help="arguments of convert_checkpoint, as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = known_options(arguments.options)
    clock = StageClock()
    estimates: list[Any] = []
    if "before_calibration" in inspect.signature(convert_checkpoint).parameters:
        known["before_calibration"] = estimates.append
    began = time.process_time()
    convert_checkpoint(arguments.source, arguments.target, "v1", calibration_progress=clock, **known)
    seconds = time.process_time() - began
    result = {
        "package": str(Path(conversion.__file__).parents[1]),
        "stages": clock.seconds(),
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "left_out": sorted(arguments.options.keys() - known.keys()),
    }
    if estimates:
        result["estimated_seconds"] = estimates[0].estimate.seconds
        result["estimated_peak_bytes"] = estimates[0].estimate.memory_bytes
    print(json.dumps(result))


if __name__ == "__main__":
    main()
