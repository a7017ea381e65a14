"""
Time of differential attention alone, in every form, against LLaMA's attention with the same parameters.

    python examples/benchmarks/attention.py --dtype bfloat16 --lengths 1024 4096 --output out/attention

Forms: `triton` the fused kernels, `chunked` the query-chunked path of CPUs, `one call` queries padded to the key's
width (what any backend of transformers gets), `two calls` one per map with values twice as wide, `four calls` one per
map and half of the value (as the authors' first release), `stock diffllama` one of all maps for each half (as in
transformers' own DiffLlama, in its layout). LLaMA runs through torch's choice of backend (`llama`) and, where triton
runs, through the same kernel with one map (`llama, same kernel`). On a GPU cuDNN is asked for by name as well, and
with `--flex` compiled FlexAttention; the ratio to LLaMA is to the fastest of its backends.

Every form is first compared with the definition in float64, and nothing is timed if one is off; backends that refuse
are named with their reason. Rounds are interleaved, medians reported; on a GPU of the time that it computes, on 16,384
tokens at a width of 2,048.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import keep_freed_memory, time_interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from modeling_diff import diff_attention_reference
from modeling_diff.diff_attention import place_queries, subtract_maps
from modeling_diff.diff_attention_chunked import chunked_attention_forward
from modeling_diff.diff_attention_triton import diff_attention_triton, triton_can_run
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for


# Of values near 1: bfloat16 keeps 8 bits, and scores, weights and output are each rounded; float16 11, float32 24.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
MODULE = SimpleNamespace(is_causal=True)
SAME_KERNEL = "llama, same kernel"
Tensors = tuple[torch.Tensor, ...]
Job = tuple[Callable, Tensors]
Seconds = dict[str, dict[str, float]]


def make_inputs(length: int, queries: int, map_dim: int, dtype: torch.dtype, device: str) -> Tensors:
    """
    V1 with two heads per key-value head: query (B, 2H, T, d), key and value (B, H / 2, S, 2d), lambda ().

    B = 1 and H = 8 on a CPU; what fills a GPU there.
    """
    batch_size, maps = (max(1, 16384 // length), 2048 // map_dim) if device == "cuda" else (1, 16)
    key_shape = (batch_size, length, maps // 4, 2 * map_dim)
    shapes = ((batch_size, queries, maps, map_dim), key_shape, key_shape)
    query, key, value = (torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes)
    return query, key.contiguous(), value.contiguous(), torch.tensor(0.3, device=device)


def as_llama(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    """LLaMA's heads of the same parameters: queries (B, 2H, T, d) on keys and values (B, H, S, d)."""
    return query, *(x.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2).contiguous() for x in (key, value))


def as_stock(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, diff_lambda: torch.Tensor) -> Tensors:
    """The layout of transformers' own DiffLlama: all first maps before all second, halves of the values likewise."""
    query = query.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    key, value = (x.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4).flatten(1, 2) for x in (key, value))
    return query, key, value, diff_lambda


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's attention, causal for a prompt; heads are repeated where its fast backends do not group them."""
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and query.shape[2] == 1:
        return sdpa(query.unflatten(1, (-1, groups)).flatten(2, 3), key, value).reshape(*query.shape[:3], -1)
    if query.device.type == "cpu" or key.shape[-1] != value.shape[-1]:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return grouped(query, key, value)


def grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    causal = query.shape[2] > 1
    groups = query.shape[1] != key.shape[1]
    return sdpa(query, key, value, is_causal=causal, enable_gqa=groups, scale=query.shape[-1] ** -0.5)


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return grouped(query, key, value)


compiled_flex_attention = torch.compile(flex_attention)


@cache
def causal_blocks(length: int, device: torch.device):
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    blocks = causal_blocks(query.shape[2], query.device) if query.shape[2] > 1 else None
    return compiled_flex_attention(query, key, value, block_mask=blocks, enable_gqa=True)


def one_call(query, key, value, diff_lambda):
    scale = query.shape[-1] ** -0.5
    placed = place_queries(query, value.shape[-1]) * (scale / value.shape[-1] ** -0.5)  # `plain` scales by the width
    return subtract_maps(plain(placed, key, value).transpose(1, 2), diff_lambda).to(query.dtype)


def two_calls(query, key, value, diff_lambda, attention=plain):
    first, second = query.unflatten(1, (-1, 2)).unbind(2)
    key1, key2 = key.chunk(2, dim=-1)
    output = attention(first, key1, value) - diff_lambda * attention(second, key2, value)
    return output.transpose(1, 2).to(query.dtype)


def four_calls(query, key, value, diff_lambda):
    halves = [two_calls(query, key, half, diff_lambda) for half in value.chunk(2, dim=-1)]
    return torch.cat(halves, dim=-1)


def stock(query, key, value, diff_lambda):
    halves = [plain(query, key, half.repeat(1, 2, 1, 1)) for half in value.chunk(2, dim=1)]
    first, second = torch.cat(halves, dim=-1).chunk(2, dim=1)
    return (first - diff_lambda * second).transpose(1, 2).to(query.dtype)


def chunked(query, key, value, diff_lambda):
    return chunked_attention_forward(MODULE, query, key, value, None, query.shape[-1] ** -0.5, diff_lambda)[0]


def fused(query, key, value, diff_lambda=None):
    return diff_attention_triton(query, key, value, diff_lambda, scaling=query.shape[-1] ** -0.5)


def llama_forms(inputs: Tensors, with_flex: bool) -> dict[str, Job]:
    """LLaMA's attention through every backend, and through our kernels with one map."""
    found: dict[str, Callable] = {"llama": plain}
    found |= {f"llama, {name}": backend for name, backend in stock_backends(inputs, with_flex).items()}
    if triton_can_run(inputs[0].device) is None:
        found[SAME_KERNEL] = fused
    return {name: (form, as_llama(*inputs[:3])) for name, form in found.items()}


def forms(inputs: Tensors, with_flex: bool) -> dict[str, Job]:
    """Each form and tensors of its own: no layout changes while the clock runs, and no form warms another's cache."""
    found: dict[str, Callable] = {"one call": one_call, "two calls": two_calls, "four calls": four_calls}
    if inputs[0].device.type == "cpu":
        found["chunked"] = chunked
    if triton_can_run(inputs[0].device) is None:
        found["triton"] = fused
    for name, backend in stock_backends(inputs, with_flex).items():
        found[f"two calls, {name}"] = partial(two_calls, attention=backend)
    own = {name: (form, tuple(x.clone() for x in inputs)) for name, form in found.items()}
    return own | {"stock diffllama": (stock, as_stock(*inputs))}


def stock_backends(inputs: Tensors, with_flex: bool) -> dict[str, Callable]:
    """Those that torch does not choose by itself."""
    found = {"cudnn": cudnn} if inputs[0].device.type == "cuda" else {}
    return found | ({"flex": flex} if with_flex else {})


def that_run(jobs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """All but the forms of torch's own attention that refuse or find no memory, each with its reason."""
    running = {}
    for name, job in jobs.items():
        try:
            job()
        except Exception as error:  # torch and its compiler raise what they like
            if name in ("llama", "chunked", "triton", SAME_KERNEL):
                raise
            print(f"{name}: refused, {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        else:
            running[name] = job
    return running


def check(dtype: torch.dtype, device: str, with_flex: bool) -> dict[str, float]:
    """Largest difference of each form from the definition in float64, on 257 tokens."""
    query, *others = (x[:1] if x.dim() else x for x in make_inputs(257, 257, 64, dtype, device))
    hidden = torch.full((257, 257), float("-inf"), dtype=torch.float64, device=device).triu(1)[None, None]
    expected = diff_attention_reference(query.double(), *(x.double() for x in others), 64**-0.5, hidden)
    calls = forms((query, *others), with_flex)
    jobs = that_run({name: partial(form, *tensors) for name, (form, tensors) in calls.items()})
    return {name: (job().double() - expected).abs().max().item() for name, job in jobs.items()}


def only_forward(function: Callable, inputs: Tensors) -> Callable[[], object]:
    return partial(function, *inputs)


def forward_and_backward(function: Callable, inputs: Tensors) -> Callable[[], object]:
    """Both; what the output weighs the loss by is the output."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)

    def both():
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, output.detach())

    return both


def only_backward(function: Callable, inputs: Tensors) -> Callable[[], object]:
    """The backward of one forward, which the first call takes."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    output = cache(lambda: function(*leaves))
    return lambda: torch.autograd.grad(output(), leaves, output().detach(), retain_graph=True)


PHASES: dict[str, Callable] = {
    "forward": only_forward,
    "backward": only_backward,
    "forward + backward": forward_and_backward,
    "decode": only_forward,
}


def measure(length: int, map_dim: int, dtype: torch.dtype, arguments: argparse.Namespace) -> Seconds:
    """Median seconds by phase and form: a prompt, and one step of decoding after it."""
    seconds: Seconds = {}
    for phase, job in PHASES.items():
        inputs = make_inputs(length, 1 if phase == "decode" else length, map_dim, dtype, arguments.device)
        calls = llama_forms(inputs, arguments.flex) | forms(inputs, arguments.flex)
        with torch.set_grad_enabled("backward" in phase):
            jobs = that_run({name: job(form, tensors) for name, (form, tensors) in calls.items()})
            seconds[phase] = time_interleaved(jobs, arguments.rounds, arguments.device, gpu_only=True)
    return seconds


def fastest_llama(times: dict[str, float]) -> float:
    return min(value for name, value in times.items() if name.startswith("llama") and name != SAME_KERNEL)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add_device(parser)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the inputs")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="sequence lengths in tokens")
    add("--map-dims", type=int, nargs="+", default=[64, 128], help="widths of the queries and keys of a map")
    add("--rounds", type=int, default=11, help="interleaved rounds of which the median is taken")
    add("--flex", action="store_true", help="compiled FlexAttention as well, tens of seconds per shape")
    add_output(parser, "attention_<machine>_<dtype>.csv, .json and .png")
    add("--smoke", action="store_true", help="one short length, two rounds")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.lengths = [128]
        arguments.map_dims = [64]
        arguments.rounds = 2
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.flex:
        torch._dynamo.config.recompile_limit = 100  # past which it would run uncompiled, with every score at once
    stem = file_stem(environment(arguments.device), arguments.dtype)
    results = [f"{stem}.{suffix}" for suffix in ("json", "csv", "png")]
    with one_line_errors(__file__), output_folder(arguments, results) as folder:
        run(arguments, folder)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Checks every form, times them, and writes what is measured after every shape."""
    keep_freed_memory()
    dtype = getattr(torch, arguments.dtype)
    differences = check(dtype, arguments.device, arguments.flex)
    wrong = {name: f"{value:.1e}" for name, value in differences.items() if not value <= TOLERANCE[dtype]}
    if wrong:
        sys.exit(f"Off the float64 definition by more than {TOLERANCE[dtype]}: {wrong}; no speed is reported.")
    record = {"environment": environment(arguments.device), "dtype": arguments.dtype, "differences": differences}
    print(json.dumps(record))
    rows: list[dict] = []
    for map_dim, length in product(arguments.map_dims, arguments.lengths):
        for phase, times in measure(length, map_dim, dtype, arguments).items():
            for form, value in times.items():
                row = {"map_dim": map_dim, "length": length, "phase": phase, "form": form, "ms": 1000 * value}
                row["ratio_to_llama"] = value / fastest_llama(times)
                row["ratio_to_same_kernel"] = value / times.get(SAME_KERNEL, float("nan"))
                rows.append(row)
        write(rows, record, folder)  # after every shape: what is measured is kept
    show(rows)


def show(rows: list[dict]) -> None:
    print(f"{'d':>4} {'length':>7} {'phase':>19} {'form':>19} {'ms':>9} {'/ llama':>8} {'/ same kernel':>14}")
    for row in rows:
        print(
            f"{row['map_dim']:4} {row['length']:7} {row['phase']:>19} {row['form']:>19} {row['ms']:9.3f} "
            f"{row['ratio_to_llama']:8.3f} {row['ratio_to_same_kernel']:14.3f}"
        )


def file_stem(machine: dict, dtype: str) -> str:
    return f"attention_{machine['machine'].split()[0].lower()}_{dtype}"


def write(rows: list[dict], record: dict, output: Path) -> None:
    """The rows as JSON with the record, as CSV and as a plot."""
    stem = file_stem(record["environment"], record["dtype"])
    (output / f"{stem}.json").write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    with open(output / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, record, output / f"{stem}.png")


def plot(rows: list[dict], record: dict, path: Path) -> None:
    """Ratio to LLaMA over the length: a column a phase, a row a map width."""
    pyplot = pyplot_for(path)
    if pyplot is None:
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
            chosen.sort(key=lambda row: row["length"])
            axis.plot([r["length"] for r in chosen], [r["ratio_to_llama"] for r in chosen], marker="o", label=form)
        axis.set(title=f"{phase}, maps {map_dim} wide", xlabel="length (tokens)", ylabel="time / LLaMA", xscale="log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(f"{record['environment']['machine']}, {record['dtype']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
