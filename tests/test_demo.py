"""demo/: the page in a real browser, run from a folder as bare as a Space, and what it draws."""

import base64
import importlib.util
import io
import json
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

from ddpm_mnist.hub.export import export_pipeline
from ddpm_mnist.hub.space import space_files
from ddpm_mnist.loading import load_model
from ddpm_mnist.sampling import labels_for, make_sampler, sample_images, to_pil
from ddpm_mnist.scheduler import DDPMScheduler
from ddpm_mnist.unet import UNet2DModel

sys.path.append(str(ROOT / "demo"))
import drawing  # noqa: E402

CONDITIONAL = ROOT / "tests/release-0.1/pipeline"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
needs_a_browser = pytest.mark.skipif(
    CHROMIUM is None or not all(map(importlib.util.find_spec, ("gradio", "playwright"))),
    reason="needs Chromium, and `pip install -r demo/requirements.txt playwright`",
)


def unconditional(folder: Path, channels: int = 1, size: int = 28) -> Path:
    """The folder of a small model with random weights and without labels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    unet = UNet2DModel(**shape, **blocks, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    export_pipeline(unet, DDPMScheduler(), folder)
    return folder


# ---- what is drawn -------------------------------------------------------------------------------------------------


def pixels(data: str) -> np.ndarray:
    """The picture in a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("L"), dtype=int)


@pytest.mark.parametrize("sampler", drawing.SAMPLERS)
def test_the_page_draws_what_generate_draws(sampler):
    ours, steps, model = load_model(str(CONDITIONAL)), 12, drawing.load_model(str(CONDITIONAL))
    settings = drawing.Settings(digit="7", count=3, guidance=1.5, sampler=sampler, steps=steps, seed=5)
    *_, before, last = drawing.draw(model, settings)
    frames = last["frames"]
    assert last["done"] and not before["done"] and len(frames) == steps + 1 and frames[-1]["t"] == -1
    labels = {"class_labels": labels_for(range(3), 10, 7), "guidance_scale": 1.5, "null_class_label": 10}
    labels["guidance_min_log_snr"] = -2.0
    expected = to_pil(sample_images(ours.unet, ours.sampler(sampler, steps)[0], range(3), steps, seed=5, **labels))
    shown = pixels(frames[-1]["png"])
    assert np.abs(shown[:, :28] - np.concatenate([np.asarray(image, dtype=int) for image in expected])).max() <= 1
    assert np.array_equal(shown[:, :28], shown[:, 28:])
    early = pixels(frames[0]["png"])
    assert np.abs(early[:, :28] - early[:, 28:]).mean() > 5  # x_T is not the x_0 predicted from it


def test_the_variance_is_that_of_generate():
    ours, model = load_model(str(CONDITIONAL)), drawing.load_model(str(CONDITIONAL))
    large = DDPMScheduler.from_config(ours.scheduler.config, variance_type="fixed_large")
    for steps, expected in ((50, "fixed_small"), (1000, "fixed_large")):
        theirs = drawing.make_sampler(model._replace(schedule=large), "ddpm", steps)
        assert theirs.config.variance_type == make_sampler("ddpm", large.config, steps).config.variance_type == expected


def test_a_long_drawing_keeps_few_frames_and_all_kinds_of_models_draw(tmp_path):
    model = drawing.load_model(str(unconditional(tmp_path / "colour", channels=3, size=8)))
    *_, last = drawing.draw(model, drawing.Settings(count=2, sampler="ddpm", steps=150))
    assert len(last["frames"]) == drawing.MAX_FRAMES + 1 and last["frames"][0]["t"] > 980
    assert "digit" not in last["query"] and last["names"] == ["1", "2"] and model.noun == "image"
    assert Image.open(io.BytesIO(base64.b64decode(last["frames"][0]["png"].split(",")[1]))).mode == "RGB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 17}, "count 17: draw 1 to 16"),
        ({"count": 0}, "count 0"),
        ({"steps": 1001}, "steps 1001: must be from 1 to 1000"),
        ({"count": 16, "steps": 500}, "too much work for this page: take at most 125 steps"),
        ({"seed": -1}, "seed -1"),
        ({"seed": None}, "must be numbers"),
        ({"seed": "1e9"}, "must be numbers"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"digit": "10"}, "digit 10: choose 0 to 9"),
        ({"sampler": "euler"}, "sampler euler: choose ddpm, ddim, dpmsolver"),
    ],
)
def test_what_is_too_much_or_wrong_is_refused(change, message):
    model = drawing.load_model(str(CONDITIONAL))
    with pytest.raises(drawing.Refusal, match=re.escape(message)):
        next(drawing.draw(model, drawing.Settings()._replace(**change)))


def test_a_drawing_is_scaled_and_centred_as_mnist_is():
    big = Image.new("L", (280, 280))
    big.paste(blob(3, 140), (130, 10))  # a disc, far from the centre
    image = drawing.as_mnist(big)
    left, top, right, bottom = image.getbbox()
    assert image.size == (28, 28) and max(right - left, bottom - top) == 20
    ink = np.asarray(image, dtype=float)
    centre = [(ink.sum(axis) * (np.arange(28) + 0.5)).sum() / ink.sum() for axis in (0, 1)]
    assert np.allclose(centre, 14, atol=0.51)
    with pytest.raises(drawing.Refusal, match="Nothing is written"):
        drawing.as_mnist(Image.new("L", (280, 280)))


def drawn_url(image: Image.Image) -> str:
    return drawing.png(np.asarray(image))


def test_a_drawing_comes_back_nearly_unchanged_from_little_noise():
    model = drawing.load_model(str(CONDITIONAL))
    *_, last = drawing.rewrite(model, drawn_url(blob(3, 140)), 0, "none", 2, 0)
    original, frame = pixels(last["original"]), pixels(last["frames"][-1]["png"])
    assert len(last["frames"]) == 2 and last["frames"][0]["t"] == 0
    assert np.abs(frame[:28, :28] - original).mean() < 10
    *_, last = drawing.rewrite(model, drawn_url(blob(3, 140)), 999, "4", 2, 0)
    assert last["frames"][0]["t"] == 980 and len(last["frames"]) == 51


@pytest.mark.parametrize(
    "data",
    ["", None, "data:image/png;base64,AAAA", "data:text/html,x", "x" * 600_000, drawn_url(Image.new("L", (1001, 1)))],
)
def test_what_is_no_drawing_is_refused(data):
    with pytest.raises(drawing.Refusal):
        drawing.read_drawing(data)


# ---- the page ------------------------------------------------------------------------------------------------------


@contextmanager
def serve(model: Path, folder: Path):
    """The address and the log of the page of a model, run from a folder that holds what a Space holds."""
    folder.mkdir()
    for path, content in space_files("alice/watch", "alice/digits", "mit").items():
        (folder / path).write_bytes(content)
    env = os.environ | {"DDPM_MODEL": str(model), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with open(folder / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        deadline, found = time.monotonic() + 180, None
        while found is None:
            text = (folder / "log").read_text(encoding="utf-8")
            found = re.search(r"http://127\.0\.0\.1:\d+", text)
            assert server.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        yield found[0], folder / "log"
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextmanager
def visit(width: int):
    """A page in a browser, `width` pixels wide, and a list of whatever went wrong there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page(viewport={"width": width, "height": 844}, accept_downloads=True)
        page.set_default_timeout(90_000)  # milliseconds; CI may be slow
        wrong = []
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda asked: None if re.match(r"http://127|data:|blob:", asked.url) else wrong.append(asked.url)
        )
        yield page, wrong
        browser.close()


def film(page, where: str = "#drawn", tiles: int | None = None) -> list[str]:
    """The pictures that a film shows, x_t and predicted x_0 of each image, when it is done."""
    if tiles is not None:
        page.wait_for_function(f"document.querySelectorAll('{where} .tiles figure').length === {tiles}")
    page.wait_for_selector(f"{where}[data-done=true], {where} [data-done=true]")
    page.wait_for_function(f"document.querySelector('{where} .caption').textContent.startsWith('Done')")
    return page.evaluate(f"[...document.querySelectorAll('{where} .tiles canvas')].map((c) => c.toDataURL())")


def write_by_mouse(page, points: list[tuple[float, float]]) -> None:
    """A stroke on the canvas, through points in units of its side."""
    box = page.locator("#pad canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


@needs_a_browser
def test_a_visit(tmp_path):
    with serve(CONDITIONAL, tmp_path / "space") as (address, log), visit(1200) as (page, wrong):
        # open: a picture is there
        page.goto(address)
        first = film(page, tiles=10)
        assert page.title() == "Watch diffusion draw: pipeline" and "?" not in page.url

        # draw: three sevens, which appear step by step
        page.get_by_role("radio", name="7", exact=True).first.check()
        page.locator("#count input[type=number]").fill("3")
        page.locator("#count input[type=number]").press("Tab")
        page.click("#draw")
        sevens = film(page, tiles=3)
        assert len(sevens) == 6 and sevens[0] == sevens[1] and not set(sevens) & set(first)
        assert "digit=7" in page.url and "count=3" in page.url and "seed=0" in page.url

        # scrub, by keyboard
        slider = page.locator("#drawn input[type=range]")
        slider.focus()
        slider.press("Home")
        caption = page.locator("#drawn .caption")
        assert "t = 980" in caption.text_content() and "1.00 ε" in caption.text_content()
        slider.press("ArrowRight")
        assert "t = 960" in caption.text_content()
        slider.press("End")
        assert film(page) == sevens

        # save: all as one picture, and one as the model drew it
        with page.expect_download() as saved:
            page.click("#drawn .save")
        assert Image.open(saved.value.path()).size == (3 * 28 * 4, 28 * 4)
        with page.expect_download() as saved:
            page.locator("#drawn figcaption a").first.click()
        assert saved.value.suggested_filename == "digits-seed0-0.png"
        assert Image.open(saved.value.path()).size == (28, 28)

        # another seed
        page.click("#another")
        page.wait_for_url("**seed=1**")
        assert film(page, tiles=3) != sevens
        link = page.locator("#drawn .link").get_attribute("href").replace("seed=1", "seed=0")

        # write: by mouse, then by keyboard
        page.get_by_role("tab", name="Write one").click()
        page.click("#rewrite")
        page.get_by_text("Nothing is written yet").first.wait_for()
        write_by_mouse(page, [(0.3, 0.2), (0.7, 0.2), (0.4, 0.8)])
        page.click("#rewrite")
        by_mouse = film(page, "#rewritten", tiles=5)
        page.click("#pad .clear")
        page.locator("#pad canvas").focus()
        for key in [" ", *["ArrowDown"] * 8, *["ArrowRight"] * 4, " "]:
            page.keyboard.press(key)
        page.click("#rewrite")
        page.wait_for_function(
            "(old) => document.querySelector('#rewritten canvas').toDataURL() !== old", arg=by_mouse[0]
        )
        assert len(set(film(page, "#rewritten", tiles=5))) == 5  # what was written, and four other pictures

        # the schedule
        page.get_by_role("tab", name="Schedule").click()
        page.locator("#schedule input").focus()
        page.keyboard.press("End")
        assert page.locator("#schedule .sum").text_content() == "xₜ = 0.006 x₀ + 1.000 ε"
        noise = page.evaluate("document.querySelector('#schedule canvas').toDataURL()")
        page.keyboard.press("Home")
        assert "99.99" in page.locator("#schedule .words").text_content() or "100" in page.content()
        assert page.evaluate("document.querySelector('#schedule canvas').toDataURL()") != noise

        assert wrong == []
        # (From here on Gradio may complain of the requests that a page which is left had under way.)
        # a link draws the same picture again, and a wrong one says so
        page.goto(link)
        assert film(page, tiles=3) == sevens
        page.goto(f"{address}?count=99")
        page.get_by_text("count 99: draw 1 to 16 images").first.wait_for()
        assert [said for said in wrong if not re.search("abort|errored out", said, re.IGNORECASE)] == []
        assert "Traceback" not in log.read_text(encoding="utf-8")


@needs_a_browser
def test_a_model_without_labels_on_a_phone(tmp_path):
    with serve(unconditional(tmp_path / "model"), tmp_path / "space") as (address, log), visit(390) as (page, wrong):
        page.goto(address)
        film(page, tiles=10)
        assert page.get_by_role("radio", name="7", exact=True).count() == 0
        page.locator("#count input[type=number]").fill("2")
        page.locator("#count input[type=number]").press("Tab")
        page.click("#draw")
        film(page, tiles=2)
        assert "digit" not in page.url and "count=2" in page.url
        for tab in ("Write one", "Schedule", "Draw an image"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
            if tab == "Write one":
                write_by_mouse(page, [(0.5, 0.2), (0.5, 0.8)])
                page.click("#rewrite")
                film(page, "#rewritten", tiles=5)
        assert wrong == [] and "Traceback" not in log.read_text(encoding="utf-8")


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs `pip install -r demo/requirements.txt`")
    (tmp_path / "model_index.json").write_text(json.dumps({}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "demo/app.py"), "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        f"error: --model {tmp_path}: cannot be shown"
    )
    assert "Traceback" not in done.stderr
