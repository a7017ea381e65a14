"""What a user typed comes back in the user's words: options on the command line, arguments in Python, one line."""

import json

import pytest
import torch
import typer
from command_line import run

from conversion import ConversionError, convert_checkpoint
from conversion.cli import app
from conversion.errors import typed
from conversion.healing.options import HealingOptions
from conversion.options import chosen_dtype, parse_size


COMMANDS = ["convert", "verify", "export", "inspect", "push", "heal"]


def refusal(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code in (1, 2), result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--variant", "v3"], ["--variant", "'v1', 'v2'"]),
        (["--dtype", "int8"], ["--dtype is 'int8'", "float32, bfloat16, float16", "bf16"]),
        (["--norm", "soft"], ["--norm", "'strict', 'neutral'"]),
        (["--seed", "x"], ["--seed: 'x' is not a whole number"]),
        (["--seed", "-1"], ["--seed is -1", "0 to 4294967295"]),
        (["--lambda", "half"], ["--lambda: 'half' is not a number"]),
        (["--variant", "v2", "--lambda", "2"], ["--lambda is 2.0", "between 0 and 1"]),
        (["--lambda", "0.3"], ["--lambda belongs to variant v2", "--lambda-init"]),
        (["--variant", "v2", "--norm", "neutral"], ["--norm belongs to variant v1"]),
        (["--lambda-init", "small"], ["--lambda-init is 'small'", "0.05,0.1"]),
        (["--lambda-init", "0.1,0.2,0.3"], ["--lambda-init has 3 values", "2 layers"]),
        (["--layers", "0,3-x"], ["--layers has '3-x'", "0,4-7"]),
        (["--layers", "9-3"], ["--layers has '9-3'", "3-9"]),
        (["--layers", "0-99999999999"], ["--layers has '0-99999999999'"]),
        (["--layers", "1,3-9"], ["--layers names layer 3", "2 layers", "0-1"]),
        (["--max-shard-size", "5"], ["--max-shard-size '5' has no unit", "5GB"]),
        (["--max-shard-size", "5B"], ["--max-shard-size '5B'", "at least 1KB"]),
        (["--max-shard-size", "many"], ["--max-shard-size 'many'", "5GB"]),
        (["--stages", "copy,melt"], ["--stages is 'melt'", "copy, pairing"]),
        (["--effort", "hasty"], ["--effort", "'quick', 'standard', 'thorough'"]),
        (["--calibration", "text", "--effort", "quick", "--stages", "copy"], ["--effort and --stages both say"]),
        (["--calibration-tokens", "5"], ["--calibration-tokens", "(--calibration)"]),
        (["--lambda-floor", "0.1"], ["--lambda-floor", "(--calibration)"]),
        (["--calibration", "text", "--lambda-floor", "1"], ["--lambda-floor is 1.0", "below 1"]),
        (["--calibration", "text", "--calibration-tokens", "0"], ["--calibration-tokens is 0", "above 0"]),
        (["--no-such-option"], ["--no-such-option", "convert --help"]),
    ],
)
def test_convert_refusal_names_what_was_typed(tmp_path, llama, arguments, told):
    variant = [] if "--variant" in arguments else ["--variant", "v1"]
    variant += [] if {"--variant", "--calibration"} & set(arguments) else ["--uncalibrated"]
    message = refusal("convert", llama, tmp_path / "out", *variant, *arguments)
    assert all(part in message for part in told), message
    assert not any(
        name in message for name in ("lambda_", "max_shard", "calibration_tokens", "Value error", "Input sh")
    )
    assert not (tmp_path / "out").exists()


def test_heal_refusal_names_what_was_typed(tmp_path):
    """The option is `--lambda`, its name in Python `lambda_mode`."""
    command = ["heal", "checkpoint", "out", "--data", "text"]
    assert "--learning-rate is -1.0" in refusal(*command, "--learning-rate", "-1")
    assert "--tokens 5 and --max-steps 6" in refusal(*command, "--tokens", "5", "--max-steps", "6")
    assert "--teacher-dtype is 'int4'" in refusal(*command, "--teacher-dtype", "int4")
    assert "--lambda: 'high' is not one of" in refusal(*command, "--lambda", "high")


def test_python_refusal_names_the_argument(tmp_path, llama):
    with pytest.raises(ConversionError, match=r"^lambda_start is 2\.0, expected"):
        convert_checkpoint(llama, tmp_path / "out", "v2", lambda_start=2)
    with pytest.raises(ConversionError, match=r"^dtype is 'int8', expected one of float32, bfloat16, float16"):
        convert_checkpoint(llama, tmp_path / "out", "v2", dtype="int8")
    with pytest.raises(ConversionError, match=r"^layers names layer 7, and the model has 2 layers"):
        convert_checkpoint(llama, tmp_path / "out", "v2", layers=[0, 7])
    with pytest.raises(ConversionError, match=r"^lambda_mode is 'high', expected one of free, floor, paper"):
        HealingOptions(lambda_mode="high")


@pytest.mark.parametrize("given", ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_is_taken_by_every_usual_name(given):
    assert chosen_dtype("dtype", given) == "bfloat16"
    assert HealingOptions(dtype=given, stage="KL").recorded()["dtype"] == "bfloat16"


def test_choices_are_taken_in_any_case(tmp_path, llama):
    result = run("convert", llama, tmp_path / "a", "--variant", "V2", "--dtype", "BF16", "--dry-run", "--json")
    options = json.loads(result.stdout)["record"]["options"]
    assert (options["variant"], options["dtype"]) == ("v2", "bfloat16")
    report = convert_checkpoint(
        llama, tmp_path / "b", "V1", uncalibrated=True, norm="Neutral", dtype=torch.float16, dry_run=True
    )
    assert report.record["options"]["norm"] == "neutral" and report.record["options"]["dtype"] == "float16"


SIZES = [
    ("5GB", 5 * 10**9),
    ("200MB", 2 * 10**8),
    ("1.5 gib", 3 * 2**29),
    ("0.1GB", 10**8),
    ("1KB", 1000),
    (4096, 4096),
]
NO_SIZES = [
    "5",
    "1" * 99,
    5,
    "999B",
    "0GB",
    "-5GB",
    "5G B",
    "GB",
    "1e9",
    "nan",
    "5XB",
    "٣GB",
    "0.1",
    "",
    None,
    True,
    1.5,
]


@pytest.mark.parametrize(("given", "num_bytes"), SIZES)
def test_size_is_read_with_its_unit(given, num_bytes):
    assert parse_size(given) == num_bytes


@pytest.mark.parametrize("given", NO_SIZES)
def test_size_without_unit_or_below_a_kilobyte_is_refused(given):
    with pytest.raises(ConversionError, match=r"^max_shard_size "):
        parse_size(given)


def test_typed_gives_values_as_they_are_typed_in_python():
    assert typed("dtype", "float32") == "dtype='float32'" and typed("allow_pickle", True) == "allow_pickle=True"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_braces_and_no_type_for_flags(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert not any(riddle in shown.stdout for riddle in ("{", "<bool>", "list[", "Of ", "The same"))


def test_no_argument_shows_the_help_and_a_misspelled_command_what_was_meant():
    assert "convert" in run().stdout and run().exit_code == 0
    assert "'convrt'" in refusal("convrt") and "'convert'" in refusal("convrt")
    assert refusal("convert").startswith("missing argument 'SOURCE'")


def test_every_option_has_a_help_of_its_own():
    """Sentences that stand alone: a capital or a choice at the start, a full stop at the end."""
    for name, command in typer.main.get_command(app).commands.items():
        for param in command.params:
            assert param.help and param.help.endswith("."), (name, param.name, param.help)
