"""The model card: what a checkpoint is, how it was made, what was measured, and what it needs, plainly."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from conversion.errors import escape
from conversion.hub.bundle import code_requirements
from conversion.hub.card_metadata import metadata_block, read_metadata
from conversion.hub.card_text import CITATION, CONFIG_CHANGED, FINE_TUNE, LIMITS, LOAD, NEW_MODULES, STATUS
from conversion.hub.certificate import certificate_section
from conversion.hub.licenses import LlamaTerms, llama_terms
from conversion.hub.markdown import code_span, markdown
from conversion.mapping.heads import heads_in_words
from conversion.mapping.lambdas import differential_heads, not_differential, starting_lambdas
from conversion.record import measured_text
from conversion.source.hub_address import HUB_ID
from modeling_diff import DiffLlamaConfig


INHERITED = ("license", "license_name", "license_link", "language")  # stated by the source, or not at all
# The line that says a card is ours to write anew; without it, a card is the user's own.
GENERATED = (
    "<!-- Written by diff-llama, which writes it anew when pushing; delete this line to keep your own text. -->"
)
BAR_WIDTH = 24
EIGHTHS = "▏▎▍▌▋▊▉█"
METRICS = {  # of `verify`: name on the card, what it says
    "loss_nats": ("loss (nats/token)", "loss"),
    "source_loss_nats": ("the source's loss", "loss of the source"),
    "kl_nats": ("KL to the source (nats/token)", "KL divergence to the source"),
    "greedy_agreement": ("equal greedy tokens", "greedy agreement with the source"),
    "generation_agreement": ("equal continuations", "generation agreement with the source"),
}
HEALING_METRICS = {"loss": "loss_nats", "kl": "kl_nats", "greedy_agreement": "greedy_agreement"}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        certificate: Of these weights, as `verify --certificate` wrote it.
        lambdas: By layer, without the layers that are LLaMA's own.
        needs: Sentence on the releases that the code next to the weights needs; the package's by default.
        config_changed: Whether config.json may be another one than what is promised here is of.
    """

    metadata: Mapping[str, Any]
    config: DiffLlamaConfig
    record: Mapping[str, Any]
    lambdas: Mapping[int, float]
    terms: LlamaTerms | None = None
    verification: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    repo_id: str | None = None
    needs: str = field(default_factory=code_requirements)
    config_changed: bool = False

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[-1] if self.repo_id else converted_name(self.record, self.config)


def converted_name(record: Mapping[str, Any], config: DiffLlamaConfig) -> str:
    """Returns the source's name with what became of it."""
    return f"{record['source']['name'].split('/')[-1]}-diff-{config.variant}"


def model_card(
    folder: Path, config: DiffLlamaConfig, record: Mapping[str, Any], lambdas: Mapping[int, float] | None = None
) -> str:
    """Returns the card of a checkpoint that is made from the one in `folder`, whose card and license it follows.

    Args:
        folder: What it is made from.
        config: Of the checkpoint.
        record: Of the checkpoint.
        lambdas: Lambda per layer; by default what a conversion starts with.
    """
    metadata = source_metadata(folder)
    return render_card(
        CardFacts(
            metadata=metadata,
            config=config,
            record=record,
            lambdas=lambdas or starting_lambdas(config, record),
            terms=llama_terms(metadata, folder),
        )
    )


def render_card(facts: CardFacts) -> str:
    """Returns README.md: a metadata block that the Hub accepts, and the text."""
    record = facts.record
    config = facts.config
    source = record["source"]
    sections = [
        metadata_block(_metadata(facts)),
        f"# {markdown(facts.name)}",
        *([f"**{facts.terms.built_with}**"] if facts.terms and facts.terms.built_with else []),
        f"A [Differential Transformer](https://arxiv.org/abs/2410.05258) ({config.variant.upper()}), converted from "
        f"{_origin(source)} by `diff-llama`.",
        status_text(record),
        *([CONFIG_CHANGED] if facts.config_changed else []),
        *([f"**{warning}.**"] if (warning := not_differential(facts.lambdas)) else []),
        f"## How it was made\n\n{_story(record, config)}",
        *_measurements(facts),
        *([certificate_section(facts.certificate)] if facts.certificate else []),
        f"## Sizes\n\n{_sizes(record, config)}",
        f"## λ, layer by layer\n\n{lambda_plot(facts.lambdas, config.num_hidden_layers)}",
        "## How to load\n\n"
        + LOAD.format(repo=json.dumps(escape(facts.repo_id or facts.name), ensure_ascii=False), needs=facts.needs),
        "## How to fine-tune\n\n" + FINE_TUNE.format(new_modules=NEW_MODULES[config.variant]),
        "## Limits\n\n" + LIMITS,
        *_license(facts),
        "## Citation\n\n" + CITATION,
        GENERATED,
    ]
    return "\n\n".join(sections) + "\n"


def _origin(source: Mapping[str, Any]) -> str:
    """Returns a link to what is surely a repository of the Hub, else the name alone."""
    if hub_id := _hub_id(source["hub_id"]):
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    name = markdown(source["hub_id"] or source["name"])
    return f"{name} ({gguf['bits_per_weight']:.1f} bits per weight)" if (gguf := source.get("gguf")) else name


def _hub_id(text: str | None) -> str | None:
    """Returns the text if it can be a repository of the Hub; in a record that was edited it may be anything."""
    return text if text and HUB_ID.fullmatch(text) else None


def export_card(folder: Path) -> str:
    """Returns README.md of an export to transformers' own class."""
    name = folder.resolve().name
    metadata = source_metadata(folder)
    inherited = {key: value for key, value in metadata.items() if key in (*INHERITED, "base_model")}
    tags = ["differential-transformer"]
    block = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **inherited)
    terms = llama_terms(metadata, folder)
    built_with = f"**{terms.built_with}**\n\n" if terms and terms.built_with else ""
    return (
        f"{metadata_block(block)}\n\n# {markdown(name)}-diffllama\n\n{built_with}"
        "A [Differential Transformer](https://arxiv.org/abs/2410.05258) in the format of transformers' own "
        f"`DiffLlamaForCausalLM`, exported from {code_span(name)} by `diff-llama`. It needs no custom code.\n\n"
        "## Citation\n\n" + CITATION + "\n"
    )


def source_metadata(folder: Path) -> dict[str, Any]:
    """Returns the metadata block of a folder's card; empty without one, or if it cannot be read."""
    return dict(read_metadata(folder / "README.md"))


def lambda_plot(lambdas: Mapping[int, float], num_layers: int) -> str:
    """Returns one bar per layer in text, which every viewer shows; the longest bar is the largest λ."""
    if not lambdas:
        return "Not read."
    largest = max(max(lambdas.values()), 1e-9)
    lines = ["layer      λ"]
    for layer in range(num_layers):
        value = lambdas.get(layer)
        shown = "LLaMA's own attention" if value is None else f"{value:7.4f} {_bar(value / largest)}"
        lines.append(f"{layer:5d} {shown}".rstrip())
    return "```\n" + "\n".join(lines) + "\n```"


def _bar(share: float) -> str:
    eighths = round(max(share, 0.0) * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def status_text(record: Mapping[str, Any]) -> str:
    """Returns what may be expected of a checkpoint, by the last thing that was done to it."""
    if healing := record.get("healing"):
        return STATUS["healed"].format(tokens=_tokens(sum(int(stage.get("tokens") or 0) for stage in healing)))
    if calibration := record.get("calibration"):
        return STATUS["calibrated"].format(tokens=calibration["tokens"])
    return STATUS[record["promise"]["kind"]].format(promise=markdown(record["promise"]["text"]))


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else "an unrecorded number of tokens"


def _metadata(facts: CardFacts) -> ModelCardData:
    inherited = {key: value for key, value in facts.metadata.items() if key in INHERITED and value is not None}
    results = _eval_results(facts)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["differential-transformer", "diff_llama"],
        # base_model_relation stays unset: the Hub has no value for a conversion.
        base_model=_hub_id(facts.record["source"]["hub_id"]),
        datasets=_datasets(facts.record),
        model_name=facts.name if results else None,
        eval_results=results or None,
        **inherited,
    )


def _datasets(record: Mapping[str, Any]) -> list[str] | None:
    """Returns the texts used that are data sets of the Hub; a local file's name says nothing there."""
    texts = [(record.get("calibration") or {}).get("text")]
    texts += [text for stage in record.get("healing") or [] for text in stage.get("data") or []]
    return sorted({text for text in texts if isinstance(text, str) and HUB_ID.fullmatch(text)}) or None


def _measured(verification: Mapping[str, Any] | None) -> dict[str, float]:
    """Numbers of the converted model itself in a verification report."""
    checks = (verification or {}).get("checks", ())
    found: dict[str, float] = {}
    for check in checks:
        if check["name"] in ("converted", "tokens"):
            found |= {key: float(value) for key, value in check["values"].items() if key in METRICS}
    return found


def _at_end(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns what was measured at the conversion's end: numbers of these weights, unless they were healed since."""
    return None if record.get("healing") else record.get("measured")


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Returns results of the verification and of the last healing, each under the text that it was measured on."""
    checks = (facts.verification or {}).get("checks", ())
    text = next((check["text"] for check in checks if check.get("text")), "texts of diff-llama verify")
    measured = {text: _measured(facts.verification)}
    if (at_end := _at_end(facts.record)) and not facts.verification:
        values = at_end.get("values") or {}
        measured = {str(at_end.get("text")): {key: value for key, value in values.items() if key in METRICS}}
    if healing := facts.record.get("healing"):
        compared = ["loss"] if _taught_by_another(healing[-1]) else list(HEALING_METRICS)
        measured[f"held-out text of {', '.join(healing[-1].get('data') or ['the healing'])}"] = {
            HEALING_METRICS[key]: value for key, value in healing[-1]["end"].items() if key in compared
        }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=name,
            metric_type=key,
            metric_name=METRICS[key][1],
            metric_value=round(value, 6),
        )
        for name, values in measured.items()
        for key, value in values.items()
    ]


def _story(record: Mapping[str, Any], config: DiffLlamaConfig) -> str:
    """Returns what was done, in order."""
    revision = record["source"].get("revision")
    lines = [f"- Promise: {markdown(record['promise']['text'])}."]
    if revision:
        lines.append(f"- Source revision: {code_span(revision)}.")
    if adapter := record.get("adapter"):
        done = "merged into the source first" if adapter["merged"] else "carried over, and not part of these weights"
        lines.append(f"- Adapter {code_span(adapter['name'])}: {done}.")
    if record.get("pairing"):
        norm = record["options"].get("norm", "as in the source")
        lines.append(f"- Heads paired: {markdown(record['pairing'])}; norm: {markdown(norm)}.")
    if calibration := record.get("calibration"):
        stages = markdown(", ".join(map(str, calibration["stages"])))
        text = code_span(calibration["text"])
        floor = f", λ at least {markdown(calibration['lambda_floor'])}" if calibration.get("lambda_floor") else ""
        effort = f", effort {markdown(calibration['effort'])}" if calibration.get("effort") else ""
        lines.append(f"- Calibrated on {_tokens(calibration['tokens'])} of {text}{effort}: {stages}{floor}.")
    for stage in record.get("healing") or []:
        lines.append(f"- Healed, {markdown(stage.get('stage', 'one stage'))}: {markdown(_healing(stage))}.")
    heads = heads_in_words(differential_heads(config), config.num_attention_heads)
    versions = markdown(", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items())))
    return "\n".join(
        [*lines, f"- Differential heads: {heads}.", f"- Made with {versions}; `conversion.json` has every option."]
    )


def _healing(stage: Mapping[str, Any]) -> str:
    """Returns tokens and a teacher that is not the source, then each number at the start and at the end."""
    start = stage.get("start") or {}
    end = stage.get("end") or {}
    moves = [f"{key.replace('_', ' ')} {start[key]:.4g} → {end[key]:.4g}" for key in start if key in end]
    moves += [f"{key.replace('_', ' ')} {end[key]:.4g}" for key in end if key not in start]
    teacher = [f"teacher {stage.get('teacher')}, not the source"] if _taught_by_another(stage) else []
    return "; ".join([_tokens(int(stage.get("tokens") or 0)), *teacher, *moves])


def _taught_by_another(stage: Mapping[str, Any]) -> bool:
    """Returns whether distances are not from the source; records of earlier versions do not say."""
    return stage.get("teacher_is_source") is False


def _measurements(facts: CardFacts) -> list[str]:
    """Returns the section of measured numbers; nothing where nothing was measured."""
    sections = []
    if found := measured_text(_at_end(facts.record)):
        sections.append(f"At the end of the conversion: {markdown(found)}.")
    if not facts.verification:
        return ["\n\n".join(["## Measured", *sections])] if sections else []
    rows = [f"| {METRICS[key][0]} | {value:.4g} |" for key, value in _measured(facts.verification).items()]
    checks = facts.verification.get("checks", ())
    rows += [
        f"| {markdown(check['name'])} | {markdown(check['outcome'])}: {markdown(check['detail'])} |"
        for check in checks
        if check["outcome"] != "measured"
    ]
    sections.append("By `diff-llama verify`:\n\n| what | result |\n|---|---|\n" + "\n".join(rows))
    return ["\n\n".join(["## Measured", *sections])]


def _sizes(record: Mapping[str, Any], config: DiffLlamaConfig) -> str:
    parameters = record["parameters"]
    rows: Sequence[tuple[str, str]] = [
        ("parameters", f"{parameters['output']:,} (source: {parameters['source']:,})"),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", f"{config.hidden_size:,}"),
        ("differential heads", f"{config.num_attention_heads}, each of two maps {config.map_dim} wide"),
        ("key-value heads", f"{config.num_key_value_heads}, values {config.head_dim} wide"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows)


def _license(facts: CardFacts) -> list[str]:
    if not facts.terms:
        return []
    return [f"## License\n\n{facts.terms.notice} Its terms and its acceptable use policy hold for this model as well."]
