"""
What it costs to convert heads: the KL of LLaMA's distribution to that of the model in which they alone are converted.

The distance that is left right after a layer does not say it, as errors of early layers grow on their way up. Layers
are fitted for this by the closed-form stages, each on LLaMA's own stream, on a part of the text.

R sequences, T tokens per sequence, C hidden, V vocabulary.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conversion.calibration.calibrate import Progress, Stage, run_stage
from conversion.calibration.closed_form import lambdas_to_try, refit_outputs
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.problem import LayerProblem, Norm
from conversion.calibration.store import CalibrationStore, run_identity
from conversion.calibration.streams import LayerWeights, LlamaLayers, Streams, chunks
from conversion.checkpoint.json_files import read_json
from conversion.checkpoint.output_folder import replace_text
from conversion.checkpoint.reader import CheckpointReader
from conversion.mapping.heads import HeadPairing
from conversion.options import CHOICE
from conversion.source.architectures import plain_config
from modeling_diff.diff_llama_fields import padded_counts


FITTED_TOKENS = 8192
JUDGING_TOKENS = 2048
LOGIT_TOKENS = 256  # of one product with the head
COSTS = "costs.json"
HeadsByLayer = Sequence[Collection[int]]  # the differential heads of each layer
Unit = tuple[int, int]  # a layer, and the number of a unit in it


def value_groups(config: Any) -> list[tuple[int, ...]]:
    """Returns the heads of a layer that share each key-value head.

    Args:
        config: LLaMA's.
    """
    counts = padded_counts(config.num_attention_heads, config.num_key_value_heads)
    return HeadPairing.adjacent(*counts).groups


class HeadTrials:
    """Every layer of a LLaMA, fitted alone by the quick stages, and what it costs to convert heads of it.

    Args:
        reader: The LLaMA's weights.
        config: Its config.
        tokens: Token ids (R, T) of the calibration, of which a part is used.
        units: The heads of a layer that are tried together; by default those that share a key-value head.
        paired: Whether heads are matched by least-squares cost, in place of neighbors.
        lambda_init: As for `calibrate`.
        lambda_floor: Lowest lambda of any layer.
        norm: As for `calibrate`.
        pairings: As for `calibrate`.
        dtype: Dtype of the checkpoint to be written.
        seed: Of the lambda vectors.
        device: Where layers are computed.
        work_folder: Where what is done is kept for a run that continues this one.
        resume: As for `calibrate`.
        progress: As for `calibrate`. The stage is always "choice"; after the last layer one more is counted, in
            which KL is measured.

    Attributes:
        units: The heads of a layer that are tried together.
        costs: KL in nats per token, per layer and unit, with that unit alone converted.
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
        units: Sequence[Collection[int]] | None = None,
        paired: bool = True,
        lambda_init: Literal["grid", "paper"] | float | Sequence[float] = "grid",
        lambda_floor: float = LocalFit.lambda_floor,
        norm: Norm = "strict",
        pairings: Mapping[int, HeadPairing] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        work_folder: Path,
        resume: bool | None = None,
        progress: Progress = lambda layer, num_layers, stage, done: None,
    ):
        config = plain_config(config)
        self.units = [tuple(sorted(unit)) for unit in units or value_groups(config)]
        self._stages = (Stage.PAIRING if paired else Stage.COPY, Stage.REFIT)
        self._local = LocalFit(lambda_floor=lambda_floor)
        self._sample, self._num_judging = _sample(tokens, config)
        self._norm = norm
        self._pairings = pairings or {}
        self._dtype = dtype
        self._seed = seed
        self._progress = progress
        self._lambdas = [lambdas_to_try(lambda_init, index, lambda_floor) for index in range(config.num_hidden_layers)]
        options: dict[str, Any] = {
            "choice": self._stages,
            "lambda": self._lambdas,
            "norm": norm,
            "pairings": self._pairings,
        }
        options |= {"seed": seed, "dtype": dtype, "device": str(device)}
        self._store = CalibrationStore(work_folder, run_identity(reader, config, self._sample, options), resume)
        self._llama = LlamaLayers(reader, config, torch.device(device))
        self._head = Head(self._llama)
        self.tokens = self._sample[: self._num_judging].numel()
        path = self._store.folder / COSTS
        key = {"fingerprint": self._store.fingerprint, "units": [list(unit) for unit in self.units]}
        if (costs := _kept_costs(path, key)) is None:
            costs = self._measure()
            replace_text(path, json.dumps({**key, "costs": costs}))
        self.costs = costs
        self._original = self._end({})

    @property
    def cheapest_first(self) -> list[Unit]:
        """Returns layer and number of each unit, by what it costs."""
        units = [(layer, unit) for layer in range(len(self.costs)) for unit in range(len(self.units))]
        return sorted(units, key=lambda unit: self.costs[unit[0]][unit[1]])

    @property
    def layer_pairings(self) -> tuple[HeadPairing, ...]:
        """Returns which heads become one, per layer."""
        return tuple(self._base(index).pairing for index in range(len(self.costs)))

    def heads(self, units: Collection[Unit]) -> tuple[tuple[int, ...], ...]:
        """Returns the heads (indices per layer) of units, which `cheapest_first` names."""
        heads: list[list[int]] = [[] for _ in self.costs]
        for layer, unit in units:
            heads[layer] += self.units[unit]
        return tuple(tuple(sorted(chosen)) for chosen in heads)

    def together(self, heads: HeadsByLayer) -> float:
        """Returns the KL in nats per token with these heads of each layer converted together, as fitted alone."""
        chosen = {layer: tuple(sorted(found)) for layer, found in enumerate(heads) if found}
        if any(self._kept(layer, found) is None for layer, found in chosen.items()):
            for problem in self._walk():
                if problem.index in chosen:
                    self._fitted(problem, chosen[problem.index])
        return self._head.divergences(self._original, [self._end(chosen)])[0]

    def weights(self, layer: int, heads: Collection[int]) -> LayerWeights:
        """Returns a layer in which `heads` are converted, as `together` has fitted it."""
        kept = self._kept(layer, tuple(sorted(heads)))
        assert kept is not None
        return kept

    def _walk(self) -> Iterator[LayerProblem]:
        """Goes through LLaMA on the sample, and yields each layer on LLaMA's own stream."""
        llama = self._llama
        streams = Streams.start(llama.embed(self._sample))
        for index, values in enumerate(self._lambdas):
            tensors = llama.tensors(index)
            layer = llama.layer(index, tensors)
            streams.look_ahead(llama, layer, index)
            yield LayerProblem(
                index=index,
                llama=llama,
                tensors=tensors,
                layer=layer,
                streams=streams,
                seed=self._seed,
                norm=self._norm,
                lambdas=values,
                num_validation_rows=self._num_judging,
                pairing=self._pairings.get(index),
            )
            streams.stay_original()

    def _measure(self) -> list[list[float]]:
        """One walk through LLaMA, on which the models with one converted unit each are computed side by side."""
        llama = self._llama
        judged = slice(0, self._num_judging)
        ends: list[torch.Tensor] = []  # (R, T, C) of the judging sequences, per model
        original = torch.empty(0)
        for problem in self._walk():
            before = problem.streams.original[judged]
            with torch.no_grad():
                ends = [llama.run(problem.layer, states) for states in ends]
            for unit in self.units:
                converted = problem.diff_layer(self._fitted(problem, unit))
                with torch.no_grad():
                    ends.append(llama.run(converted, before))
            original = problem.streams.after_layer[judged]
        measured = partial(self._progress, len(self._lambdas), len(self._lambdas), CHOICE)
        costs = iter(self._head.divergences(original, ends, measured))
        return [[next(costs) for _ in self.units] for _ in self._lambdas]

    def _fitted(self, problem: LayerProblem, heads: tuple[int, ...]) -> LayerWeights:
        """Returns a layer in which `heads` are converted, fitted now unless it was; only o_proj depends on them."""
        if (kept := self._kept(problem.index, heads)) is not None:
            return kept
        name = self._stages[0]
        if self._store.load(problem.index, name, self._llama.device) is None:
            self._progress(problem.index, len(self._lambdas), CHOICE, 0.0)
            start = run_stage(problem, name, None, self._stages, self._local, lambda done: None)
            self._store.save(problem.index, problem.rounded(start, self._dtype), {}, name)
        weights = refit_outputs(problem, self._base(problem.index).replaced({}, heads=heads))
        weights = problem.rounded(weights, self._dtype)
        output = {"o_proj.weight": weights.tensors["o_proj.weight"]}
        self._store.save(problem.index, replace(weights, tensors=output), {}, _name(heads))
        self._progress(problem.index, len(self._lambdas), CHOICE, 1.0)
        return weights.as_float()

    def _base(self, index: int) -> LayerWeights:
        """The weights of a layer before the refit, all of its heads differential."""
        kept = self._store.load(index, self._stages[0], self._llama.device)
        assert kept is not None  # its cost has been measured
        return kept[0].as_float()

    def _kept(self, index: int, heads: tuple[int, ...]) -> LayerWeights | None:
        """The weights of a layer in which `heads` are converted; None if they are not fitted yet."""
        if (kept := self._store.load(index, _name(heads), self._llama.device)) is None:
            return None
        return self._base(index).replaced(kept[0].as_float().tensors, heads=heads)

    @torch.no_grad()
    def _end(self, heads: Mapping[int, tuple[int, ...]]) -> torch.Tensor:
        """The states (R, T, C) after the last layer, with `heads` converted, by layer."""
        llama = self._llama
        states = llama.embed(self._sample[: self._num_judging])
        for index in range(llama.config.num_hidden_layers):
            tensors = llama.tensors(index)
            layer: nn.Module = llama.layer(index, tensors)
            if index in heads:
                layer = llama.diff_layer(index, tensors, self.weights(index, heads[index]))
            states = torch.cat([llama.run(layer, states[rows]) for rows in chunks(*states.shape[:2])])
        return states


def _name(heads: Collection[int]) -> str:
    """The name under which a layer is kept: a bit per head, as a file name holds no hundreds of numbers."""
    return f"heads-{sum(1 << head for head in heads):x}"


def _kept_costs(path: Path, key: Mapping[str, Any]) -> list[list[float]] | None:
    """What an earlier run of the same identity has measured of the same units."""
    if not path.is_file():
        return None
    kept = read_json(path)
    return kept["costs"] if all(kept.get(name) == value for name, value in key.items()) else None


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
    def divergences(
        self,
        original: torch.Tensor,
        others: Sequence[torch.Tensor],
        progress: Callable[[float], None] = lambda done: None,
    ) -> list[float]:
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
                progress((number * len(others) + model + 1) / (len(parts) * len(others)))
        # Of rounding alone a sum may come out below 0, which no divergence is.
        return [max(0.0, total) / original[..., 0].numel() for total in sums]

    def _log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(states), self.table).log_softmax(-1)
