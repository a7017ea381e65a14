"""torch.compile without graph breaks or recompilation, and torch.export."""

import pytest
import torch
from tiny_models import tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from modeling_diff.diff_transformers_compat import cache_argument


# float32 logits of up to about 6.
FLOAT32_ATOL = 2e-5


@pytest.fixture(params=["eager", "sdpa", "diff_auto"])
def model(request, tiny_model, heads):
    torch._dynamo.reset()
    one_layer = {name: values[:1] for name, values in heads.items() if name == "differential_heads"}
    return tiny_model(**(heads | one_layer), attn_implementation=request.param, num_hidden_layers=1)


@torch.no_grad()
def decode_compiled(model, input_ids, compiled, prefill_length=9):
    cache = StaticCache(config=model.config, max_cache_len=24)
    logits = [model(input_ids[:, :prefill_length], **cache_argument(cache)).logits]
    for t in range(prefill_length, input_ids.shape[1]):
        position_ids = torch.tensor([[t]])
        with torch._dynamo.config.patch(error_on_recompile=t > prefill_length):
            step = compiled(input_ids[:, t : t + 1], position_ids=position_ids, **cache_argument(cache))
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


def test_static_cache_decoding_compiles_to_one_graph_once(model, random_ids):
    input_ids = random_ids(2, 13)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    decoded = decode_compiled(model, input_ids, compiled)
    torch.testing.assert_close(decoded, model(input_ids).logits, rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.slow
def test_inductor_decoding_equals_one_pass(tiny_model, random_ids):
    torch._dynamo.reset()
    model = tiny_model("v1", num_hidden_layers=1)
    input_ids = random_ids(2, 11)
    decoded = decode_compiled(model, input_ids, torch.compile(model.forward, fullgraph=True))
    torch.testing.assert_close(decoded, model(input_ids).logits, rtol=0, atol=FLOAT32_ATOL)


def test_training_step_compiles_to_one_graph_with_equal_gradients(model, random_ids):
    input_ids = random_ids(2, 13)
    model.train()
    gradients = []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # compiles the backward pass as well
    for forward in (model, compiled):
        model.zero_grad()
        forward(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        tolerance = 1e-4 * expected.abs().max().item()  # float32, relative to the tensor's largest entry
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "diff_auto"])
def test_training_compiles_to_one_graph_for_all_lengths(tiny_model, variant, implementation, random_ids):
    """Two graphs, as LLaMA: one of the first length, one of any other."""
    torch._dynamo.reset()
    model = tiny_model(variant, attn_implementation=implementation).train()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for length in (12, 21, 30, 150):
        input_ids = random_ids(2, length)
        loss, expected = (forward(input_ids, labels=input_ids, use_cache=False).loss for forward in (compiled, model))
        torch.testing.assert_close(loss, expected, rtol=0, atol=FLOAT32_ATOL)
    assert graphs.frame_count == 2


def export(model, input_ids):
    batch_size = torch.export.Dim("batch_size")
    num_tokens = torch.export.Dim("num_tokens", max=100)
    return torch.export.export(
        model,
        (input_ids,),
        kwargs={"use_cache": False},
        dynamic_shapes={"input_ids": {0: batch_size, 1: num_tokens}, "use_cache": None},
        strict=False,
    )


@pytest.fixture(scope="module")
def torch_exports_llama():
    """Skips where LLaMA itself, with grouped queries, cannot be exported for any length: torch 2.11 fixes one."""
    try:
        export(tiny_model("llama"), torch.arange(3, 29).view(2, 13))
    except torch._dynamo.exc.UserError as error:
        pytest.skip(f"torch {torch.__version__} cannot export transformers' own LLaMA either: {str(error)[:80]}")


@pytest.mark.usefixtures("torch_exports_llama")
def test_export_gives_equal_logits_for_other_shapes(model, random_ids):
    exported = export(model, random_ids(2, 13))
    for shape in ((2, 13), (3, 9), (1, 40)):
        input_ids = random_ids(*shape, seed=4)
        logits = exported.module()(input_ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids).logits, rtol=0, atol=FLOAT32_ATOL)
