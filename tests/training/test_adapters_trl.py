"""TRL on converted checkpoints, as its users call it: supervised fine-tuning and preference training with LoRA."""

import math

import pytest
import torch
from tiny_tokenizers import TINY_LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import convert_checkpoint
from modeling_diff import DiffLlamaConfig
from modeling_diff.training import LambdaCallback, four_bit_config, lora_config, parameter_groups
from modeling_diff.training.trainer import DiffTrainerMixin


trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

# peft 0.21 and TRL 1.16 use names that transformers 5.23 deprecates: TRL switches gradient_checkpointing on itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 5e-3,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
ROWS = datasets.Dataset.from_list([{"text": "def f(x):\n    return x"}] * 4)
PREFERENCES = datasets.Dataset.from_list(
    [{"prompt": f"{word} =", "chosen": " yes", "rejected": " no"} for word in ("ab", "cd", "ef", "gh")]
)


@pytest.fixture(scope="module", params=["v1", "v2"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / request.param
    convert_checkpoint(TINY_LLAMA, folder, request.param, uncalibrated=request.param == "v1", measure=False)
    return folder


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def losses(trainer):
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def test_supervised_fine_tuning_learns(checkpoint, tmp_path):
    class DiffSFTTrainer(DiffTrainerMixin, trl.SFTTrainer):
        pass

    model = load(checkpoint)
    words = ("ab", "cd", "ef", "gh")
    data = datasets.Dataset.from_list([{"prompt": f"upper {w} ->", "completion": f" {w.upper()}"} for w in words])
    trainer = DiffSFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **SETTINGS),
        train_dataset=data,
        peft_config=lora_config(model, r=4),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        callbacks=[LambdaCallback()],
        lambda_factor=2.0,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] / 2
    assert "lambda/layer_4/mean" in trainer.state.log_history[0]
    groups = parameter_groups(trainer.model, learning_rate=5e-3, lambda_factor=2.0)
    assert [g["name"] for g in trainer.optimizer.param_groups] == [g["name"] for g in groups]


def test_path_is_refused_with_the_way_out(checkpoint, tmp_path):
    """TRL takes the class that transformers has under our name, and would compute something else."""
    with pytest.raises(Exception, match="such as TRL given a path, has to be given the model itself"):
        trl.SFTTrainer(str(checkpoint), trl.SFTConfig(str(tmp_path), **SETTINGS), train_dataset=ROWS)


def test_guard_of_another_wording_loads():
    """Checkpoints keep the text of the revision that wrote them."""
    assert DiffLlamaConfig(lambda_std_dev="Not transformers' own.").to_dict() == DiffLlamaConfig().to_dict()


def test_full_preference_training_takes_a_reference(checkpoint, tmp_path):
    trainer = trl.DPOTrainer(
        model=load(checkpoint),
        ref_model=load(checkpoint),
        train_dataset=PREFERENCES,
        args=trl.DPOConfig(str(tmp_path), **(SETTINGS | {"max_steps": 1})),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)  # as below


def test_preference_training_starts_at_its_reference_and_learns(checkpoint, tmp_path):
    class DiffDPOTrainer(DiffTrainerMixin, trl.DPOTrainer):
        pass

    model = load(checkpoint)
    trainer = DiffDPOTrainer(
        model=model,
        args=trl.DPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=PREFERENCES,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=lora_config(model, r=4),
        callbacks=[LambdaCallback()],
    )
    trainer.train()
    # Policy and reference, the model without its adapter, are one at first: -log sigmoid(0). float32.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(trainer)[-1] < 0.5
    assert "lambda/layer_4/distance" in trainer.state.log_history[-2]


def test_quantized_base_keeps_lambda_in_float32(checkpoint, tmp_path):
    """TRL casts whatever trains on a quantized base to bfloat16, without asking the modules."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    class DiffSFTTrainer(DiffTrainerMixin, trl.SFTTrainer):
        pass

    quantized = {"quantization_config": four_bit_config(), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **quantized)
    trainer = DiffSFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **(SETTINGS | {"bf16": True, "max_steps": 2})),
        train_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=lora_config(model, r=4),
    )
    trainer.train()
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and {dtype for name, dtype in trained.items() if "diff_lambda" in name} <= {torch.float32}
    assert len(losses(trainer)) == 2
