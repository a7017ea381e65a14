"""The page in a real browser: opened from disk, with a keyboard, a pointer, and nobody to ask for anything."""

import json
import re
import shutil
import time

import pytest
import torch
from tiny_models import random_ids, tiny_model

from modeling_diff.analysis.aggregate import attention_to_span, mean_maps
from modeling_diff.analysis.maps import collect_maps
from modeling_diff.analysis.view_html import view_attention, write_html


selenium = pytest.importorskip("selenium", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="chromium and chromedriver are not installed")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,800"),
)
MINUS = "\u2212"
SIZES = {"num_hidden_layers": 3, "max_position_embeddings": 640}
NUM_TOKENS = 24
QUANTIZED = 0.5 / 255 * 2 + 1e-4  # of a weight of 1, both of whose halves were rounded at worst


def llama():
    return tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, **SIZES)


def diff_model():
    return tiny_model("v1", **SIZES)


def tokens(length=NUM_TOKENS):
    return random_ids(1, length, seed=1)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")

    def view(model, name, length=NUM_TOKENS):
        labels = [f" w{i}" if i % 6 else f"\n    w{i}" for i in range(length)]
        return view_attention(model, tokens(length), labels, name)

    write_html([view(diff_model(), "one")], folder / "one.html")
    write_html([view(llama(), "first"), view(diff_model(), "second")], folder / "two.html")
    write_html([view(llama(), "a", 512), view(diff_model(), "b", 512)], folder / "long.html", mark=(3, 9))
    return folder


def open_page(browser, path):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    deadline = time.monotonic() + 60
    while not browser.execute_script("return document.documentElement.dataset.ready"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)


def press(browser, *keys):
    for key in keys:
        browser.execute_script("delete document.documentElement.dataset.ready")
        browser.switch_to.active_element.send_keys(key)
        if key in "jknp0123":  # those compute a map
            while not browser.execute_script("return document.documentElement.dataset.ready"):
                time.sleep(0.02)


def requested(browser):
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def focused(browser):
    return [span.text for span in browser.find_elements(By.CSS_SELECTOR, ".tokens .focus")]


@pytest.mark.parametrize("height", [900, 1400])
@pytest.mark.parametrize("name", ["one", "two"])
def test_page_fills_a_large_window(browser, pages, name, height):
    """What is worked with, without the notes below it, takes two thirds of its height, and no list is empty."""
    size = {"width": 1400, "height": height, "deviceScaleFactor": 1, "mobile": False}
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        open_page(browser, pages / f"{name}.html")
        script = "return [...document.querySelectorAll('.panel')].map((panel) => panel.getBoundingClientRect().bottom)"
        map_side = browser.execute_script("return panels[0].canvas.getBoundingClientRect().width")
        bottoms = browser.execute_script(script)
        lists = browser.execute_script(
            "return [...document.querySelectorAll('.lists ol')].map((list) => list.childElementCount)"
        )
        assert max(bottoms) > 0.65 * height and map_side > 0.29 * height and all(lists)
    finally:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": 1280, "height": 800})


@pytest.mark.parametrize("name", ["one", "two", "long"])
def test_pages_open_without_a_word_a_request_or_overflow(browser, pages, name):
    open_page(browser, pages / f"{name}.html")
    press(browser, Keys.END, "n", "j", "m", "t", "t")
    assert browser.get_log("browser") == []
    assert {url.split(":")[0] for url in requested(browser)} <= {"file", "data"}
    assert len([url for url in requested(browser) if url.startswith("file")]) <= 1
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == 1280
    # What is worked with is on the first screen of a laptop: maps, tokens, lists and all heads.
    assert (
        browser.execute_script(
            "return Math.max(...[...document.querySelectorAll('.heads')]"
            ".map((heads) => heads.getBoundingClientRect().bottom))"
        )
        <= 800
    )


@pytest.mark.parametrize("kind", ["positive", "negative", "difference"])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_pages_means_equal_the_librarys(browser, pages, kind, normalized):
    open_page(browser, pages / "one.html")
    script = "return panels[0].model.map('mean', 'mean', arguments[0], arguments[1]).then((map) => [...map.weights])"
    shown = torch.tensor(browser.execute_script(script, kind, normalized)).view(NUM_TOKENS, NUM_TOKENS)
    exact = mean_maps(diff_model(), tokens(), kind=kind, normalization="absolute" if normalized else "none")[0]
    torch.testing.assert_close(shown, exact, atol=2 * QUANTIZED, rtol=0)
    assert not torch.equal(shown, exact)


def test_every_head_shown_is_the_models(browser, pages):
    open_page(browser, pages / "two.html")
    script = "return panels[1].model.map(2, arguments[0], 'difference', false).then((map) => [...map.weights])"
    exact = collect_maps(diff_model(), tokens(), layers=[2])[0].difference()[0]
    for head in range(4):
        shown = torch.tensor(browser.execute_script(script, head)).view(NUM_TOKENS, NUM_TOKENS)
        torch.testing.assert_close(shown, exact[head], atol=2 * QUANTIZED, rtol=0)


def test_pointing_at_a_token_shows_both_directions(browser, pages):
    open_page(browser, pages / "two.html")
    panel = browser.find_elements(By.CLASS_NAME, "panel")[1]
    span = panel.find_elements(By.CSS_SELECTOR, ".tokens span")[9]
    ActionChains(browser).move_to_element(span).perform()
    assert [text.strip() for text in focused(browser)] == ["w9", "w9"]  # the same text: both models point at it
    exact = collect_maps(diff_model(), tokens(), layers=[1])[0].difference()[0].mean(0)  # what a page begins with
    lists = panel.find_elements(By.CSS_SELECTOR, ".lists ol")
    for column, weights in zip(lists, (exact[9, :10], exact[9:, 9]), strict=True):
        shown = [float(n.text.replace(MINUS, "-")) for n in column.find_elements(By.CSS_SELECTOR, ".number")]
        expected = sorted(weights.tolist(), key=abs, reverse=True)[: len(shown)]
        assert len(shown) == 7 and shown == pytest.approx(expected, abs=2 * QUANTIZED)
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert focused(browser) == []


def test_pointing_at_a_cell_reads_it_out(browser, pages):
    open_page(browser, pages / "one.html")
    canvas = browser.find_element(By.CSS_SELECTOR, ".map canvas")
    margin, width, size = browser.execute_script(
        "const p = panels[0]; return [p.margin, p.canvas.clientWidth, p.model.size]"
    )
    cell = (width - margin) / size
    middle = canvas.size["width"] / 2
    ActionChains(browser).move_to_element_with_offset(
        canvas, int(margin + 4.5 * cell - middle), int(margin + 15.5 * cell - middle)
    ).perform()
    readout = browser.find_element(By.TAG_NAME, "output").text
    exact = collect_maps(diff_model(), tokens(), layers=[1])[0].difference()[0].mean(0)[15, 4].item()
    assert re.match(r"w15 15 → w4 4: ", readout)
    assert float(readout.split(": ")[1].split(" ")[0].replace(MINUS, "-")) == pytest.approx(exact, abs=2 * QUANTIZED)


def test_everything_is_reached_from_the_keyboard(browser, pages):
    open_page(browser, pages / "two.html")
    panels = browser.find_elements(By.CLASS_NAME, "panel")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert [text.strip() for text in focused(browser)] == ["w1", "w1"]
    press(browser, Keys.END, Keys.ARROW_LEFT)
    assert [text.strip() for text in focused(browser)] == ["w22", "w22"]
    selects = [[Select(s) for s in panel.find_elements(By.TAG_NAME, "select")] for panel in panels]
    press(browser, "j", "n", "n")
    assert [[s.first_selected_option.text for s in pair] for pair in selects] == [["2", "1"], ["2", "1"]]
    press(browser, "2")
    pressed = [b.text for b in panels[1].find_elements(By.CSS_SELECTOR, ".kinds [aria-pressed=true]")]
    assert pressed == ["A₂"]
    assert [b.text for b in panels[0].find_elements(By.CSS_SELECTOR, ".kinds [aria-pressed=true]")] == ["A"]
    press(browser, Keys.HOME, Keys.ARROW_RIGHT, "m", *[Keys.ARROW_RIGHT] * 3, "m", Keys.END)
    marked = browser.find_elements(By.CSS_SELECTOR, ".panel:nth-child(2) .marked")
    assert [span.text.strip() for span in marked] == ["w1", "w2", "w3", "w4"]
    exact = collect_maps(diff_model(), tokens(), layers=[2], heads=[1])[0].negative[0, 0]
    share, _ = attention_to_span(exact, [1, 2, 3, 4])
    said = panels[1].find_element(By.TAG_NAME, "output").text
    assert float(re.search(r"marked ([\d.]+) %", said).group(1)) == pytest.approx(100 * share[-1].item(), abs=1.5)
    press(browser, Keys.ESCAPE)
    assert focused(browser) == []


def test_every_control_can_be_tabbed_to(browser, pages):
    open_page(browser, pages / "two.html")
    reached = set()
    for _ in range(32):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(
            browser.execute_script(
                "const e = document.activeElement; return e.id || e.ariaLabel || e.textContent || e.tagName"
            )
        )
    assert {"normalize", "contrast", "link", "theme", "layer", "head", "tokens", "head 0", "A₁", "A₂"} <= reached


def test_models_are_changed_together_or_apart(browser, pages):
    open_page(browser, pages / "two.html")
    layers = [Select(s) for s in browser.find_elements(By.CSS_SELECTOR, "[aria-label=layer]")]
    layers[0].select_by_visible_text("0")
    assert [s.first_selected_option.text for s in layers] == ["0", "0"]
    browser.find_element(By.ID, "link").click()
    layers[1].select_by_visible_text("mean")
    assert [s.first_selected_option.text for s in layers] == ["0", "mean"]


def test_models_with_other_layers_kept_show_the_nearest(browser, tmp_path):
    views = [view_attention(llama(), tokens(8), ["x"] * 8, "all")]
    views.append(view_attention(diff_model(), tokens(8), ["x"] * 8, "some", layers=[0, 2]))
    open_page(browser, write_html(views, tmp_path / "some.html"))
    layers = [Select(s) for s in browser.find_elements(By.CSS_SELECTOR, "[aria-label=layer]")]
    layers[0].select_by_visible_text("2")
    assert [s.first_selected_option.text for s in layers] == ["2", "2"]
    layers[0].select_by_visible_text("1")
    assert [s.first_selected_option.text for s in layers] == ["1", "0"]


def test_the_theme_follows_the_system_and_the_button(browser, pages):
    def emulate(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def ground():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    emulate("dark")
    open_page(browser, pages / "one.html")
    dark = ground()
    browser.find_element(By.ID, "theme").click()
    assert dark == "rgb(16, 20, 27)" and ground() == "rgb(255, 255, 255)"
    emulate("light")
    open_page(browser, pages / "one.html")
    assert ground() == "rgb(255, 255, 255)"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_zero_is_the_ground_and_signs_have_hues_of_their_own(browser, pages, theme):
    open_page(browser, pages / "one.html")
    zero, plus, minus = browser.execute_script(
        "return [0, 0.8, -0.8].map((share) => colorOf(share, 'positive', arguments[0], 0.5))", theme
    )
    assert zero == ([255, 255, 255] if theme == "light" else [16, 20, 27])
    assert plus[2] > plus[0] + 30 and minus[0] > minus[2] + 30  # blue, and orange


def test_512_tokens_are_followed_at_the_pointers_pace(browser, pages):
    open_page(browser, pages / "long.html")
    spent = browser.execute_script(
        "const began = performance.now(); for (let i = 0; i < 10; i++) focusToken(400 + i);"
        "return (performance.now() - began) / 10"
    )
    assert spent < 250  # ms for both panels; a tenth of that on an idle machine
    assert "marked" in browser.find_element(By.TAG_NAME, "output").text
