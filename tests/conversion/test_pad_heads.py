"""Odd head counts to V1: idle heads that change nothing until they are trained, and what is said of them."""

import pytest
import torch
from command_line import run
from planted_pairs import kl_nats
from random_llamas import SMALL, random_llama, random_relative, saved, token_ids, write_rows
from safetensors.torch import load_file
from test_convert_adapter import ATTENTION, TOLERANCE, make_adapter
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.calibration.calibrate import Stage, calibrate
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.model import calibrated_model
from conversion.calibration.pairing import PairCosts
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# Heads and KV heads, and what they become; hidden sizes that heads divide before and, in the third, not after.
COUNTS = {
    "9 on 3": ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4}, (6, 2)),
    "3 on 3": ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36}, (2, 2)),
    "15 on 5": ({"num_attention_heads": 15, "num_key_value_heads": 5, "hidden_size": 60}, (9, 3)),
    "4 on 1": ({"num_key_value_heads": 1}, (4, 1)),
}
# float32 logits of up to about 60, through sums with more terms, all of them zero.
EXACT = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(params=COUNTS)
def odd(request, tmp_path):
    changes, expected = COUNTS[request.param]
    return saved(random_llama(attention_bias=True, **changes), tmp_path / "llama"), expected


def convert(source, output, **options):
    return convert_checkpoint(source, output, "v1", **({"uncalibrated": True, "pad_heads": True} | options))


@torch.no_grad()
def logits(model):
    return model.eval()(token_ids()).logits


def test_padded_heads_compute_llama(odd, tmp_path):
    """All layers plain, as V1 stores those that are not differential: every head has its own half of a value."""
    source, counts = odd
    convert(source, tmp_path / "v1")
    config = DiffLlamaConfig.from_pretrained(tmp_path / "v1", differential_layers=[])
    assert (config.num_attention_heads, config.num_key_value_heads) == counts
    plain = DiffLlamaForCausalLM(config)
    tensors = load_file(tmp_path / "v1/model.safetensors")
    plain.load_state_dict({k: v for k, v in tensors.items() if "diff_lambda" not in k and "sub_norm" not in k})
    torch.testing.assert_close(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source)), **EXACT)


def test_pair_with_an_idle_head_computes_its_partner(odd, tmp_path):
    """With the norm as the identity: (A - lambda A) v of the last KV head, o_proj scaled back by hand."""
    source, counts = odd
    convert(source, tmp_path / "v1", norm="neutral", lambda_init=0.25)
    tensors = load_file(tmp_path / "v1/model.safetensors")
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path / "v1").eval()
    attention = model.model.layers[0].self_attn
    seen = {}
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(heads=args[0]))
    logits(model)
    last = counts[0] // counts[1] * model.config.head_dim  # columns of the heads on the last KV head
    heads = seen["heads"][..., -last:] / 0.75
    first, second = heads.unflatten(-1, (-1, 2, model.config.map_dim)).unbind(-2)
    torch.testing.assert_close(first, second, **EXACT)
    weight = tensors["model.layers.0.self_attn.o_proj.weight"].unflatten(1, (-1, 2, model.config.map_dim))
    group = counts[0] // counts[1]
    assert not weight[:, -group:, 1].any() and weight[:, :, 0].any(-1).all()


def test_verify_counts_idle_heads_and_finds_every_tensor_alive(odd, tmp_path):
    source, _ = odd
    report = convert(source, tmp_path / "v1")
    checks = {check.name: check for check in verify_checkpoint(tmp_path / "v1", against=source).checks}
    assert checks["parameters"].outcome == checks["liveness"].outcome == "passed"
    added = report.record["padding"]["parameters"]
    new = 2 * 6 * DiffLlamaConfig.from_pretrained(tmp_path / "v1").map_dim
    assert added == report.record["parameters"]["output"] - report.record["parameters"]["source"] - new > 0
    assert any(f"costs {added:,} parameters" in note for note in report.notes)


def test_idle_heads_learn(odd, tmp_path):
    """Their o_proj columns at the first step, and their values after it."""
    source, _ = odd
    convert(source, tmp_path / "v1")
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path / "v1")
    attention = model.model.layers[1].self_attn
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    map_dim = model.config.map_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        changed = attention.get_submodule(name).weight - before[f"{name}.weight"]
        assert changed[-map_dim:].abs().max() > 0, name  # the last map is idle
    assert attention.o_proj.weight[:, -map_dim:].abs().max() > 0


def test_refusal_names_the_way_out_in_the_words_that_were_typed(tmp_path):
    source = saved(random_llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=36), tmp_path / "llama")
    with pytest.raises(ConversionError, match=r"num_attention_heads is 3, .*\(pad_heads=True\), or convert to v2"):
        convert(source, tmp_path / "v1", pad_heads=False)
    arguments = ["convert", source, tmp_path / "v1", "--variant", "v1", "--uncalibrated", "--no-measure"]
    refused = run(*arguments)
    assert refused.exit_code == 1 and "(--pad-heads)" in refused.stderr
    done = run(*arguments, "--pad-heads")
    assert done.exit_code == 0, done.stderr
    assert "idle heads: 3 heads on 3 key-value heads become 4 on 4" in done.stdout + done.stderr


def test_padding_heads_that_pair_does_nothing_and_says_so(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    convert(source, tmp_path / "plain", pad_heads=False, measure=False)
    report = convert(source, tmp_path / "padded", measure=False)
    assert "pad_heads=True does nothing here: 4 heads on 2 key-value heads pair without it" in report.notes
    assert report.record["padding"] is None
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "padded")]
    assert same[0] == same[1]


def test_padding_belongs_to_v1(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    with pytest.raises(ConversionError, match="pad_heads belongs to variant v1; leave it out for v2"):
        convert_checkpoint(source, tmp_path / "v2", "v2", pad_heads=True)


def test_adapter_is_carried_over(odd, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    source, _ = odd
    adapter = make_adapter(source, tmp_path / "adapter", target_modules=ATTENTION)
    convert(source, tmp_path / "v1", adapter=adapter)
    convert_checkpoint(tmp_path / "v1", tmp_path / "later", adapter=adapter)
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), adapter).merge_and_unload()
    convert(saved(merged, tmp_path / "merged"), tmp_path / "v1-merged")
    expected = logits(DiffLlamaForCausalLM.from_pretrained(tmp_path / "v1-merged"))
    for folder in (tmp_path / "v1/adapter", tmp_path / "later"):
        ours = peft.PeftModel.from_pretrained(DiffLlamaForCausalLM.from_pretrained(tmp_path / "v1"), folder)
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strict", [False, True])
def test_cost_with_an_idle_head_is_the_least_squares_of_its_partner_alone(strict):
    torch.manual_seed(0)
    num_heads = 3
    map_dim = 2
    num_tokens = 40
    weight = torch.randn(5, num_heads * map_dim)
    costs = PairCosts(weight, num_heads, num_heads, diff_lambda=0.25, strict=strict)
    maps = torch.randn(num_heads, num_tokens, num_tokens).tril().exp()
    maps = maps / maps.sum(-1, keepdim=True)
    values = torch.randn(num_heads, num_tokens, map_dim)
    costs.add(maps, values, torch.ones(num_tokens))
    found = costs.costs()
    assert found.shape == (4, 4)
    for head in range(num_heads):
        alone = (maps[head] @ values[head]).double()
        offered = torch.cat((alone, alone), dim=1) * 0.75
        if strict:
            offered = offered / (offered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        target = alone @ weight.double().t()[head * map_dim : (head + 1) * map_dim]
        # Both halves are equal, so their sum is all there is to fit with; the ridge is 1e-6 of it.
        expected = (target - offered @ torch.linalg.pinv(offered) @ target).square().sum().item()
        scale = target.square().sum().item()
        assert found[head, 3].item() == pytest.approx(expected, abs=1e-5 * scale)
        assert found[3, head] == found[head, 3]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_calibration_uses_idle_heads_where_they_lose_least(tmp_path, name):
    """Of three heads the first and the last have equal maps: the second is the one to be left alone."""
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 12}
    model = random_llama(**changes) if name == "llama" else random_relative(name, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight[24:] = projection.weight[:12]
    folder = saved(model, tmp_path)
    held_out = token_ids(48, 8, seed=2)
    kl = []
    for stages in ((Stage.COPY,), tuple(Stage)):
        options = {"stages": stages, "local": LocalFit(steps=20, batch_tokens=384), "norm": "neutral"}
        result = calibrate(folder, model.config, token_ids(48, 48), pad_heads=True, **options)
        kl.append(kl_nats(model, calibrated_model(model, result), held_out))
    for pairing in result.pairings:
        pairs = {frozenset(pairing.kv_heads[i : i + 2]) for i in (0, 2)}
        assert pairs == {frozenset((0, 2)), frozenset((1, 3))}
    assert kl[1] < 0.01 < kl[0], kl


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_beside_idle_heads_stay_of_ordinary_size(tmp_path, counts):
    """Half of such a value varies by rounding alone, which no o_proj may bring back: float16 ends at 65,504."""
    model = random_llama(**counts[0])
    options = {"stages": tuple(Stage), "local": LocalFit(steps=10, batch_tokens=384)}
    result = calibrate(saved(model, tmp_path), model.config, token_ids(48, 48), pad_heads=True, **options)
    converted = calibrated_model(model, result)
    for layer, record in zip(converted.model.layers, result.records, strict=True):
        assert layer.self_attn.o_proj.weight.abs().max() < 1e3
        assert record["stages"]["values"]["residual"] < 1.001 * record["stages"]["values"]["tried"] < 1
        assert record["stages"]["local"]["tried"] < 1, "the gradient stage does not diverge"


def test_calibrated_checkpoint_is_written_and_verified(tmp_path):
    source = saved(random_llama(**COUNTS["9 on 3"][0]), tmp_path / "llama")
    text = write_rows(tmp_path / "text.jsonl", 8, SMALL["max_position_embeddings"])
    options = {"calibration": text, "calibration_tokens": 1024, "stages": ("pairing", "refit")}
    convert_checkpoint(source, tmp_path / "v1", "v1", pad_heads=True, **options)
    report = verify_checkpoint(tmp_path / "v1", against=source)
    assert report.passed
    with pytest.raises(ConversionError, match="pad_heads=True"):
        convert_checkpoint(source, tmp_path / "odd", "v1", **options)
