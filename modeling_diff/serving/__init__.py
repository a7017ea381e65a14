"""
Differential models in vLLM: what its entry point `vllm.general_plugins` calls in every process of vLLM.

Importing this imports nothing of vLLM; it never travels with a checkpoint.
"""

__all__ = ["register"]


def register() -> None:
    """
    Registers the native model with vLLM, and says when this vLLM was not tested. May be called more than once.

    Raises:
        ImportError: This vLLM lacks what the registration needs; names the versions that were tested.
    """
    from .vllm_registration import register_model

    register_model()
