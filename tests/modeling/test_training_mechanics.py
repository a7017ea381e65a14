"""Initial values, gradient checkpointing, tied and resized embeddings, devices, saving and loading."""

import pytest
import torch

from modeling_diff import DiffLlamaForCausalLM


@pytest.fixture(params=["eager", "sdpa", "diff_auto"])
def model(request, tiny_model, heads):
    return tiny_model(**heads, attn_implementation=request.param).train()


def gradients_of(model, input_ids):
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_by_example_equal_each_alone(tiny_model, variant, implementation, random_ids):
    model = tiny_model(variant, attn_implementation=implementation)
    input_ids = random_ids(2, 9)

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,), {"labels": row, "use_cache": False}).loss

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    by_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, input_ids.unsqueeze(1))
    for row in range(2):
        for name, expected in gradients_of(model, input_ids[row : row + 1]).items():
            # float32, batched products in another order, relative to the tensor's largest entry.
            tolerance = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(by_example[name][row], expected, rtol=0, atol=tolerance, msg=name)


def test_model_on_the_meta_device_gives_shapes(tiny_model, variant, random_ids):
    with torch.device("meta"):
        logits = tiny_model(variant).to("meta")(random_ids(2, 20).to("meta")).logits
    assert logits.is_meta and logits.shape == (2, 20, 96)


def enable_checkpointing(model, use_reentrant):
    # transformers 5.23 renamed the method and deprecates the name that 5.17 has.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_leaves_every_gradient_equal(model, random_ids, use_reentrant):
    input_ids = random_ids(2, 9)
    expected = gradients_of(model, input_ids)
    enable_checkpointing(model, use_reentrant)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    gradients = gradients_of(model, input_ids)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, expected[name]), name


def test_every_new_tensor_learns_from_the_first_step(tiny_config, variant, random_ids):
    torch.manual_seed(0)
    model = DiffLlamaForCausalLM(tiny_config(variant, initializer_range=0.02)).train()
    for name, gradient in gradients_of(model, random_ids(2, 9)).items():
        assert gradient.abs().max() > 0, name


def test_training_lowers_the_loss(model, random_ids):
    input_ids = random_ids(4, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(model(input_ids, labels=input_ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_initial_values_have_the_documented_distributions(tiny_config, variant):
    torch.manual_seed(0)
    model = DiffLlamaForCausalLM(tiny_config(variant, hidden_size=256, initializer_range=0.05, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "diff_lambda" not in name:
            # Of at least 1024 draws: five standard errors of a standard deviation are 5 / sqrt(2 * 1024) = 0.11.
            assert parameter.std().item() == pytest.approx(0.05, rel=0.12), name
            assert abs(parameter.mean().item()) < 0.01, name


def test_lambda_vectors_are_drawn_with_their_own_deviation(tiny_config):
    torch.manual_seed(0)
    model = DiffLlamaForCausalLM(tiny_config("v1", hidden_size=1024, lambda_init_std=0.3, initializer_range=0.01))
    drawn = torch.cat([parameter for name, parameter in model.named_parameters() if "diff_lambda" in name])
    assert len(drawn) == 2 * 4 * 128
    # 1024 draws, as above.
    assert drawn.std().item() == pytest.approx(0.3, rel=0.12)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_with_equal_logits(tiny_model, heads, random_ids, tmp_path, tied):
    model = tiny_model(**heads, tie_word_embeddings=tied)
    input_ids = random_ids(2, 9)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded, report = DiffLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_old_logits(tiny_model, variant, random_ids, tied):
    model = tiny_model(variant, tie_word_embeddings=tied)
    input_ids = random_ids(2, 9)
    expected = model(input_ids).logits
    model.resize_token_embeddings(110)
    logits = model(input_ids).logits
    assert logits.shape[-1] == model.config.vocab_size == 110
    # float32 logits of up to about 6: the same products in a wider matrix.
    torch.testing.assert_close(logits[..., :96], expected, rtol=0, atol=2e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_model_on_the_meta_device_loads_weights_by_assignment(tiny_model, tiny_config, heads, random_ids):
    expected = tiny_model(**heads)
    input_ids = random_ids(2, 9)
    with torch.device("meta"):
        model = DiffLlamaForCausalLM(tiny_config(**heads))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shapes = {name: weight.shape for name, weight in expected.state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    model.load_state_dict(expected.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies are in no state dict
    assert torch.equal(model.eval()(input_ids).logits, expected(input_ids).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map_loads_equal_logits(tiny_model, heads, random_ids, tmp_path, device_map):
    model = tiny_model(**heads)
    input_ids = random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = DiffLlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    logits = loaded(input_ids.to(loaded.device)).logits.cpu()
    # float32 logits of up to about 6; "auto" may choose a GPU.
    torch.testing.assert_close(logits, model(input_ids).logits, rtol=0, atol=0 if device_map == "cpu" else 1e-3)


def test_layers_offloaded_to_disk_give_equal_logits(tiny_model, heads, random_ids, tmp_path):
    model = tiny_model(**heads)
    input_ids = random_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = DiffLlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_sharded_checkpoint_loads_with_equal_logits(tiny_model, heads, random_ids, tmp_path):
    model = tiny_model(**heads)
    input_ids = random_ids(2, 9)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(DiffLlamaForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


def test_evaluation_and_training_mode_compute_the_same(model, random_ids):
    input_ids = random_ids(2, 9)
    assert torch.equal(model.train()(input_ids).logits, model.eval()(input_ids).logits)
