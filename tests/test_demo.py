"""demo/: the page in a real browser, run from a folder as bare as a Space, and what it draws."""

import base64
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, blob
from PIL import Image

from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.hub.space import space_files
from ddpm_mnist.loading import load_model
from ddpm_mnist.options import SampleOptions
from ddpm_mnist.sampling import to_uint8
from ddpm_mnist.training.export import export_pipeline

sys.path.append(str(ROOT / "demo"))
import drawing  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")
BROWSER = CHROMIUM and all(map(importlib.util.find_spec, ("gradio", "playwright")))
needs_a_browser = pytest.mark.skipif(not BROWSER, reason="see demo/ in CONTRIBUTING.md")


def untrained(folder: Path, labels: int | None = None, channels: int = 1, size: int = 28) -> Path:
    """The folder of a small model with random weights. The last of its labels, if it has any, stands for none."""
    torch.manual_seed(0)
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels, "num_class_embeds": labels}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(**shape, **blocks, norm_num_groups=4)
    export_pipeline(unet, DDPMScheduler(), folder, null_class_label=labels and labels - 1)
    return folder


DISC = drawing.png(np.asarray(blob(3, 140)))


def pixels(data: str) -> np.ndarray:
    """The picture in a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))), dtype=int)


@pytest.mark.parametrize("sampler", drawing.SAMPLERS)
def test_the_page_draws_what_generate_draws(tmp_path, sampler):
    folder, steps = str(untrained(tmp_path, labels=11)), 12
    ours, model = load_model(folder), drawing.load_model(folder)
    settings = drawing.Settings(label="7", count=3, guidance=1.5, sampler=sampler, steps=steps, seed=5)
    *_, before, last = drawing.draw(model, settings)
    frames = last["frames"]
    assert last["done"] and not before["done"] and len(frames) == steps + 1 and frames[-1]["t"] == -1
    options = SampleOptions(scheduler=sampler, num_inference_steps=steps, guidance_scale=1.5, seed=5)
    (expected,) = [to_uint8(step.prev_sample) for _, step in ours.draw(range(3), options, 7) if step.last]
    shown = pixels(frames[-1]["png"])
    assert np.abs(shown[:, :28] - expected.reshape(-1, 28).int().numpy()).max() <= 1
    assert np.array_equal(shown[:, :28], shown[:, 28:])
    early = pixels(frames[0]["png"])
    assert np.abs(early[:, :28] - early[:, 28:]).mean() > 5  # x_T is not the x_0 predicted from it


def test_a_long_drawing_keeps_few_frames_and_a_model_may_have_colours_and_no_labels(tmp_path):
    model = drawing.load_model(str(untrained(tmp_path / "colour", channels=3, size=8)))
    *_, last = drawing.draw(model, drawing.Settings(count=2, sampler="ddpm", steps=150))
    assert len(last["frames"]) == drawing.MAX_FRAMES + 1 and last["frames"][0]["t"] > 980
    assert "label" not in last["query"] and last["names"] == ["1", "2"]
    assert pixels(last["frames"][0]["png"]).shape == (2 * 8, 2 * 8, 3)


def test_what_is_too_much_or_wrong_is_refused(tmp_path):
    model = drawing.load_model(str(untrained(tmp_path, labels=11)))
    for change, message in (
        ({"count": 17}, "count 17: draw 1 to 16"),
        ({"steps": 1001}, "steps 1001: must be from 1 to 1000"),
        ({"sampler": "dpmsolver", "steps": 1000}, "steps 1000: must be from 1 to 999"),
        ({"count": 16, "steps": 500}, "too much work for this page: take at most 125 steps"),
        ({"seed": -1}, "seed -1"),
        ({"seed": None}, "must be numbers"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"label": "10"}, "label 10: choose 0 to 9"),
        ({"sampler": "euler"}, "sampler euler: choose ddpm, ddim, dpmsolver"),
    ):
        with pytest.raises(drawing.Refusal, match=re.escape(message)):
            next(drawing.draw(model, drawing.Settings()._replace(**change)))
    wide = drawing.png(np.zeros((1, 1001), np.uint8))
    for data in ("", None, "data:image/png;base64,AAAA", "data:text/html,x", "x" * 600_000, wide):
        with pytest.raises(drawing.Refusal):
            drawing.read_drawing(data)
    for data, label, message in ((DISC, "10", "Label 10"), (drawing.png(np.zeros((9, 9), np.uint8)), "1", "Nothing")):
        with pytest.raises(drawing.Refusal, match=message):
            next(drawing.rewrite(model, data, 999, label, 2, 0))


def test_a_drawing_is_scaled_and_centred_as_mnist_is():
    big = Image.new("L", (280, 280))
    big.paste(blob(3, 140), (130, 10))  # a disc, far from the centre
    image = drawing.as_mnist(big)
    left, top, right, bottom = image.getbbox()
    assert image.size == (28, 28) and max(right - left, bottom - top) == 20
    weight = np.asarray(image, dtype=float)
    centre = [(weight.sum(axis) * (np.arange(28) + 0.5)).sum() / weight.sum() for axis in (0, 1)]
    assert np.allclose(centre, 14, atol=0.51)


def test_a_drawing_comes_back_nearly_unchanged_from_little_noise(tmp_path):
    model = drawing.load_model(str(untrained(tmp_path, labels=11)))
    *_, last = drawing.rewrite(model, DISC, 0, "none", 2, 0)
    original, frame = pixels(last["original"]), pixels(last["frames"][-1]["png"])
    assert len(last["frames"]) == 2 and last["frames"][0]["t"] == 0
    assert np.abs(frame[:28, :28] - original).mean() < 10
    *_, last = drawing.rewrite(model, DISC, 999, "4", 2, 0)
    assert last["frames"][0]["t"] == 980 and len(last["frames"]) == 51


# ---- the page ------------------------------------------------------------------------------------------------------


@contextmanager
def visit(model: Path, folder: Path, width: int):
    """The page of a model in a browser, run from a folder that holds what a Space holds; and a list of errors in the
    browser and of requests to other servers."""
    from playwright.sync_api import sync_playwright

    for path, content in space_files("alice/digits", "mit").items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    env = os.environ | {"DDPM_MODEL": str(model), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log, wrong, address = folder / "log", [], None
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 180
        while address is None:
            address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8"))
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in QUIET])
            page = browser.new_page(viewport={"width": width, "height": 844}, base_url=address[0])
            page.set_default_timeout(90_000)  # milliseconds; CI may be slow
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda r: None if re.match(r"http://127|data:|blob:", r.url) else wrong.append(r.url))
            page.goto("/")
            yield page, wrong
            browser.close()
        assert "Traceback" not in log.read_text(encoding="utf-8")
    finally:
        server.terminate()
        server.wait(timeout=20)


def film(page, tiles: int, which: str = "#drawn") -> list[str]:
    """The pictures of a film of so many tiles, x_t and predicted x_0 of each image, when it is done."""
    page.wait_for_function(f"document.querySelectorAll('{which} .tiles figure').length === {tiles}")
    page.wait_for_selector(f"{which}[data-done=true], {which} [data-done=true]")
    page.wait_for_function(f"document.querySelector('{which} .caption').textContent.startsWith('Done')")
    return page.evaluate(f"[...document.querySelectorAll('{which} .tiles canvas')].map((c) => c.toDataURL())")


def draw(page, count: int) -> list[str]:
    page.locator("#count input[type=number]").fill(str(count))
    page.locator("#count input[type=number]").press("Tab")
    page.click("#draw")
    return film(page, count)


def rewrite(page, points: list[tuple[int, int]]) -> list[str]:
    """Write one stroke with the mouse, through these points of the canvas, and have it denoised."""
    box = page.locator("#pad canvas").bounding_box()
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=5)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    page.click("#rewrite")
    return film(page, 5, "#rewritten")


@needs_a_browser
def test_a_visit(tmp_path):
    with visit(untrained(tmp_path / "ten-classes", labels=11), tmp_path, 1200) as (page, wrong):
        first = film(page, 10)
        assert page.title() == "Watch diffusion draw: ten-classes" and "?" not in page.url
        page.get_by_role("radio", name="7", exact=True).first.check()
        sevens = draw(page, 3)
        assert len(sevens) == 6 and sevens[0] == sevens[1] and not set(sevens) & set(first)
        assert "label=7" in page.url and "count=3" in page.url and "seed=0" in page.url

        # slide through the steps
        page.locator("#drawn input[type=range]").press("Home")
        assert "t = 980: above xₜ = 0.01 x₀ + 1.00 ε" in page.locator("#drawn .caption").text_content()
        page.locator("#drawn input[type=range]").press("End")
        assert film(page, 3) == sevens

        # save: all as one picture, and one as the model drew it
        with page.expect_download() as saved:
            page.click("#drawn .save")
        assert Image.open(saved.value.path()).size == (3 * 28 * 4, 28 * 4)
        with page.expect_download() as saved:
            page.locator("#drawn figcaption a").first.click()
        assert Image.open(saved.value.path()).size == (28, 28)
        page.click("#another")
        page.wait_for_url("**seed=1**")
        assert film(page, 3) != sevens
        link = page.locator("#drawn .link").get_attribute("href").replace("seed=1", "seed=0")

        # write: by mouse, then by keyboard
        page.get_by_role("tab", name="Write one").click()
        page.click("#rewrite")
        page.get_by_text("Nothing is written yet").first.wait_for()
        by_mouse = rewrite(page, [(80, 50), (200, 50), (110, 220)])
        page.click("#pad .clear")
        for key in [" ", *["ArrowDown"] * 8, *["ArrowRight"] * 4, " "]:
            page.locator("#pad canvas").press(key)
        page.click("#rewrite")
        changed = "(old) => document.querySelector('#rewritten canvas').toDataURL() !== old"
        page.wait_for_function(changed, arg=by_mouse[0])
        assert len(set(film(page, 5, "#rewritten"))) == 5  # what was written, and four other pictures

        # the schedule
        page.get_by_role("tab", name="Schedule").click()
        page.locator("#schedule input").press("End")
        assert page.locator("#schedule .sum").text_content() == "xₜ = 0.006 x₀ + 1.000 ε"
        picture = "document.querySelector('#schedule canvas').toDataURL()"
        noise = page.evaluate(picture)
        page.locator("#schedule input").press("Home")
        assert page.evaluate(picture) != noise and wrong == []

        # a link draws the same picture again, and a wrong one says so; Gradio may report requests that it aborts
        page.goto(link)
        assert film(page, 3) == sevens
        page.goto("/?count=99")
        page.get_by_text("count 99: draw 1 to 16 images").first.wait_for()
        assert [text for text in wrong if not re.search("abort|errored out", text, re.IGNORECASE)] == []


@needs_a_browser
def test_a_model_without_labels_on_a_phone(tmp_path):
    with visit(untrained(tmp_path / "model"), tmp_path, 390) as (page, wrong):
        film(page, 10)
        assert page.get_by_role("radio", name="7", exact=True).count() == 0
        draw(page, 2)
        assert "label" not in page.url and "count=2" in page.url
        for tab in ("Write one", "Schedule", "Draw"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
            if tab == "Write one":
                rewrite(page, [(140, 50), (140, 220)])
        assert wrong == []


@needs_a_browser
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    command = [sys.executable, str(ROOT / "demo/app.py"), "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: --model {tmp_path}: cannot be shown")
