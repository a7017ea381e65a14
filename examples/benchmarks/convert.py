"""
Time and memory of a conversion, against copying the same files: a synthetic sharded LLaMA, random weights in bfloat16.

    python examples/benchmarks/convert.py --gigabytes 8 --work out/conversion --output out/results

Each run is a process of its own, and what it wrote is synced to disk before its clock stops. Peak memory is what the
process held for itself (RssAnon); pages of the source, mapped from its files, are counted apart, as the system takes
them back whenever it wants. The copies alternate with the conversions, and the medians are reported.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conversion import convert_checkpoint
from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder


SHARD_BYTES = 2 * 10**9


def write_source(folder: Path, num_bytes: int) -> int:
    """A LLaMA with as many layers of Llama-3.1-8B's shape as fit (small ones for a smoke test). Returns its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wide = num_bytes >= 10**9
    shape = {"hidden_size": 4096 if wide else 256, "intermediate_size": 14336 if wide else 512}
    heads = {"num_attention_heads": 32 if wide else 8, "num_key_value_heads": 8 if wide else 4, "vocab_size": 32000}
    embeddings = 2 * 2 * heads["vocab_size"] * shape["hidden_size"]
    layer = 2 * shape["hidden_size"] * (2.5 * shape["hidden_size"] + 3 * shape["intermediate_size"])
    layers = max(1, int((num_bytes - embeddings) // layer))
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **shape, **heads)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    weight_map = {}
    shard = {}
    shards = []
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + 2 * tensor.numel() > SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), shard, weight_map))
            shard = {}
        shard[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02)
    shards.append(_write_shard(folder, len(shards), shard, weight_map))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _write_shard(folder: Path, number: int, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> Path:
    path = folder / f"model-part-{number:05d}.safetensors"
    save_file(shard, path, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, path.name))
    return path


def copy(source: Path, target: Path) -> None:
    """A plain copy, synced file by file."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())


def convert_v1(source: Path, target: Path) -> None:
    convert_checkpoint(source, target, "v1", uncalibrated=True, measure=False)


def convert_v2(source: Path, target: Path) -> None:
    convert_checkpoint(source, target, "v2", measure=False)


JOBS: dict[str, Callable[[Path, Path], None]] = {"copy": copy, "convert v1": convert_v1, "convert v2": convert_v2}


def run(job: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds and peak bytes of one job in a process of its own; its target is removed afterwards."""
    shutil.rmtree(target, ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(job, source, target, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise SystemExit(f"{job} failed; its error stands above") from None
    finally:
        process.join()
        shutil.rmtree(target, ignore_errors=True)
    return result


def _measured(job: str, source: Path, target: Path, sender) -> None:
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()
    baseline = _resident()
    sampler = threading.Thread(target=_sample, args=(peaks, done))
    sampler.start()
    start = time.perf_counter()
    try:
        JOBS[job](source, target)
        seconds = time.perf_counter() - start
    finally:
        done.set()
        sampler.join()
    own = peaks["RssAnon"] - baseline["RssAnon"]
    sender.send({"seconds": seconds, "peak_own_bytes": own, "peak_mapped_bytes": peaks["RssFile"]})


def _sample(peaks: dict[str, int], done: threading.Event) -> None:
    while not done.wait(0.02):
        for name, value in _resident().items():
            peaks[name] = max(peaks[name], value)


def _resident() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser(__file__, __doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the source")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the medians are taken")
    work = Path("out/conversion")
    parser.add_argument(
        "--work", type=Path, default=work, help="folder on the disk to measure, with room for twice --gigabytes"
    )
    add_output(parser, "conversion.json")
    parser.add_argument("--smoke", action="store_true", help="0.05 GB, one round")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.gigabytes = 0.05
        arguments.rounds = 1
    with one_line_errors(__file__), output_folder(arguments, ["conversion.json"]) as folder:
        record = measure(arguments)
        (folder / "conversion.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> dict:
    """Writes the source, runs every job in every round, prints the medians and returns the record."""
    source = arguments.work / "source"
    num_bytes = write_source(source, int(arguments.gigabytes * 10**9))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    rounds = [{job: run(job, source, arguments.work / "target") for job in JOBS} for _ in range(arguments.rounds)]
    shutil.rmtree(source)
    record = {"environment": environment("cpu"), "source_bytes": num_bytes, "largest_shard_bytes": largest, "jobs": {}}
    print(f"{num_bytes / 1e9:.2f} GB of weights, {arguments.rounds} rounds, medians")
    print(f"{'':>12} {'seconds':>9} {'ratio':>7} {'own peak (MB)':>14} {'mapped peak (MB)':>17}")
    for job in JOBS:
        medians = {key: statistics.median(r[job][key] for r in rounds) for key in rounds[0][job]}
        ratio = medians["seconds"] / statistics.median(r["copy"]["seconds"] for r in rounds)
        record["jobs"][job] = medians | {"ratio_to_copy": ratio}
        own = medians["peak_own_bytes"] / 1e6
        mapped = medians["peak_mapped_bytes"] / 1e6
        print(f"{job:>12} {medians['seconds']:9.2f} {ratio:7.2f} {own:14.0f} {mapped:17.0f}")
    return record


if __name__ == "__main__":
    main()
