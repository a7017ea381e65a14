"""The story of an upload: settle files and card, send them in one commit, compare what is there with what was sent."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from conversion.checkpoint.json_files import read_small
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError, typed
from conversion.evaluation.verification import VerificationReport
from conversion.hub.bundle import code_requirements, read_code
from conversion.hub.certificate import certificate_of
from conversion.hub.commit import MAIN, UNTOUCHED, commit_files, remote_files
from conversion.hub.errors import hub_errors
from conversion.hub.licenses import license_warnings, llama_terms, private_reason
from conversion.hub.model_card import GENERATED, CardFacts, export_card, render_card, source_metadata
from conversion.hub.upload_files import CARD, UploadFolder, is_replaced, read_upload_folder, refuse_secret
from conversion.mapping.lambdas import read_lambdas
from conversion.mapping.stream import write_plan
from conversion.options import chosen
from conversion.planning.diffllama import plan_export
from conversion.record import CERTIFICATE, RECORD, changed_files, config_changed, read_record
from conversion.source.converted import read_our_config
from conversion.source.hub_address import parse_address


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or would be.

    Attributes:
        repo_id: The repository, OWNER/NAME.
        revision: Branch or pull request that has the commit.
        private: Visibility of the repository; None where a dry run leaves it to the Hub.
        files: Bytes of each file, by name.
        notes: What the user should know.
        commit: Id of the commit; None after a dry run.
        url: Where it is shown; None after a dry run.
    """

    repo_id: str
    revision: str
    private: bool | None
    files: Mapping[str, int]
    notes: tuple[str, ...]
    commit: str | None = None
    url: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class UploadPlan:
    """All that will be sent.

    Attributes:
        repo_id: The repository, OWNER/NAME.
        contents: Each file by its name there: where it is, or its bytes.
        private: Visibility of a new repository; None for the Hub's default.
        private_reason: Why it should be private; None where nothing asks for it.
        notes: What the user should know.
    """

    repo_id: str
    contents: Mapping[str, Path | bytes]
    private: bool | None
    private_reason: str | None
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.contents.items()
        }


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    format: Literal["native", "diffllama"] = "native",
    verification: VerificationReport | Mapping[str, Any] | None = None,
    token: str | None = None,
) -> PushReport:
    """Uploads a checkpoint, an export or an adapter, with all that others need to load it, in a single commit.

    Running again is always safe.

    Args:
        folder: The checkpoint, export or adapter.
        repo_id: Repository, OWNER/NAME, created if it does not exist.
        private: Visibility of a new repository. By default private where the base model's license restricts access,
            else as the Hub has it.
        revision: Branch to upload to, created if it does not exist; main by default.
        create_pr: Upload as a pull request in place of a commit to main.
        dry_run: List the files and their sizes, contact nothing.
        format: "native": the checkpoint with its code. "diffllama": exported to transformers' own class first.
        verification: A report of `verify_checkpoint`, whose numbers go into the model card.
        token: Of the Hub; by default that of `hf auth login`.

    Returns:
        What was uploaded, or would be (`dry_run`).

    Raises:
        ConversionError: Bad input, or whatever the Hub answers.
    """
    address = parse_address(repo_id)
    if address is None:
        raise ConversionError(f"{repo_id}: not a possible repository name, expected OWNER/NAME")
    if address.revision and revision not in (None, address.revision):
        raise ConversionError(f"{repo_id}: names another revision than {typed('revision', revision)}; leave out one")
    repo_id = address.hub_id
    revision = address.revision or revision
    if create_pr and revision not in (None, MAIN):
        raise ConversionError(
            f"--revision {revision}: a pull request (--create-pr) goes to main; leave one of them out"
        )
    format = chosen("format", format, ("native", "diffllama"))  # type: ignore[assignment]
    report = verification.to_dict() if isinstance(verification, VerificationReport) else verification
    with _exported(Path(folder), format) as source:
        plan = plan_upload(source, repo_id, private, report)
        if dry_run:
            return PushReport(repo_id, revision or MAIN, plan.private, plan.sizes, plan.notes)
        return _send(plan, HfApi(token=token), revision or MAIN, create_pr)


@contextmanager
def _exported(folder: Path, format: str) -> Iterator[Path]:
    """Yields the folder itself, or an export of it that lasts as long as the upload."""
    if format == "native":
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="diff-llama-") as scratch:
        target = Path(scratch) / folder.resolve().name
        plan, _ = plan_export(folder, export_card(folder))
        write_plan(plan, target, folder, overwrite=False, resume=False)
        yield target


def plan_upload(
    folder: Path, repo_id: str, private: bool | None = None, verification: Mapping[str, Any] | None = None
) -> UploadPlan:
    """Settles files, card and visibility, without asking the Hub.

    Args:
        folder: The checkpoint, export or adapter.
        repo_id: Repository, OWNER/NAME.
        private: Visibility that was asked for; None for the license's or the Hub's default.
        verification: A report of `verify --json`, for the card.

    Raises:
        ConversionError: The folder is not fit to publish.
    """
    found = read_upload_folder(folder)
    contents: dict[str, Path | bytes] = dict(found.files)
    metadata = source_metadata(folder)
    terms = llama_terms(metadata, folder)
    certificate, notes = _certificate(folder, found)
    if certificate is None:
        contents.pop(CERTIFICATE, None)
    if found.kind == "checkpoint" and RECORD in found.files:
        card, note = _card(folder, found, repo_id, verification, certificate)
        notes += [note] if note else []
        if card is not None:
            refuse_secret(CARD, card)
            contents[CARD] = card.encode()
    elif CARD in contents and _is_generated(found.files[CARD]):
        of_what = "whole weights" if found.kind == "adapter" else f"the weights that {RECORD} spoke of"
        notes.append(f"README.md is left out: it is the card of {of_what}, and makes promises about them")
        del contents[CARD]
    if found.kind == "checkpoint" and (code := read_code(folder)).age != "same":
        notes.append(f"code: {code}")
    notes += _adapter_notes(found)
    if CARD not in contents:
        notes.append("no README.md: the repository will have no model card")
    base_model = metadata.get("base_model")
    reason = private_reason(metadata, terms, base_model if isinstance(base_model, str) else None)
    if private is None and reason:
        private = True
        notes.append(f"private, as {reason}; --public overrides")
    elif private is False and reason:
        notes.append(f"public as asked, though {reason}")
    notes += license_warnings(metadata, terms, contents, repo_id)
    return UploadPlan(repo_id, contents, private, reason, tuple(notes))


def _adapter_notes(found: UploadFolder) -> list[str]:
    """Returns what keeps others from loading an adapter by its name alone."""
    if found.kind != "adapter":
        return []
    notes = []
    if Path(str(found.config.get("base_model_name_or_path"))).is_dir():
        notes.append("adapter_config.json names its base by a local path: set base_model_name_or_path to its Hub id")
    if found.config.get("auto_mapping"):
        notes.append(
            "adapter_config.json asks for an import of this machine's package (auto_mapping), which AutoPeftModel "
            'refuses elsewhere: train with LoraConfig(task_type="CAUSAL_LM", ...)'
        )
    return notes


def _certificate(folder: Path, found: UploadFolder) -> tuple[dict[str, Any] | None, list[str]]:
    """The certificate in a folder if it is of its model, and a note if it is not."""
    if CERTIFICATE not in found.files:
        return None, []
    try:
        return certificate_of(folder, found.files), []
    except ConversionError as error:
        return None, [f"{CERTIFICATE} is left out: {error}"]


def _card(
    folder: Path,
    found: UploadFolder,
    repo_id: str,
    verification: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None,
) -> tuple[str | None, str | None]:
    """Returns a new card for this repository if the folder's is ours; and a note if it is not, or lacks figures."""
    own = found.files.get(CARD)
    if own is not None and not _is_generated(own):
        return None, "README.md is your own and goes up as it is" + (
            ", without the numbers of the verification" if verification else ""
        )
    record = read_record(folder)
    _check_record(folder, record, verification)
    note = None
    if changed := config_changed(folder, record):
        record = _without_figures(record)
        verification = None
        note = (
            "config.json has changed since the conversion, in fields that numbers may depend on: README.md leaves out "
            "what was measured, and says so; put the file back as it was written, or convert again"
        )
    metadata = source_metadata(folder)
    config = read_our_config(folder)
    facts = CardFacts(
        metadata=metadata,
        config=config,
        record=record,
        lambdas=read_lambdas(config, CheckpointReader(folder)),
        terms=llama_terms(metadata, folder),
        verification=verification,
        certificate=certificate,
        repo_id=repo_id,
        needs=code_requirements(folder),
        config_changed=changed,
    )
    return render_card(facts), note


def _without_figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record that tells what was done, and not what was measured of it."""
    healing = [{**stage, "start": {}, "end": {}} for stage in record.get("healing") or []]
    return {**record, "measured": None, "healing": healing}


def _is_generated(card: Path) -> bool:
    return GENERATED in read_small(card).decode(errors="replace")


def _check_record(folder: Path, record: Mapping[str, Any], verification: Mapping[str, Any] | None) -> None:
    """Checks that a card would say nothing of these weights that is known of others; ConversionError otherwise."""
    # Not of code, whose owner may have changed what no number depends on: `verify` tells of it, as of config.json.
    if changed := [name for name in changed_files(folder, record) if name.endswith(".safetensors")]:
        raise ConversionError(
            f"{folder / changed[0]}: not the weights that {RECORD} speaks of; remove {RECORD} if they were trained "
            "since, or convert again"
        )
    if verification is None:
        return
    if verification.get("promise") != record["promise"]["kind"]:
        raise ConversionError(
            f"the verification is of a {verification.get('promise')!r} conversion, and this is a "
            f"{record['promise']['kind']!r} one; verify this folder"
        )
    if not verification.get("passed"):
        failed = [check["name"] for check in verification.get("checks", ()) if check["outcome"] == "failed"]
        raise ConversionError(f"the verification failed ({', '.join(failed)}); convert again before uploading")


def _send(plan: UploadPlan, api: HfApi, revision: str, create_pr: bool) -> PushReport:
    """Sends one commit, so that a repository is the old or the new one, and compares what is there afterwards."""
    repo_id = plan.repo_id
    with hub_errors(repo_id, UNTOUCHED):
        plan = _ensure_repository(plan, api, create_pr)
        if revision != MAIN and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.repo_info(repo_id, revision=revision).sha
        present = remote_files(api, repo_id, head)
    stale = [name for name in present if is_replaced(name) and name not in plan.contents]
    message = f"Upload {len(plan.contents)} files with diff-llama"
    commit = commit_files(
        api, repo_id, plan.contents, stale, message, revision=revision, create_pr=create_pr, parent_commit=head
    )
    private = api.repo_info(repo_id).private
    shown = commit.pr_revision or revision
    return PushReport(repo_id, shown, private, plan.sizes, plan.notes, commit.oid, commit.pr_url or commit.commit_url)


def _ensure_repository(plan: UploadPlan, api: HfApi, create_pr: bool) -> UploadPlan:
    """Creates the repository if there is none. ConversionError where one is public that should not be."""
    try:
        existing = api.repo_info(plan.repo_id)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise ConversionError(
                f"{plan.repo_id}: not there, or not yours to see; a pull request needs it"
            ) from error
        api.create_repo(plan.repo_id, private=plan.private, exist_ok=True)
        return plan
    if plan.private and not existing.private and not create_pr:
        why = f", as {plan.private_reason}" if plan.private_reason else ""
        raise ConversionError(
            f"{plan.repo_id}: it is public and should be private{why}; change it in its settings, or pass --public"
        )
    if plan.private is False and existing.private:
        return replace(plan, notes=(*plan.notes, "the repository is private and stays so; its settings change that"))
    return plan
