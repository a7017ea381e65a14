"""The making of a certificate: source and conversion found, checked, run on one suite, and compared."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoint.companions import read_tokenizer
from conversion.errors import ConversionError, typed
from conversion.evaluation.certificate import (
    LITERATURE,
    PASSAGE_TOKENS,
    TOLERANCE_NATS,
    Certificate,
    compare_certificates,
    measures,
)
from conversion.evaluation.measurement import load_in_float32
from conversion.evaluation.metrics import TextMetrics, next_token_losses, text_metrics, window_logits
from conversion.evaluation.performance import Performance, perform, win_and_tie_rate
from conversion.evaluation.suite import SEED, Suite, build_suite
from conversion.evaluation.verification import Check
from conversion.record import (
    ADAPTER_MERGED,
    CERTIFICATE_FORMAT,
    SUITE,
    adapter_merged,
    changed_files,
    config_fields,
    read_certificate,
    read_record,
    versions,
)
from conversion.source.config import SourceModel, read_source_model
from conversion.source.converted import read_our_config
from conversion.source.location import SourceFolder, locate_recorded
from modeling_diff import DiffLlamaConfig, __version__


Judge = Callable[[str, str, str], float]
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Subject:
    """What a certificate is of, all of it checked, and nothing computed yet."""

    folder: Path
    config: DiffLlamaConfig
    record: Mapping[str, Any]
    source: SourceFolder
    source_model: SourceModel
    tokenizer: Any
    suite: Suite

    @property
    def device(self) -> str:
        """Bits are compared on the CPU: a GPU's products of other widths add in other orders."""
        return "cuda" if torch.cuda.is_available() and self.record["promise"]["kind"] != "bit-exact" else "cpu"

    def statements(self) -> dict[str, Any]:
        """Returns what a certificate says before anything is measured."""
        origin = {name: self.record["source"][name] for name in ("name", "hub_id", "revision")}
        return {
            "model": {
                "name": self.folder.resolve().name,
                "variant": self.config.variant,
                "promise": self.record["promise"]["kind"],
                "weights": _weights(self.record),
                "config_fields": config_fields(self.folder),
            },
            "source": {**origin, "weights": dict(self.record["source"]["sha256"])},
            "seed": SEED,
            "data": self.suite.digests(),
        }

    def environment(self) -> dict[str, Any]:
        """Returns what the numbers depend on besides weights and tasks, to the last digit."""
        on_gpu = self.device == "cuda"
        return {
            "diff-llama": __version__,
            **versions(),
            "device": self.device,
            "processor": torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "attention": "sdpa",
        }


def certify(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Measures what a conversion has kept of its source, by a suite that is always the same and needs no network.

    Both models are run in float32, one after the other: on a GPU where there is one, but on the CPU where the same
    bits were promised.

    Args:
        folder: Folder of the converted checkpoint.
        against: Folder or Hub id of the LLaMA that it was converted from. By default the Hub id that it was converted
            from.
        judge: Scores an answer by question, context and answer, from 0 to 1; its mean becomes a measure of its own.
        progress: Called before each part of the work with the share that is done, in percent, and its name.

    Returns:
        The certificate; `write` makes the file.

    Raises:
        ConversionError: Weights that are not those of the conversion's record, or models that the suite cannot be run
            on.
    """
    return _measured(_open_subject(folder, against), judge, progress)


def check_certificate(
    path: str | Path,
    folder: str | Path,
    against: str | Path | None = None,
    *,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Runs a certificate's suite again and says what differs.

    Args:
        path: The certificate.
        folder: As `certify`.
        against: As `certify`.
        judge: The one that the certificate was made with, if it was made with one.
        progress: As `certify`.

    Returns:
        A check for each measure, failed where it differs, whatever the certificate's own judgment.

    Raises:
        ConversionError: As `certify`; and a file that is no certificate, or one of other weights or texts.
    """
    filed = read_certificate(Path(path))
    subject = _open_subject(folder, against)
    stated = subject.statements()
    for name, folder in (("model", subject.folder), ("source", subject.source.folder)):
        if file := _changed(filed[name]["weights"], stated[name]["weights"]):
            raise ConversionError(f"{folder / file}: not the weights that {path} certifies; certify again")
    # Older certificates do not say of which config they are; then the numbers do.
    if filed["model"].get("config_fields") not in (None, stated["model"]["config_fields"]):
        raise ConversionError(
            f"{subject.folder / 'config.json'}: not the config that {path} certifies, in fields that numbers depend "
            "on; put it back as it was, or certify again"
        )
    if text := _changed(filed["data"], stated["data"]):
        raise ConversionError(
            f"{path}: its {text} is not that of this diff-llama with the tokenizer of {subject.folder}; take the "
            f"release that made it ({filed['environment'].get('diff-llama')}), or certify again"
        )
    return list(compare_certificates(filed, _measured(subject, judge, progress).content))


def _changed(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    return next((name for name in [*there, *here] if there.get(name) != here.get(name)), None)


def _open_subject(folder: str | Path, against: str | Path | None) -> Subject:
    folder = Path(folder)
    config = read_our_config(folder)
    record = read_record(folder)
    if config.architectures == ["DiffLlamaModel"]:
        raise ConversionError(f"{folder}: a backbone without a language model head, of which no suite can be run")
    if adapter_merged(record):
        raise ConversionError(f"{folder}: {ADAPTER_MERGED}; merge it into the source, convert that and certify it")
    if changed := changed_files(folder, {"sha256": _weights(record)}):
        raise ConversionError(
            f"{folder / changed[0]}: not the weights that conversion.json speaks of; convert or heal again"
        )
    found = against or record["source"]["hub_id"]
    if not found:
        raise ConversionError(
            f"{typed('against')}: not given; a certificate compares with the source, {record['source']['name']}"
        )
    source = locate_recorded(found, record)
    if changed := changed_files(source.folder, record["source"]):
        raise ConversionError(
            f"{source.folder / changed[0]}: not the weights that {folder.name} was converted from; give its source"
        )
    source_model = read_source_model(source.folder, record["options"]["source_layout"])
    if source_model.kind == "unilm":
        raise ConversionError(
            f"{source.name}: transformers has no model for the authors' own files, so nothing can be compared"
        )
    tokenizer = read_tokenizer(folder)
    suite = build_suite(folder, tokenizer, config.vocab_size, config.max_position_embeddings)
    return Subject(folder, config, record, source, source_model, tokenizer, suite)


def _weights(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest for name, digest in record["sha256"].items() if name.endswith(".safetensors")}


def _measured(subject: Subject, judge: Judge | None, progress: Progress | None) -> Certificate:
    windows = subject.suite.held_out.windows
    rounded = subject.record["options"]["dtype"]
    run = _Run(subject, progress)
    llama = load_in_float32(subject.source.folder, rounded, subject.source_model.config).to(subject.device)
    run.begin("held-out text, source")
    source_logits = [logits.cpu() for logits in window_logits(llama, windows)]
    _check_finite(source_logits, subject.source.folder)
    source = run.perform(llama, "source")
    del llama
    model = load_in_float32(subject.folder, rounded).to(subject.device)
    run.begin("held-out text, model")
    metrics, win_and_tie = _held_out_metrics(model, subject, source_logits)
    del source_logits
    performed = run.perform(model, "model")
    judged = _judged(judge, subject.suite, source.answers, performed.answers) if judge else None
    found = measures(
        metrics,
        win_and_tie,
        source=source,
        model=performed,
        exact=subject.record["promise"]["kind"] == "bit-exact",
        judged=judged,
    )
    failed = [measure.name for measure in found if measure.outcome == "failed"]
    return Certificate(
        {
            "format": CERTIFICATE_FORMAT,
            "suite": SUITE,
            "passed": not failed,
            "failed": failed,
            **subject.statements(),
            "measures": [measure.to_dict() for measure in found],
            "literature": LITERATURE,
            "judge": _name(judge) if judge else None,
            "environment": subject.environment(),
        }
    )


class _Run:
    """One suite on both models, and how much of it is done."""

    def __init__(self, subject: Subject, progress: Progress | None):
        self.subject = subject
        self.progress = progress
        self.begun = 0
        self.parts = 2 * (4 + len(subject.suite.needles))

    def begin(self, what: str) -> None:
        if self.progress:
            self.progress(100 * self.begun // self.parts, what)
        self.begun += 1

    def perform(self, model: Any, who: str) -> Performance:
        try:
            return perform(
                model, self.subject.tokenizer, self.subject.suite, lambda task: self.begin(f"{task}, {who}")
            )
        except ValueError as error:  # of a tokenizer that takes many more tokens than words
            raise ConversionError(f"{self.subject.folder}: {error}") from error


def _held_out_metrics(
    model: Any, subject: Subject, source_logits: Sequence[torch.Tensor]
) -> tuple[TextMetrics, float]:
    """Metrics of the text, and the win-and-tie rate of its passages; one window's logits at a time."""
    windows = subject.suite.held_out.windows
    losses: list[torch.Tensor] = []

    def kept_losses() -> Iterator[torch.Tensor]:
        for logits, ids in zip(window_logits(model, windows), windows, strict=True):
            found = logits.cpu()
            _check_finite([found], subject.folder)
            losses.append(next_token_losses(found, ids))
            yield found

    metrics = text_metrics(kept_losses(), windows, source_logits)
    source_losses = [next_token_losses(logits, ids) for logits, ids in zip(source_logits, windows, strict=True)]
    return metrics, win_and_tie_rate(losses, source_losses, PASSAGE_TOKENS, TOLERANCE_NATS)


def _check_finite(logits: Sequence[torch.Tensor], folder: Path) -> None:
    if not all(part.isfinite().all() for part in logits):
        raise ConversionError(f"{folder}: its logits on the held-out text are not finite, so nothing can be compared")


def _judged(judge: Judge, suite: Suite, source: Sequence[str], model: Sequence[str]) -> tuple[float, float]:
    """The judge's mean score of source and model; the same answer is judged once."""

    @cache
    def judgment(question: str, context: str, answer: str) -> float:
        score = judge(question, context, answer)
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ConversionError(f"judge: gave {score!r} for {answer!r}, expected a number from 0 to 1")
        return float(score)

    means = (
        statistics.fmean(
            judgment(task.question, task.context, answer) for task, answer in zip(suite.facts, said, strict=True)
        )
        for said in (source, model)
    )
    return next(means), next(means)


def _name(judge: Judge) -> str:
    return getattr(judge, "__name__", type(judge).__name__)
