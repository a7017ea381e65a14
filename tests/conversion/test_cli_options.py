"""The command line is made from the configs: every option once, and nothing heavy is imported to read it."""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from command_line import run

import modeling_diff
from conversion import (
    ConversionConfig,
    export_checkpoint,
    heal_checkpoint,
    push_checkpoint,
    update_checkpoint_code,
    verify_checkpoint,
)
from conversion.describe import describe_checkpoint
from conversion.healing.options import HealingOptions
from conversion.options import ExportConfig, HealFilesConfig, InspectConfig, PushConfig, UpdateCodeConfig, VerifyConfig


CONFIGS = {
    "convert": ConversionConfig,
    "export": ExportConfig,
    "inspect": InspectConfig,
    "push": PushConfig,
    "update-code": UpdateCodeConfig,
    "verify": VerifyConfig,
}
FUNCTIONS = {
    export_checkpoint: ExportConfig,
    describe_checkpoint: InspectConfig,
    heal_checkpoint: HealFilesConfig,
    push_checkpoint: PushConfig,
    update_checkpoint_code: UpdateCodeConfig,
    verify_checkpoint: VerifyConfig,
}


CASES = [*sorted(CONFIGS.items()), ("heal", HealingOptions), ("heal", HealFilesConfig)]


@pytest.mark.parametrize(("command", "config"), CASES)
def test_help_shows_every_field_with_its_help(command, config):
    shown = run(command, "--help").stdout
    words = " ".join(shown.replace("│", " ").split())
    for field in fields(config):
        flag = (field.metadata.get("flag") or f"--{field.name.replace('_', '-')}").split("/")[0]
        if field.metadata.get("python_only"):
            assert flag not in words
            continue
        assert flag in words, field.name
        assert " ".join(field.metadata["help"].split()) in words, field.name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_python_arguments_have_the_names_and_defaults_of_the_options(function):
    parameters = inspect.signature(function).parameters
    for field in fields(FUNCTIONS[function]):
        assert field.default is not MISSING and parameters[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["convert", "a"], ["convert", "a", "b", "--layers", "x"], ["no"]]
)
def test_help_and_usage_errors_import_neither_torch_nor_transformers(arguments):
    script = (
        "import sys; from conversion.cli import main; sys.argv[1:] = sys.argv[2:]\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "--", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == (0 if "--help" in arguments else 2), process.stderr
    assert process.stderr.endswith("[]\n"), process.stderr


def test_version_names_this_package_and_what_it_runs_with():
    result = run("--version")
    assert result.exit_code == 0, result.output
    assert f"diff-llama {modeling_diff.__version__}\n" in result.stdout
    assert {line.split()[0] for line in result.stdout.splitlines()} >= {"torch", "transformers", "safetensors"}


def test_config_and_its_fields_exclude_each_other(tmp_path):
    from conversion import ConversionError, convert_checkpoint

    with pytest.raises(ConversionError, match="config and variant are both given"):
        convert_checkpoint(tmp_path, tmp_path / "out", "v2", config=ConversionConfig(variant="v2"))
    with pytest.raises(TypeError, match="no_such_option"):
        convert_checkpoint(tmp_path, tmp_path / "out", "v2", no_such_option=1)
