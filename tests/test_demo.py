"""demo/: the page in a real browser, served as a static Space is, and the model as ONNX. The page's sampler is held
against ours: same noise in, same images out."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import filelock
import numpy as np
import pytest
import serve
import torch
import yaml
from conftest import ROOT, in_process
from onnx_model import export_onnx
from PIL import Image

from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.pipeline import denoise, guided
from ddpm_mnist.sampling import initial_noise, make_sampler, to_uint8
from ddpm_mnist.training.export import export_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")
RUNTIME = re.search(r"onnxruntime-web@[\d.]+", (ROOT / "demo/model.js").read_text(encoding="utf-8"))[0]
EXPORTS = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
BROWSER = CHROMIUM and EXPORTS and importlib.util.find_spec("playwright") and shutil.which("npm")
needs_onnx = pytest.mark.skipif(not EXPORTS, reason="pip install onnx onnxscript onnxruntime")
needs_a_browser = pytest.mark.skipif(not BROWSER, reason="see the page's tests in CONTRIBUTING.md")
KINDS = ("html", "css", "js")
LABELS = 11  # ten, and the one that stands for none


def untrained(folder: Path, labels: int | None, channels: int = 1, levels: int = 1) -> Path:
    """The folder of a small model with random weights, and its export. The last of its labels stands for none."""
    torch.manual_seed(0)
    shape = {"sample_size": 28, "in_channels": channels, "out_channels": channels, "num_class_embeds": labels}
    down, up = ["DownBlock2D", "AttnDownBlock2D"][:levels], ["AttnUpBlock2D", "UpBlock2D"][-levels:]
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": [8, 16][:levels]}
    unet = UNet2DModel(**shape, **blocks, layers_per_block=1, norm_num_groups=4)
    export_pipeline(unet, DDPMScheduler(), folder, null_class_label=labels and labels - 1)
    export_onnx(folder)
    return folder


@pytest.fixture(scope="module")
def with_labels(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("model") / "ten-classes", LABELS)


@pytest.fixture(scope="module")
def without_labels(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("model") / "plain", None, levels=2)


# ---- the export ------------------------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("kind", ["with_labels", "without_labels"])
def test_the_export_computes_what_the_model_computes(kind, request):
    import onnxruntime

    folder = request.getfixturevalue(kind)
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    for batch in (1, 5):
        inputs = {"sample": torch.randn(batch, 1, 28, 28), "timestep": torch.randint(0, 1000, (batch,))}
        if unet.config.num_class_embeds:
            inputs["class_labels"] = torch.randint(0, LABELS, (batch,))
        (output,) = session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            assert np.abs(output - unet(**inputs).sample.numpy()).max() < 1e-4
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx"]  # the weights are in it


@needs_onnx
def test_an_export_holds_no_paths_and_comes_out_the_same_again(with_labels):
    before = (with_labels / "onnx/model.onnx").read_bytes()
    assert b"site-packages" not in before and str(ROOT).encode() not in before
    assert export_onnx(with_labels).read_bytes() == before


def test_an_export_without_its_packages_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript"):
        export_onnx(tmp_path)


# ---- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> Path:
    """The files of onnxruntime-web that the CDN has, from the npm registry; packed once for all test processes."""
    shared = tmp_path_factory.getbasetemp().parent / RUNTIME
    shared.mkdir(exist_ok=True)
    needed = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
    with filelock.FileLock(shared / ".lock"):
        if not (shared / "package").is_dir():
            command = [shutil.which("npm"), "pack", RUNTIME, "--fetch-retries=1"]
            done = subprocess.run(command, cwd=shared, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"npm pack {RUNTIME}: {done.stderr.strip()[-200:]}")
            with tarfile.open(next(shared.glob("*.tgz"))) as package:
                files = [m for m in package.getmembers() if m.name.split("/")[-1] in needed]
                package.extractall(shared, files, filter="data")
    return shared / "package/dist"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])


@contextmanager
def running(*command, cwd: Path):
    """The address that a server in Python prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-u", *command], cwd=cwd, text=True, **pipes)
    try:
        printed = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stdout)
        yield next(found[0] for found in printed if found)
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextmanager
def serving(files: dict[str, bytes], folder: Path):
    """The address of a folder with these files, served by Python's own server of files alone."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    with running("-m", "http.server", "0", "--bind", "127.0.0.1", cwd=folder) as address:
        yield address


@contextmanager
def visiting(browser, runtime: Path, address: str, query: str = "/", width=1200, hub=None, **more):
    """A page at the address; afterwards, whatever went wrong in it fails the test.

    The CDN is answered from the npm package; the Hub, if `hub` names a folder, from that. Nothing
    else is.
    """
    context = browser.new_context(viewport={"width": width, "height": 844}, base_url=address, **more)
    page, wrong = context.new_page(), []
    page.set_default_timeout(120_000)  # milliseconds; CI may be slow
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def answer(route):
        url = route.request.url.partition("?")[0]
        cdn, models = (
            f"https://cdn.jsdelivr.net/npm/{RUNTIME}/dist/",
            "https://huggingface.co/alice/digits/resolve/v2/",
        )
        if url.startswith((address, "data:", "blob:")):
            route.continue_()
        elif url.startswith(cdn) or (hub and url.startswith(models)):
            file = runtime / url.removeprefix(cdn) if url.startswith(cdn) else hub / url.removeprefix(models)
            kind = {"content-type": "text/javascript"} if file.suffix == ".mjs" else {}
            route.fulfill(body=file.read_bytes(), headers={"access-control-allow-origin": "*", **kind})
        else:
            wrong.append(url)
            route.abort()

    context.route("**", answer)
    try:
        page.goto(query)
        yield page
        assert wrong == []
    finally:
        context.close()


def finished(page, which: str = "#draw", state: str = "done") -> list[str]:
    """The pictures of the tiles, x_t and x_0 of each, when the drawing is done."""
    page.wait_for_selector(f"{which} .film[data-state={state}]", state="attached")
    return page.evaluate(f"[...document.querySelectorAll('{which} .tile canvas')].map((c) => c.toDataURL())")


def caption(page, which: str = "#draw") -> str:
    return page.locator(f"{which} .caption").text_content()


def draw(page, **fields) -> list[str]:
    """Fill in fields of the form, draw, and wait."""
    page.evaluate("document.querySelector('#draw details').open = true")
    for name, value in fields.items():
        page.locator(f"#draw [name={name}]").fill(str(value))
    page.click("#draw .go")
    return finished(page)


def write(page, points: list[tuple[int, int]]) -> None:
    """One stroke with the mouse, through these points of the 280 x 280 square."""
    box = page.locator(".pad canvas").bounding_box()
    scale = box["width"] / 280
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + scale * x, box["y"] + scale * y, steps=5)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


@needs_a_browser
def test_a_visit(browser, runtime, with_labels, tmp_path):
    """From a Space's folder, as any server of files serves it."""
    files = serve.page_files(with_labels, "alice/digits")
    with serving(files, tmp_path) as address, visiting(browser, runtime, address, "/?steps=8") as page:
        first = finished(page)
        assert page.title() == "Watch diffusion draw: alice/digits" and len(first) == 20
        assert page.locator("#model").get_attribute("href") == "https://huggingface.co/alice/digits"
        assert re.search(r"Done: 8 steps in [\d.]+ s, \d+ ms a step", caption(page))
        assert [text[0] for text in page.locator("#draw .name").all_text_contents()[:3]] == ["0", "1", "2"]
        assert not set(first[::2]) & set(first[1::2])  # the rows are not equal: above is the noise it began with
        page.get_by_role("radio", name="7", exact=True).first.check(force=True)
        sevens = draw(page, count=3, steps=10)
        assert len(sevens) == 6 and "label=7" in page.url and "count=3" in page.url and "seed=0" in page.url

        # slide through the steps, and look closer: x_t and x_0 next to each other
        slider, look = page.locator("#draw .scrub input"), page.locator("#draw .look")
        slider.press("Home")
        assert "t = 900: xₜ above, the x₀ predicted from it below" in caption(page)
        assert "xₜ = 0.02 x₀ + 1.00 ε" in look.text_content()
        slider.press("ArrowRight")
        page.locator("#draw .tile").nth(2).click()
        tile, large = (
            page.evaluate(f"[...document.querySelectorAll('{s} canvas')].map((c) => c.toDataURL())")
            for s in ("#draw .tile:nth-child(3)", "#draw .look")
        )
        assert tile == large and len(set(large)) == 2 and "Image 3 of 3: 7" in look.text_content()
        slider.press("End")
        assert finished(page) == sevens and "grey levels" in look.text_content()

        # save: all as one picture, and one as the model drew it
        for button, size in (("save-all", (3 * 28 * 4, 28 * 4)), ("save-one", (28, 28))):
            with page.expect_download() as saved:
                page.click(f"#draw .{button}")
            assert Image.open(saved.value.path()).size == size

        # the next seed, back to the picture before, and the link to it on a new visit
        link = page.locator("#draw .link").get_attribute("href")
        page.click("#draw .another")
        page.wait_for_url("**seed=1**")
        assert finished(page) != sevens
        page.go_back()
        page.wait_for_url("**seed=0**")
        assert finished(page) == sevens and page.locator("#draw [name=seed]").input_value() == "0"
        page.goto(link)
        assert finished(page) == sevens

        # the schedule; a reload keeps the tab
        page.get_by_role("tab", name="Draw").press("ArrowLeft")
        page.reload()
        assert len(finished(page)) == 6 and page.locator("#schedule").is_visible()
        page.locator("#schedule input").press("End")
        assert page.locator("#schedule .sum").text_content() == "xₜ = 0.006 x₀ + 1.000 ε"
        noise = page.evaluate("document.querySelector('#schedule canvas').toDataURL()")
        page.locator("#schedule input").press("Home")
        assert page.evaluate("document.querySelector('#schedule canvas').toDataURL()") != noise


@needs_a_browser
def test_writing_a_digit(browser, runtime, with_labels, tmp_path):
    files, query = serve.page_files(with_labels, "digits"), "/?steps=2&count=1&seed=5&tab=write"
    with serving(files, tmp_path) as address, visiting(browser, runtime, address, query) as page:
        finished(page)
        page.click("#write .go")
        assert "Nothing is written yet" in caption(page, "#write")
        write(page, [(80, 50), (200, 50), (110, 220)])
        page.click("#write .go")
        by_mouse = finished(page, "#write")
        assert len(by_mouse) == 8 and len(set(by_mouse)) == 8 and page.locator("#write .original canvas").count() == 1
        page.click("#write .another")
        assert not set(finished(page, "#write")) & set(by_mouse)
        assert page.locator("#draw [name=seed]").input_value() == "5"  # the other tab's noise is its own

        # little noise leaves the digit nearly as it was; a label is one of the model's
        page.locator("#write [name=until]").press("Home")
        page.get_by_role("radio", name="4", exact=True).last.check(force=True)
        page.click("#write .go")
        finished(page, "#write")
        assert caption(page, "#write").startswith("Done: 1 steps")
        pixels = "(name) => [...document.querySelector(name).getContext('2d').getImageData(0, 0, 28, 28).data]"
        original, again = (
            np.array(page.evaluate(pixels, f"#write {name}"))
            for name in (".original canvas", ".tile canvas:nth-child(2)")
        )
        assert np.abs(original - again).mean() < 10

        # by keyboard
        page.click(".pad .clear, #write .clear")
        page.click("#write .go")
        assert "Nothing is written yet" in caption(page, "#write")
        for key in [" ", *["ArrowDown"] * 8, *["ArrowRight"] * 4, " "]:
            page.locator(".pad canvas").press(key)
        page.click("#write .go")
        assert len(finished(page, "#write")) == 8


@needs_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_model_without_labels_on_a_phone(browser, runtime, without_labels, tmp_path, scheme):
    files, query = serve.page_files(without_labels, "digits"), "/?steps=4&label=3&count=99"
    phone = {"width": 390, "color_scheme": scheme}
    with serving(files, tmp_path) as address, visiting(browser, runtime, address, query, **phone) as page:
        finished(page)
        notice = page.locator("#notice").text_content()
        assert "this model knows no label" in notice and "count in the address must be from 1 to 16" in notice
        assert page.locator("#draw .labels").is_hidden() and page.locator("#draw .tile").count() == 10
        named = page.locator(".tile .name").all_text_contents()
        assert not re.search(r"\d", "".join(named))  # numbers would be taken for labels
        assert page.locator("#draw .tile").nth(9).bounding_box()["y"] < 844 - 150  # results are above the fold
        for tab in ("Write one", "The schedule", "Draw"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
            for contrast in page.evaluate(CONTRASTS):
                assert contrast[0] >= 4.5, contrast


# Contrast of all visible text with what is behind it: [ratio, text] (WCAG 2.2, 1.4.3).
CONTRASTS = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    const colour = rgba(getComputedStyle(node).backgroundColor);
    return colour[3] ? colour : behind(node.parentElement);
  };
  const written = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const seen = (node) => node.checkVisibility() && !node.disabled && node.closest("svg, select") === null;
  return [...document.querySelectorAll("body *")].filter((node) => seen(node) && written(node)).map((node) => {
    const pair = [luminance(rgba(getComputedStyle(node).color)), luminance(behind(node))];
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), node.textContent.slice(0, 40)];
  });
})()
"""


@needs_a_browser
def test_a_drawing_can_be_stopped_and_wrong_addresses_are_text(browser, runtime, with_labels, tmp_path):
    with serving(serve.page_files(with_labels, "digits"), tmp_path) as address:
        html = "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E"
        query = f"/?steps=1000&count=1&label={html}&sampler={html}&seed=-1"
        with visiting(browser, runtime, address, query) as page:
            page.wait_for_function("document.querySelector('#draw .scrub input').max > 3")
            assert page.locator("img").count() == 0 and "onerror" not in page.content()
            notice = page.locator("#notice").text_content()
            assert "label in the address must be one of each, 0, 1" in notice and "sampler in the address" in notice
            page.click("#draw .stop")
            finished(page, state="stopped")
            assert re.match(r"Stopped after \d+ of 1000 steps\.", caption(page))
            steps = page.locator("#draw .scrub input").get_attribute("max")
            page.wait_for_timeout(300)
            assert page.locator("#draw .scrub input").get_attribute("max") == steps
        for model in (html, "../../etc", "alice", "alice/digits/x", "alice/.."):
            with visiting(browser, runtime, address, f"/?model={model}") as page:
                finished(page, state="failed")
                assert "?model=USER/NAME" in caption(page) and page.locator("img").count() == 0


@needs_a_browser
def test_a_model_of_the_hub(browser, runtime, with_labels, without_labels, tmp_path):
    with serving(serve.page_files(without_labels, "digits"), tmp_path) as address:
        query = "/?model=alice/digits@v2&steps=2"
        with visiting(browser, runtime, address, query, hub=with_labels) as page:
            finished(page)
            assert page.title().endswith("alice/digits@v2") and page.locator("#draw .labels").is_visible()
            draw(page, count=2)
            assert "model=alice%2Fdigits%40v2" in page.url


# ---- what the page computes ------------------------------------------------------------------------------------------

# The page's own modules, on the model beside it; the noise is given, for x_T and then for each step that draws some.
SAMPLE = """
async ({ config, sampler, steps, labels, scale, noises, start }) => {
  const { denoise, guided, makeAlphasCumprod } = await import("./sampler.js");
  window.model ??= await (await import("./model.js")).loadModel("./model/");
  const alphasCumprod = makeAlphasCumprod(config);
  const arrays = noises.map((noise) => Float32Array.from(noise));
  const predict = guided(model.unet, { alphasCumprod, labels, scale, nullLabel: model.nullLabel });
  const found = [];
  const nextNoise = () => arrays.shift();
  const job = { config, sampler, steps, predict, sample: nextNoise(), nextNoise, start: start ?? undefined };
  for await (const { t, x_0, previous } of denoise(job)) found.push([t, [...x_0], [...previous]]);
  return found;
}
"""
CASES = [  # sampler, steps, guidance, start, changes to the scheduler's config
    ("ddpm", 10, 1.5, None, {"prediction_type": "v_prediction"}),
    ("ddpm", 12, 1.0, None, {"prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2"}),
    ("ddpm", 7, 3.0, None, {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    ("ddpm", 8, 1.5, None, {"prediction_type": "v_prediction", "variance_type": "fixed_large"}),
    ("ddpm", 16, 1.5, None, {"num_train_timesteps": 16, "beta_end": 0.5, "variance_type": "fixed_large"}),
    ("ddim", 10, 1.5, None, {"prediction_type": "v_prediction"}),
    ("ddim", 12, 1.0, None, {"clip_sample": False, "beta_schedule": "scaled_linear"}),
    ("ddim", 9, 2.0, 400, {"timestep_spacing": "linspace", "clip_sample_range": 0.9}),
]


@needs_a_browser
def test_the_pages_sampler_draws_what_ours_draws(browser, runtime, with_labels, tmp_path):
    unet = UNet2DModel.from_pretrained(with_labels, subfolder="unet").eval()
    labels = torch.tensor([7, 0])
    files = serve.page_files(with_labels, "digits") | {"blank.html": b"<!doctype html><link rel=icon href=data:,>"}
    with serving(files, tmp_path) as address, visiting(browser, runtime, address, "/blank.html") as page:
        for name, steps, scale, start, change in CASES:
            scheduler = DDPMScheduler(**change)
            sampler = make_sampler(name, scheduler.config, steps)
            x_T, generators = initial_noise(0, [0, 1], (1, 28, 28))
            predict = guided(unet, sampler, labels, scale, LABELS - 1, -2.0)
            ours = list(denoise(predict, sampler, x_T, steps, generators, start))
            _, again = initial_noise(0, [0, 1], (1, 28, 28))
            noises = [x_T] + [torch.stack([torch.randn(1, 28, 28, generator=g) for g in again]) for _ in range(steps)]
            asked = {"config": json.loads(scheduler.to_json_string()), "sampler": name, "steps": steps, "start": start}
            asked |= {"labels": labels.tolist(), "scale": scale, "noises": [n.flatten().tolist() for n in noises]}
            found = page.evaluate(SAMPLE, asked)
            assert [t for t, *_ in found] == [step.timestep for step in ours]
            for (_, *theirs), step in zip(found, ours):
                for image, expected in zip(theirs, (step.pred_original_sample, step.prev_sample)):
                    shown = to_uint8(torch.tensor(image).reshape(expected.shape)).int()
                    assert (shown - to_uint8(expected).int()).abs().max() <= 1, (name, change)


@needs_a_browser
def test_noise_and_what_is_written(browser, runtime, with_labels, tmp_path):
    files = {**serve.page_files(with_labels, "digits"), "blank.html": b"<!doctype html><link rel=icon href=data:,>"}
    with serving(files, tmp_path) as address, visiting(browser, runtime, address, "/blank.html") as page:
        draw_noise = "async ([seed, numbers]) => [...(await import('./sampler.js')).noiseSource(seed, numbers, 5000)()]"
        noise = np.array(page.evaluate(draw_noise, [3, [0, 1, 2]])).reshape(3, 5000)
        assert np.abs(noise.mean(1)).max() < 0.06 and np.abs(noise.std(1) - 1).max() < 0.04
        assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.06
        assert np.array_equal(noise[2], page.evaluate(draw_noise, [3, [2]]))  # the same in any batch
        assert not np.array_equal(noise[0], page.evaluate(draw_noise, [4, [0]]))

        written = """async ([drawing]) => { const { asMnist } = await import("./pad.js");
            const image = asMnist(Float32Array.from(drawing), 280, 28); return image && [...image] }"""
        disc = np.add.outer((np.arange(280) - 60) ** 2, (np.arange(280) - 200) ** 2) < 40**2  # far from the centre
        image = np.array(page.evaluate(written, [disc.astype(float).ravel().tolist()])).reshape(28, 28)
        rows, columns = np.nonzero(image > 0.02)
        assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == 20 and image.max() <= 1
        centre = [np.average(axis + 0.5, weights=image[rows, columns]) for axis in (rows, columns)]
        assert np.allclose(centre, 14, atol=0.51)
        assert page.evaluate(written, [[0.0] * 280 * 280]) is None


# ---- demo/serve.py ---------------------------------------------------------------------------------------------------


@needs_onnx
def test_serve_exports_and_serves_the_page_on_this_machine_alone(with_labels, tmp_path):
    folder = Path(shutil.copytree(with_labels, tmp_path / "digits"))
    shutil.rmtree(folder / "onnx")
    (folder / "secret").write_text("not to be served")
    command = [ROOT / "demo/serve.py", "--model", folder, "--port", "0", "--no_browser"]
    with running(*command, cwd=tmp_path) as address:
        for path, content in serve.page_files(folder, "digits").items():
            with urlopen(address + path) as answer:
                assert answer.read() == content, path
        with urlopen(address) as answer:
            assert answer.headers["Content-Type"].startswith("text/html") and b"<title>" in answer.read()
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        for path in ("model/secret", "serve.py", "../README.md", "model/../serve.py"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(address + path)


@needs_onnx
def test_a_space_holds_all_it_needs(with_labels, tmp_path, capsys):
    space = tmp_path / "space"
    for _ in range(2):  # again, over the first
        options = ["--model", with_labels, "--space_dir", space, "--hub_model_id", "alice/digits"]
        assert in_process(serve.main, *options) == 0
    files = {path.relative_to(space).as_posix(): path.read_bytes() for path in space.rglob("*") if path.is_file()}
    assert files.keys() == {"README.md", "model.txt", *serve.PAGE, *(f"model/{name}" for name in serve.MODEL)}
    assert files["model.txt"] == b"alice/digits\n"
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["sdk"] == "static" and front["models"] == ["alice/digits"] and len(front["short_description"]) <= 60
    assert b"https://huggingface.co/alice/digits" in files["README.md"]
    assert f"hf upload USER/NAME {space} . --type space" in capsys.readouterr().out


def test_the_pages_modules_are_all_in_a_space():
    """What one of them imports, and what index.html names, is there."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in serve.DEMO.iterdir() if path.suffix[1:] in KINDS}
    assert set(texts) == set(serve.PAGE)
    named = {name for text in texts.values() for name in re.findall(r'"(?:\./)?([\w-]+\.(?:js|css))"', text)}
    assert named == set(texts) - {"index.html"}


def test_what_cannot_be_shown_is_one_line(model, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    for options, message in (
        (["--model", tmp_path], f"--model {tmp_path}: holds no model_index.json"),
        (["--space_dir", tmp_path / "s"], "--hub_model_id: missing; write --hub_model_id USER/NAME"),
        (
            ["--space_dir", tmp_path, "--hub_model_id", "a/b"],
            f"--space_dir {tmp_path}: holds other files; name another",
        ),
    ):
        assert in_process(serve.main, "--model", model, *options) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
