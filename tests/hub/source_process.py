"""
Locates sources with the real client on a Hub of its own, step by step.

`python source_process.py JOB`: a pickle with `home`, `reports` (the file to write), `repositories` (files by name) and
`steps`: keyword arguments of `locate_source`, `{url}` in a source standing for the Hub's address.
"""

import os
import pickle
import sys
from pathlib import Path

from loopback_hub import LoopbackHub


def run_step(hub: LoopbackHub, source: str, **options) -> dict:
    """The files that came down, or the error; the commit; and the files that were asked for."""
    from conversion.errors import ConversionError
    from conversion.source.location import locate_source

    hub.requests.clear()
    report: dict = {}
    try:
        found = locate_source(source.replace("{url}", hub.url), **options)
        files = [path.relative_to(found.folder) for path in found.folder.rglob("*") if path.is_file()]
        report |= {"files": sorted(map(str, files)), "hub_id": found.hub_id, "revision": found.revision}
    except ConversionError as error:
        report["error"] = str(error)
    resolved = [path for endpoint, path in hub.requests if endpoint == "resolve"]
    return report | {"asked": sorted({path.split("/resolve/")[1].split("/", 1)[1] for path in resolved})}


def main(job_file: Path) -> None:
    job = pickle.loads(job_file.read_bytes())
    with LoopbackHub() as hub:
        os.environ.update(hub.environment(job["home"]))
        commits = {}
        for repo, revisions in job["repositories"].items():
            for revision, files in revisions.items():
                commits[repo, revision] = _add(hub, repo, revision, files)
        reports = [run_step(hub, **step) for step in job["steps"]]
    Path(job["reports"]).write_bytes(pickle.dumps((commits, reports)))


def _add(hub: LoopbackHub, repo: str, revision: str, files: dict[str, bytes]) -> str:
    from loopback_hub import File

    if repo not in hub.repositories:
        hub.add(repo)
    return hub.repositories[repo].commit(revision, {name: File(data, False) for name, data in files.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
