"""
Time of differential attention alone, in every form, against LLaMA's attention with the same parameters.

    python examples/benchmark_attention.py --dtype bfloat16 --lengths 1024 4096 --output out/attention

Forms: `triton` the fused kernels, `chunked` the query-chunked path, `one call` queries padded to the key's width (what
any backend of transformers gets), `two calls` one a map with values twice as wide, `four calls` one a map and half of
the value (as the authors' first release), `stock diffllama` one of all maps for each half (as transformers' own
DiffLlama, in its layout). LLaMA runs through torch's best backend (`llama`) and, where triton runs, through the same
kernel with one map (`llama, same kernel`). Every form is first compared with the definition in float64, and nothing is
timed if one is off. Rounds are interleaved, medians reported.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import environment, keep_freed_memory, time_interleaved
from torch.nn.functional import scaled_dot_product_attention as sdpa

from modeling_diff import diff_attention_reference
from modeling_diff.diff_attention import place_queries, subtract_maps
from modeling_diff.diff_attention_chunked import chunked_attention_forward
from modeling_diff.diff_attention_triton import diff_attention_triton, triton_can_run


# Of values near 1: bfloat16 keeps 8 bits, and scores, weights and output are each rounded; float16 11, float32 24.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
MODULE = SimpleNamespace(is_causal=True)
Tensors = tuple[torch.Tensor, ...]


def make_inputs(length: int, queries: int, map_dim: int, dtype: torch.dtype, device: str) -> Tensors:
    """V1 with 8 heads on 4 key-value heads: query (1, 16, T, d), key and value (1, 4, S, 2d), lambda ()."""
    shapes = ((1, queries, 16, map_dim), (1, length, 4, 2 * map_dim), (1, length, 4, 2 * map_dim))
    query, key, value = (torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes)
    return query, key.contiguous(), value.contiguous(), torch.tensor(0.3, device=device)


def as_llama(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    """LLaMA's heads of the same parameters: (1, 16, T, d) queries on (1, 8, S, d) keys and values."""
    return query, *(x.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2).contiguous() for x in (key, value))


def as_stock(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, diff_lambda: torch.Tensor) -> Tensors:
    """The layout of transformers' own DiffLlama: all first maps before all second, halves of the values likewise."""
    query = query.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    key, value = (x.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4).flatten(1, 2) for x in (key, value))
    return query, key, value, diff_lambda


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's attention, causal for a prompt; heads are repeated where its fast backends do not group them."""
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu":
        if query.shape[2] == 1:
            return sdpa(query.unflatten(1, (-1, groups)).flatten(2, 3), key, value).reshape(*query.shape[:3], -1)
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        groups = 1
    return sdpa(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=groups > 1, scale=query.shape[-1] ** -0.5)


def one_call(query, key, value, diff_lambda):
    scale = query.shape[-1] ** -0.5
    placed = place_queries(query, value.shape[-1]) * (scale / value.shape[-1] ** -0.5)  # `plain` scales by the width
    return subtract_maps(plain(placed, key, value).transpose(1, 2), diff_lambda).to(query.dtype)


def two_calls(query, key, value, diff_lambda):
    first, second = query.unflatten(1, (-1, 2)).unbind(2)
    key1, key2 = key.chunk(2, dim=-1)
    return (plain(first, key1, value) - diff_lambda * plain(second, key2, value)).transpose(1, 2).to(query.dtype)


def four_calls(query, key, value, diff_lambda):
    halves = [two_calls(query, key, half, diff_lambda) for half in value.chunk(2, dim=-1)]
    return torch.cat(halves, dim=-1)


def stock(query, key, value, diff_lambda):
    halves = [plain(query, key, half.repeat(1, 2, 1, 1)) for half in value.chunk(2, dim=1)]
    first, second = torch.cat(halves, dim=-1).chunk(2, dim=1)
    return (first - diff_lambda * second).transpose(1, 2).to(query.dtype)


def chunked(query, key, value, diff_lambda):
    return chunked_attention_forward(MODULE, query, key, value, None, query.shape[-1] ** -0.5, diff_lambda)[0]


def fused(query, key, value, diff_lambda):
    return diff_attention_triton(query, key, value, diff_lambda, scaling=query.shape[-1] ** -0.5)


def forms(inputs: Tensors) -> dict[str, tuple[Callable, Tensors]]:
    """Each form and tensors of its own: no layout changes while the clock runs, and no form warms another's cache."""
    found = {"chunked": chunked, "one call": one_call, "two calls": two_calls, "four calls": four_calls}
    if triton_can_run(inputs[0].device) is None:
        found["triton"] = fused
    own = {name: (form, tuple(x.clone() for x in inputs)) for name, form in found.items()}
    return own | {"stock diffllama": (stock, as_stock(*inputs))}


def check(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest difference of each form from the definition in float64, on 257 tokens."""
    inputs = make_inputs(257, 257, 64, dtype, device)
    hidden = torch.full((257, 257), float("-inf"), dtype=torch.float64, device=device).triu(1)[None, None]
    expected = diff_attention_reference(*(x.double() for x in inputs), 64**-0.5, hidden)
    outputs = {name: form(*tensors) for name, (form, tensors) in forms(inputs).items()}
    return {name: (output.double() - expected).abs().max().item() for name, output in outputs.items()}


def with_gradients(function: Callable, inputs: Tensors) -> Callable[[], object]:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def measure(length: int, map_dim: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds: forward and forward with backward of a prompt, and one step of decoding after it."""
    seconds = {}
    for phase, queries in (("forward", length), ("forward + backward", length), ("decode", 1)):
        inputs = make_inputs(length, queries, map_dim, dtype, device)
        calls: dict[str, tuple[Callable, Tensors]] = {"llama": (plain, as_llama(*inputs[:3]))}
        if triton_can_run(device) is None:
            calls["llama, same kernel"] = (lambda q, k, v: fused(q, k, v, None), as_llama(*inputs[:3]))
        calls |= forms(inputs)
        if phase == "forward + backward":
            jobs = {name: with_gradients(form, tensors) for name, (form, tensors) in calls.items()}
        else:
            jobs = {name: (lambda f=form, t=tensors: f(*t)) for name, (form, tensors) in calls.items()}
        with torch.set_grad_enabled(phase == "forward + backward"):
            seconds[phase] = time_interleaved(jobs, rounds, device)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--map-dims", type=int, nargs="+", default=[64, 128], help="width of a map")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="folder for attention_<dtype>.csv, .json and .png")
    parser.add_argument("--smoke", action="store_true", help="one short length, two rounds")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.lengths, arguments.map_dims, arguments.rounds = [128], [64], 2
    keep_freed_memory()
    dtype = getattr(torch, arguments.dtype)
    differences = check(dtype, arguments.device)
    wrong = {name: f"{value:.1e}" for name, value in differences.items() if not value <= TOLERANCE[dtype]}
    if wrong:
        sys.exit(f"Off the float64 definition by more than {TOLERANCE[dtype]}: {wrong}; no speed is reported.")
    rows = []
    for map_dim in arguments.map_dims:
        for length in arguments.lengths:
            for phase, times in measure(length, map_dim, dtype, arguments.device, arguments.rounds).items():
                rows += [
                    {"map_dim": map_dim, "length": length, "phase": phase, "form": form, "ms": 1000 * value,
                     "ratio_to_llama": value / times["llama"],
                     "ratio_to_same_kernel": value / times.get("llama, same kernel", float("nan"))}
                    for form, value in times.items()
                ]  # fmt: skip
    report(rows, {"environment": environment(arguments.device), "dtype": arguments.dtype, "differences": differences},
           arguments.output)  # fmt: skip


def report(rows: list[dict], record: dict, output: Path | None) -> None:
    print(json.dumps(record))
    print(f"{'d':>4} {'length':>7} {'phase':>19} {'form':>19} {'ms':>9} {'/ llama':>8} {'/ same kernel':>14}")
    for row in rows:
        print(f"{row['map_dim']:4} {row['length']:7} {row['phase']:>19} {row['form']:>19} {row['ms']:9.3f} "
              f"{row['ratio_to_llama']:8.3f} {row['ratio_to_same_kernel']:14.3f}")  # fmt: skip
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    stem = f"attention_{record['environment']['machine'].split()[0].lower()}_{record['dtype']}"
    (output / f"{stem}.json").write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    with open(output / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, record, output / f"{stem}.png")


def plot(rows: list[dict], record: dict, path: Path) -> None:
    """Ratio to LLaMA over the length: a column a phase, a row a map width."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    phases, map_dims = (list(dict.fromkeys(row[field] for row in rows)) for field in ("phase", "map_dim"))
    lengths = sorted({row["length"] for row in rows})
    size = (4 * len(phases), 3.6 * len(map_dims))
    figure, axes = pyplot.subplots(
        len(map_dims), len(phases), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for (map_dim, phase), axis in zip(product(map_dims, phases), axes.flat, strict=True):
        for form in dict.fromkeys(row["form"] for row in rows):
            chosen = [row for row in rows if (row["phase"], row["form"], row["map_dim"]) == (phase, form, map_dim)]
            axis.plot([r["length"] for r in chosen], [r["ratio_to_llama"] for r in chosen], marker="o", label=form)
        axis.set(title=f"{phase}, maps {map_dim} wide", xlabel="length (tokens)", ylabel="time / LLaMA", xscale="log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(f"{record['environment']['machine']}, {record['dtype']}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
