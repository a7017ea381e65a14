"""Small models for the kernels, on two paths side by side, and which paths their calls took."""

from functools import partial

from tiny_models import tiny_model

from modeling_diff.diff_attention_auto import fastest_path


# float32 against float32 sums in another order: a few times 2^-24 of the largest value per layer.
TOLERANCE = 5e-5


build_model = partial(tiny_model, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)


def with_eager(model, implementation, function):
    """What `function` gives with `eager`, and with `implementation`."""
    results = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        results.append(function())
    return results


def assert_close(ours, expected, name=""):
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max(), name


def record_paths(monkeypatch):
    """A function that gives the implementations of all calls by default since, as they were chosen."""
    chosen = set()

    def record(*args, **kwargs):
        name, mask = fastest_path(*args, **kwargs)
        chosen.add(name)
        return name, mask

    monkeypatch.setattr("modeling_diff.diff_attention_auto.fastest_path", record)
    monkeypatch.setattr("modeling_diff.diff_attention_modules.fastest_path", record)
    return lambda: chosen
