"""Whole models on the kernels on a GPU: by default in 16 bits, under autocast, and captured in CUDA graphs."""

import pytest
import torch
from fused_models import build_model, record_paths

from modeling_diff.diff_attention_triton_check import kernels_agree


pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(64, 128, 128, 2), (128, 256, 256, 2), (64, 64, 64, 2), (128, 128, 128, 1)])
def test_check_before_the_first_call_trusts_the_kernels_here(widths, dtype, training):
    assert kernels_agree(torch.device(DEVICE, torch.cuda.current_device()), dtype, *widths, training)


@pytest.fixture(params=["v1", "v2"])
def model(request):
    """Two differential layers and one that kept LLaMA's attention, maps of 64."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 3, "initializer_range": 0.05}
    heads = {"num_attention_heads": 4 if request.param == "v1" else 8, "num_key_value_heads": 2}
    return build_model(request.param, differential_layers=[0, 2], **sizes, **heads).to(DEVICE)


@pytest.fixture
def batch():
    """Two rows of 300 tokens, the second padded by 40 on the left."""
    ids = torch.randint(3, 96, (2, 300), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model):
    """All but V1's of lambda, one sum that cancels: test_triton_gpu.py measures it against what it sums."""
    return [parameter.grad.double() for name, parameter in model.named_parameters() if ".diff_lambda." not in name]


def logits_and_gradients(model, batch, implementation, autocast=False):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        output = model(**batch, use_cache=False)
    output.loss.backward()
    logits = output.logits.detach()[batch["attention_mask"].bool()].double()
    return [logits, *gradients(model)]


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_default_errs_no_more_than_the_standard_call(model, batch, how, monkeypatch):
    """Logits and every gradient against float64, relative to their norm."""
    paths = record_paths(monkeypatch)
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    ours, standard = (
        logits_and_gradients(model, batch, implementation, autocast=how == "autocast")
        for implementation in ("diff_auto", "sdpa")
    )
    assert paths() == {"diff_triton"}
    # Not `eager`: LLaMA's own, in the layer that kept it, gives NaN in float64 for rows of padding.
    expected = logits_and_gradients(model.double(), batch, "sdpa")
    for one, other, tensor in zip(ours, standard, expected, strict=True):
        # The same roundings in another order: 8 bits, summed over 300 tokens.
        assert (one - tensor).norm() <= 1.5 * (other - tensor).norm() + 2e-3 * tensor.norm()


def test_generation_in_cuda_graphs_equals_eager_generation(model, batch):
    """A static cache has transformers compile each step and capture it; in float32, where no two logits tie."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 12, "do_sample": False}
    model.set_attn_implementation("eager")
    expected = model.generate(**inputs, **settings)
    model.set_attn_implementation("diff_triton")
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), expected)


def test_compiled_training_step_equals_the_uncompiled_one(model, batch):
    batch = {name: tensor[:1] for name, tensor in batch.items()}  # the row without padding
    model = model.to(torch.bfloat16)
    expected = logits_and_gradients(model, batch, "diff_auto")
    del batch["attention_mask"]
    model.zero_grad()
    output = torch.compile(model, fullgraph=True)(**batch, use_cache=False)
    output.loss.backward()
    ours = [output.logits.detach()[0].double(), *gradients(model)]
    for one, other in zip(ours, expected, strict=True):
        # Fused elementwise operations round less often than separate ones.
        assert (one - other).norm() <= 3e-2 * other.norm()
