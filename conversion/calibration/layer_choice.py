"""
Which layers to convert where not all are: those that change the model least.

What a layer costs is measured where it counts: the KL of LLaMA's distribution to that of the model in which this layer
alone is converted. The distance that is left right after a layer does not say it, as errors of early layers grow on
their way up. Layers are fitted for this by the closed-form stages, each on LLaMA's own stream, on a part of the text.

R sequences, T tokens per sequence, C hidden, V vocabulary.
"""

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conversion.calibration.calibrate import Progress, Stage, fit_stages, lambdas_to_try
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.problem import LayerProblem, Norm
from conversion.calibration.store import CalibrationStore, run_identity
from conversion.calibration.streams import LlamaLayers, Streams, chunks
from conversion.checkpoint.json_files import read_json
from conversion.checkpoint.output_folder import replace_text
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError, typed
from conversion.source.architectures import plain_config
from modeling_diff.diff_llama_fields import padded_counts


logger = logging.getLogger(__name__)
CHOICE_STAGES = (Stage.PAIRING, Stage.REFIT)
FITTED_TOKENS = 8192
JUDGING_TOKENS = 2048
LOGIT_TOKENS = 256  # of one product with the head
COSTS = "costs.json"


@dataclass(frozen=True)
class LayerChoice:
    """The layers to convert, and what was measured to choose them.

    Attributes:
        layers: Their indices, ascending.
        costs: KL in nats per token per layer of the model, with that layer alone converted.
        kl: KL in nats per token with the chosen layers converted together. A whole calibration leaves less.
        tokens: How many tokens were judged.
    """

    layers: tuple[int, ...]
    costs: tuple[float, ...]
    kl: float
    tokens: int

    @property
    def note(self) -> str:
        """What was chosen, as one sentence."""
        return (
            f"differential layers: {', '.join(map(str, self.layers))} of {len(self.costs)}, which change the model "
            f"least; KL {self.kl:.3g} nats/token on {self.tokens:,} tokens of the calibration text after a first fit"
        )

    def record(self) -> dict[str, Any]:
        """Returns the choice as JSON, for conversion.json."""
        rounded = {"costs": [round(cost, 6) for cost in self.costs], "kl": round(self.kl, 6)}
        return asdict(self) | {"layers": list(self.layers)} | rounded


def num_chosen(share: float, num_layers: int) -> int:
    """Returns how many layers hold a share (above 0, at most 1) of all heads, one at least."""
    return max(1, int(share * num_layers + 0.5))


class LayerTrials:
    """Every layer of a LLaMA, fitted alone by the quick stages, and what it costs to convert it.

    Args:
        reader: The LLaMA's weights.
        config: Its config.
        tokens: Token ids (R, T) of the calibration, of which a part is used.
        lambda_init: As for `calibrate`.
        lambda_floor: Lowest lambda of any layer.
        norm: As for `calibrate`.
        dtype: Dtype of the checkpoint to be written.
        seed: Of the lambda vectors.
        device: Where layers are computed.
        work_folder: Where what is done is kept for a run that continues this one.
        resume: As for `calibrate`.
        progress: As for `calibrate`.

    Attributes:
        costs: KL in nats per token per layer, with that layer alone converted.
        tokens: Number of tokens that were judged.

    Raises:
        ConversionError: Activations are not finite.
        FilesError: The work folder cannot be used.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: PreTrainedConfig,
        tokens: torch.Tensor,
        *,
        lambda_init: Literal["grid", "paper"] | float | Sequence[float] = "grid",
        lambda_floor: float = LocalFit.lambda_floor,
        norm: Norm = "strict",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        work_folder: Path,
        resume: bool | None = None,
        progress: Progress = lambda layer, num_layers, stage, done: None,
    ):
        config = plain_config(config)
        sample, num_judging = _sample(tokens, config)
        options = {"choice": CHOICE_STAGES, "lambda": [lambda_init, lambda_floor], "norm": norm, "seed": seed}
        identity = run_identity(reader, config, sample, options | {"dtype": dtype, "device": str(device)})
        self.store = CalibrationStore(work_folder, identity, resume)
        self.llama = LlamaLayers(reader, config, torch.device(device))
        self._judging = sample[:num_judging]
        self._head = Head(self.llama)
        self.tokens = self._judging.numel()
        path = self.store.folder / COSTS
        if (costs := _kept_costs(path, self.store.fingerprint)) is None:
            lambdas = [lambdas_to_try(lambda_init, index, lambda_floor) for index in range(config.num_hidden_layers)]
            costs = self._measure(sample, lambdas, norm, seed, dtype, LocalFit(lambda_floor=lambda_floor), progress)
            replace_text(path, json.dumps({"fingerprint": self.store.fingerprint, "costs": costs}))
        self.costs = costs
        self._original = self._end(())

    @property
    def cheapest_first(self) -> list[int]:
        """Returns the layers by what they cost."""
        return sorted(range(len(self.costs)), key=lambda index: self.costs[index])

    def together(self, layers: Collection[int]) -> float:
        """Returns the KL in nats per token with all of `layers` converted, each as it was fitted alone."""
        return self._head.divergences(self._original, [self._end(layers)])[0]

    def _measure(
        self,
        sample: torch.Tensor,
        lambdas: Sequence[tuple[float, ...]],
        norm: Norm,
        seed: int,
        dtype: torch.dtype | None,
        local: LocalFit,
        progress: Progress,
    ) -> list[float]:
        """One walk through LLaMA, on which the models with one converted layer each are computed side by side."""
        llama = self.llama
        num_judging = len(self._judging)
        streams = Streams.start(llama.embed(sample))
        ends: list[torch.Tensor] = []  # (R, T, C) of the judging sequences, per model
        for index, values in enumerate(lambdas):
            tensors = llama.tensors(index)
            layer = llama.layer(index, tensors)
            streams.look_ahead(llama, layer, index)
            problem = LayerProblem(index, llama, tensors, layer, streams, seed, norm, values, num_judging)
            weights = fit_stages(problem, CHOICE_STAGES, local, self.store, dtype, progress)
            with torch.no_grad():
                ends = [llama.run(layer, states) for states in ends]
                ends.append(llama.run(problem.diff_layer(weights), streams.original[:num_judging]))
            streams.stay_original()
        return self._head.divergences(streams.original[:num_judging], ends)

    @torch.no_grad()
    def _end(self, converted: Collection[int]) -> torch.Tensor:
        """The states (R, T, C) after the last layer, with the kept weights in the layers of `converted`."""
        llama = self.llama
        states = llama.embed(self._judging)
        for index in range(llama.config.num_hidden_layers):
            tensors = llama.tensors(index)
            layer: nn.Module = llama.layer(index, tensors)
            if index in converted:
                kept = self.store.load(index, None, llama.device)
                assert kept is not None  # its cost has been measured
                layer = llama.diff_layer(index, tensors, kept[0].as_float())
            states = torch.cat([llama.run(layer, states[rows]) for rows in chunks(*states.shape[:2])])
        return states


def choose_layers(trials: LayerTrials, *, share: float | None = None, max_kl: float | None = None) -> LayerChoice:
    """Chooses the layers to convert, those that cost least.

    Args:
        trials: What the layers cost.
        share: How much of all layers to choose. One of `share` and `max_kl` is given.
        max_kl: KL in nats per token that the chosen layers may cost together; as many are chosen as that allows.

    Raises:
        ConversionError: The cheapest layer alone costs more than `max_kl`.
    """
    order = trials.cheapest_first
    if share is not None:
        count = num_chosen(share, len(order))
        kl = trials.together(order[:count])
    else:
        assert max_kl is not None
        count, kl = _largest(lambda count: trials.together(order[:count]), len(order), max_kl)
        if not count:
            raise ConversionError(
                f"{typed('max_kl')} is {max_kl:g}, and layer {order[0]}, which costs least, alone costs "
                f"{trials.costs[order[0]]:.2g} nats per token; allow more, choose {typed('share')} or "
                f"{typed('layers')}, or convert to v2, which is exact"
            )
    choice = LayerChoice(tuple(sorted(order[:count])), tuple(trials.costs), kl, trials.tokens)
    logger.info(choice.note)
    return choice


def _largest(together: Callable[[int], float], num_layers: int, max_kl: float) -> tuple[int, float]:
    """How many of the cheapest layers cost at most `max_kl` together, by halving, and their KL."""
    fits = 0
    kl = 0.0
    above = num_layers + 1
    while above - fits > 1:
        count = (fits + above) // 2
        reached = together(count)
        if reached <= max_kl:
            fits = count
            kl = reached
        else:
            above = count
    return fits, kl


def _kept_costs(path: Path, fingerprint: str) -> list[float] | None:
    """What an earlier run of the same identity has measured."""
    if not path.is_file():
        return None
    kept = read_json(path)
    return kept["costs"] if kept.get("fingerprint") == fingerprint else None


def _sample(tokens: torch.Tensor, config: Any) -> tuple[torch.Tensor, int]:
    """The sequences that are used, and how many of them, the first, judge."""
    row_tokens = tokens.shape[1]
    columns = padded_counts(config.num_attention_heads, config.num_key_value_heads)[0] * config.head_dim
    num_judging = min(max(1, JUDGING_TOKENS // row_tokens), max(1, len(tokens) // 4))
    num_fitted = -(-max(FITTED_TOKENS, 2 * columns) // row_tokens)
    return tokens[: num_judging + num_fitted], num_judging


class Head:
    """LLaMA's final norm and language model head."""

    def __init__(self, llama: LlamaLayers):
        names = llama.reader.tensors
        table = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
        self.table = llama.reader.read(table).to(llama.device, torch.float32)  # (V, C)
        self.norm = LlamaRMSNorm(llama.config.hidden_size, eps=llama.config.rms_norm_eps)
        self.norm.load_state_dict({"weight": llama.reader.read("model.norm.weight")})
        self.norm.to(llama.device, torch.float32)

    @torch.no_grad()
    def divergences(self, original: torch.Tensor, others: Sequence[torch.Tensor]) -> list[float]:
        """Returns the KL in nats per token of each of `others` from `original`, states (R, T, C) of the last layer."""
        sums = [0.0] * len(others)
        parts = original.flatten(0, 1).split(LOGIT_TOKENS)
        other_parts = [states.flatten(0, 1).split(LOGIT_TOKENS) for states in others]
        for number, part in enumerate(parts):
            expected = self._log_probabilities(part)
            for model, split in enumerate(other_parts):
                found = self._log_probabilities(split[number])
                terms = nn.functional.kl_div(found, expected, reduction="none", log_target=True)
                sums[model] += float(terms.sum(dtype=torch.float64))
        # Of rounding alone a sum may come out below 0, which no divergence is.
        return [max(0.0, total) / original[..., 0].numel() for total in sums]

    def _log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(states), self.table).log_softmax(-1)
