"""The releases of vLLM that the native model was run with."""

TESTED_VLLM = "0.32.0"
TESTED_RELEASES = ((0, 32),)


def untested_vllm(found: tuple[int, ...], version: str) -> str | None:
    """Returns what to say of a release that was not tested, or None."""
    if found[:2] in TESTED_RELEASES:
        return None
    return (
        f"diff-llama was tested with vLLM {TESTED_VLLM}, found {version}: compare its tokens with `generate` before "
        "you rely on them."
    )


def unsupported_vllm(version: str, error: ImportError) -> str:
    """Returns what to say where names that the native model is built on are gone."""
    return f"diff-llama does not know vLLM {version} ({error}); it was tested with {TESTED_VLLM}: install that one."
