"""Tensor parallelism by the model's own plan, in two processes: everything equals one process."""

import pytest
import torch
from parallel_ranks import TOKENS, generate, gradients

from modeling_diff import DiffLlamaForCausalLM


pytestmark = pytest.mark.transformers(since="5.16", reason="it has no DistributedConfig with these plans")


NAMES = ("v1", "v2", "v1_with_llama_layer", "v2_with_llama_layer", "v1_with_mixed_layers")


@pytest.fixture(scope="module")
def tensor_parallel(run_ranks):
    folder, results, _ = run_ranks("ranks_tensor.py")
    return folder, results


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def one_process(checkpoints, name):
    return DiffLlamaForCausalLM.from_pretrained(checkpoints / name)


@pytest.fixture
def ranks(tensor_parallel, name):
    """What each rank found for one checkpoint."""
    return [results[name] for results in tensor_parallel[1]]


def assert_gradients_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(
            found[parameter], gradient, rtol=1e-4, atol=tolerance, msg=lambda text, p=parameter: f"{p}: {text}"
        )


def test_tensor_parallel_logits_equal_one_process(ranks, one_process):
    with torch.no_grad():
        expected = one_process(TOKENS).logits
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank["eager_logits"], expected, rtol=1e-4, atol=1e-5)


def test_tensor_parallel_splits_heads_and_keeps_pairs_together(ranks, one_process):
    whole = {name: tuple(parameter.shape) for name, parameter in one_process.named_parameters()}
    for rank in ranks:
        assert rank["num_attention_maps"] in (
            one_process.config.num_attention_heads // 2,  # differential heads, or LLaMA's of V2
            one_process.config.num_attention_heads,  # LLaMA's heads in V1, two to a head
        )
        for parameter, shape in rank["local_shapes"].items():
            if parameter.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "lambda_proj.weight")):
                assert shape == (whole[parameter][0] // 2, whole[parameter][1]), parameter
            if any(name in parameter for name in ("diff_lambda", "sub_norm", "q_norm", "k_norm")):
                assert shape == whole[parameter], parameter


def test_tensor_parallel_gradients_equal_one_process(ranks, one_process):
    expected = gradients(one_process)
    for rank in ranks:
        assert_gradients_equal(rank["gradients"], expected)


def test_tensor_parallel_gradients_accumulate_as_in_one_process(ranks, one_process):
    expected = gradients(one_process, num_passes=2)
    for rank in ranks:
        assert_gradients_equal(rank["accumulated_gradients"], expected)


@pytest.mark.parametrize("cache", ["generated", "generated_static"])
def test_tensor_parallel_generates_as_one_process(ranks, one_process, cache):
    expected = generate(one_process)
    for rank in ranks:
        assert torch.equal(rank[cache], expected)


def test_tensor_parallel_save_writes_the_whole_checkpoint(tensor_parallel, one_process, name):
    folder, _ = tensor_parallel
    saved, info = DiffLlamaForCausalLM.from_pretrained(folder / f"saved-{name}", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (folder / f"saved-{name}" / "config.json").read_text() == (folder / name / "config.json").read_text()
    expected = one_process.state_dict()
    assert saved.state_dict().keys() == expected.keys()
    for parameter, value in saved.state_dict().items():
        assert value.dtype == expected[parameter].dtype
        assert torch.equal(value, expected[parameter]), parameter


def test_tensor_parallel_refuses_to_split_a_key_value_head(tensor_parallel):
    for results in tensor_parallel[1]:
        message = results["one_key_value_head"]
        assert message.startswith("ValueError: tp_size=2")
        assert "num_key_value_heads=1" in message
