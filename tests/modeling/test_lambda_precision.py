"""lambda stays in float32 through every road on which the rest of the model is narrowed."""

import pytest
import torch

from modeling_diff import DiffLlamaForCausalLM, DiffLlamaForSequenceClassification, DiffLlamaModel


NARROWING = {
    "to_bfloat16": lambda model: model.to(torch.bfloat16),
    "to_float16_keyword": lambda model: model.to(dtype=torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
    "to_and_back": lambda model: model.to(torch.bfloat16).float().half(),
}


@pytest.fixture
def model(tiny_model):
    return tiny_model("v1")


def lambda_vectors(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "diff_lambda" in name}


def assert_lambda_is_exact(model, expected):
    vectors = lambda_vectors(model)
    assert len(vectors) == len(expected) == 8
    for name, vector in vectors.items():
        assert vector.dtype == torch.float32, name
        assert torch.equal(vector, expected[name]), name


@pytest.mark.parametrize("narrow", NARROWING.values(), ids=NARROWING)
def test_lambda_keeps_its_value_when_the_model_is_narrowed(model, random_ids, narrow):
    expected = lambda_vectors(model)
    narrowed = narrow(model)
    assert_lambda_is_exact(narrowed, expected)
    assert narrowed.lm_head.weight.dtype in (torch.float16, torch.bfloat16)
    assert narrowed(random_ids(1, 5)).logits.dtype == narrowed.lm_head.weight.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
@pytest.mark.parametrize("model_class", [DiffLlamaForCausalLM, DiffLlamaModel, DiffLlamaForSequenceClassification])
def test_lambda_keeps_its_value_when_loaded_narrow(model, tmp_path, model_class, dtype):
    expected = lambda_vectors(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, dtype=dtype)
    prefix = "" if model_class is DiffLlamaModel else "model."
    assert_lambda_is_exact(loaded, {prefix + name.removeprefix("model."): value for name, value in expected.items()})
    narrow = torch.bfloat16 if dtype == "auto" else dtype
    assert {p.dtype for name, p in loaded.named_parameters() if "diff_lambda" not in name} == {narrow}


def test_lambda_is_built_in_float32_under_a_narrow_default(tiny_config):
    model = DiffLlamaForCausalLM._from_config(tiny_config("v1"), dtype=torch.bfloat16)
    assert {vector.dtype for vector in lambda_vectors(model).values()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_lambda_assigned_narrow_is_still_computed_in_float32(model):
    """accelerate sets parameters past everything that keeps them wide."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    diff_lambda = model.model.layers[0].self_attn.diff_lambda
    vectors = [vector.detach().double() for vector in diff_lambda.parameters()]
    expected = (vectors[0] @ vectors[1]).exp() - (vectors[2] @ vectors[3]).exp() + diff_lambda.lambda_init
    assert diff_lambda().dtype == torch.float32
    assert diff_lambda().item() == pytest.approx(expected.item(), abs=1e-6)  # bfloat16 would be off by 1e-3


def test_lambda_follows_to_float64(model):
    assert {vector.dtype for vector in lambda_vectors(model.double()).values()} == {torch.float64}


def test_lambda_gradient_is_float32_in_a_narrow_model(model, random_ids):
    model.to(torch.bfloat16)
    model(random_ids(2, 9), labels=random_ids(2, 9)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
        if "diff_lambda" in name:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0, name


def test_lambda_survives_autocast(model, random_ids):
    input_ids = random_ids(2, 9)
    expected = [layer.self_attn.diff_lambda() for layer in model.model.layers]
    with torch.autocast("cpu", torch.bfloat16):
        values = [layer.self_attn.diff_lambda() for layer in model.model.layers]
        assert model(input_ids).logits.isfinite().all()
    assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))


def test_lambda_is_the_paper_formula(tiny_model):
    module = tiny_model("v1").model.layers[1].self_attn.diff_lambda
    q1, k1, q2, k2 = (getattr(module, f"lambda_{name}").double() for name in ("q1", "k1", "q2", "k2"))
    expected = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + module.lambda_init
    # float32 against float64: two exponentials near 1.
    torch.testing.assert_close(module().double(), expected, rtol=0, atol=1e-6)


def test_v2_lambda_is_a_float32_sigmoid_of_the_token(tiny_model, random_ids):
    model = tiny_model("v2", attn_implementation="eager").to(torch.bfloat16)
    maps = {}
    model(random_ids(2, 9), attention_maps_by_layer=maps)
    assert {layer.diff_lambda.dtype for layer in maps.values()} == {torch.float32}
    assert all(((layer.diff_lambda > 0) & (layer.diff_lambda < 1)).all() for layer in maps.values())
