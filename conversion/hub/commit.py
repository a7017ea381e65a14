"""One commit on the Hub, compared afterwards with what was sent."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile

from conversion.errors import ConversionError
from conversion.hub.errors import hub_errors


UNTOUCHED = "nothing was changed there"

WHOLE = "the repository shows its old state or the new one whole, and running again ends right"

MAIN = "main"


def commit_files(
    api: HfApi,
    repo_id: str,
    contents: Mapping[str, Path | bytes],
    stale: Sequence[str],
    message: str,
    *,
    revision: str,
    create_pr: bool,
    parent_commit: str | None,
) -> CommitInfo:
    """Adds and removes files in one commit, and compares what is there with what was sent.

    Raises:
        ConversionError: Whatever the Hub answers, among it that `parent_commit` is no longer the newest.
    """
    additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with hub_errors(repo_id, WHOLE):
        commit = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit,
        )
    with hub_errors(repo_id, "it is committed, but could not be compared with what was sent; run again to compare"):
        _compare(api, repo_id, commit, additions, stale)
    return commit


def remote_files(api: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    """Returns the files of a repository by name."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _compare(
    api: HfApi, repo_id: str, commit: CommitInfo, additions: list[CommitOperationAdd], removed: Sequence[str]
) -> None:
    """Checks that every file is there with the size and checksum of what was sent; ConversionError otherwise."""
    remote = remote_files(api, repo_id, commit.pr_revision or commit.oid)
    wrong = [
        operation.path_in_repo for operation in additions if not _same(remote.get(operation.path_in_repo), operation)
    ]
    wrong += [name for name in removed if name in remote]
    if wrong:
        raise ConversionError(
            f"{repo_id}: {wrong[0]} is there with other bytes than were sent, or not at all ({len(wrong)} files "
            "differ); do not use it, run again"
        )


def _same(entry: RepoFile | None, operation: CommitOperationAdd) -> bool:
    if entry is None or entry.size != operation.upload_info.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as stream:  # small, and hashed as git does
        content = stream.read()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
