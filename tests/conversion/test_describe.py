"""What `inspect` reads, and what it refuses to guess at."""

import pytest
from random_llamas import random_llama, saved
from safetensors.torch import load_file, save_file

from conversion import ConversionError, convert_checkpoint
from conversion.describe import describe_checkpoint


@pytest.mark.parametrize(
    ("options", "name", "size"),
    [
        ({"variant": "v1", "uncalibrated": True}, "model.layers.1.self_attn.diff_lambda.lambda_k2", 8),
        ({"variant": "v2", "lambda_start": 0.3}, "model.layers.0.self_attn.lambda_proj.bias", 4),
    ],
)
def test_lambda_that_cannot_be_read_is_named(tmp_path, options, name, size):
    convert_checkpoint(saved(random_llama(), tmp_path / "llama"), tmp_path / "converted", **options)
    path = tmp_path / "converted" / "model.safetensors"
    weights = load_file(path)
    vector = weights.pop(name)
    for changed, found in (({name: vector[1:].clone()}, rf"has shape \({size - 1},\)"), ({}, "is missing")):
        save_file(weights | changed, path)
        with pytest.raises(ConversionError, match=rf"tensor {name} {found}, expected \({size},\)"):
            describe_checkpoint(tmp_path / "converted")


def test_record_that_is_no_object_is_refused(tmp_path):
    llama = saved(random_llama(), tmp_path / "llama")
    assert "conversion" not in describe_checkpoint(llama)
    (llama / "conversion.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"conversion.json is a JSON list, expected an object"):
        describe_checkpoint(llama)
