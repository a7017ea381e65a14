"""Checkpoints as commit 5dc5cd9 wrote them: its code, packed as it was, in the place of today's. Not a test module."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path


def old_code() -> dict[str, bytes]:
    """The code that commit 5dc5cd9 put next to weights, before transformers 5.24, by file name."""
    with tarfile.open(Path(__file__).with_name("code_of_5dc5cd9.tar.xz")) as archive:
        return {Path(member.name).name: archive.extractfile(member).read() for member in archive if member.isfile()}


def with_old_code(checkpoint: Path, folder: Path) -> Path:
    """A copy of a converted checkpoint with old code, and with the record that its conversion would have written."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.py"))
    for name, content in old_code().items():
        (folder / name).write_bytes(content)
    record = json.loads((folder / "conversion.json").read_text())
    kept = {name: digest for name, digest in record["sha256"].items() if not name.endswith(".py")}
    record["sha256"] = kept | {name: hashlib.sha256(content).hexdigest() for name, content in old_code().items()}
    (folder / "conversion.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return folder
