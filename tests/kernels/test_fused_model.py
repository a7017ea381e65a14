"""The whole model on the fused kernels against `eager`, in triton's interpreter: masks, caches, packing, gradients.

As in test_triton_interpreter.py, collected without TRITON_INTERPRET this file holds the one test that sets it.
"""

import pytest
import torch
from fused_models import assert_close, build_model, with_eager
from interpreter import INTERPRETED, assert_passes_interpreted

from modeling_diff import diff_attention, diff_attention_auto
from modeling_diff.diff_attention_triton import triton_can_run
from modeling_diff.training import CancelledShare


pytest.importorskip("triton", reason="triton is not installed, so there are no kernels to interpret")

if not INTERPRETED:

    def test_fused_models_pass_in_an_interpreter_process():
        assert_passes_interpreted(__file__)

    def test_diff_triton_without_a_gpu_raises_by_name():
        if torch.cuda.is_available():
            pytest.skip("there is a GPU, where diff_triton runs")
        model = build_model("v1")
        with pytest.raises(ImportError, match=r'attn_implementation="diff_triton" cannot run here: .*CUDA'):
            model.set_attn_implementation("diff_triton")

    def test_kernels_refuse_amd_gpus(monkeypatch):
        """Which torch calls CUDA, with compute capabilities that read like NVIDIA's."""
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert "NVIDIA" in triton_can_run("cuda")

    def test_default_takes_the_standard_call_where_triton_cannot_run(monkeypatch, caplog):
        monkeypatch.setitem(diff_attention_auto.FASTEST, "cpu", "diff_triton")
        monkeypatch.setattr(diff_attention_auto, "FUSED_DTYPES", (torch.float32,))
        model = build_model("v1")
        logits = model(torch.arange(9)[None]).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(logits, model(torch.arange(9)[None]).logits)
        assert not caplog.records  # it is what this machine has: nothing to warn of

else:
    VARIANTS = {
        "v1": {"kind": "v1"},
        "v2": {"kind": "v2"},
        "v1 with a LLaMA layer": {"kind": "v1", "differential_layers": [1]},
        "v2 with a LLaMA layer": {"kind": "v2", "differential_layers": [0]},
        "v1 with some differential heads": {"kind": "v1", "differential_heads": [[1], [0, 1]]},
    }

    @pytest.fixture(params=VARIANTS)
    def model(request):
        sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2, "pad_token_id": 0}
        return build_model(**sizes, **VARIANTS[request.param])

    @pytest.fixture
    def inputs():
        """Two rows of 17 tokens, the second padded by 4 on the left."""
        ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    def test_fused_logits_and_gradients_equal_eager_with_left_padding(model, inputs):
        labels = inputs["input_ids"].clone()
        labels[1, :5] = -100  # the first token after the padding is predicted by a row of padding

        def run():
            model.zero_grad()
            output = model(**inputs, labels=labels)
            output.loss.backward()
            logits = torch.cat((output.logits[0], output.logits[1, 4:])).detach()
            return {"logits": logits} | {name: p.grad.clone() for name, p in model.named_parameters()}

        expected, ours = with_eager(model, "diff_triton", run)
        for name, value in expected.items():
            assert_close(ours[name], value, name)

    def test_attentions_asked_of_the_kernels_are_warned_of(model, inputs, monkeypatch):
        texts = []
        monkeypatch.setattr(diff_attention.logger, "warning_once", texts.append)
        model.set_attn_implementation("diff_triton")
        assert model(**inputs, output_attentions=True).attentions == ()
        layers = model.config.num_hidden_layers
        assert len(texts) == layers and all("`diff_triton` attention does not support" in text for text in texts)

    @pytest.mark.parametrize("kind", ["padded on the left", "packed"])
    @pytest.mark.parametrize("variant", ["v1", "v2"])
    def test_cancelled_share_is_measured_under_the_kernels_masks(variant, kind, inputs):
        model = build_model(variant, hidden_size=64).train()
        if kind == "packed":
            positions = torch.cat((torch.arange(9), torch.arange(8)))[None]
            inputs = {"input_ids": inputs["input_ids"][:1], "position_ids": positions}
        else:
            inputs = {name: tensor.flip(0) for name, tensor in inputs.items()}  # it looks at the first row

        def run():
            # Of the first layer, as rows of padding, which see nothing, leave it as 0 by the kernels only.
            share = CancelledShare(model.model.layers[0].self_attn)
            model(**inputs, use_cache=False)
            return share.value

        assert_close(*with_eager(model, "diff_triton", run))

    def test_fused_packed_sequences_do_not_see_each_other(model, inputs):
        positions = torch.cat((torch.arange(9), torch.arange(8)))[None]
        row = inputs["input_ids"][:1]

        def run():
            with torch.no_grad():
                packed = model(row, position_ids=positions, use_cache=False).logits
                return packed, model(row[:, 9:], use_cache=False).logits

        (expected, alone), (ours, ours_alone) = with_eager(model, "diff_triton", run)
        assert_close(ours, expected)
        assert_close(ours[:, 9:], alone)
        assert_close(ours_alone, alone)

    def test_fused_packed_rows_equal_eager(model, inputs):
        first, second = (torch.cat((torch.arange(n), torch.arange(17 - n))) for n in (9, 1))
        positions = torch.stack((first, second))

        def run():
            with torch.no_grad():
                return model(inputs["input_ids"], position_ids=positions, use_cache=False).logits

        expected, ours = with_eager(model, "diff_triton", run)
        assert_close(ours, expected)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_fused_generation_equals_eager(model, inputs, cache):
        settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        expected, ours = with_eager(model, "diff_triton", lambda: model.generate(**inputs, **settings))
        assert torch.equal(ours, expected)

    def test_fused_refuses_what_it_cannot_read(model, inputs):
        model.set_attn_implementation("diff_triton")
        holes = inputs["attention_mask"].clone()
        holes[0, 6] = 0
        with pytest.raises(ValueError, match="padding between tokens"):
            model(inputs["input_ids"], attention_mask=holes)
        by_hand = torch.ones(2, 1, 17, 17, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match="no custom masks"):
            model(inputs["input_ids"], attention_mask=by_hand)
