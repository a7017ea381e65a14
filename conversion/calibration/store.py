"""Results of a calibration on disk, one file per layer: memory is that of one, and a stopped run can continue."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedConfig

from conversion.calibration.streams import LayerWeights
from conversion.checkpoint.kept_work import state_to_go_on_from, write_state
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import file_errors
from conversion.mapping.heads import HeadPairing


IDENTITY = "identity.json"


def run_identity(
    reader: CheckpointReader, config: PreTrainedConfig, tokens: torch.Tensor, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what changes with anything that could change a result; reads every byte of the weights.

    Args:
        reader: The source's weights.
        config: Its config.
        tokens: The calibration tokens (R, T).
        options: All other choices.
    """
    return {
        "source": [reader.content(), config.to_dict() | {"_name_or_path": None}],
        "text": [list(tokens.shape), hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()],
        "options": options,
        "versions": [torch.__version__, transformers.__version__],
    }


class CalibrationStore:
    """`layer-00003.safetensors` for a finished layer, `layer-00003.STAGE.safetensors` for an unfinished one.

    Args:
        folder: Where the files are.
        identity: All that the results depend on.
        resume: What to do with results that are there: `conversion.checkpoint.kept_work`.

    Raises:
        FilesError: A run of another identity has finished a layer or a stage there, and `resume` is not False.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool | None = None):
        self.folder = Path(folder)
        self.fingerprint = hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest()
        self.records: dict[int, dict[str, Any]] = {}
        self._files: dict[str, tuple[Path, str]] = {}  # file and key of each tensor, by its name in the checkpoint
        state = self.folder / IDENTITY
        if state_to_go_on_from(state, identity, resume, costly=has_results(self.folder)) is None:
            with file_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.glob("layer-*"):  # a folder that a caller has named may hold more
                    path.unlink()
            write_state(state, identity)

    @property
    def names(self) -> frozenset[str]:
        """Names in the converted checkpoint of the tensors of finished layers."""
        return frozenset(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor of a finished layer by its name in the converted checkpoint."""
        path, key = self._files[name]
        with file_errors(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(key).clone()  # mapped otherwise, and a file cut short would kill the process

    def save(self, index: int, weights: LayerWeights, record: Mapping[str, Any], stage: str | None) -> None:
        """Writes the results of a stage, or of a finished layer, whole or not at all.

        Args:
            index: Index of the layer.
            weights: Its attention.
            record: What the stages reached.
            stage: The stage; None for a finished layer, whose stages are then removed.
        """
        said: dict[str, Any] = {"fingerprint": self.fingerprint, "record": dict(record)}
        said |= {"query_heads": weights.pairing.query_heads, "kv_heads": weights.pairing.kv_heads}
        said |= {"lambda_init": weights.lambda_init, "sub_norm_eps": weights.sub_norm_eps, "heads": weights.heads}
        path = self._path(index, stage)
        partial = path.with_suffix(".partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.tensors.items()}
        with file_errors(path), partial.open("wb") as stream:
            stream.write(save(tensors, {"calibration": json.dumps(said)}))
            stream.flush()
            os.fsync(stream.fileno())
            partial.replace(path)
        if stage is None:
            self._finish(index, weights, record)

    def load(self, index: int, stage: str | None, device: torch.device) -> tuple[LayerWeights, dict[str, Any]] | None:
        """Returns the weights and the record that `save` wrote; None if there is nothing of this run."""
        path = self._path(index, stage)
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {}).get("calibration", "{}"))
                if said.get("fingerprint") != self.fingerprint:
                    return None
                tensors = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError, ValueError):
            return None
        pairing = HeadPairing(tuple(said["query_heads"]), tuple(said["kv_heads"]))
        heads = None if said["heads"] is None else tuple(said["heads"])
        weights = LayerWeights(pairing, said["lambda_init"], said["sub_norm_eps"], tensors, heads)
        if stage is None:
            self._finish(index, weights, said["record"])
        return weights, said["record"]

    def _finish(self, index: int, weights: LayerWeights, record: Mapping[str, Any]) -> None:
        path = self._path(index, None)
        self.records[index] = dict(record)
        self._files |= {f"model.layers.{index}.self_attn.{name}": (path, name) for name in weights.tensors}
        for unfinished in self.folder.glob(f"layer-{index:05}.*.safetensors"):
            unfinished.unlink(missing_ok=True)

    def _path(self, index: int, stage: str | None) -> Path:
        return self.folder / f"layer-{index:05}{f'.{stage}' if stage else ''}.safetensors"


def has_results(folder: Path) -> bool:
    """Returns whether a layer, or a stage of one, was finished in this work folder."""
    return next(folder.glob("layer-*.safetensors"), None) is not None
