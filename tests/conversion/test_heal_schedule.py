"""The path of lambda_init and epsilon: nothing changes where it starts, a plain model stands where it ends."""

from itertools import pairwise

import pytest
import torch
from random_llamas import SMALL, random_model, token_ids

from conversion.healing.annealing import AnnealedNorm, Annealing, layer_paths
from conversion.healing.options import HealingOptions
from conversion.healing.student import final_config
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


IDS = token_ids()
WIDTH = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
NEUTRAL = 2.0**24


def student(eps=NEUTRAL, lambda_init=0.05, **changes):
    """A V1 model with lambdas below 0.2 and outputs of ordinary size whatever epsilon is."""
    config = DiffLlamaConfig(**(SMALL | WIDTH), sub_norm_eps=eps, lambda_init=[lambda_init] * 2, **changes)
    model = random_model(DiffLlamaForCausalLM, config)
    for layer in model.model.layers:
        layer.self_attn.sub_norm.weight.data *= (1 + eps) ** 0.5
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def begun(model, mode="floor", norm_share=0.5):
    end = final_config(model.config, HealingOptions(lambda_mode=mode))
    annealing = Annealing(layer_paths(model, model.config, end, IDS), norm_share)
    annealing.begin(model)
    return annealing, end


@pytest.mark.parametrize("mode", ["floor", "paper"])
@pytest.mark.parametrize("eps", [NEUTRAL, 1e-5])
def test_the_start_computes_what_the_checkpoint_does(mode, eps):
    model = student(eps)
    before = logits(model)
    begun(model, mode)
    # float32: the norm's weight is divided by a factor, and its output multiplied by it.
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["floor", "paper"])
def test_the_end_is_a_plain_model_of_the_final_config(mode, tmp_path):
    model = student()
    annealing, end = begun(model, mode)
    annealing.end(model)
    assert not any(isinstance(module, AnnealedNorm) for module in model.modules())
    plain = DiffLlamaForCausalLM(end).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model))
    assert end.sub_norm_eps == 1e-5
    # the paper's schedule, arXiv:2410.05258
    assert end.lambda_init == ([0.05, 0.05] if mode == "floor" else pytest.approx([0.2, 0.355509], abs=1e-6))


def test_there_is_no_jump_on_the_way_and_norm_comes_first():
    """With weights held still, 200 steps each change logits by a small part of what all of them do."""
    model = student()
    annealing, _ = begun(model, "paper", norm_share=0.5)
    path = []
    for step in range(201):
        annealing.move(model, step / 200)
        path.append(logits(model))
    jumps = [(after - before).abs().max().item() for before, after in pairwise(path)]
    assert max(jumps) < 0.15 * (path[-1] - path[0]).abs().max().item()
    annealing.move(model, 0.5)
    assert model.model.layers[0].self_attn.sub_norm.eps == pytest.approx(1e-5)
    assert model.model.layers[0].self_attn.diff_lambda.lambda_init == pytest.approx((0.05 + 0.2) / 2)


@pytest.mark.parametrize("eps", [NEUTRAL, 1e-5])
def test_a_head_of_usual_size_keeps_it_all_the_way(eps):
    model = student(eps)
    annealing, _ = begun(model, "paper")
    attention = model.model.layers[1].self_attn
    path = annealing.paths[1]
    outputs = torch.randn(1, 3, 2, attention.head_dim, generator=torch.Generator().manual_seed(0))
    outputs *= (path.mean_square / outputs.square().mean(-1, keepdim=True)).sqrt()
    sizes = []
    for done in (0, 0.1, 0.4, 0.7, 1):
        annealing.move(model, done)
        sizes.append(attention.normalize(outputs).detach())
    for size in sizes[1:]:
        torch.testing.assert_close(size, sizes[0], rtol=1e-4, atol=1e-6)  # float32


def test_layers_with_nothing_to_change_stay_as_they_are():
    model = student(eps=1e-5)
    annealing, _ = begun(model)
    assert not annealing.paths
    assert not any(isinstance(module, AnnealedNorm) for module in model.modules())
