"""The exported folder in the hands of stock diffusers, and generate.py."""

import functools
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, as_nobody, in_process, posix, python, same, weights
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.errors import LFS_POINTER, ConfigError
from ddpm_mnist.loading import Model, load_model
from ddpm_mnist.options import SampleOptions, read_options
from ddpm_mnist.pipeline import ClassConditionalDDPMPipeline, denoise, guided, step_arguments, with_timesteps
from ddpm_mnist.randomness import draw_mask, seeded_generator
from ddpm_mnist.record import WEIGHTS_FILE
from ddpm_mnist.sampling import grid, initial_noise, labels_for, make_sampler, to_pil
from ddpm_mnist.training.config import SCHEDULER
from ddpm_mnist.training.export import export_pipeline

SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
SMALL |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def test_the_three_lines_of_the_readme_with_this_repo_absent(model, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = textwrap.dedent(re.search(r"(?:    .*\n)*    pipe\(batch_size=4.*\n", readme)[0])
    assert len(code.splitlines()) == 3
    check = "import sys; assert not any(m.startswith('ddpm_mnist') for m in sys.modules)"
    done = python("-c", code.replace('"ddpm-mnist"', repr(str(model))) + check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / "digit.png")
    assert image.size == (28, 28) and image.mode == "L"


def test_the_index_names_stock_classes_and_the_weights_are_the_average(model):
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert same(weights(model / "unet"), weights(model / "checkpoint-8/unet_ema"))
    assert not same(weights(model / "unet"), weights(model / "checkpoint-8/unet"))
    assert "ddpm_mnist" not in "".join(p.read_text() for p in model.glob("*/*config.json"))


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_sampling_is_that_of_the_stock_pipeline(model):
    """One image of seed s: the stock pipeline, given that image's generator, draws the same."""
    pipe = diffusers.DDPMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(generator=seeded_generator(5, "sample", 2), num_inference_steps=20, output_type="pt").images
    drawn = load_model(str(model)).draw_images([2], SampleOptions(num_inference_steps=20, seed=5))
    torch.testing.assert_close((drawn / 2 + 0.5).clamp(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch(model):
    together, alone = (
        load_model(str(model)).draw_images(range(3), SampleOptions(num_inference_steps=10, batch_size=size))
        for size in (3, 1)
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_to_pil_and_grid():
    images = to_pil(torch.tensor([-1.0, 1.0, 0.0, 9.0, -9.0]).reshape(5, 1, 1, 1))
    assert [image.getpixel((0, 0)) for image in images] == [0, 255, 128, 255, 0]
    picture = grid(images, zoom=2)
    assert picture.size == (6, 4) and picture.mode == "L"
    assert [picture.getpixel((x, y)) for y in (0, 2) for x in (0, 2, 4)] == [0, 255, 128, 255, 0, 0]
    assert to_pil(torch.zeros(1, 3, 2, 2))[0].mode == "RGB"


# ---- guidance ------------------------------------------------------------------------------------------------------


def test_guidance_is_the_formula_in_one_forward_pass():
    torch.manual_seed(0)
    unet = UNet2DModel(**SMALL | {"num_class_embeds": 11}).eval()
    sizes = []
    unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    sample, labels = torch.randn(3, 1, 8, 8), torch.tensor([7, 0, 9])
    with torch.no_grad():
        strong, plain = (guided(unet, DDPMScheduler(), labels, scale, 10)(sample, 5) for scale in (2.5, 1.0))
        assert sizes == [6, 3]
        with_class = unet(sample, 5, class_labels=labels).sample
        without = unet(sample, 5, class_labels=torch.full_like(labels, 10)).sample
    torch.testing.assert_close(strong, without + 2.5 * (with_class - without), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain, with_class)


def guidance_at(scheduler, timestep, scale: float, least: float) -> float:
    """The scale at a timestep: the prediction of a U-Net that says 1 with the class and 0 without it."""

    def unet(sample, timestep, class_labels):
        return SimpleNamespace(sample=(class_labels == 7).float().reshape(-1, 1, 1, 1))

    return guided(unet, scheduler, torch.tensor([7]), scale, 10, least)(torch.zeros(1, 1, 1, 1), timestep).item()


def test_guidance_acts_if_the_signal_is_strong_enough():
    scheduler = DDPMScheduler(**SCHEDULER)
    log_snr = torch.logit(scheduler.alphas_cumprod.double())
    scales = torch.tensor([guidance_at(scheduler, t, 3.0, -2.0) for t in range(1000)])
    assert torch.equal(scales == 3, log_snr >= -2) and torch.equal(scales == 1, log_snr < -2)
    assert 400 < (scales == 3).sum() < 500
    assert {guidance_at(scheduler, t, 3.0, -math.inf) for t in (0, 500, 999)} == {3.0}
    assert [guidance_at(scheduler, t, 0.0, -2.0) for t in (0, 999)] == [0, 0]  # without the class, at all timesteps
    assert guidance_at(scheduler, torch.tensor(998.6), 3.0, -2.0) == 1.0  # samplers visit times between timesteps
    assert guidance_at(diffusers.EDMEulerScheduler(), 999, 3.0, -2.0) == 3.0  # it knows no alphas_cumprod
    terminal = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert guidance_at(terminal, 999, 3.0, -2.0) == 1.0 and guidance_at(terminal, 999, 3.0, -math.inf) == 3.0


def test_the_pipeline_and_generate_guide_at_the_same_timesteps(conditional_model, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(conditional_model, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    args = ["--model", conditional_model, "--class_label", 7, "--num_images", 1, "--scheduler", "ddim"]
    args += ["--num_inference_steps", 10, "--guidance_scale", 3, "--output", tmp_path / "a.png", "--overwrite"]
    pictures = []
    for least, theirs in ((-2, {}), (-1000, {"guidance_min_log_snr": -math.inf})):  # -2 is the default of both
        assert in_process(generate.main, *args, *([] if least == -2 else ["--guidance_min_log_snr", least])) == 0
        pictures.append(np.array(Image.open(tmp_path / "a/00000.png"), dtype=int))
        expected = pipe([7], 3.0, [seeded_generator(0, "sample", 0)], 10, **theirs).images[0]
        assert np.abs(pictures[-1] - np.array(expected, dtype=int)).max() <= 1  # of 255: rounding
    assert np.abs(pictures[0] - pictures[1]).max() > 1


def test_ddim_goes_on_from_the_clipped_image():
    """x_{t-1} must lie on the line from the clipped x_0 through x_t, not leave it by the noise of another x_0."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    t, sample, prediction = scheduler.timesteps[2], torch.randn(1, 1, 4, 4), 3 * torch.randn(1, 1, 4, 4)
    step = scheduler.step(prediction, t, sample, **step_arguments(scheduler, None))
    a, b = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[scheduler.timesteps[3]]
    x_0 = ((sample - (1 - a) ** 0.5 * prediction) / a**0.5).clamp(-1, 1)
    noise = (sample - a**0.5 * x_0) / (1 - a) ** 0.5
    torch.testing.assert_close(step.prev_sample, b**0.5 * x_0 + (1 - b) ** 0.5 * noise)
    assert set(step_arguments(diffusers.DPMSolverMultistepScheduler(), None)) == {"generator"}


def test_labels_are_dropped_at_the_given_rate_whoever_computes_them():
    def dropped(number: int, rows: slice) -> torch.Tensor:
        return draw_mask(0, "label dropout", number, 0.25, 1000, rows, torch.device("cpu"))

    whole = torch.cat([dropped(number, slice(0, 1000)) for number in range(20)])
    assert 0.23 < whole.float().mean() < 0.27
    halves = [dropped(3, rows) for rows in (slice(0, 500), slice(500, 1000))]
    assert torch.equal(torch.cat(halves), whole[3000:4000])


def samplers() -> list[str]:
    """Every scheduler of diffusers that says it takes this noise schedule, and can be made here."""
    names = []
    for name in DDPMScheduler._compatibles:
        cls = getattr(diffusers, name)
        try:
            cls.from_config(DDPMScheduler(**SCHEDULER).config)
        except ImportError:  # one that needs a further package
            continue
        names.append(name)
    return names


@pytest.fixture(scope="module")
def drawer():
    """A conditional U-Net that needs no training: it knows the one image, and predicts the noise that leads to it."""
    x, scheduler = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), DDPMScheduler()

    class Drawer(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            t = torch.as_tensor(timestep, dtype=torch.float32).expand(len(sample))
            log_sigma = 0.5 * torch.log(1 / scheduler.alphas_cumprod - 1)  # samplers visit times between timesteps
            sigma = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(1000), log_sigma))).float()
            bar = (1 / (1 + sigma**2))[:, None, None, None]
            noise = (sample - bar.sqrt() * x) / (1 - bar).sqrt()
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=noise)

    return Drawer(**SMALL | {"num_class_embeds": 10}).eval(), x


@pytest.mark.parametrize("name", samplers())
def test_the_pipeline_that_travels_and_generate_draw_the_same_with_every_sampler(drawer, name):
    """And the right image: x_T and the network's input are scaled as the sampler asks."""
    unet, x = drawer
    pipe, sampler = (getattr(diffusers, name).from_config(DDPMScheduler(**SCHEDULER).config) for _ in range(2))
    pipe = ClassConditionalDDPMPipeline(unet, pipe)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe([0, 1], 1.0, [seeded_generator(0, "sample", i) for i in range(2)], 20, "pt").images * 2 - 1
    noise, generators = initial_noise(0, [0, 1], (1, 8, 8))
    *_, last = denoise(guided(unet, sampler, torch.arange(2)), sampler, noise, 20, generators)
    ours = last.prev_sample
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=1e-3, atol=1e-3)
    if name != "EDMEulerScheduler":  # which is for networks that predict something else
        assert (ours - x).abs().mean() < 0.02, (ours - x).abs().mean()


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver"])
def test_every_sampler_has_the_betas_of_the_schedule(name, beta_schedule, tmp_path):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, clip_sample=False)
    sampler = make_sampler(name, scheduler.config, 20)
    torch.testing.assert_close(sampler.betas, scheduler.betas, rtol=0, atol=1e-9)
    unet = UNet2DModel(**SMALL)
    export_pipeline(unet, scheduler, tmp_path)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    others = diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler
    for cls in others:  # as a stranger does
        torch.testing.assert_close(cls.from_config(pipe.scheduler.config).betas, scheduler.betas, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("T", "steps"), [(2, 1), (20, 19), (1000, 20)])
def test_dpmsolver_never_takes_all_timesteps(T, steps):
    """Its last step would divide by 0."""
    few, options = Model(UNet2DModel(**SMALL), DDPMScheduler(T), None), SampleOptions(scheduler="dpmsolver")
    assert few.num_steps(options) == steps
    assert all(step.prev_sample.isfinite().all() for _, step in few.draw(range(2), options))


@pytest.mark.parametrize("name", ["ddim", "dpmsolver"])
def test_a_sampler_that_does_not_know_the_schedule_says_so(name):
    with pytest.raises(ConfigError, match=f"--scheduler {name}: sigmoid .*not implemented.*; use ddpm"):
        make_sampler(name, DDPMScheduler(beta_schedule="sigmoid").config, 20)


def test_two_versions_of_the_pipeline_in_one_process_and_copies_of_one(conditional_model, tmp_path):
    """diffusers keeps all local pipelines in one module file."""
    old = Path(shutil.copytree(conditional_model, tmp_path / "old"))
    with (old / "pipeline.py").open("a") as file:
        file.write("# an older version\n")
    load = functools.partial(diffusers.DiffusionPipeline.from_pretrained, trust_remote_code=True)
    older, newer = load(old), load(conditional_model)
    for pipe, folder in ((older, old), (newer, conditional_model)):
        pipe.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again/pipeline.py").read_bytes() == (folder / "pipeline.py").read_bytes()
    copy = type(newer).from_pipe(newer)
    assert copy.config.null_class_label == newer.config.null_class_label == 10


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 61, 103, 499, 501, 750, 999])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_every_number_of_steps_starts_at_pure_noise(name, steps):
    scheduler = with_timesteps(getattr(diffusers, name)(timestep_spacing="leading"), steps, "cpu")
    assert len(scheduler.timesteps) == steps and scheduler.timesteps.min() >= 0
    assert scheduler.timesteps[0] >= 990 and (scheduler.timesteps.diff() < 0).all()


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (1000, 7), (1000, 150), (1000, 501), (1000, 999), (75, 50)])
def test_ddim_goes_to_the_next_timestep_whatever_the_gap(T, steps):
    """With the output of an ideal network for x_0 ~ N(0.5, 0.3^2), DDIM of these timesteps by its formula."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing="leading", clip_sample=False)

    def mean_noise(sample: torch.Tensor, t) -> torch.Tensor:
        a = scheduler.alphas_cumprod[int(t)]
        return (1 - a) ** 0.5 * (sample - a**0.5 * 0.5) / (a * 0.09 + 1 - a)

    sample = torch.randn(200, 1, 4, 4)
    drawn = list(denoise(mean_noise, scheduler, sample, steps))
    timesteps = [step.timestep for step in drawn]
    for t, following in zip(timesteps, [*timesteps[1:], None]):
        a, b = scheduler.alphas_cumprod[t], 1.0 if following is None else scheduler.alphas_cumprod[following]
        noise = mean_noise(sample, t)
        sample = b**0.5 * (sample - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise
    torch.testing.assert_close(drawn[-1].prev_sample, sample, rtol=1e-4, atol=1e-5)
    assert steps < 20 or T < 1000 or abs(sample.mean() - 0.5) < 0.05 and abs(sample.std() - 0.3) < 0.05
    assert drawn[-1].last and len(drawn) == steps


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [20, 50])
def test_ddpm_in_few_steps_is_ddim_with_eta_1(steps, variance_type):
    """Also for a model whose variance is beta_t, which would be too much for a jump over many timesteps."""
    config = DDPMScheduler(**SCHEDULER | {"variance_type": variance_type}).config
    ddpm, ddim = make_sampler("ddpm", config, steps), diffusers.DDIMScheduler.from_config(config)
    ddpm.set_timesteps(steps)
    ddim.set_timesteps(steps)
    assert ddpm.timesteps.tolist() == ddim.timesteps.tolist()
    for t in ddpm.timesteps:
        model_output, sample = torch.randn(2, 2, 1, 4, 4)
        a = ddpm.step(model_output, t, sample, torch.Generator().manual_seed(0)).prev_sample
        arguments = {"eta": 1.0, "use_clipped_model_output": True, "generator": torch.Generator().manual_seed(0)}
        torch.testing.assert_close(a, ddim.step(model_output, t, sample, **arguments).prev_sample)
    assert make_sampler("ddpm", config, 1000).config.variance_type == variance_type


@pytest.mark.parametrize("steps", [7, 20, 30, 125, 250, 500])
@pytest.mark.parametrize("name", ["PNDMScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_samplers_with_other_rows_of_timesteps_go_all_the_way(name, steps, spacing):
    """PNDM visits some timesteps twice; DPM-Solver and its relatives skip one more than requested."""
    T, scheduler = 1000, with_timesteps(getattr(diffusers, name)(timestep_spacing=spacing), steps, "cpu")
    assert scheduler.timesteps[0] >= T - T / steps - T / 20 - 1 and scheduler.timesteps[-1] <= T / steps + 1


LABELS = [np.arange(10), torch.arange(10), list(np.arange(10, dtype=np.uint8)), range(10), [torch.tensor(3)]]


@pytest.mark.parametrize("labels", [*LABELS, np.int64(3), 3], ids=lambda labels: type(labels).__name__)
def test_whole_numbers_of_any_library_are_class_labels(drawer, labels):
    pipe = ClassConditionalDDPMPipeline(drawer[0], diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(labels, 1.0, num_inference_steps=1).images) == (len(labels) if np.ndim(labels) else 1)


@pytest.mark.parametrize(
    "labels", [np.array([1.5]), ["7"], "7", [None], np.array([10]), torch.tensor([-1]), []], ids=str
)
def test_other_class_labels_are_refused(drawer, labels):
    pipe = ClassConditionalDDPMPipeline(drawer[0], diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="class_labels: .*the classes 0 to 9"):
        pipe(labels, 1.0)


def test_the_conditional_folder_names_its_pipeline_and_loads_also_when_saved_again(conditional_model, tmp_path):
    index = json.loads((conditional_model / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ClassConditionalDDPMPipeline"] and index["null_class_label"] == 10
    for folder in (conditional_model, tmp_path / "copy", tmp_path / "copy"):  # the third has its own file in the way
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.config.null_class_label == 10 and len(pipe(class_labels=[1, 2], num_inference_steps=2).images) == 2
        pipe.save_pretrained(tmp_path / "copy")


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver"])
def test_generate_draws(model, tmp_path, scheduler, capfd):
    args = ["--model", model, "--scheduler", scheduler, "--num_images", 5, "--batch_size", 2, "--save_trajectory"]
    assert in_process(generate.main, *args, "--num_inference_steps", 12, "--output", tmp_path / "grid.png") == 0
    assert "36/36" in capfd.readouterr().err  # the progress bar: three batches of twelve steps
    assert Image.open(tmp_path / "grid.png").size == (3 * 56, 2 * 56)
    assert len(list((tmp_path / "grid").glob("*.png"))) == 5
    assert Image.open(tmp_path / "grid_trajectory.png").size == (10 * 56, 4 * 56)


def test_a_draft_of_the_user_stays(model, tmp_path):
    (tmp_path / "paper.draft").write_text("mine")
    args = ["--model", model, "--num_images", 1, "--num_inference_steps", 2, "--output", tmp_path / "paper.png"]
    assert in_process(generate.main, *args) == 0 and (tmp_path / "paper.draft").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"paper.draft", "paper.png", "paper"}


def test_generate_is_seeded_and_overwrites_only_when_asked(model, tmp_path, capfd):
    args = ["--model", model, "--num_images", 2, "--num_inference_steps", 3]
    a, b, again = tmp_path / "a.png", tmp_path / "b.png", [*args, "--output", tmp_path / "a.png"]
    assert in_process(generate.main, *args, "--output", a) == 0
    assert in_process(generate.main, *args, "--batch_size", 1, "--output", b) == 0
    assert a.read_bytes() == b.read_bytes()
    assert in_process(generate.main, *again, "--seed", 1) == 2
    assert "these settings; give --overwrite" in capfd.readouterr().err and a.read_bytes() == b.read_bytes()
    (tmp_path / "a/mine.png").touch()
    assert in_process(generate.main, *again, "--seed", 1, "--overwrite") == 0
    assert a.read_bytes() != b.read_bytes()
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert in_process(generate.main, *again, "--num_images", 1, "--overwrite") == 2  # nobody's picture is deleted
    assert "00001.png exists, but does not match these settings; it would stay" in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}


def test_an_interrupted_generate_goes_on_and_a_repeated_one_draws_nothing(model, tmp_path, capfd):
    """What was drawn before is neither drawn nor written again, and the pictures are those of one run."""
    args = ["--model", model, "--num_images", 6, "--num_inference_steps", 3, "--batch_size", 2]
    assert in_process(generate.main, *args, "--output", tmp_path / "whole.png") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for number in (3, 5):
        (tmp_path / f"part/0000{number}.png").unlink()
    cut = tmp_path / "part/00004.png"  # killed while it was written
    cut.write_bytes(cut.read_bytes()[:-40])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").iterdir() if path != cut}
    capfd.readouterr()
    assert in_process(generate.main, *args, "--output", tmp_path / "part.png") == 2  # a cut file may be the user's
    assert in_process(generate.main, *args, "--output", tmp_path / "part.png", "--overwrite") == 0
    assert "6/6" in capfd.readouterr().err  # two batches of three steps: 3 and 4, then 5
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "part").iterdir()}.items()
    for name in (".png", *(f"/0000{number}.png" for number in range(6))):
        assert (tmp_path / f"part{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    assert in_process(generate.main, *args, "--output", tmp_path / "part.png") == 0
    assert "0it" in capfd.readouterr().err


def test_generate_leaves_its_finished_batches_when_it_is_killed(model, tmp_path):
    args = ["--num_images=400", "--batch_size=2", "--num_inference_steps=20", f"--output={tmp_path / 'grid.png'}"]
    process = subprocess.Popen([sys.executable, ROOT / "generate.py", f"--model={model}", *args])
    deadline = time.monotonic() + 120
    while not (tmp_path / "grid/00005.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(list((tmp_path / "grid").iterdir())) >= 6 and not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("file", "values", "part"),
    [
        ("model_index.json", {"null_class_label": "ten"}, "null_class_label 'ten' is not the last of 11 classes"),
        ("model_index.json", {"null_class_label": 99}, "null_class_label 99 is not the last of 11 classes"),
        ("unet/config.json", {"num_class_embeds": None}, "cannot be loaded"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "x"}, "x is not supported"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, "cannot be loaded (x is not implemented"),
        ("scheduler/scheduler_config.json", {"prediction_type": "x"}, "prediction_type='x'"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "cannot be loaded (index 999 is out of bounds"),
        ("unet/config.json", {"sample_size": None}, "a UNet2DModel of sample_size None"),
        ("unet/config.json", {"sample_size": 100_000}, "a UNet2DModel of sample_size 100000"),
        ("unet/config.json", {"sample_size": [28, "28"]}, "a UNet2DModel of sample_size [28, '28']"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "its U-Net is a UNet2DConditionModel"),
    ],
)
def test_a_models_files_with_wrong_values_are_one_line(conditional_model, tmp_path, file, values, part, capfd):
    model = Path(shutil.copytree(conditional_model, tmp_path / "model"))
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | values))
    assert in_process(generate.main, "--model", model, "--output", tmp_path / "grid.png") == 2
    assert f"--model {model}" in (stderr := capfd.readouterr().err) and part in stderr and "Traceback" not in stderr


def test_weights_that_are_a_pointer_of_git_lfs(model, tmp_path, capfd):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / WEIGHTS_FILE).write_bytes(LFS_POINTER + b"\noid sha256:0\n")
    assert in_process(generate.main, "--model", copy, "--output", tmp_path / "grid.png") == 2
    assert "is a git-lfs pointer and not the file" in capfd.readouterr().err


def test_weights_that_are_not_finite_are_an_error_and_no_black_picture(model, tmp_path, capfd):
    shutil.copytree(model, tmp_path / "broken")
    path = tmp_path / "broken" / WEIGHTS_FILE
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path)
    assert in_process(generate.main, "--model", tmp_path / "broken", "--output", tmp_path / "grid.png") == 2
    assert "samples are not finite" in capfd.readouterr().err and not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver"])
def test_samples_that_are_not_finite_are_an_error(scheduler):
    unet = UNet2DModel(**SMALL)
    unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ConfigError, match="samples are not finite"):
        options = SampleOptions(scheduler=scheduler, num_inference_steps=2)
        Model(unet, DDPMScheduler(**SCHEDULER), None).draw_images([0], options)


def test_what_decides_a_picture_is_in_its_key_and_nothing_else():
    unet, options = UNet2DModel(**SMALL, num_class_embeds=11), SampleOptions()
    model = Model(unet, DDPMScheduler(**SCHEDULER), 10)
    changes = {"scheduler": "ddim", "num_inference_steps": 9, "guidance_scale": 3.0, "guidance_min_log_snr": -9.0}
    changes |= {"mixed_precision": "bf16", "seed": 1}
    keys = [model.key(options), model.key(options, 7), Model(unet, DDPMScheduler(), 10).key(options)]
    keys += [model.key(replace(options, **{name: value})) for name, value in changes.items()]
    assert keys[0] == model.key(replace(options, num_images=3, batch_size=1))
    unet.conv_out.bias.data += 1
    assert len({*keys, model.key(options)}) == len(keys) + 1


def test_the_class_of_each_image(conditional_model, tmp_path, capfd):
    for label in (10, -1):
        args = ["--model", conditional_model, f"--class_label={label}", "--output", tmp_path / "a.png"]
        assert in_process(generate.main, *args) == 2
        assert f"--class_label {label}: the model has 10 classes" in capfd.readouterr().err
    assert labels_for([0, 9, 10, 21], 10).tolist() == [0, 9, 0, 1] and labels_for(range(2), 10, 7).tolist() == [7, 7]


def test_without_dropped_labels_there_is_no_guidance():
    pipe = ClassConditionalDDPMPipeline(UNet2DModel(**SMALL, num_class_embeds=10), diffusers.DDIMScheduler())
    assert len(pipe([1, 2], num_inference_steps=1).images) == 2
    with pytest.raises(ValueError, match="without label dropout"):
        pipe([1], 2.0)


def test_bf16_draws_the_same_picture_but_for_rounding(model, tmp_path):
    args = ["--model", model, "--scheduler", "ddim", "--num_inference_steps", 10]
    for precision in ("no", "bf16"):
        output = tmp_path / f"{precision}.png"
        assert in_process(generate.main, *args, "--mixed_precision", precision, "--output", output) == 0
    plain, bf16 = (np.array(Image.open(tmp_path / f"{p}.png"), dtype=int) for p in ("no", "bf16"))
    assert 0 < np.abs(plain - bf16).mean() < 4


def test_generate_draws_from_a_checkpoint_its_averaged_weights(model, conditional_model, tmp_path):
    for folder, sampler in ((model, "ddim"), (conditional_model, "dpmsolver")):
        options = ["--num_images", 2, "--scheduler", sampler, "--num_inference_steps", 4]
        pictures = []
        for source in (folder, folder / "checkpoint-8"):  # the export is the average of the last checkpoint
            output = tmp_path / f"{folder.name}-{source.name}.png"
            assert in_process(generate.main, "--model", source, *options, "--output", output) == 0
            pictures.append(output.read_bytes())
        assert pictures[0] == pictures[1]


IN_THE_WAY = [  # (what, made how, its mode, one more option, what is said)
    ("grid.png", "mkdir", 0o777, "--overwrite", "grid.png is a folder"),
    ("grid", "touch", 0o666, "--overwrite", "grid is a file; name a folder"),
    ("grid/00000.png", "mkdir", 0o777, "--overwrite", "00000.png is a folder"),
    ("grid.png", "touch", 0o444, "--overwrite", "grid.png cannot be written"),  # another user's
    ("grid", "mkdir", 0o555, "--overwrite", "grid cannot be written"),
]


@posix
@pytest.mark.parametrize(("what", "how", "mode", "option", "said"), IN_THE_WAY)
def test_generate_says_at_the_start_what_is_in_its_way(tmp_path, what, how, mode, option, said):
    tmp_path.chmod(0o777)
    (tmp_path / what).parent.mkdir(exist_ok=True)
    getattr(tmp_path / what, how)(mode)
    options = ["--model", "none", "--output", str(tmp_path / "grid.png"), option]
    config = read_options(generate.GenerateConfig, options, "")
    with as_nobody(tmp_path), pytest.raises(ConfigError, match=said) as error:
        generate.generate(config)
    assert f"--output {tmp_path / 'grid.png'}: " in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such-model"], "--model no/such-model: the Hub cannot be reached"),
        (["--model", str(ROOT / "configs")], "holds no model_index.json"),
        (["--model", "ddpm-mnist"], "--model ddpm-mnist: no such folder; first, accelerate launch"),  # the default
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001"),
        (["--scheduler", "dpmsolver", "--num_inference_steps", "1000"], "1000: dpmsolver takes at most 999"),
        (["--guidance_scale", "3"], "--guidance_scale 3.0: this model was trained without dropped labels"),
        (["--guidance_min_log_snr", "-9"], "--guidance_min_log_snr -9.0: this model was trained without dropped"),
        (["--class_label", "3"], "--class_label 3: the model has no classes"),
        (["--output", "grid.gif"], "--output grid.gif: must end in .png"),
    ],
)
def test_generate_answers_bad_input_in_one_line(model, tmp_path, args, message, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert in_process(generate.main, "--model", model, *args) == 2
    stderr = capfd.readouterr().err
    assert message in stderr.strip().splitlines()[-1] and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
