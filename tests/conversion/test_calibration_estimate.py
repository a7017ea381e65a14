"""The estimate of a calibration: its operations against those torch counts, and what must make it longer."""

from dataclasses import replace

import pytest
import torch
from planted_pairs import planted_llama, random_tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from conversion.calibration import estimate
from conversion.calibration.calibrate import Stage, calibrate
from conversion.calibration.estimate import Work, estimate_calibration, seconds_of
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.speed import faster_in_bfloat16


CONFIG = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
)
LOCAL = LocalFit(steps=20, batch_tokens=1152, learning_rate=0.03)  # which the layers bear: nothing starts again
LADDER = ((Stage.PAIRING,), (Stage.PAIRING, Stage.REFIT), (Stage.PAIRING, Stage.REFIT, Stage.VALUES), tuple(Stage))


@pytest.fixture(autouse=True)
def steady_machine(monkeypatch):
    """One that does 10^9 operations per second of any dtype."""
    monkeypatch.setattr(estimate, "product_rate", lambda device_type, dtype: 1e9)
    monkeypatch.setattr(estimate, "faster_in_bfloat16", lambda device_type: False)


def operations(work: Work) -> float:
    return work.float32 + work.float64 + work.fast


@pytest.mark.parametrize("num_kv_heads", [4, 8], ids=["gqa", "mha"])
def test_estimated_operations_of_each_stage_are_those_that_torch_counts(num_kv_heads, tmp_path):
    llama, _ = planted_llama("plain", num_kv_heads, num_layers=1)
    llama.save_pretrained(tmp_path)
    tokens = random_tokens(32)
    faster_in_bfloat16("cpu")  # probes once per process
    before = 0.0
    counted_before = 0
    for stages in LADDER:
        with FlopCounterMode(display=False) as counter:
            calibrate(tmp_path, llama.config, tokens, stages=stages, local=LOCAL)
        estimated = estimate_calibration(llama.config, tokens.numel(), tokens.shape[1], stages=stages, local=LOCAL)
        added = operations(estimated.work) - before
        # torch counts neither factorizations nor the attention of sdpa; the estimate counts those.
        assert 1 <= added / (counter.get_total_flops() - counted_before) < 1.4, stages[-1]
        before += added
        counted_before = counter.get_total_flops()


@pytest.mark.parametrize(
    "larger",
    [
        {"num_hidden_layers": 17},
        {"hidden_size": 2304, "head_dim": 64},
        {"intermediate_size": 9216},
        {"num_attention_heads": 64, "head_dim": 64},
    ],
    ids=lambda larger: next(iter(larger)),
)
def test_a_larger_model_is_estimated_to_take_longer(larger):
    shape = {name: getattr(CONFIG, name) for name in estimate_fields()}
    found = estimate_calibration(LlamaConfig(**(shape | larger)), 65536, 1024)
    assert found.seconds > estimate_calibration(CONFIG, 65536, 1024).seconds


def estimate_fields():
    return ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def test_tokens_count_in_full_where_no_stage_samples_them():
    """Beyond the sample of the choices each token costs the same, whatever the stages."""
    seconds = [estimate_calibration(CONFIG, tokens, 1024).seconds for tokens in (65536, 131072, 196608)]
    assert seconds[0] < seconds[1]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])


def test_layers_that_stay_cost_two_passes_alone():
    whole, one, two = (estimate_calibration(CONFIG, 65536, 1024, num_layers=count).seconds for count in (16, 1, 2))
    assert one < two < whole
    assert whole - two == pytest.approx(14 * (two - one))
    assert one > two - one, "the streams pass through the other fifteen"


def test_a_choice_of_heads_takes_time_memory_and_disk_for_every_unit():
    """16 layers with 8 key-value heads of LLaMA's, 4 units of heads each, on 2,048 tokens of 2,048 float32 numbers."""
    given = estimate_calibration(CONFIG, 65536, 1024)
    chosen = estimate_calibration(CONFIG, 65536, 1024, chosen=True)
    assert chosen.memory_bytes - given.memory_bytes == 16 * 4 * 2048 * 2048 * 4
    attention = 2 * 2048 * 2048 + 2 * 512 * 2048
    assert chosen.disk_bytes - given.disk_bytes == 16 * (attention + 4 * 2048 * 2048) * 4
    fewer = LlamaConfig(**{name: getattr(CONFIG, name) for name in estimate_fields()} | {"num_key_value_heads": 2})
    added = [
        estimate_calibration(config, 65536, 1024, chosen=True).work.float64
        - estimate_calibration(config, 65536, 1024).work.float64
        for config in (CONFIG, fewer)
    ]
    assert added[0] > 1.5 * added[1] > 0, "a refit per unit"


def test_every_stage_takes_time():
    seconds = [estimate_calibration(CONFIG, 65536, 1024, stages=stages).seconds for stages in LADDER]
    assert seconds == sorted(set(seconds))


def test_text_that_the_source_writes_takes_time():
    given = estimate_calibration(CONFIG, 65536, 1024)
    assert estimate_calibration(CONFIG, 65536, 1024, written=True).seconds > given.seconds


def test_longer_gradient_fits_take_longer():
    given = estimate_calibration(CONFIG, 65536, 1024, local=LOCAL)
    longer = estimate_calibration(CONFIG, 65536, 1024, local=replace(LOCAL, steps=40))
    assert 1.9 * given.work.fast < longer.work.fast < 2 * given.work.fast, "all but the loss at the start"
    assert longer.work.float32 == given.work.float32


def test_seconds_are_divided_among_cores_and_not_on_a_gpu(monkeypatch):
    work = Work(float32=1e9)
    seconds = {}
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        seconds[threads] = {device: seconds_of(work, torch.device(device)) for device in ("cpu", "cuda")}
    assert seconds[1]["cpu"] / 2 <= seconds[2]["cpu"] < seconds[1]["cpu"]
    assert seconds[1]["cuda"] == seconds[2]["cuda"]


def test_idle_heads_take_time_as_others_do():
    odd, padded = (
        LlamaConfig(hidden_size=576, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64)
        for heads, kv_heads in ((9, 3), (12, 4))
    )
    assert estimate_calibration(odd, 65536, 1024) == estimate_calibration(padded, 65536, 1024)


def test_small_layers_spend_more_of_their_time_on_what_is_no_product():
    """Measured shares are in the module; a layer twice as wide has half as much besides its products."""
    shares = {}
    for hidden in (256, 512, 1024):
        config = LlamaConfig(hidden_size=hidden, num_attention_heads=8)
        found = estimate_calibration(config, 65536, 1024)
        shares[hidden] = found.seconds / seconds_of(found.work, torch.device("cpu")) - 1
    assert shares[256] == pytest.approx(2 * shares[512]) == pytest.approx(4 * shares[1024])
    assert 1 < shares[256] < 2
