"""Lambda in the log: what is written, against the maps and the formula; the floor, the warning, a loss of NaN."""

import logging as standard_logging

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from trainable_models import random_rows, tiny_model, training_arguments
from transformers import Trainer, TrainerCallback

from modeling_diff.diff_attention_modules import DiffLambda
from modeling_diff.training import (
    LORA_TARGETS,
    DiffTrainer,
    FiniteLossCallback,
    LambdaCallback,
    hold_lambda,
    lora_config,
)
from modeling_diff.training.cancellation import visible


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VARIANTS = ("v1", "v2")


class Reporter(TrainerCallback):
    """As an integration of report_to: it sees what a log holds when its turn comes."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def run(model, folder, callback, reporter=None, trainer_class=DiffTrainer, **overrides):
    callbacks = [reporter or Reporter(), callback]
    trainer = trainer_class(
        model, training_arguments(folder, **overrides), train_dataset=random_rows(), callbacks=callbacks
    )
    trainer.train()
    return trainer


def lambda_by_formula(module):
    q1, k1, q2, k2 = (getattr(module, f"lambda_{name}").detach().double() for name in ("q1", "k1", "q2", "k2"))
    return float((q1 @ k1).exp() - (q2 @ k2).exp() + module.lambda_init)


def test_v1_log_holds_lambda_and_its_distance(tmp_path):
    model = tiny_model("v1")
    reporter = Reporter()
    start = [lambda_by_formula(layer.self_attn.diff_lambda) for layer in model.model.layers]
    trainer = run(model, tmp_path, LambdaCallback(), reporter)
    end = [lambda_by_formula(layer.self_attn.diff_lambda) for layer in model.model.layers]
    seen = [logs for logs in reporter.logs if "loss" in logs]
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert len(seen) == len(history) == 4
    for logs in (seen[-1], history[-1]):
        for layer in range(2):
            # float32 against float64.
            assert logs[f"lambda/layer_{layer}/mean"] == pytest.approx(end[layer], abs=1e-6)
            assert logs[f"lambda/layer_{layer}/distance"] == pytest.approx(end[layer] - start[layer], abs=1e-6)
        assert abs(logs["lambda/layer_1/distance"]) > 1e-3
        assert logs["lambda/min"] == pytest.approx(min(end), abs=1e-6)
        assert logs["lambda/grad_norm"] > 0
    assert not any(name.startswith("lambda") for name in reporter.logs[-1])  # the summary at the end has no loss


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_console_shows_lambda_but_not_of_every_layer(tmp_path, capsys, disable_tqdm):
    """Whether a bar or `print` shows it. Attached again, as when a run is resumed, there is one such callback."""
    trainer = run(tiny_model("v2"), tmp_path, LambdaCallback(), disable_tqdm=disable_tqdm)
    printed = "".join(capsys.readouterr())
    assert "lambda/mean" in printed and "lambda/grad_norm" in printed and "lambda/layer_" not in printed
    assert "lambda/layer_1/mean" in trainer.state.log_history[0]
    trainer.attach_lambda_callbacks()
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("LayersOffConsole") == 1


@pytest.mark.parametrize("adapted", [False, True])
def test_v2_log_holds_the_mean_over_tokens_and_heads(tmp_path, adapted):
    model = tiny_model("v2")
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(model, lora_config(model, r=4))
    rows = torch.stack([row["input_ids"] for row in random_rows()])
    attentions = [m for m in model.modules() if hasattr(m, "lambda_proj")]
    expected = {}
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: expected.__setitem__(
                layer, module.compute_lambda(kwargs["hidden_states"]).double()
            ),
            with_kwargs=True,
        )
        for layer, attention in enumerate(attentions)
    ]
    with torch.no_grad():
        model.eval()(input_ids=rows)
    for hook in hooks:
        hook.remove()
    # One step on all rows: what is logged is the model before it moved.
    trainer = run(model, tmp_path, LambdaCallback(), max_steps=1, per_device_train_batch_size=16)
    (logs,) = (logs for logs in trainer.state.log_history if "loss" in logs)
    for layer, values in expected.items():
        assert logs[f"lambda/layer_{layer}/mean"] == pytest.approx(values.mean().item(), abs=1e-6)
        assert logs[f"lambda/layer_{layer}/min"] == pytest.approx(values.min().item(), abs=1e-6)
        assert logs[f"lambda/layer_{layer}/max"] == pytest.approx(values.max().item(), abs=1e-6)
        assert logs[f"lambda/layer_{layer}/distance"] == 0
    assert not any(module._forward_hooks for module in model.modules())


class TrainerWithReference(DiffTrainer):
    """As preference training with an adapter: the model without it is asked first, in training mode."""

    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [LORA_TARGETS, ["k_proj"]])
def test_log_leaves_out_passes_of_the_reference(variant, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    logged = []
    for trainer_class in (DiffTrainer, TrainerWithReference):
        model = peft.get_peft_model(tiny_model(variant), lora_config(tiny_model(variant), r=4, target_modules=targets))
        trainer = run(model, tmp_path, LambdaCallback(), trainer_class=trainer_class, learning_rate=0.1)
        logged.append([{name: logs[name] for name in logs if "lambda" in name} for logs in trainer.state.log_history])
    assert logged[0] == logged[1] and abs(logged[0][-2]["lambda/layer_1/distance"]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["sdpa", "diff_chunked", "eager"])
def test_cancelled_share_is_the_overlap_of_the_maps(variant, implementation, tmp_path):
    model = tiny_model(variant, attn_implementation="eager", differential_layers=[1], use_qk_norm=True)
    row = random_rows(1)
    maps = {}
    with torch.no_grad():
        model.eval()(input_ids=row[0]["input_ids"][None], attention_maps_by_layer=maps)
    positive = maps[1].positive.double()
    negative = maps[1].negative.double()
    diff_lambda = maps[1].diff_lambda.double()
    diff_lambda = diff_lambda if diff_lambda.dim() == 0 else diff_lambda.transpose(1, 2)[..., None]
    expected = torch.minimum(positive, diff_lambda * negative).sum(-1).mean().item()

    model.set_attn_implementation(implementation)
    arguments = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=1)
    trainer = DiffTrainer(model, arguments, train_dataset=row, callbacks=[LambdaCallback()])
    trainer.train()
    logs = trainer.state.log_history[0]
    assert expected > 0.05
    assert logs["lambda/layer_1/cancelled"] == pytest.approx(expected, abs=1e-6)
    # V1 logs at the end of the step, so its lambda has moved by about the rate; V2's share is of the same forward.
    assert logs["lambda/cancelled"] == logs["lambda/layer_1/cancelled"]


def test_cancelled_share_reads_the_masks_of_flex_attention():
    document = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = create_block_mask(
        lambda batch, head, query, key: (query >= key) & (document[query] == document[key]),
        B=1,
        H=1,
        Q_LEN=6,
        KV_LEN=6,
        device="cpu",
    )
    seen = visible(mask, torch.tensor([1, 4]), 6)
    assert seen.tolist() == [[[[True, True, False, False, False, False], [False, False, False, True, True, False]]]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_watching_changes_nothing(variant, use_reentrant, tmp_path):
    states = []
    for callbacks in ([], [LambdaCallback()]):
        model = tiny_model(variant)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
        trainer = DiffTrainer(model, training_arguments(tmp_path), train_dataset=random_rows(), callbacks=callbacks)
        trainer.train()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_distance_is_measured_from_the_first_start_after_a_resume(tmp_path):
    for variant in VARIANTS:
        folder = tmp_path / variant
        saving = {"save_strategy": "steps", "save_steps": 2}
        whole = run(tiny_model(variant), folder / "whole", LambdaCallback())
        run(tiny_model(variant), folder / "halves", LambdaCallback(), **saving)
        arguments = training_arguments(folder / "halves", **saving)
        resumed = DiffTrainer(
            tiny_model(variant), arguments, train_dataset=random_rows(), callbacks=[LambdaCallback()]
        )
        resumed.train(resume_from_checkpoint=str(folder / "halves/checkpoint-2"))
        last = [trainer.state.log_history[3] for trainer in (whole, resumed)]
        names = [name for name in last[0] if name.startswith("lambda/")]
        assert len(names) > 8 and {name: last[0][name] for name in names} == {name: last[1][name] for name in names}
        states = [trainer.model.state_dict() for trainer in (whole, resumed)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("trainer_class", [DiffTrainer, Trainer])
def test_restored_callback_reports_or_warns(trainer_class, tmp_path, warnings_of_callbacks):
    """transformers puts a new callback in the place of a restored one, behind those that report."""
    saving = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        callback = LambdaCallback()
        reporter = Reporter()
        arguments = training_arguments(tmp_path, **saving)
        trainer = trainer_class(
            tiny_model("v1"), arguments, train_dataset=random_rows(), callbacks=[reporter, callback]
        )
        callback.attach(trainer)
        arguments.report_to = ["a reporter"]
        trainer.train(resume_from_checkpoint=checkpoint)
    reported = "lambda/layer_1/distance" in reporter.logs[0]
    warned = any("will not see lambda" in message for message in warnings_of_callbacks)
    assert (reported, warned) == ((True, False) if trainer_class is DiffTrainer else (False, True))


def test_distance_is_of_the_model_that_is_trained(tmp_path):
    callback = LambdaCallback()
    run(tiny_model("v1"), tmp_path, callback)
    trainer = run(tiny_model("v1", lambda_init=[0.1, 0.1]), tmp_path, callback, learning_rate=1e-9)
    # At this rate lambda stays where it is; float32.
    assert trainer.state.log_history[0]["lambda/layer_0/distance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_before_the_first_step_and_after_the_last_is_taken(variant, tmp_path):
    callback = LambdaCallback()
    trainer = DiffTrainer(
        tiny_model(variant), training_arguments(tmp_path), train_dataset=random_rows(), callbacks=[callback]
    )
    callback.watch(trainer.model)
    trainer.log({"loss": 2.0})
    assert not any("lambda" in name for name in trainer.state.log_history[0])
    trainer.train()
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["loss"] == 1.0


@pytest.fixture
def warnings_of_callbacks():
    records = []
    handler = standard_logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = standard_logging.getLogger("modeling_diff.training.callbacks")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_negative_lambda_is_warned_of_once(tmp_path, warnings_of_callbacks):
    run(tiny_model("v1", lambda_init=[0.5, -0.3]), tmp_path, LambdaCallback())
    (message,) = (message for message in warnings_of_callbacks if "below 0" in message)
    assert "layer 1" in message and "floor" in message


@pytest.mark.parametrize("adapted", [False, True])
def test_floor_holds_lambda_after_every_step(tmp_path, adapted):
    model = tiny_model("v1", lambda_init=[0.5, -0.3])
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(model, lora_config(model, r=4))
    trainer = run(model, tmp_path, LambdaCallback(floor=0.05))
    held = [logs["lambda/layer_1/mean"] for logs in trainer.state.log_history if "loss" in logs]
    assert held[0] == pytest.approx(0.05, abs=1e-5) and all(value >= 0.05 for value in held)
    assert trainer.state.log_history[-2]["lambda/layer_0/mean"] > 0.2


def test_floor_leaves_a_frozen_lambda(tmp_path, warnings_of_callbacks):
    """What moved in the base would be missing from the adapter that is saved."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_model("v1", lambda_init=[0.5, -0.3])
    frozen = {name: p.clone() for name, p in base.state_dict().items() if "diff_lambda" in name}
    run(peft.get_peft_model(base, peft.LoraConfig(r=4)), tmp_path, LambdaCallback(floor=0.05))
    assert len(frozen) == 8 and all(torch.equal(base.state_dict()[name], p) for name, p in frozen.items())
    assert any("layer 1" in message for message in warnings_of_callbacks)


def test_hold_lambda_leaves_what_is_above():
    module = tiny_model("v1").model.layers[0].self_attn.diff_lambda
    kept = {name: p.clone() for name, p in module.named_parameters()}
    hold_lambda(module, -1.0)
    assert all(torch.equal(p, kept[name]) for name, p in module.named_parameters())
    hold_lambda(module, 0.6)
    assert lambda_by_formula(module) == pytest.approx(0.6, abs=1e-5)  # the margin of 1e-6, and float32


def small_lambda():
    torch.manual_seed(0)
    config = type("Config", (), {"map_dim": 16, "lambda_init": [0.05]})
    diff_lambda = DiffLambda(config, 0)
    for parameter in diff_lambda.parameters():
        parameter.data.normal_(0, 0.1)
    return diff_lambda


def test_floor_moves_lambda_by_the_shortest_way():
    """A short step along the gradient is the smallest that changes a function by so much."""
    diff_lambda = small_lambda()
    before = torch.cat([p.detach().clone() for p in diff_lambda.parameters()])
    diff_lambda().backward()
    gradient = torch.cat([p.grad for p in diff_lambda.parameters()])
    hold_lambda(diff_lambda, diff_lambda().item() + 1e-3)
    step = torch.cat([p.detach() for p in diff_lambda.parameters()]) - before
    assert torch.cosine_similarity(step, gradient, dim=0) > 1 - 1e-4
    assert step.norm().item() == pytest.approx(1e-3 / gradient.norm().item(), rel=0.01)


def test_held_vectors_stay_small():
    """Adam pulls lambda down at every step and the floor holds it: the vectors must not grow without end."""
    diff_lambda = small_lambda()
    diff_lambda.lambda_init = 0.05 - diff_lambda().item() + diff_lambda.lambda_init
    optimizer = torch.optim.Adam(diff_lambda.parameters(), lr=2e-3)
    for _ in range(400):
        optimizer.zero_grad()
        diff_lambda().backward()
        optimizer.step()
        hold_lambda(diff_lambda, 0.05)
    # 0.4 at the start, and Adam moves 0.8 in all an element; held by lambda_q1 alone, that grows to 470.
    assert all(0.1 < p.norm() < 3 for p in diff_lambda.parameters())


@pytest.mark.parametrize("short", [0.3, 1e-4])
def test_floor_moves_lambda_back_and_no_further(short):
    diff_lambda = small_lambda().requires_grad_(False)
    diff_lambda.lambda_init = float(-short - (diff_lambda() - 0.05))
    hold_lambda(diff_lambda, 0.0)
    assert 0 <= diff_lambda().item() < 1e-5
    kept = diff_lambda.lambda_q1.clone()
    diff_lambda.lambda_init += 0.2
    hold_lambda(diff_lambda, 0.0)
    assert torch.equal(diff_lambda.lambda_q1, kept)


def test_plain_trainer_reports_when_attached(tmp_path):
    reporter = Reporter()
    trainer = Trainer(
        tiny_model("v2"), training_arguments(tmp_path), train_dataset=random_rows(), callbacks=[reporter]
    )
    LambdaCallback().attach(trainer)
    trainer.train()
    assert "lambda/layer_1/mean" in reporter.logs[0]


def test_what_cannot_be_watched_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer has differential attention"):
        run(tiny_model("v1", differential_layers=[]), tmp_path, LambdaCallback())
    with pytest.raises(ValueError, match=r"floor=0\.1: V2"):
        run(tiny_model("v2"), tmp_path, LambdaCallback(floor=0.1))
    with pytest.raises(ValueError, match="floor=nan"):
        LambdaCallback(floor=float("nan"))


def test_loss_of_nan_stops_training(tmp_path):
    model = tiny_model("v1")
    with torch.no_grad():
        model.lm_head.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        run(model, tmp_path, FiniteLossCallback(), logging_nan_inf_filter=False)
    with pytest.raises(ValueError, match="logging_nan_inf_filter=True hides"):
        run(model, tmp_path, FiniteLossCallback())
