"""Importing the training package brings neither the Trainer nor PEFT before they are asked for."""

import subprocess
import sys

import pytest

import modeling_diff.training


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_import_leaves_the_trainer_and_peft_out():
    run(
        "import sys, modeling_diff.analysis, modeling_diff.training as training\n"
        "training.parameter_groups, training.lora_config, training.CancelledShare\n"
        "assert not {'transformers.trainer', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "assert 'modeling_diff.analysis.maps' not in sys.modules\n"
    )


def test_every_exported_name_is_there():
    run(
        "from modeling_diff.training import *\n"
        "import modeling_diff.training as training\n"
        "assert set(training.__all__) <= set(globals())\n"
        "assert DiffTrainer.__mro__[1] is DiffTrainerMixin\n"
    )


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"modeling_diff\.training.*has no attribute 'DiffTrianer'"):
        modeling_diff.training.DiffTrianer  # noqa: B018  the access is what is tested
