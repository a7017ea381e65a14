"""What vLLM is told before it reads a config: the native model, how to count heads, and what to refuse early."""

from typing import Any

import vllm
from vllm.logger import init_logger

from ..diff_adapters import MODEL_TYPE
from ..diff_parallel import check_tensor_parallel_size
from ..diff_transformers_compat import release
from .versions import unsupported_vllm, untested_vllm


try:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )
except ImportError as error:
    raise ImportError(unsupported_vllm(vllm.__version__, error)) from error

from ..diff_engines import count_both_maps


logger = init_logger("vllm.diff_llama")
ARCHITECTURE = "DiffLlamaForCausalLM"
MODEL = "modeling_diff.serving.vllm_model:DiffLlamaForCausalLM"


class DiffLlamaChecks(VerifyAndUpdateConfig):
    """Checks in the process that the user started, before any worker is."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        config = vllm_config.model_config.hf_config
        check_model_type(config)
        check_tensor_parallel_size(config, vllm_config.parallel_config.tensor_parallel_size)


def check_model_type(config: Any) -> None:
    """
    Checks that a checkpoint whose class has our name is one of ours.

    Raises:
        ValueError: It is of another type, such as transformers' own diffllama.
    """
    if config.model_type != MODEL_TYPE:
        raise ValueError(
            f"model_type={config.model_type!r} in config.json: {ARCHITECTURE} of diff-llama takes {MODEL_TYPE!r} only."
        )


def register_model() -> None:
    """Registers all of it; names that are there stay."""
    if untested := untested_vllm(release(vllm.__version__), vllm.__version__):
        logger.warning_once(untested)
    MODEL_ARCH_CONFIG_CONVERTORS.setdefault(MODEL_TYPE, count_both_maps(ModelArchConfigConvertorBase))
    MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, DiffLlamaChecks)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
