"""
Which path a call takes when none was asked for, and that every one gives what `eager` gives, in triton's interpreter.

As in test_triton_interpreter.py, collected without TRITON_INTERPRET this file holds the one test that sets it. The
interpreter stands for the GPU: the table is told that CPUs run the kernels, in float32.
"""

import logging

import pytest
import torch
from fused_models import assert_close, build_model, record_paths, with_eager
from interpreter import INTERPRETED, assert_passes_interpreted

from modeling_diff import diff_attention_auto as auto
from modeling_diff import diff_attention_triton_check as check
from modeling_diff.diff_transformers_compat import cache_argument, output_cache


pytest.importorskip("triton", reason="triton is not installed, so there are no kernels to interpret")

if not INTERPRETED:

    def test_default_path_passes_in_an_interpreter_process():
        assert_passes_interpreted(__file__)

else:
    CPU = torch.device("cpu")

    @pytest.fixture(autouse=True)
    def kernels_on_the_cpu(monkeypatch):
        monkeypatch.setitem(auto.FASTEST, "cpu", "diff_triton")
        monkeypatch.setattr(auto, "FUSED_DTYPES", (torch.float32,))
        monkeypatch.setattr(check, "NUM_TOKENS", 40)

    @pytest.fixture
    def paths(monkeypatch):
        return record_paths(monkeypatch)

    @pytest.fixture
    def unchecked():
        """The kernels are not checked yet, and what is found of them here is forgotten."""
        check._kernels_agree.cache_clear()
        yield
        check._kernels_agree.cache_clear()

    @pytest.fixture(params=["v1", "v2"])
    def model(request):
        """One differential layer and one that kept LLaMA's attention."""
        return build_model(request.param, differential_layers=[1])

    @pytest.fixture
    def ids():
        return torch.randint(3, 96, (2, 13), generator=torch.Generator().manual_seed(1))

    def left_padding(ids):
        return (torch.arange(13) >= torch.tensor([[0], [4]])).long()

    def assert_equals_eager(model, function):
        for expected, ours in zip(*with_eager(model, "diff_auto", function), strict=True):
            assert_close(ours, expected)

    def in_two_steps(model, ids):
        """Logits of eight tokens, then of four more over the cache, then of one."""
        with torch.no_grad():
            start = model(ids[:, :8])
            more = model(ids[:, 8:12], **cache_argument(output_cache(start)))
            return start.logits, more.logits, model(ids[:, 12:], **cache_argument(output_cache(more))).logits

    def logits_and_gradients(model, ids, **kwargs):
        model.zero_grad()
        output = model(ids, labels=ids, **kwargs)
        output.loss.backward()
        return output.logits, *(parameter.grad for parameter in model.parameters())

    def test_kernels_take_training_decoding_and_padding(model, ids, paths):
        packed = torch.cat((torch.arange(9), torch.arange(4))).expand(2, -1)
        assert_equals_eager(model, lambda: logits_and_gradients(model, ids))
        assert_equals_eager(model, lambda: logits_and_gradients(model, ids, position_ids=packed, use_cache=False))
        assert_equals_eager(model, lambda: in_two_steps(model, ids))
        mask = left_padding(ids)
        assert_equals_eager(model, lambda: [model(ids, attention_mask=mask).logits[mask.bool()]])
        assert paths() == {"diff_triton"}

    def test_everything_else_goes_through_the_standard_call(model, ids, paths):
        holes = torch.ones_like(ids)
        holes[0, 6] = 0
        by_hand = torch.full((2, 1, 13, 13), torch.finfo(torch.float32).min).triu(1)
        by_hand[0, 0, 5:, :5] = torch.finfo(torch.float32).min
        for mask in (holes, by_hand):
            assert_equals_eager(model, lambda mask=mask: [model(ids, attention_mask=mask).logits[:, 7:]])
        assert_equals_eager(model.double(), lambda: logits_and_gradients(model, ids))
        assert paths() == {"sdpa"}

    def test_layers_read_the_kernels_masks_where_the_kernels_are_not_trusted(model, ids, paths, monkeypatch):
        monkeypatch.setattr(auto, "kernels_agree", lambda *_, **__: False)
        assert_equals_eager(model, lambda: in_two_steps(model, ids))
        mask = left_padding(ids)
        assert_equals_eager(model, lambda: [model(ids, attention_mask=mask).logits[mask.bool()]])
        packed = torch.cat((torch.arange(9), torch.arange(4))).expand(2, -1)
        assert_equals_eager(model, lambda: logits_and_gradients(model, ids, position_ids=packed, use_cache=False))
        monkeypatch.setattr(model.config, "is_causal", False, raising=False)
        assert_equals_eager(model, lambda: [model(ids, attention_mask=mask).logits[mask.bool()]])
        assert paths() == {"sdpa"}

    def test_bidirectional_attention_of_the_kernels_equals_eager(model, ids, paths, monkeypatch):
        monkeypatch.setattr(model.config, "is_causal", False, raising=False)
        for mask in (torch.ones_like(ids), left_padding(ids), left_padding(ids).flip(-1)):
            assert_equals_eager(model, lambda mask=mask: [model(ids, attention_mask=mask).logits[mask.bool()]])
        assert paths() == {"diff_triton"}

    def test_generation_over_a_static_cache_equals_eager(model, ids):
        settings = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        assert_equals_eager(model, lambda: [model.generate(ids, attention_mask=left_padding(ids), **settings)])

    @pytest.mark.filterwarnings("ignore")
    def test_compiled_model_checks_the_kernels_and_runs_on_them(model, ids, unchecked):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_equals_eager(model, lambda: logits_and_gradients(compiled, ids, use_cache=False))
        assert check._kernels_agree.cache_info().misses == 2  # a differential layer, and one of LLaMA's
        holes = torch.ones_like(ids)
        holes[0, 6] = 0
        assert_equals_eager(model, lambda: [compiled(ids, attention_mask=holes, use_cache=False).logits[:, 7:]])

    def test_kernels_are_checked_under_checkpointing_and_inference_mode(model, ids, unchecked):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()  # counts the tensors that the first pass saved: those of the check are not among them
        check._kernels_agree.cache_clear()
        with torch.inference_mode():
            assert torch.allclose(model.eval()(ids, labels=ids).loss, loss)
        assert check._kernels_agree.cache_info().misses == 2

    WIDTHS = {"v1": (16, 32, 32, 2), "v2": (32, 32, 32, 2), "one map": (32, 32, 32, 1)}

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("widths", WIDTHS)
    def test_sound_kernels_pass_the_check(widths, training, caplog):
        for dtype in (torch.float32, torch.float16):
            assert check.kernels_agree(CPU, dtype, *WIDTHS[widths], training)
        assert not caplog.records

    @pytest.mark.parametrize("widths", WIDTHS)
    @pytest.mark.parametrize(
        ("training", "broken", "named"),
        [
            (False, lambda output, query: torch.cat((output[:, :-1], 2 * output[:, -1:]), 1), "output"),
            (False, lambda output, query: output if query.shape[2] > 1 else 2 * output, "decode step"),
            (True, lambda output, query: output.detach() + 2 * (output - output.detach()), "gradient of query"),
            (True, lambda output, query: output * float("nan"), "output"),
        ],
    )
    def test_unsound_kernels_fail_the_check_and_are_named(
        widths, training, broken, named, unchecked, monkeypatch, caplog
    ):
        sound = check.diff_attention_triton
        monkeypatch.setattr(
            check, "diff_attention_triton", lambda query, *args, **kwargs: broken(sound(query, *args, **kwargs), query)
        )
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert not check.kernels_agree(CPU, torch.float32, *WIDTHS[widths], training)
        assert len(caplog.records) == 1 and f"their {named} is off by" in caplog.text

    def test_kernels_whose_softmax_overflows_fail_the_check(unchecked, monkeypatch, caplog):
        def without_maximum(query, key, value, diff_lambda, *, scaling, **_):
            key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
            weights = (query @ key.transpose(-1, -2) * scaling).exp().tril(key.shape[2] - query.shape[2])
            return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2)

        monkeypatch.setattr(check, "diff_attention_triton", without_maximum)
        assert not check.kernels_agree(CPU, torch.float16, *WIDTHS["one map"], False)
        assert "their output is off by nan" in caplog.text

    def test_kernels_that_do_not_compile_are_not_used_and_the_reason_is_given(
        model, ids, paths, unchecked, monkeypatch, caplog
    ):
        def fail(*args, **kwargs):
            raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")

        monkeypatch.setattr(check, "diff_attention_triton", fail)
        assert_equals_eager(model, lambda: logits_and_gradients(model, ids))
        assert paths() == {"sdpa"} and "Hardware limit: 101376" in caplog.text

    def states(num_queries, num_keys, map_dim=16, dtype=torch.float32):
        query = torch.zeros(1, 4, num_queries, map_dim, dtype=dtype)
        return query, *torch.zeros(2, 1, 1, num_keys, 2 * map_dim, dtype=dtype)

    @pytest.mark.parametrize(
        ("inputs", "mask", "path"),
        [
            (states(5, 5), None, "diff_triton"),
            (states(1, 5), None, "diff_triton"),
            (states(3, 5), None, "sdpa"),  # sdpa's function means the first keys by it, the kernels' never gives it
            (states(3, 5), torch.tensor([[[[1, 5]]]], dtype=torch.int32), "diff_triton"),
            (states(5, 5), torch.ones(1, 1, 5, 5, dtype=torch.bool), "sdpa"),
            (states(5, 5, map_dim=160), None, "sdpa"),
            (states(5, 5, dtype=torch.float64), None, "sdpa"),
            (states(5, 5, dtype=torch.float16), None, "sdpa"),
        ],
    )
    def test_call_takes_the_fastest_path_that_can_run_it(inputs, mask, path):
        assert auto.fastest_path(None, *inputs, mask, 2, True)[0] == path
        with torch.autocast("cpu", dtype=torch.float16):
            assert auto.fastest_path(None, *inputs, mask, 2, True)[0] == "sdpa"  # the table here has float32 alone
