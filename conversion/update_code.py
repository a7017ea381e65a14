"""The story of an update: today's code next to unchanged weights, in a folder or on the Hub."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from conversion.checkpoint.companions import read_object
from conversion.checkpoint.json_files import parse_json, read_small
from conversion.checkpoint.output_folder import locked, sync_folder
from conversion.errors import ConversionError, FilesError, file_errors, typed
from conversion.hub.bundle import PACKAGE_WINS, CheckpointCode, code_requirements, package_code, read_code
from conversion.hub.commit import MAIN, UNTOUCHED, commit_files, remote_files
from conversion.hub.errors import hub_errors
from conversion.hub.upload_files import CARD
from conversion.record import RECORD
from conversion.source.config import INTERRUPTED_UPDATE, read_config
from conversion.source.hub_address import HubAddress, parse_address
from modeling_diff.configuration_diff_llama import AUTO_MAP


CONFIG = "config.json"
NEEDED_FROM_HUB = (CONFIG, RECORD, CARD, "adapter_config.json")  # and code
LARGEST_BYTES = 1 << 24  # of any of them
STAGED = INTERRUPTED_UPDATE  # complete, and to be moved in place; under another name while it is being filled
JOURNAL = "journal.json"


@dataclass(frozen=True)
class CodeUpdate:
    """All that will change.

    Attributes:
        contents: New files by name: code, and config.json, conversion.json and card where they change.
        removed: Files of the old code that today's code has no more.
        before: The code that was there.
    """

    contents: Mapping[str, bytes]
    removed: tuple[str, ...]
    before: CheckpointCode

    @property
    def empty(self) -> bool:
        """Whether nothing has to change."""
        return not self.contents and not self.removed


@dataclass(frozen=True)
class UpdateReport:
    """What was changed, or would be.

    Attributes:
        target: The folder or repository.
        before: What the code was before: its version, and what is known of it.
        written: Bytes of each file that changes, by name.
        removed: Files of the old code that today's code has no more.
        notes: What the user should know.
        dry_run: Whether nothing was changed.
        commit: Id of the commit; None for a folder and after a dry run.
        url: Where it is shown; None for a folder and after a dry run.
    """

    target: str
    before: str
    written: Mapping[str, int]
    removed: tuple[str, ...]
    notes: tuple[str, ...]
    dry_run: bool
    commit: str | None = None
    url: str | None = None


def update_checkpoint_code(
    target: str | Path,
    *,
    dry_run: bool = False,
    force: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> UpdateReport:
    """Puts the code of this package next to the weights of a checkpoint; weights are neither written nor read.

    In a folder, config.json is away while files change, so that no load finds two versions mixed: killed in between,
    the folder does not load, and running again completes it. On the Hub it is one commit.

    Args:
        target: Folder, or repository in one of the forms of `parse_address`.
        dry_run: Say what would change, and change nothing.
        force: Replace edited and newer files as well.
        revision: Branch on the Hub; main by default.
        create_pr: Open a pull request on the Hub in place of a commit.
        token: Of the Hub; by default that of `hf auth login`.

    Returns:
        What was changed, or would be (`dry_run`).

    Raises:
        ConversionError: Not a checkpoint of ours, foreign, edited or newer code; whatever the Hub answers.
        FilesError: The folder cannot be written.
    """
    folder = Path(target).expanduser()
    address = None if folder.exists() else parse_address(str(target))
    if address is not None:
        if revision is not None and address.revision not in (None, revision):
            raise ConversionError(
                f"{target}: names another revision than {typed('revision', revision)}; leave out one"
            )
        branch = HubAddress(address.hub_id, address.revision or revision or MAIN)
        return _update_on_hub(branch, dry_run, force, create_pr, HfApi(token=token))
    for argument, value in (("revision", revision), ("create_pr", create_pr)):
        if value:
            raise ConversionError(f"{typed(argument)} means something on the Hub, and {target} is a local path")
    return _update_folder(folder, dry_run, force)


def plan_update(folder: Path, force: bool = False) -> CodeUpdate:
    """Settles what will change, and changes nothing.

    Args:
        folder: Folder of the checkpoint.
        force: Replace edited and newer files as well.

    Returns:
        What will change.

    Raises:
        ConversionError: Not a checkpoint of ours, or code that is not ours to replace.
    """
    config = _read_our_config(folder)
    before = read_code(folder)
    _check_replaceable(folder, before, force)
    code = package_code()
    contents = {name: text for name, text in code.items() if before.files.get(name) != _sha256(text)}
    removed = tuple(sorted(before.files.keys() - code.keys()))
    old_config = (folder / CONFIG).read_bytes()
    auto_map = config.get("auto_map")
    new_map = {**auto_map, **AUTO_MAP} if isinstance(auto_map, dict) else dict(AUTO_MAP)
    if auto_map != new_map:
        contents[CONFIG] = (json.dumps(config | {"auto_map": new_map}, indent=2) + "\n").encode()
    record = read_object(folder / RECORD)
    new_record = _updated_record(record, contents, code, removed, _sha256(old_config))
    if new_record != record:
        contents[RECORD] = (json.dumps(new_record, indent=2, sort_keys=True) + "\n").encode()
    card = folder / CARD
    if card.is_file() and (old_card := read_small(card).decode(errors="surrogateescape")):
        new_card = old_card.replace(code_requirements(folder), code_requirements())
        if new_card != old_card:
            contents[CARD] = new_card.encode(errors="surrogateescape")
    return CodeUpdate(contents, removed, before)


def _read_our_config(folder: Path) -> dict[str, Any]:
    """Returns config.json unchanged; ConversionError for anything but a checkpoint of ours."""
    if (folder / "adapter_config.json").is_file() and not (folder / CONFIG).is_file():
        raise ConversionError(f"{folder}: an adapter, which has no code of its own; update that of its base model")
    config = read_config(folder)
    if config["model_type"] != "diff_llama":
        raise ConversionError(
            f"{folder / CONFIG}: model_type is {config['model_type']!r}, expected 'diff_llama': there is no code of "
            "diff-llama to update"
        )
    return config


def _check_replaceable(folder: Path, code: CheckpointCode, force: bool) -> None:
    """Refuses code that is not ours, or not older (ConversionError)."""
    if code.foreign:
        raise ConversionError(
            f"{folder / CONFIG}: auto_map takes the model from {code.foreign[0]}, which is not diff-llama's; remove "
            "auto_map there to have diff-llama's code instead"
        )
    for name in (CONFIG, RECORD, *code.files):
        if (folder / name).is_symlink():
            raise ConversionError(
                f"{folder / name}: a link, as in the Hub's cache, which is not ours to change; update the repository "
                "(`diff-llama update-code OWNER/NAME`), or a copy of the folder"
            )
    if force:
        return
    if code.edited:
        raise ConversionError(
            f"{folder / code.edited[0]}: not as any diff-llama wrote it ({len(code.edited)} edited "
            f"{'file' if len(code.edited) == 1 else 'files'}); keep a copy, then pass {typed('force', True)} to "
            "replace it"
        )
    if code.age == "newer":
        raise ConversionError(
            f"{folder}: its code is newer than this diff-llama's; upgrade diff-llama, or pass {typed('force', True)} "
            "to go back"
        )


def _updated_record(
    record: Mapping[str, Any],
    contents: Mapping[str, bytes],
    code: Mapping[str, bytes],
    removed: tuple[str, ...],
    old_config: str,
) -> Mapping[str, Any]:
    """Returns the record with the checksums of what is there afterwards; that of an edited config stays unchanged."""
    recorded = record.get("sha256")
    if not isinstance(recorded, dict):
        return record
    hashes = {name: digest for name, digest in recorded.items() if name not in removed}
    hashes |= {name: _sha256(text) for name, text in code.items()}
    if CONFIG in contents and recorded.get(CONFIG) == old_config:
        hashes[CONFIG] = _sha256(contents[CONFIG])
    return {**record, "sha256": hashes}


def _update_folder(folder: Path, dry_run: bool, force: bool) -> UpdateReport:
    staged = folder / STAGED
    if dry_run:
        if staged.exists():
            raise ConversionError(f"{folder}: an update was interrupted; leave out {typed('dry_run')} to complete it")
        return _report(str(folder), plan_update(folder, force), dry_run)
    if not folder.is_dir():
        read_config(folder)  # says what is wrong with it
    with file_errors(folder), locked(staged):
        completed = staged.exists()
        if completed:
            _complete(folder)
        update = plan_update(folder, force)
        if not update.empty:
            _stage(folder, update)
            try:
                _complete(folder)
            except (KeyboardInterrupt, SystemExit):
                _complete(folder)  # renames alone, in milliseconds
                raise
            except OSError as error:
                raise FilesError(
                    f"{folder}: stopped while its code was being replaced ({error}), and does not load; run again"
                ) from error
    report = _report(str(folder), update, dry_run)
    return replace(report, notes=("completed an interrupted update", *report.notes)) if completed else report


def _stage(folder: Path, update: CodeUpdate) -> None:
    """Writes all new files, config.json always among them, into a folder that appears whole."""
    fresh = folder / f"{STAGED}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    journal = json.dumps({"written": sorted(update.contents), "removed": update.removed}).encode()
    for name, content in {CONFIG: (folder / CONFIG).read_bytes(), **update.contents, JOURNAL: journal}.items():
        with (fresh / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    sync_folder(fresh)
    os.rename(fresh, folder / STAGED)
    sync_folder(folder)


def _complete(folder: Path) -> None:
    """Moves staged files in place, config.json last: without it nothing loads. Done twice it is done once."""
    staged = folder / STAGED
    if (staged / CONFIG).exists():
        (folder / CONFIG).unlink(missing_ok=True)
        sync_folder(folder)
        journal = parse_json((staged / JOURNAL).read_bytes(), staged / JOURNAL)
        for name in journal["written"]:
            if name != CONFIG and (staged / name).exists():
                os.replace(staged / name, folder / name)
        for name in journal["removed"]:
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        os.rename(staged / CONFIG, folder / CONFIG)
        sync_folder(folder)
    shutil.rmtree(staged)


def _update_on_hub(branch: HubAddress, dry_run: bool, force: bool, create_pr: bool, api: HfApi) -> UpdateReport:
    repo_id = branch.hub_id
    with tempfile.TemporaryDirectory(prefix="diff-llama-") as scratch:
        folder = Path(scratch)
        with hub_errors(repo_id, UNTOUCHED):
            head = api.repo_info(repo_id, revision=branch.revision).sha
            for name, entry in remote_files(api, repo_id, head).items():
                if name in NEEDED_FROM_HUB or (name.endswith(".py") and "/" not in name):
                    if entry.size > LARGEST_BYTES:
                        raise ConversionError(
                            f"{repo_id}/{name}: {entry.size:,} bytes, which no file of this name has"
                        )
                    api.hf_hub_download(repo_id, name, revision=head, local_dir=folder)
        try:
            update = plan_update(folder, force)
        except ConversionError as error:
            raise ConversionError(str(error).replace(str(folder), repo_id)) from error
    report = _report(repo_id, update, dry_run)
    if dry_run or update.empty:
        return report
    commit = commit_files(
        api,
        repo_id,
        update.contents,
        update.removed,
        "Update the model's code with diff-llama",
        revision=branch.revision or MAIN,
        create_pr=create_pr,
        parent_commit=head,
    )
    return replace(report, commit=commit.oid, url=commit.pr_url or commit.commit_url)


def _report(target: str, update: CodeUpdate, dry_run: bool) -> UpdateReport:
    sizes = {name: len(content) for name, content in sorted(update.contents.items())}
    notes = [f"{name} was edited, and is replaced" for name in update.before.edited]
    if update.empty:
        notes.append("the code is today's already; nothing to do")
    else:
        notes.append(f"without an update as well, {PACKAGE_WINS}")
    return UpdateReport(target, str(update.before), sizes, update.removed, tuple(notes), dry_run)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
