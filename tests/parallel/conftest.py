"""Tiny checkpoints, and ranks in processes of their own that are killed hard when one fails or time is up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model


HERE = Path(__file__).parent
WORLD_SIZE = 2
TIMEOUT_S = 240

TINY = {"vocab_size": 48, "eos_token_id": None, "initializer_range": 0.2}
CHECKPOINTS = {
    "v1": {"attention_bias": True, "attention_out_bias": False, "use_qk_norm": True},
    "v2": {"lambda_bias": True},
    "v1_with_llama_layer": {"differential_layers": [1]},
    "v2_with_llama_layer": {"differential_layers": [0], "use_qk_norm": True},
    # Of two ranks, the first has both differential heads of the first layer.
    "v1_with_mixed_layers": {"differential_heads": [[0, 1], [1, 2]]},
    "one_key_value_head": {"num_key_value_heads": 1},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with one checkpoint for each of `CHECKPOINTS`."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, changes in CHECKPOINTS.items():
        variant = "v2" if name.startswith("v2") else "v1"
        model = tiny_model(variant, **(TINY | changes))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):  # neither all one nor all zero
                torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def wait_for_all(processes: list[subprocess.Popen]) -> None:
    """Returns once every rank has ended, one has failed (the others would wait for it for ever) or time is up."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(code not in (None, 0) for code in codes):
            return
        time.sleep(0.05)


@pytest.fixture(scope="session")
def run_ranks(checkpoints, tmp_path_factory):
    """`run_ranks(script)` gives the folder it worked in, the results of every rank in order, and what they printed."""

    def run(script: str) -> tuple[Path, list[dict], list[str]]:
        folder = tmp_path_factory.mktemp(Path(script).stem)
        for checkpoint in checkpoints.iterdir():
            (folder / checkpoint.name).symlink_to(checkpoint)
        logs = [folder / f"rank-{rank}.log" for rank in range(WORLD_SIZE)]
        processes = []
        for rank, log in enumerate(logs):
            # accelerate asks for an address, though the ranks have met before and nothing listens there.
            ranks = {
                "MASTER_ADDR": "127.0.0.1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(WORLD_SIZE),
            }
            paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, HERE / script, folder],
                        env=os.environ | ranks | paths | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            wait_for_all(processes)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        texts = [log.read_text() for log in logs]
        if any(codes):  # None, still running, is caught below
            pytest.fail(f"ranks ended with {codes}\n" + "\n".join(text[-3000:] for text in texts))
        if None in codes:
            pytest.fail(f"ranks still ran after {TIMEOUT_S} s: {codes}\n" + "\n".join(text[-3000:] for text in texts))
        return folder, [torch.load(folder / f"result-{rank}.pt") for rank in range(WORLD_SIZE)], texts

    return run
