"""A LLaMA's LoRA through a conversion: what PEFT computes with LLaMA is what it computes with V2, and V1 after it."""

import json
import shutil

import pytest
import torch
from command_line import run
from random_llamas import edit_json, random_llama, saved, token_ids, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert_checkpoint, verify_checkpoint


peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RECIPES = {
    "every projection": {"target_modules": LINEAR},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 5, "layers.1.self_attn.o_proj": 2},
        "alpha_pattern": {"o_proj": 3, "layers.0.self_attn.q_proj": 7},
    },
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "modules trained whole": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "a projection trained whole": {"target_modules": ["v_proj"], "modules_to_save": ["q_proj", "o_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "a regular expression": {"target_modules": r".*_proj"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "excluded modules": {"target_modules": LINEAR, "exclude_modules": ["o_proj"]},
    "biases of its own": {"target_modules": ATTENTION, "lora_bias": True},
    "EVA": {"target_modules": ATTENTION, "config_changes": {"init_lora_weights": "eva"}},
}
# Only these can be merged: PEFT refuses the others, too, or LLaMA has no place for them.
MERGEABLE = [name for name in RECIPES if name != "biases of its own"]
# float32 logits of up to about 60, through two roundings of every product where merging rounds once.
TOLERANCE = 1e-3


def make_adapter(llama, folder, config_changes=None, **settings):
    """A LoRA on the checkpoint `llama` whose every tensor matters."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(llama)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    edit_json(folder / "adapter_config.json", **config_changes or {})
    return folder


def adapted_logits(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(token_ids()).logits


def merged_by_peft(llama, adapter, folder):
    model = AutoModelForCausalLM.from_pretrained(llama)
    saved(peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(), folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(random_llama(), tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """Adapters of the LLaMA by the name of their recipe, made when they are asked for."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}

    def adapter(name):
        if name not in made:
            made[name] = make_adapter(llama, root / name, **RECIPES[name])
        return made[name]

    return adapter


@pytest.mark.parametrize("name", RECIPES)
def test_adapter_on_v2_computes_what_it_does_on_llama_to_the_last_bit(llama, adapters, name, tmp_path):
    convert_checkpoint(llama, tmp_path / "v2", "v2", adapter=adapters(name))
    expected = adapted_logits(llama, adapters(name))
    plain = AutoModelForCausalLM.from_pretrained(llama)(token_ids()).logits
    assert (expected - plain).abs().max() > 0.1
    assert torch.equal(adapted_logits(tmp_path / "v2", tmp_path / "v2" / "adapter"), expected)


@pytest.mark.parametrize("options", [{"layers": [1]}, {"lambda_start": 0.3}, {"lambda_start": 0.3, "layers": [0]}])
def test_adapter_follows_the_options_of_v2(llama, adapters, options, tmp_path):
    convert_checkpoint(llama, tmp_path / "v2", "v2", adapter=adapters("DoRA"), **options)
    expected = adapted_logits(llama, adapters("DoRA"))
    logits = adapted_logits(tmp_path / "v2", tmp_path / "v2" / "adapter")
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE if "lambda_start" in options else 0)


@pytest.mark.parametrize("name", MERGEABLE)
def test_adapter_on_an_uncalibrated_v1_computes_what_merging_first_gives(llama, adapters, name, tmp_path):
    convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True, adapter=adapters(name))
    merged = merged_by_peft(llama, adapters(name), tmp_path / "merged")
    convert_checkpoint(merged, tmp_path / "merged v1", "v1", uncalibrated=True)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged v1", attn_implementation="sdpa").eval()
        expected = model(token_ids()).logits
    logits = adapted_logits(tmp_path / "v1", tmp_path / "v1" / "adapter")
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["patterns", "rsLoRA", "DoRA", "modules trained whole"])
def test_calibrated_v1_is_that_of_the_llama_that_peft_merges(adapters, name, dtype, tmp_path):
    llama = saved(random_llama().to(dtype), tmp_path / "llama")
    merged = merged_by_peft(llama, adapters(name), tmp_path / "merged")
    text = write_rows(tmp_path / "text.jsonl", 8, 128)
    options = {"calibration": text, "calibration_tokens": 8 * 128, "stages": ["copy", "pairing"]}
    report = convert_checkpoint(llama, tmp_path / "v1", "v1", adapter=adapters(name), **options)
    convert_checkpoint(merged, tmp_path / "expected", "v1", **options)
    assert any("merged into the LLaMA first" in note for note in report.notes)
    assert report.record["adapter"]["merged"] and not (tmp_path / "v1" / "adapter").exists()
    assert "an adapter was merged first" in report.record["measured"]["not_measured"]
    assert "merged into the source first" in (tmp_path / "v1" / "README.md").read_text()
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("v1", "expected"))
    assert ours.keys() == expected.keys()
    for tensor in expected:
        assert torch.equal(ours[tensor], expected[tensor]), tensor


@pytest.mark.parametrize(
    "variant, options",
    [
        ("v1", {"uncalibrated": True}),
        ("v1", {"uncalibrated": True, "heads": [[1], []]}),
        ("v2", {}),
        ("v2", {"lambda_start": 0.3}),
    ],
)
def test_adapter_for_a_converted_checkpoint_is_the_one_written_with_it(llama, adapters, variant, options, tmp_path):
    convert_checkpoint(llama, tmp_path / "both", variant, adapter=adapters("DoRA"), **options)
    convert_checkpoint(llama, tmp_path / "base", variant, **options)
    report = convert_checkpoint(tmp_path / "base", tmp_path / "adapter", adapter=adapters("DoRA"))
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    ours = tmp_path / "adapter"
    expected = tmp_path / "both" / "adapter"
    assert (ours / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, expected)]
    assert [config.pop("base_model_name_or_path") for config in configs] == [
        str(tmp_path / "base"),
        str(tmp_path / "both"),
    ]
    assert configs[0] == configs[1]
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert_checkpoint(tmp_path / "base", tmp_path / "adapter", adapter=adapters("DoRA"))
    convert_checkpoint(tmp_path / "base", tmp_path / "adapter", adapter=adapters("rsLoRA"), overwrite=True)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ConversionError, match="converted already"):
        convert_checkpoint(tmp_path / "base", tmp_path / "again", variant, adapter=adapters("DoRA"))


def test_dry_run_writes_no_adapter(llama, adapters, tmp_path):
    convert_checkpoint(llama, tmp_path / "v2", "v2", adapter=adapters("DoRA"), dry_run=True)
    assert not (tmp_path / "v2").exists()
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    convert_checkpoint(tmp_path / "v2", tmp_path / "adapter", adapter=adapters("DoRA"), dry_run=True)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.transformers(since="5.16", reason="its LLaMA takes adapter weights for a part of the model")
def test_adapter_next_to_the_weights_it_belongs_to_is_carried_over(llama, adapters, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    shutil.copytree(adapters("patterns"), source, dirs_exist_ok=True)
    with pytest.raises(ConversionError, match="--adapter"):
        convert_checkpoint(source, tmp_path / "v2", "v2")
    report = convert_checkpoint(source, tmp_path / "v2", "v2", adapter=source)
    assert report.record["measured"]["values"] == {"largest_difference": 0}, "compared without the adapter"
    assert verify_checkpoint(tmp_path / "v2", against=source).passed
    expected = adapted_logits(llama, adapters("patterns"))
    assert torch.equal(adapted_logits(tmp_path / "v2", tmp_path / "v2" / "adapter"), expected)
    assert verify_checkpoint(tmp_path / "v2", against=source).passed


def test_tied_backbone_names_and_pickles_are_read(adapters, tmp_path):
    llama = saved(random_llama(tie_word_embeddings=True), tmp_path / "llama")
    folder = make_adapter(llama, tmp_path / "lora", target_modules=LINEAR)
    expected = adapted_logits(llama, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match="--allow-pickle"):
        convert_checkpoint(llama, tmp_path / "v2", "v2", adapter=folder)
    convert_checkpoint(llama, tmp_path / "v2", "v2", adapter=folder, allow_pickle=True)
    assert torch.equal(adapted_logits(tmp_path / "v2", tmp_path / "v2" / "adapter"), expected)


def test_merged_adapter_is_not_measured_as_a_loss_of_the_conversion(llama, adapters, tmp_path):
    """Nor against the source by `verify`: what is far from it is the fine-tuning."""
    text = write_rows(tmp_path / "rows.jsonl", 8, 32)
    convert_checkpoint(llama, tmp_path / "v1", "v1", calibration=text, adapter=adapters("DoRA"))
    report = verify_checkpoint(tmp_path / "v1", against=llama)
    found = {check.name: check for check in report.checks}
    assert report.passed and found["source"].outcome == "passed"
    assert (found["function"].outcome, found["function"].detail) == (
        "skipped",
        "not compared: an adapter was merged first, and the source is without it",
    )
    assert found["converted"].values.keys() == {"loss_nats"}
    assert not [check.name for check in report.checks if "kl_nats" in check.values]


CONFIG_REFUSALS = {
    "other method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "biases of the base": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "all biases": ({"bias": "all"}, "bias is 'all'"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "parameters": ({"target_parameters": ["mlp.gate"]}, "target_parameters is"),
    "layer replication": ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
    "text for a number": ({"lora_alpha": "sixteen"}, "lora_alpha is 'sixteen'"),
    "list for patterns": ({"alpha_pattern": [1]}, "alpha_pattern is"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_adapters_that_cannot_be_carried_over_are_refused_by_field(llama, adapters, case, tmp_path):
    changes, message = CONFIG_REFUSALS[case]
    folder = shutil.copytree(adapters("rsLoRA"), tmp_path / "lora")
    edit_json(folder / "adapter_config.json", **changes)
    refuse(llama, folder, tmp_path, f"adapter_config.json: {message}")


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


FIRST_A = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
TENSOR_REFUSALS = {
    "other rows": (lambda t: {n: x.repeat(2, 1) if "q_proj.lora_B" in n else x for n, x in t.items()}, "has shape"),
    "other layers": (lambda t: {n.replace("layers.1", "layers.7"): x for n, x in t.items()}, "a LLaMA has not"),
    "our own module": (
        lambda t: t | {FIRST_A.replace("k_proj", "lambda_proj"): t[FIRST_A].clone()},
        "a LLaMA has not",
    ),
    "half a pair": (lambda t: {n: x for n, x in t.items() if n != FIRST_A}, "is missing next to"),
    "two ranks": (lambda t: t | {FIRST_A: t[FIRST_A][:2].clone()}, "expected one rank"),
    "a bias": (lambda t: t | {FIRST_A.replace("lora_A.weight", "bias"): torch.ones(16)}, "neither a LoRA's nor"),
    "not a number": (lambda t: t | {FIRST_A: t[FIRST_A] * float("nan")}, "NaN or infinite"),
    "nothing": (lambda t: {}, "holds no tensors"),
}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_tensors_that_are_not_of_this_llama_are_refused_by_name(llama, adapters, case, tmp_path):
    change, message = TENSOR_REFUSALS[case]
    folder = shutil.copytree(adapters("rsLoRA"), tmp_path / "lora")
    rewrite(folder, change)
    refuse(llama, folder, tmp_path, message)


def test_folders_without_an_adapter_are_refused(llama, adapters, tmp_path):
    refuse(llama, tmp_path / "nowhere", tmp_path, "does not exist")
    (tmp_path / "empty").mkdir()
    refuse(llama, tmp_path / "empty", tmp_path, "adapter_config.json: missing")
    folder = shutil.copytree(adapters("rsLoRA"), tmp_path / "lora")
    (folder / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(llama, folder, tmp_path, "git-lfs pointer")
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    refuse(llama, folder, tmp_path, "refused by safetensors")


def test_adapter_is_refused_where_layers_were_calibrated_or_llama_never_was(llama, adapters, tmp_path):
    convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True)
    record = tmp_path / "v1" / "conversion.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps(found | {"pairing": "calibrated"}))
    with pytest.raises(ConversionError, match=r"its layers were calibrated.*--calibration and --adapter"):
        convert_checkpoint(tmp_path / "v1", tmp_path / "adapter", adapter=adapters("DoRA"))
    record.unlink()
    with pytest.raises(ConversionError, match=r"conversion\.json.*convert the LLaMA itself"):
        convert_checkpoint(tmp_path / "v1", tmp_path / "adapter", adapter=adapters("DoRA"))


def refuse(llama, adapter, folder, message):
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(llama, folder / "output", "v2", adapter=adapter)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "output").exists()


@pytest.mark.parametrize("variant, options", [("v1", {"uncalibrated": True}), ("v2", {})])
@pytest.mark.parametrize("name", ["a regular expression", "modules trained whole", "a projection trained whole"])
def test_adapter_reaches_no_module_that_llama_has_not(llama, adapters, name, variant, options, tmp_path):
    """`.*_proj` would match lambda_proj, `norm` sub_norm."""
    convert_checkpoint(llama, tmp_path / "model", variant, adapter=adapters(name), **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "model" / "adapter")
    reached = [name for name, _ in adapted.named_parameters() if "lora_" in name or "modules_to_save" in name]
    assert reached and not [name for name in reached if "lambda" in name or "sub_norm" in name]


def test_command_line_says_where_the_adapter_is(llama, adapters, tmp_path):
    arguments = ["convert", llama, tmp_path / "v2", "--variant", "v2", "--adapter", adapters("DoRA")]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"carried over to {tmp_path}/v2/adapter" in result.output.replace("\n", "")
    result = run("convert", tmp_path / "v2", tmp_path / "lora", "--adapter", llama)
    assert result.exit_code == 1 and "adapter_config.json: missing" in result.output.replace("\n", " ")
