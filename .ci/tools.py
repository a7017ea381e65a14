"""
Compares the adapter that a tool of `.ci/tools` saved with what the tool merged.

    tools.py BASE ADAPTER MERGED
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


# float32, five layers, weights added up in another order.
TOLERANCE = 1e-4


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 2048, (2, 96), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=tokens).logits


def check(base: str, adapter: str, merged: str) -> None:
    """Ends with an error unless the reload with PEFT equals the merge, and lambda itself was trained."""
    load = {"trust_remote_code": True, "dtype": torch.float32}
    before = logits(AutoModelForCausalLM.from_pretrained(base, **load))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **load), adapter)
    reloaded = logits(model)
    trained = [
        (whole.modules_to_save["default"], whole.original_module)
        for whole in model.modules()
        if hasattr(whole, "modules_to_save") and hasattr(whole, "original_module")
    ]
    moved = [
        (now - was).abs().max().item()
        for new, old in trained
        for now, was in zip(new.parameters(), old.parameters(), strict=True)
    ]
    change = (reloaded - before).abs().max().item()
    difference = (logits(AutoModelForCausalLM.from_pretrained(merged, **load)) - reloaded).abs().max().item()
    print(
        f"{adapter}: {change:.3g} from {base}; its merge {difference:.2g} from the reload; {len(moved)} tensors whole"
    )
    if not moved or min(moved) == 0:
        raise SystemExit(f"{adapter}: lambda was not trained or not saved: {moved}")
    if change < 100 * TOLERANCE or difference > TOLERANCE:
        raise SystemExit(f"{merged}: not the model that {adapter} makes of {base}")


if __name__ == "__main__":
    check(*sys.argv[1:])
