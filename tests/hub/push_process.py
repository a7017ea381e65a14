"""
Runs `diff-llama push` with the real client against a Hub of its own, step by step.

`python push_process.py JOB`: a pickle with `home`, `reports` (the file to write) and `steps`: keyword arguments of
`run_step`. Waiting is recorded, not done.
"""

import os
import pickle
import sys
import time
from pathlib import Path

from loopback_hub import TOKEN, Fault, LoopbackHub


def run_step(
    hub: LoopbackHub,
    arguments: list[str],
    faults: list[dict] | None = None,
    repositories: dict[str, dict] | None = None,
    token: str | None = TOKEN,
    fresh: bool = True,
) -> dict:
    """
    One push, to an empty Hub unless `fresh` is false: exit code, output, endpoints asked, seconds waited, and by
    repository all that a reader sees afterwards.
    """
    from typer.testing import CliRunner

    from conversion.cli import app

    if fresh:
        hub.forget()
    for repo, options in (repositories or {}).items():
        hub.add(repo, **options)
    hub.faults = [Fault(**fault) for fault in faults or []]
    hub.requests.clear()
    waits.clear()
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    result = CliRunner().invoke(app, ["push", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    return {
        "exit_code": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "endpoints": [endpoint for endpoint, _ in hub.requests],
        "waits": list(waits),
        "private": {repo: repository.private for repo, repository in hub.repositories.items()},
        "files": {
            repo: {ref: hub.files(repo, ref) for ref in repository.refs}
            for repo, repository in hub.repositories.items()
        },
        "refs": {repo: dict(repository.refs) for repo, repository in hub.repositories.items()},
    }


waits: list[float] = []


def main(job_file: Path) -> None:
    job = pickle.loads(job_file.read_bytes())
    with LoopbackHub() as hub:
        os.environ.update(hub.environment(job["home"]))
        time.sleep = waits.append
        reports = [run_step(hub, **step) for step in job["steps"]]
    Path(job["reports"]).write_bytes(pickle.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
