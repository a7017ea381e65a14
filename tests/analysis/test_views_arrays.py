"""Aggregations against plain means of collected maps, spans, figures on disk, and what a page stores."""

import base64
import json
import re
import zlib
from xml.etree import ElementTree

import numpy
import pytest
import torch
from tiny_models import random_ids, tiny_model

from modeling_diff.analysis.aggregate import attention_to_span, mean_maps, normalize, top_keys, weights_of
from modeling_diff.analysis.maps import collect_maps
from modeling_diff.analysis.tokens import encode_text, token_labels
from modeling_diff.analysis.view_html import quantize, view_attention, write_html


SIZES = {"num_hidden_layers": 3, "max_position_embeddings": 640}


def diff_model(variant="v1", **changes):
    return tiny_model(variant, **SIZES, **changes)


def llama():
    return tiny_model("llama", **SIZES)


def tokens(length=20, batch_size=1):
    return random_ids(batch_size, length, seed=1)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("normalization", ["none", "sum", "absolute"])
def test_streamed_means_equal_means_of_whole_maps(variant, normalization):
    model = diff_model(variant)
    ids = tokens(batch_size=2)
    differences = [layer.positive - layer.diff_lambda * layer.negative for layer in collect_maps(model, ids)]
    weights = torch.stack(differences)  # (L, B, H, Q, S)
    if normalization != "none":
        weights = weights / (weights if normalization == "sum" else weights.abs()).sum(-1, keepdim=True)
    for over, dims in (("heads", 2), ("layers", 0), ("both", (0, 2))):
        mean = mean_maps(model, ids, over=over, normalization=normalization, block=7)
        # The same sums of float32 numbers in another order; rows over a small sum of 1 - lambda are large.
        torch.testing.assert_close(mean, weights.mean(dims), atol=1e-5, rtol=1e-5)


def test_means_take_a_mixed_models_own_heads():
    model = diff_model("v1", differential_layers=[0, 2])
    ids = tokens()
    assert mean_maps(model, ids, over="heads").shape == (3, 1, 20, 20)
    with pytest.raises(ValueError, match="layer 1 has 8 chosen heads and an earlier one 4"):
        mean_maps(model, ids, over="layers")
    with pytest.raises(ValueError, match="layer 1 subtracts no map"):
        mean_maps(model, ids, kind="negative")


def test_span_and_all_else_add_up():
    weights = torch.tensor([[0.5, -0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    inside, elsewhere = attention_to_span(weights, [1, 2])
    assert inside.tolist() == [0.5, 0.0] and elsewhere.tolist() == [0.5, 0.0]
    inside, elsewhere = attention_to_span(weights, [1, 2], "none")
    assert inside.tolist() == [0.0, 0.0] and elsewhere.tolist() == [0.5, 0.0]
    assert normalize(weights, "sum")[0].tolist() == [1.0, -0.5, 0.5, 0.0]
    assert top_keys(weights, 3) == [[0, 1, 2], []]


def stored_weights(stored, head, which):
    """A stored map as a (T, T) matrix, decoded as the page says."""
    size = stored.outside.shape[-1]
    matrix = numpy.zeros((size, size))
    matrix[numpy.tril_indices(size)] = (stored.maps[head, which] / 255.0) ** 2
    return matrix


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_pages_store_maps_within_their_stated_precision(variant):
    model = diff_model(variant)
    ids = tokens(70)
    view = view_attention(model, ids, [str(i) for i in range(70)], "model", layers=[1], heads=[2, 0])
    (maps,) = collect_maps(model, ids, layers=[1], heads=[2, 0])
    (stored,) = view.layers
    assert stored.heads == [2, 0] and view.left_out == []
    for head in range(2):
        for which, exact in enumerate((maps.positive, maps.negative)):
            exact = exact[0, head].double().numpy()
            error = numpy.abs(stored_weights(stored, head, which) - exact)
            # Half a step of sqrt(w) is 0.5 / 255, and w is its square.
            assert (error <= numpy.sqrt(exact) / 255 + (0.5 / 255) ** 2 + 1e-6).all()
    numpy.testing.assert_array_equal(stored.diff_lambda, maps.diff_lambda[0, :, :, 0].numpy())


def test_page_shows_the_differential_heads_of_a_layer_that_has_others():
    model = diff_model(differential_heads=[[1, 3], [0, 1, 2, 3], []])
    view = view_attention(model, tokens(), ["x"] * 20, "model")
    assert [(stored.heads, stored.is_differential) for stored in view.layers] == [
        ([1, 3], True),
        ([0, 1, 2, 3], True),
        (list(range(8)), False),
    ]


def test_long_texts_show_a_window_and_say_so():
    ids = tokens(60)
    view = view_attention(diff_model(), ids, [str(i) for i in range(60)], "model", max_tokens=16)
    assert view.tokens == [str(i) for i in range(44, 60)] and view.start == 44
    assert "44 of 60 tokens" in view.left_out[0] and "44 to 59" in view.left_out[0]
    exact = collect_maps(diff_model(), ids, layers=[0])[0].positive[0, 1, 50]
    inside = stored_weights(view.layers[0], 1, 0)[6]
    assert inside[:7] == pytest.approx(exact[44:51].numpy(), abs=0.004)
    assert (view.layers[0].outside[1, 0, 6] / 255.0) ** 2 == pytest.approx(exact[:44].sum().item(), abs=0.004)


def test_too_many_maps_lose_layers_then_heads_and_say_so():
    labels = ["x"] * 20
    bytes_a_map = 20 * 21 // 2
    view = view_attention(diff_model(), tokens(), labels, "model", max_bytes=2 * 8 * bytes_a_map)
    assert [layer.layer for layer in view.layers] == [0, 2] and "Layers 1:" in view.left_out[0]
    view = view_attention(diff_model(), tokens(), labels, "model", max_bytes=4 * bytes_a_map)
    assert len(view.layers) == 1 and view.layers[0].heads == [0, 3]
    assert "All but 2 heads" in view.left_out[1]


def test_pages_are_one_file_without_addresses(tmp_path):
    labels = ["</script>", *["x"] * 19]
    views = [view_attention(m, tokens(), labels, n) for m, n in ((llama(), "a"), (diff_model(), "b"))]
    page = write_html(views, tmp_path / "view.html", title="<b>@@DATA@@").read_text()
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert page.count("</script>") == 2 and "&lt;b&gt;@@DATA@@" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert [model["tokens"][0] for model in data["models"]] == ["</script>"] * 2
    raw = zlib.decompress(base64.b64decode(data["models"][1]["layers"][2]["maps"]))
    assert raw == views[1].layers[2].maps.tobytes()


def test_512_tokens_make_a_page_of_a_few_megabytes(tmp_path):
    view = view_attention(diff_model("v2"), tokens(512), ["x"] * 512, "model")
    assert view.left_out == []
    assert write_html([view], tmp_path / "view.html").stat().st_size < 5e6  # 24 maps of 131 KB, in base64


def test_quantization_keeps_zero_and_one():
    assert quantize(torch.tensor([0.0, 1.0, 0.25])).tolist() == [0, 255, 128]


class Letters:
    """A tokenizer with a letter a token; the second half of the snowman is a piece that is no text."""

    def __call__(self, text, **kwargs):
        return type("Encoded", (), {"input_ids": torch.tensor([[ord(letter) for letter in text]])})

    def decode(self, ids, **kwargs):
        return "\ufffd" if ids[0] > 255 else chr(ids[0])

    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


def test_tokens_are_shown_as_text_or_as_pieces():
    assert token_labels(Letters(), [65, 10, 9731]) == ["A", "\n", "<9731>"]
    assert token_labels(None, [65, 10]) == ["65", "10"]
    assert encode_text(Letters(), "AB").tolist() == [[65, 66]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_text(None, "text"), "tokenizer is None"),
        (lambda: encode_text(Letters(), " \n"), "text is empty"),
        (lambda: write_html([], "page.html"), "0 views"),
        (lambda: view_attention(diff_model(), tokens(batch_size=2), ["x"] * 20, "m"), "give one text"),
        (lambda: view_attention(diff_model(), tokens(), ["x"] * 20, "m", layers=[3]), "there are 3 layers"),
        (lambda: view_attention(diff_model(), tokens(), ["x"] * 20, "m", heads=[4]), "there are 4 heads"),
        (lambda: view_attention(diff_model(), tokens(), ["x"] * 20, "m", start=20), "start=20"),
        (lambda: view_attention(diff_model(), tokens(641), ["x"] * 641, "m"), "max_position_embeddings=640"),
        (lambda: weights_of(collect_maps(llama(), tokens())[0], "negative"), "subtracts no map"),
        (lambda: weights_of(collect_maps(llama(), tokens())[0], "both"), "kind='both'"),
        (lambda: normalize(torch.ones(2), "max"), "normalization='max'"),
        (lambda: attention_to_span(torch.ones(2, 3), [3]), "span=\\[3\\]"),
        (lambda: mean_maps(llama(), tokens(), over="texts"), "over='texts'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_figures_are_written_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from modeling_diff.analysis.figures import heads_figure, map_figure, pair_figure, save_figure, score_figure

    model = diff_model()
    ids = tokens()
    labels = ["a$b", "\n", " ", *["word"] * 17]
    (maps,) = collect_maps(model, ids, layers=[1])
    figures = {
        "map": map_figure({"one": maps.difference()[0, 0], "two": maps.positive[0, 0]}, labels),
        "heads": heads_figure(maps),
        "pair": pair_figure(maps, 2, labels),
        "scores": score_figure({"induction": torch.rand(3, 4), "retrieval": torch.full((3, 4), torch.nan)}, "model"),
    }
    for figure in figures.values():
        assert all(axes.get_xlabel() or axes.get_ylabel() or figure.get_supxlabel() for axes in figure.axes[:1])
    for name in ("map", "heads", "pair"):  # one scale, one color bar
        scales = {(image.norm.vmin, image.norm.vmax) for axes in figures[name].axes for image in axes.images}
        bars = [axes for axes in figures[name].axes if axes.get_label() == "<colorbar>"]
        assert len(scales) == 1 and len(bars) == 1 and bars[0].get_ylabel() == "attention weight"
    for name, figure in figures.items():
        png = save_figure(figure, tmp_path / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5000
    svg = save_figure(figures["pair"], tmp_path / "pair.svg").read_text()
    assert "<svg" in svg and ">word<" in svg  # text stays text
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        save_figure(figures["map"], tmp_path / "map.jpg")
    with pytest.raises(ValueError, match="3 labels for 20 keys"):
        map_figure({"one": maps.positive[0, 0]}, ["a"] * 3)
    with pytest.raises(ValueError, match="head=9"):
        pair_figure(maps, 9)


def test_svgs_of_any_text_are_xml(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from modeling_diff.analysis.figures import map_figure, save_figure

    labels = ["a\x0cb", "\x1b[0m", "\x00", "\n", "\uffff", "\ud800", "<b>&", "é"]
    path = save_figure(map_figure({"one": torch.rand(8, 8).tril()}, labels), tmp_path / "map.svg")
    written = {"".join(text.itertext()) for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
    assert written >= {r"a\x0cb", r"\x1b[0m", r"\x00", r"\n", r"\uffff", r"\ud800", "<b>&", "é"}


def test_zero_is_white_on_the_diverging_scale():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from modeling_diff.analysis.figures import map_figure

    weights = torch.tensor([[0.9, 0.0, 0.0], [-0.2, 0.6, 0.0], [0.0, -0.1, 0.4]])
    image = map_figure({"one": weights}).axes[0].images[0]
    assert image.norm(0.0) == pytest.approx(0.5) and image.norm.vmin == -image.norm.vmax
    assert image.cmap(image.norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01)
    assert image.norm(-0.2) < 0.5 < image.norm(0.1)
