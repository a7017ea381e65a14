"""The comparisons under examples/ run in their smallest form, and say what the conversions promise."""

import json

import compare_continuations
import compare_healing
import compare_lora
import pytest
import torch
from blended_attention import Blend
from transformers import LlamaForCausalLM

from conversion import convert_checkpoint
from modeling_diff import DiffLlamaForCausalLM


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's own
]


def test_lora_is_compared_at_equal_parameters(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    compare_lora.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)])
    rows = {(row["model"], row["task"]): row for row in json.loads((tmp_path / "lora.json").read_text())["rows"]}
    assert len(rows) == 6
    for (_, task), row in rows.items():
        assert row["trainable"] == pytest.approx(rows["LLaMA", task]["trainable"], rel=0.03)
    for task in ("instructions", "modules"):  # exact V2 starts where the LLaMA does; float32 sums in another order
        assert rows["DIFF V2", task]["loss_before"] == pytest.approx(rows["LLaMA", task]["loss_before"], rel=1e-5)


def test_continuations_start_from_equal_losses(tmp_path):
    compare_continuations.main(["--smoke", "--output", str(tmp_path)])
    llama, *others = json.loads((tmp_path / "continuations.json").read_text())["rows"]
    for row in others:
        assert row["before"]["heldout_loss"] == pytest.approx(llama["before"]["heldout_loss"], rel=1e-5)
        assert row["before"]["lambda_by_layer"] == pytest.approx([0.5] * 5)


def test_blend_is_the_llama_at_first_and_plain_v1_at_the_end(tmp_path):
    convert_checkpoint(
        compare_healing.EMBEDDED,
        tmp_path / "v1",
        "v1",
        uncalibrated=True,
        norm="neutral",
        lambda_init=0.05,
        measure=False,
    )
    llama = LlamaForCausalLM.from_pretrained(compare_healing.EMBEDDED, dtype=torch.float32)
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path / "v1", dtype=torch.float32).eval()
    ids = torch.arange(3, 99)[None]
    with torch.no_grad():
        plain = model(ids).logits
        blend = Blend(model, share=0.5)
        blend.move(0.0)
        # The neutral norm turns an output by up to 0.05 %, a layer.
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=0.05)
        assert (plain - llama(ids).logits).abs().max() > 1
        blend.move(0.5)
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)  # float32


def test_healing_is_compared_from_every_start_asked_for(tmp_path):
    compare_healing.main(["--smoke", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "healing.json").read_text())
    assert [row["start"] for row in results["starts"]] == ["copy", "blend"]
    copy, blend = results["starts"]
    assert blend["curve"][0]["kl"] < 1e-3 < copy["curve"][0]["kl"]  # the blend starts as the LLaMA
    assert copy["after"]["kl_nats"] < copy["before"]["kl_nats"]
    assert (tmp_path / "healing.png").stat().st_size > 1000
