"""What was promised against what is there: files and tensors first, then what the model computes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from conversion.checkpoint import CheckpointReader
from conversion.checkpoint.companions import read_tokenizer
from conversion.data.held_out import HeldOut, read_held_out
from conversion.errors import ConversionError, quote, typed
from conversion.evaluation.behavior import (
    Behavior,
    cache_difference,
    cacheable_length,
    compare_logits,
    dead_parameters,
    encode_texts,
    generation_agreement,
    largest_difference,
    observe,
    observe_logits,
    shuffled_pairs,
)
from conversion.evaluation.certificate import check_file
from conversion.evaluation.certification import Judge, Progress, certify, check_certificate
from conversion.evaluation.measurement import TOLERANCE
from conversion.evaluation.metrics import text_metrics, window_logits
from conversion.evaluation.verification import Check, VerificationReport
from conversion.hub.bundle import missing_code, read_code
from conversion.mapping.lambdas import not_differential, read_lambdas
from conversion.record import ADAPTER_MERGED, adapter_merged, changed_files, read_record
from conversion.source.config import read_config, read_source_model
from conversion.source.converted import read_our_config
from conversion.source.location import SourceFolder, locate_recorded
from conversion.source.model import load_converted, load_original
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM, DiffLlamaModel


def verify_checkpoint(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    texts: Sequence[str] | None = None,
    held_out: str | Path | None = None,
    certificate: str | Path | None = None,
    check: str | Path | None = None,
    overwrite: bool = False,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Checks a converted checkpoint; with its source in `against`, also what was promised of the function.

    Models are loaded one after the other, in float32. A broken promise is a failed check, not an error.

    Args:
        folder: Folder of the converted checkpoint.
        against: Folder or Hub id of the LLaMA it was converted from, to compare with.
        texts: Prompts on which logits and greedy tokens are compared; built-in ones by default.
        held_out: Text or JSON lines on which loss, KL and greedy agreement are measured; a standard text by default.
        certificate: File to write a certificate to, whose suite then takes the place of the checks of the function.
        check: Certificate whose suite is run again; what differs is a failed check.
        overwrite: Replace an earlier certificate.
        judge: Scores answers for a certificate, as in `certify`.
        progress: Called while a suite is run, as in `certify`.

    Returns:
        The checks, with their outcome and numbers.

    Raises:
        ConversionError: The folder is no converted checkpoint, `against` no source, or `check` no certificate of them.
        FilesError: The certificate cannot be written.
    """
    folder = Path(folder)
    config = read_our_config(folder)
    record = read_record(folder)
    promise = record["promise"]["kind"]
    if certificate is not None or check is not None:
        _check_suite_options(texts, held_out, certificate, check)
    if certificate is not None:
        source = Path(against) if against is not None and Path(against).is_dir() else None
        check_file(Path(certificate), overwrite, source)
    if check is not None:
        found = check_certificate(check, folder, against, judge=judge, progress=progress)
        return VerificationReport(folder.name, promise, found)
    checks = list(_structure(folder, config, record))
    # A broken checkpoint would only fail in less clear ways; its code is not what is run here.
    whole = all(check.outcome != "failed" or check.name == "code" for check in checks)
    if whole and certificate is not None:
        made = certify(folder, against, judge=judge, progress=progress)
        made.write(certificate, overwrite=overwrite)
        checks += made.checks()
    elif whole:
        checks += _behavior(folder, config, record, against, texts, None if held_out is None else Path(held_out))
    return VerificationReport(folder.name, promise, checks)


def _check_suite_options(
    texts: Sequence[str] | None,
    held_out: str | Path | None,
    certificate: str | Path | None,
    check: str | Path | None,
) -> None:
    """ConversionError for arguments that exclude each other."""
    if certificate is not None and check is not None:
        raise ConversionError(f"{typed('certificate')} and {typed('check')} are both given; leave out one")
    for name, value in (("texts", texts), ("held_out", held_out)):
        if value is not None:
            raise ConversionError(f"{typed(name)}: given, but a certificate is of texts of its own; leave it out")


def _outcome(good: bool) -> Literal["passed", "failed"]:
    return "passed" if good else "failed"


def _structure(folder: Path, config: DiffLlamaConfig, record: Mapping[str, Any]) -> Iterator[Check]:
    """Checks tensors, checksums, code and parameter count; the expected tensors come from the model class."""
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        model = _model_class(config)(config)
    expected = {_full_name(name, config): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = {name: info.shape for name, info in reader.tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    detail = f"{len(found)} tensors, as the model expects"
    if wrong:
        name = wrong[0]
        detail = f"{name}: {found.get(name)}, expected {expected.get(name)} ({len(wrong)} differ)"
    yield Check("tensors", _outcome(not wrong), detail)
    changed = changed_files(folder, record)
    yield Check("checksums", _outcome(not changed), f"{changed[0]} has changed" if changed else "as recorded")
    missing = missing_code(folder)
    code = read_code(folder)
    yield Check(
        "code", _outcome(not missing and not code.wrong_here), f"{missing[0]} is missing" if missing else str(code)
    )
    yield _parameter_count(config, record, sum(torch.Size(shape).numel() for shape in found.values()))
    if not wrong and (warning := not_differential(read_lambdas(config, reader))):
        yield Check("lambda", "measured", warning)


def _parameter_count(config: DiffLlamaConfig, record: Mapping[str, Any], found: int) -> Check:
    """Checks the count: the source's, and idle heads; 6 d more per layer in V1, H d D + H D in V2."""
    layers = sum(config.is_differential(layer) for layer in range(config.num_hidden_layers))
    added = 6 * config.map_dim
    if config.variant == "v2":
        queries = config.num_attention_heads * config.map_dim * (config.hidden_size + config.attention_bias)
        added = queries + config.num_attention_heads * (config.hidden_size + config.lambda_bias)
    if record["source"]["kind"] != "llama":  # differential already: at most the norm's weight is new
        added = 2 * config.map_dim if record["source"]["kind"] == "diffllama" else 0
    source = record["parameters"]["source"] + (record.get("padding") or {}).get("parameters", 0)
    good = found == source + added * layers
    return Check(
        "parameters", _outcome(good), f"{found:,} = {source:,} + {layers} layers x {added:,}", {"count": found}
    )


def _model_class(config: DiffLlamaConfig) -> type[DiffLlamaForCausalLM] | type[DiffLlamaModel]:
    return DiffLlamaModel if config.architectures == ["DiffLlamaModel"] else DiffLlamaForCausalLM


def _full_name(name: str, config: DiffLlamaConfig) -> str:
    return f"model.{name}" if _model_class(config) is DiffLlamaModel else name


def _behavior(
    folder: Path,
    config: DiffLlamaConfig,
    record: Mapping[str, Any],
    against: str | Path | None,
    texts: Sequence[str] | None,
    text: Path | None,
) -> Iterator[Check]:
    source = None if against is None else _locate_against(against, record)
    if source is not None:
        yield _same_source(source.folder, record)
    if _model_class(config) is DiffLlamaModel:
        yield Check("function", "skipped", "a backbone without a language model head")
        return
    inputs = encode_texts(folder, config.vocab_size, config.max_position_embeddings, texts)
    held_out = _held_out(folder, config, inputs, texts, text)
    parity = record["promise"]["kind"] == "parity"
    original = None
    source_logits = None
    source_logits_without_bos = None
    if source is not None:
        theirs = read_source_model(source.folder, record["options"]["source_layout"])
        if theirs.kind == "unilm":
            yield Check("function", "skipped", "transformers has no model for the authors' own files")
        elif adapter_merged(record):
            yield Check("function", "skipped", f"not compared: {ADAPTER_MERGED}")
        elif theirs.config.vocab_size != config.vocab_size:
            detail = f"not compared: {theirs.config.vocab_size} tokens in its vocabulary, and {config.vocab_size} here"
            yield Check("function", "skipped", detail)
        else:
            rounded = record["options"]["dtype"] or "float32"
            llama = load_original(source.folder, theirs.config, dtype=rounded).float().eval()
            original = observe(llama, inputs)
            if parity:
                source_logits = list(window_logits(llama, held_out.windows))
                source_logits_without_bos = list(window_logits(llama, held_out.without_bos))
            del llama
            if not record.get("healing"):  # which chooses a dtype of its own
                yield _default_load(folder, source.folder, theirs.config, record, inputs)
    model = _load(folder, record)
    if parity:
        yield _parity("converted", model, inputs, held_out, original, source_logits)
        if held_out.without_bos:
            bare = HeldOut(f"{held_out.name} without a bos", held_out.without_bos)
            yield _parity("converted, without a bos", model, inputs, bare, None, source_logits_without_bos)
        with shuffled_pairs(model):
            yield _parity("pairs shuffled (wrong on purpose)", model, inputs, held_out, original, source_logits)
    elif original is not None:
        yield from _same_function(record["promise"]["kind"], original, observe(model, inputs))
    else:
        yield Check("function", "skipped", "give the source (--against) to compare with")
    yield _cache(model, inputs[0])
    dead = dead_parameters(model, inputs[0])
    detail = f"{dead[0]} has no gradient ({len(dead)} in all)" if dead else "every new tensor has a gradient"
    yield Check("liveness", _outcome(not dead), detail)


def _locate_against(against: str | Path, record: Mapping[str, Any]) -> SourceFolder:
    """Returns where the source is that a checkpoint is compared with.

    Raises:
        ConversionError: Nothing is there, or a model of another type than the one that was converted.
    """
    source = locate_recorded(against, record)
    found = read_config(source.folder)["model_type"]
    expected = record["source"].get("model_type", found)
    if found != expected:
        raise ConversionError(
            f"{typed('against', against)}: model_type is {quote(found)} in its config.json, expected "
            f"{quote(expected)} as of {record['source']['name']}, the source of this conversion; give that"
        )
    return source


def _same_source(folder: Path, record: Mapping[str, Any]) -> Check:
    same = not changed_files(folder, record["source"])
    return Check("source", _outcome(same), "as recorded" if same else "these are not the weights that were converted")


def _load(folder: Path, record: Mapping[str, Any]) -> Any:
    """Loads a model in float32, after the rounding that the conversion was asked for.

    Both models on one attention path: sdpa, where a V2 conversion runs the very kernel that LLaMA runs, head by head.
    """
    rounded = record["options"]["dtype"] or "float32"
    # Loaded in the narrow dtype and widened: .to(dtype) of a whole model would round the rotary frequencies as well.
    return load_converted(folder, dtype=rounded, attn_implementation="sdpa").float().eval()


def _default_load(
    folder: Path, source: Path, config: PreTrainedConfig, record: Mapping[str, Any], inputs: Sequence[torch.Tensor]
) -> Check:
    """Loads both as any user does: in the dtype of their files, which has to be the same one for both."""
    asked = record["options"]["dtype"]
    expected = observe_logits(load_original(source, config, **({"dtype": asked} if asked else {})).eval(), inputs)
    found = observe_logits(load_converted(folder).eval(), inputs)
    names = [str(logits[0].dtype).removeprefix("torch.") for logits in (expected, found)]
    if names[0] != names[1]:
        detail = f"the source computes in {names[0]}, this checkpoint in {names[1]}; convert again"
        return Check("default load", "failed", detail)
    if record["promise"]["kind"] == "parity":
        return Check("default load", "passed", f"in {names[0]}, as the source")
    difference, scale = compare_logits(expected, found)
    # Two attention kernels, in half precision two orders of rounding; another function is off by the scale itself.
    tolerance = max(TOLERANCE, 16 * torch.finfo(expected[0].dtype).eps) * max(scale, 1)
    detail = f"in {names[0]}, as the source; largest difference of logits {difference:.3g}"
    return Check("default load", _outcome(difference <= tolerance), detail, {"largest_difference": difference})


def _cache(model: DiffLlamaForCausalLM, ids: torch.Tensor) -> Check:
    """Compares with and without a cache, on as many tokens as LLaMA itself computes alike."""
    length = cacheable_length(model.config)
    if length < 2:
        return Check("cache", "skipped", "LLaMA itself computes other logits with a cache than without one")
    difference = cache_difference(model, ids[:, :length])
    detail = f"cached and uncached logits differ by {difference:.2g}"
    return Check("cache", _outcome(difference <= TOLERANCE), detail, {"largest_difference": difference})


def _same_function(promise: str, original: Behavior, converted: Behavior) -> Iterator[Check]:
    difference = largest_difference(original, converted)
    scale = max(logits.abs().max().item() for logits in original.logits)
    good = difference == 0 if promise == "bit-exact" else difference <= TOLERANCE * max(scale, 1)
    detail = f"largest difference of logits {difference:.3g} ({promise} was promised)"
    yield Check("logits", _outcome(good), detail, {"largest_difference": difference})
    same = generation_agreement(original, converted)
    count = len(original.continuations)
    detail = f"greedy continuations of {count} texts: {same:.1%} the same"
    # Near-ties may fall either way when logits are only equal up to rounding: then it is a number, and no check.
    outcome = _outcome(same == 1) if promise == "bit-exact" else "measured"
    yield Check("tokens", outcome, detail, {"generation_agreement": same})


def _held_out(
    folder: Path, config: DiffLlamaConfig, inputs: list[torch.Tensor], texts: Sequence[str] | None, text: Path | None
) -> HeldOut:
    """Returns what a parity conversion is measured on."""
    tokenizer = read_tokenizer(folder)
    if text is None and (texts is not None or tokenizer is None):
        return HeldOut("the given texts" if tokenizer else "random ids (no tokenizer)", inputs)
    return read_held_out(tokenizer, config.vocab_size, config.max_position_embeddings, text)


def _parity(
    name: str,
    model: DiffLlamaForCausalLM,
    inputs: Sequence[torch.Tensor],
    held_out: HeldOut,
    original: Behavior | None,
    source_logits: list[torch.Tensor] | None,
) -> Check:
    """Measures a parity conversion, of which nothing is promised, next to a deliberately wrong one."""
    values = text_metrics(window_logits(model, held_out.windows), held_out.windows, source_logits).to_dict()
    if original is not None:
        values["generation_agreement"] = generation_agreement(original, observe(model, inputs))
    detail = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
    detail += f"; on {held_out.name}, {held_out.num_tokens:,} tokens"
    return Check(name, "measured", detail, values, held_out.name)
