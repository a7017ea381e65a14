"""Optimizer groups: every trainable parameter once, lambda and norms without decay, rates by factors."""

import pytest
import torch
from torch import nn
from trainable_models import random_rows, tiny_model, training_arguments

from modeling_diff.training import DiffTrainer, lora_config, parameter_groups


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VARIANTS = ("v1", "v2")
RATE = 1e-2
DECAY = 0.1
LAMBDA_FACTOR = 5.0
QUERY_FACTOR = 1 / 3


def groups_of(model):
    return parameter_groups(
        model, learning_rate=RATE, weight_decay=DECAY, lambda_factor=LAMBDA_FACTOR, query_factor=QUERY_FACTOR
    )


def with_adapter(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, lora_config(model, r=4, use_dora=True))


class Wrapped(nn.Module):
    """As DDP and others do: the model under a name of theirs."""

    def __init__(self, model):
        super().__init__()
        self.module = model


WRAPPERS = {"bare": lambda model: model, "peft": with_adapter, "module": Wrapped, "compiled": torch.compile}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_trainable_parameter_is_in_one_group_with_its_own_settings(variant, wrapper):
    model = WRAPPERS[wrapper](tiny_model(variant, attention_bias=True, differential_layers=[1]))
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouped = [(names[p], group["lr"], group["weight_decay"]) for group in groups_of(model) for p in group["params"]]
    assert sorted(name for name, _, _ in grouped) == sorted(names.values())
    for name, rate, decay in grouped:
        is_lambda = "diff_lambda" in name or "lambda_proj" in name
        mirrored = variant == "v2" and "layers.1.self_attn.q_proj" in name
        vector = "norm" in name or name.endswith("bias") or "magnitude" in name
        assert rate == pytest.approx(RATE * (LAMBDA_FACTOR if is_lambda else QUERY_FACTOR if mirrored else 1)), name
        assert decay == (0 if is_lambda or vector else DECAY), name
    assert any("lambda" in name for name, _, _ in grouped)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decay_shrinks_matrices_alone(variant):
    model = tiny_model(variant, attention_bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameter_groups(model, learning_rate=RATE, weight_decay=DECAY)).step()
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and "lambda" not in name
        # One rounding of float32.
        torch.testing.assert_close(parameter, before[name] * (1 - RATE * DECAY if matrix else 1), rtol=1e-6, atol=0)


def test_llama_is_taken_as_well():
    groups = {group["name"]: len(group["params"]) for group in groups_of(tiny_model("llama", num_hidden_layers=1))}
    assert groups == {"rest": 9, "rest, no decay": 3}


@pytest.mark.parametrize("name", ["lambda_factor", "query_factor"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_factors_that_train_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        parameter_groups(tiny_model("v1"), learning_rate=RATE, **{name: value})


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(tiny_model("v1").requires_grad_(False), learning_rate=RATE)


def test_flat_parameters_are_refused():
    model = nn.Module()
    model.register_parameter("_flat_param", nn.Parameter(torch.zeros(4)))
    with pytest.raises(ValueError, match="FSDP2"):
        parameter_groups(model, learning_rate=RATE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_trainer_trains_the_groups(variant, optim, tmp_path):
    arguments = training_arguments(
        tmp_path, optim=optim, weight_decay=DECAY, lr_scheduler_type="constant", max_steps=1
    )
    trainer = DiffTrainer(
        tiny_model(variant),
        arguments,
        train_dataset=random_rows(),
        lambda_factor=LAMBDA_FACTOR,
        query_factor=QUERY_FACTOR,
    )
    trainer.train()
    expected = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups_of(trainer.model)}
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups} == expected
    assert len(expected) == {"v1": 3, "v2": 4}[variant]


def test_every_training_has_the_rate_of_its_arguments(tmp_path):
    """As in a search over rates, which trains a new model in each trial; the rate that is logged is theirs as well."""
    arguments = training_arguments(tmp_path, lr_scheduler_type="constant", max_steps=1)
    trainer = DiffTrainer(
        model_init=lambda: tiny_model("v1"), args=arguments, train_dataset=random_rows(), lambda_factor=LAMBDA_FACTOR
    )
    for rate in (1e-2, 1e-5):
        trainer.args.learning_rate = rate
        trainer.train()
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == pytest.approx({"rest": rate, "rest, no decay": rate, "lambda": LAMBDA_FACTOR * rate})
        assert trainer.state.log_history[0]["learning_rate"] == rate


def test_trainer_refuses_an_optimizer_with_its_own_groups(tmp_path):
    trainer = DiffTrainer(tiny_model("v1"), training_arguments(tmp_path), train_dataset=random_rows())
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"optimizer_dict": {}})
    with pytest.raises(ValueError, match="groups parameters itself"):
        trainer.create_optimizer()


@pytest.mark.parametrize("made", ["before", "by model_init"])
def test_adapter_on_a_bfloat16_base_trains_the_norm_over_heads(made, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted():
        base = tiny_model("v1").to(torch.bfloat16)
        return peft.get_peft_model(base, lora_config(base, r=4))

    arguments = training_arguments(tmp_path, bf16=True, max_steps=1, learning_rate=2e-4)
    given = {"model": adapted()} if made == "before" else {"model_init": adapted}
    trainer = DiffTrainer(args=arguments, train_dataset=random_rows(), **given)
    trainer.train()
    norms = {name: p.detach() for name, p in trainer.model.named_parameters() if "sub_norm.modules_to_save" in name}
    assert len(norms) == 2
    for weight in norms.values():
        # Adam's first step is as long as the rate, and 1 what the norm was; float32 near 1.
        torch.testing.assert_close((weight - 1).abs(), torch.full((8,), 2e-4), rtol=0, atol=1e-6)
    trainer.save_model(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(tiny_model("v1"), tmp_path / "adapter").state_dict()
    assert all(torch.equal(reloaded[name], weight) for name, weight in norms.items())
