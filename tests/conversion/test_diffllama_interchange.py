"""V1 in other people's formats: transformers' own DiffLlama both ways, and the authors' unilm files."""

import json

import pytest
import torch
import transformers
from random_llamas import SMALL, random_diffllama, random_llama, random_model, saved, token_ids
from safetensors.torch import load_file, save_file

from conversion import ConversionError, convert_checkpoint, export_checkpoint
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


SHAPES = {
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "mha": {"num_key_value_heads": 4},
    "one-pair": {"num_key_value_heads": 2, "head_dim": 16},
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def random_ours(**changes):
    """A V1 model that transformers' DiffLlama can express, its norm's weights far from one."""
    counts = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sub_norm_eps": 1e-5}
    config = DiffLlamaConfig(**{**SMALL, **counts, **changes})
    return random_model(DiffLlamaForCausalLM, config)


def assert_same_logits(model, other):
    with torch.no_grad():
        expected, found = model(token_ids()).logits, other(token_ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_import_computes_what_diffllama_computes(tmp_path, shape):
    theirs = random_diffllama(**SHAPES[shape])
    assert type(theirs).__module__.startswith("transformers.")
    report = convert_checkpoint(saved(theirs, tmp_path / "theirs"), tmp_path / "ours")
    assert report.record["promise"]["kind"] == "equal"
    assert_same_logits(theirs, DiffLlamaForCausalLM.from_pretrained(tmp_path / "ours").eval())


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}]
)
def test_export_computes_what_we_compute(tmp_path, changes):
    ours = random_ours(**changes)
    export_checkpoint(saved(ours, tmp_path / "ours"), tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs) is transformers.DiffLlamaForCausalLM
    assert_same_logits(ours, theirs)
    assert not list((tmp_path / "theirs").glob("*.py"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_then_export_returns_the_very_weights(tmp_path, dtype):
    source = saved(random_diffllama().to(dtype), tmp_path / "theirs")
    convert_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    fields = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "lambda_std_dev", "model_type")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again")]
    assert [[config[field] for field in fields] for config in configs[:1]] == [[configs[1][f] for f in fields]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_init": [0.05, 0.05]}, r"lambda_init\[0\] is 0\.05.*paper"),
        ({"sub_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"differential_layers": [0]}, "differential_layers"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"variant": "v2", "sub_norm_eps": None}, "variant is 'v2'"),
    ],
)
def test_export_refuses_what_cannot_be_said_there(tmp_path, changes, message):
    source = saved(random_ours(**changes), tmp_path / "ours")
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(source, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_export_refuses_other_models(tmp_path):
    with pytest.raises(ConversionError, match="model_type is 'llama'"):
        export_checkpoint(saved(random_llama(), tmp_path / "llama"), tmp_path / "theirs")


@pytest.mark.parametrize("tied", [True, False])
def test_export_refuses_a_backbone(tmp_path, tied):
    """With tied embeddings no tensor lacks for a language model, and it is none all the same."""
    llama = saved(random_llama(tie_word_embeddings=tied), tmp_path / "llama")
    convert_checkpoint(llama, tmp_path / "backbone", "v1", uncalibrated=True, lambda_init="paper", backbone_only=True)
    with pytest.raises(ConversionError, match=r"architectures is \['DiffLlamaModel'\].*only a whole language model"):
        export_checkpoint(tmp_path / "backbone", tmp_path / "theirs")


def test_diffllama_is_taken_over_whole_or_not(tmp_path):
    source = saved(random_diffllama(), tmp_path / "theirs")
    for options in ({"variant": "v2"}, {"layers": [0]}, {"lambda_init": 0.1}, {"norm": "neutral"}):
        with pytest.raises(ConversionError, match="differential already"):
            convert_checkpoint(source, tmp_path / "ours", **options)


def unilm_files(model, folder):
    """`model` as the authors' code would hold it, rows moved one at a time: pair (j, j + d/2) goes to (2j, 2j + 1)."""
    d = model.config.map_dim
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("o_proj", "out_proj").replace("diff_lambda.", "").replace("sub_norm", "subln")
        if "q_proj" in name or "k_proj" in name:
            moved = torch.empty_like(tensor)
            for row in range(tensor.shape[0]):
                head, j = divmod(row, d)
                moved[head * d + (2 * j if j < d // 2 else 2 * (j - d // 2) + 1)] = tensor[row]
            tensor = moved
        weights[name] = tensor.clone()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return folder


def test_authors_files_come_over_behind_the_explicit_option(tmp_path):
    ours = random_ours(lambda_init=[0.3, 0.1])
    source = unilm_files(ours, tmp_path / "unilm")
    with pytest.raises(ConversionError, match="converted already"):
        convert_checkpoint(source, tmp_path / "ours")
    convert_checkpoint(source, tmp_path / "ours", source_layout="unilm")
    loaded = DiffLlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert loaded.config.lambda_init == [0.3, 0.1]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), loaded.parameters(), strict=True))
