"""
Commands stopped by signals at random moments and run again: what they leave, what they end with, what they do twice.

Not a test module: `test_stopped_runs.py` runs a few of them, and this file as a script as many as are asked for:
`python tests/conversion/stopped_runs.py FOLDER --kills 40 --interrupts 20 --hangups 10`.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from random_llamas import random_llama, saved, write_rows

from conversion import convert_checkpoint
from conversion.checkpoint.kept_work import kept_work


# A fork server has all of it imported once and no threads: each run is a clean process, started in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["conversion.cli", "conversion.heal", "stopped_runs"])
ROW_TOKENS = 64
NUM_ROWS = 12
SHARDS = ["--max-shard-size", "20KB"]
COMMANDS = {
    "convert-v1": [
        "convert",
        "llama",
        "OUT",
        "--variant",
        "v1",
        "--calibration",
        "rows.jsonl",
        *SHARDS,
        "--calibration-tokens",
        str(ROW_TOKENS * NUM_ROWS),
        "--stages",
        "pairing,refit,values",
    ],
    "convert-v2": ["convert", "llama", "OUT", "--variant", "v2", *SHARDS],
    "heal": [
        "heal",
        "v2",
        "OUT",
        "--teacher",
        "llama",
        "--data",
        "rows.jsonl",
        "--max-length",
        "32",
        "--per-device-train-batch-size",
        "2",
        "--max-steps",
        "8",
        *SHARDS,
    ],
    "export": ["export", "v1", "OUT", *SHARDS],
}
EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGHUP: 129}


def make_inputs(folder: Path) -> Path:
    """`folder` with llama/, v1/ (which can be exported), v2/ and rows.jsonl in it."""
    saved(random_llama(max_position_embeddings=ROW_TOKENS, rms_norm_eps=1e-5), folder / "llama")
    convert_checkpoint(folder / "llama", folder / "v1", "v1", lambda_init="paper", uncalibrated=True)
    convert_checkpoint(folder / "llama", folder / "v2", "v2")
    write_rows(folder / "rows.jsonl", 2 * NUM_ROWS, ROW_TOKENS)
    return folder


def run_command(inputs: Path, output: Path, arguments: list[str], log: Path) -> None:
    """The command line in this process; `log` gets a line when a piece of work is begun and when it is kept."""
    from conversion import cli as command_line
    from conversion.calibration import calibrate
    from conversion.calibration.store import CalibrationStore
    from conversion.checkpoint.reader import CheckpointReader
    from conversion.checkpoint.writer import CheckpointWriter
    from conversion.healing.trainer import HealingTrainer

    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def noted(function: Callable, begun: Callable | None = None, kept: Callable | None = None) -> Callable:
        def call(*args, **kwargs):
            if begun:
                os.write(descriptor, f"begun {begun(*args)}\n".encode())
            result = function(*args, **kwargs)
            for piece in kept(*args) if kept else ():
                os.write(descriptor, f"kept {piece}\n".encode())
            return result

        return call

    def shard(writer, shard, tensors):
        return shard.file_name if writer._identity["source or options"] else f"unnamed {time.monotonic()}"

    calibrate.run_stage = noted(calibrate.run_stage, lambda problem, stage, *_: f"layer {problem.index} {stage}")
    CalibrationStore.save = noted(
        CalibrationStore.save, kept=lambda store, index, weights, record, stage: [f"layer {index} {stage}"]
    )
    CheckpointWriter.write_shard = noted(CheckpointWriter.write_shard, shard, lambda *args: [shard(*args)])
    HealingTrainer.training_step = noted(
        HealingTrainer.training_step, lambda trainer, *_: f"step {trainer.state.global_step + 1}"
    )
    HealingTrainer._save_checkpoint = noted(
        HealingTrainer._save_checkpoint,
        kept=lambda trainer, *_: [f"step {step}" for step in range(1, trainer.state.global_step + 1)],
    )
    # Slow as a large tensor, so that moments fall within the work and not within its start.
    CheckpointReader.read = noted(CheckpointReader.read, lambda *_: f"read {time.sleep(0.04)} {time.monotonic()}")
    command_line.stop_on_signals = noted(command_line.stop_on_signals, kept=lambda: ["signals"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(inputs)
    with log.with_suffix(".err").open("w") as errors, log.with_suffix(".out").open("w") as shown:
        os.dup2(errors.fileno(), 2)
        os.dup2(shown.fileno(), 1)
    sys.argv = ["diff-llama", *(str(output) if argument == "OUT" else argument for argument in arguments)]
    command_line.main()


def run(inputs: Path, output: Path, arguments: list[str], stop: tuple[int, float] | None = None) -> tuple[int, float]:
    """Exit code of the command, stopped by a signal so many seconds after it has come to handle signals.

    Returns the seconds that it has taken from there on, too.
    """
    log = output.with_name(output.name + ".log")
    started = log.read_text().count("kept signals") if log.exists() else 0
    process = PROCESSES.Process(target=run_command, args=(inputs, output, arguments, log))
    process.start()
    while process.is_alive() and not (log.exists() and log.read_text().count("kept signals") > started):
        time.sleep(0.002)
    began = time.monotonic()
    if stop:
        process.join(stop[1])
        # Twice, as by an impatient user: the second must not stop the clean-up.
        for _ in range(2):
            if process.is_alive():
                os.kill(process.pid, stop[0])
                process.join(0.01)
    process.join(300)
    assert process.exitcode is not None, "the command does not end"
    return process.exitcode, time.monotonic() - began


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def done_twice(log: Path) -> list[str]:
    """Pieces of work that were begun although they had been kept."""
    kept = set()
    twice = []
    for line in log.read_text().splitlines():
        word, piece = line.split(" ", 1)
        if word == "kept":
            kept.add(piece)
        elif piece in kept:
            twice.append(piece)
    return twice


def check_stopped(output: Path, signum: int, code: int, whole: dict[str, bytes]) -> None:
    """Nothing half done looks whole; a signal that can be handled leaves no lock and says what stays."""
    assert code in (0, EXIT_CODES[signum]), (code, output.with_name(output.name + ".err").read_text())
    if output.exists():
        assert weights(output) == whole and (output / "conversion.json").exists()
    if signum == signal.SIGKILL or code == 0:
        return
    said = output.with_name(output.name + ".err").read_text().splitlines()[-1]
    assert not list(output.parent.glob(f".{output.name}.*.lock")), "a lock was left"
    left = kept_work(output)
    assert said.startswith(("interrupted; ", "stopped by SIGHUP; ")), said
    assert ("kept: " in said and "to continue: diff-llama" in said) == bool(left), (said, left)
    assert all(str(folder) in said for folder in left)


def stop_and_run_again(
    inputs: Path,
    output: Path,
    name: str,
    signum: int,
    moment: float,
    first: list[str],
    again: list[str],
    whole: dict[str, bytes],
) -> str:
    """Stops a command once, runs it again until it ends, and checks all that was promised. Returns what was met."""
    arguments = COMMANDS[name]
    code, _ = run(inputs, output, [*arguments, *first], (signum, moment))
    check_stopped(output, signum, code, whole)
    met = "work kept" if kept_work(output) else "ended before" if output.exists() else "nothing kept"
    if not output.exists():
        code, _ = run(inputs, output, [*arguments, *again])
        assert code == 0, output.with_name(output.name + ".err").read_text()
    assert weights(output) == whole, "other weights"
    log = output.with_name(output.name + ".log")
    assert not done_twice(log), f"{done_twice(log)} done twice"
    if code == 0 and met != "ended before":
        assert not kept_work(output)
    return met


def run_whole(inputs: Path, folder: Path, name: str) -> tuple[dict[str, bytes], float]:
    """The weights that a command ends with, and how long it takes."""
    code, seconds = run(inputs, folder / "whole", COMMANDS[name])
    errors = (folder / "whole.err").read_text()
    assert code == 0, errors
    warnings = [line for line in errors.splitlines() if not line.startswith("calibration on")]  # what it will take
    assert not warnings, f"{warnings} where nothing is wrong"
    return weights(folder / "whole"), seconds


def stop_many(
    inputs: Path, folder: Path, name: str, counts: dict[int, int], *, seed: int = 0, earliest: float = 0.0
) -> Counter[str]:
    """`counts` stops by signal, the first run with and without `--resume` in turn; how often what was met.

    Moments are random ones after a share `earliest` of a whole run's time.
    """
    source = random.Random(f"{seed} {name}")
    found = Counter()
    folder.mkdir(parents=True, exist_ok=True)
    run(inputs, folder / "warm", ["--help"])  # the first run of a fork server starts it
    whole, seconds = run_whole(inputs, folder, name)
    stops = [signum for signum, count in counts.items() for _ in range(count)]
    for number, signum in enumerate(stops):
        first = ["--resume"] * (number % 2)
        again = ["--resume"] * (number // 2 % 2)
        moment = source.uniform(earliest, 1) * seconds
        output = folder / f"{signal.Signals(signum).name}-{number}"
        met = stop_and_run_again(inputs, output, name, signum, moment, first, again, whole)
        found[f"{signal.Signals(signum).name}: {met}"] += 1
        shutil.rmtree(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--hangups", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    inputs = arguments.folder.absolute() / "inputs"
    inputs.mkdir(parents=True)
    make_inputs(inputs)
    counts = {signal.SIGKILL: arguments.kills, signal.SIGINT: arguments.interrupts, signal.SIGHUP: arguments.hangups}
    for name in arguments.commands:
        began = time.monotonic()
        found = stop_many(inputs, arguments.folder.absolute() / name, name, counts, seed=arguments.seed)
        seconds = time.monotonic() - began
        print(json.dumps({"command": name, **dict(sorted(found.items())), "seconds": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
