"""Evaluation: of sets whose distances are known, of the bound in closed form, and of a real run."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, blob, in_process, make_dataset, python
from datasets import ClassLabel
from scipy.stats import norm

import evaluate as command
from benchmarks.recipe import error_by_snr as error
from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.evaluation import bound, classifier, report
from ddpm_mnist.evaluation.metrics import frechet_distance, gaussian_of, in_balls, jackknife, nearest, share_and_ci
from ddpm_mnist.images.batches import Images, scale
from ddpm_mnist.record import weights_sha256
from ddpm_mnist.training.config import parse_args


def gaussian(count: int, dim: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_formula():
    a, b = gaussian(200_000, 3, 0), gaussian(200_000, 3, 1, mean=2.0, std=3.0)
    assert frechet_distance(a, gaussian_of(b)) == pytest.approx(3 * 2.0**2 + 3 * (3 - 1) ** 2, rel=0.01)
    assert abs(frechet_distance(a, gaussian_of(a))) < 1e-6
    correlated = a @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 1.0]])  # ones on C's diagonal
    back, forth = frechet_distance(correlated, gaussian_of(a)), frechet_distance(a, gaussian_of(correlated))
    assert back == pytest.approx(forth, rel=1e-6) and forth > 0.1


def test_a_ball_reaches_to_the_kth_other_center_and_nearest_gives_distances_and_indices():
    line = torch.tensor([0, 10, 30, 70], dtype=torch.uint8)[:, None, None, None]
    points = torch.tensor([[-9.0], [15.0], [71.0], [115.0]])
    assert in_balls(points, line.flatten(1).float(), 1).tolist() == [True, True, True, False]  # radii 10, 10, 20, 40
    assert in_balls(points[:1] - 2, line.flatten(1).float(), 1).tolist() == [False]
    distances, indices = nearest(torch.tensor([29, 60], dtype=torch.uint8)[:, None, None, None], line, 2)
    assert indices.tolist() == [[2, 1], [3, 2]]
    torch.testing.assert_close(distances * 255, torch.tensor([[1.0, 19.0], [10.0, 30.0]]))
    many, line = (
        gaussian(n, 4, n).reshape(n, 1, 2, 2).mul(40).add(128).byte() for n in (7, 4500)
    )  # the line is more than one block
    distances, indices = nearest(many, line, 3)
    whole = torch.cdist(many.flatten(1) / 255, line.flatten(1) / 255).topk(3, largest=False)
    of_indices = (line[indices] / 255 - many[:, None] / 255).flatten(2).norm(dim=2)
    torch.testing.assert_close((distances, of_indices), (whole.values, whole.values))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_balls_of_many_are_those_of_all_at_once_and_take_the_memory_of_some():
    """A square of 10,000 x 10,000 distances, all at once, take 1.5 GB."""
    points, centers = gaussian(1100, 4, 0), gaussian(1300, 4, 1)
    radii = torch.cdist(centers, centers).sort(dim=1).values[:, 3]
    assert torch.equal(in_balls(points, centers), (torch.cdist(points, centers) <= radii).any(dim=1))
    code = """
import torch
from ddpm_mnist.evaluation.metrics import in_balls
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # kilobytes
in_balls(torch.randn(100, 8), torch.randn(100, 8))
before = peak()
in_balls(torch.randn(10_000, 8), torch.randn(10_000, 8))
assert peak() - before < 800_000
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_jackknife_takes_the_bias_away_and_its_interval_holds_the_truth():
    """150 samples of a Gaussian whose Fréchet distance to the reference is 1: the plain value is above 1.5."""
    reference, truth = gaussian_of(gaussian(10_000, 24, 0)), 24 * 0.5**2 / 6
    plain, values, held = [], [], 0
    for seed in range(60):
        samples = gaussian(150, 24, seed + 1, mean=0.5 / 6**0.5)
        value, ci = jackknife(lambda x: frechet_distance(x, reference), samples)
        plain.append(frechet_distance(samples, reference))
        values.append(value)
        held += abs(value - truth) < ci
    assert np.mean(plain) > 1.5 * truth  # what small samples are called without it
    assert np.mean(values) == pytest.approx(truth, rel=0.1)
    assert held >= 52  # of 60; 57 are expected
    assert jackknife(lambda x: x.mean().item(), torch.tensor([[1.0], [3.0]]))[0] == pytest.approx(2)


@pytest.mark.parametrize(("count", "block"), [(10, 10), (11, 10), (25, 10), (39, 10), (1100, 1000)])
def test_the_jackknife_of_few_samples_has_no_groups_of_a_class_or_of_nothing(count, block):
    samples, reference = gaussian(count, 3, 0), gaussian_of(gaussian(100_000, 3, 1))
    value, ci = jackknife(lambda x: frechet_distance(x, reference), samples, block=block)
    assert math.isfinite(ci) and abs(value) < (3 if count < 100 else 0.05)


def test_the_jackknife_keeps_a_sample_of_each_class_together():
    """Ten classes far apart, in turn: their distance does not make the mean of all less certain."""
    samples = gaussian(400, 1, 0) + 10 * (torch.arange(400) % 10)[:, None]
    assert jackknife(lambda x: x.mean().item(), samples, block=10)[1] == pytest.approx(1.96 / 20, rel=0.4)
    assert jackknife(lambda x: x.mean().item(), samples)[1] > 1  # in groups of one class each


@pytest.mark.parametrize(("hits", "of", "least"), [(20, 20, 0.15), (0, 20, 0.15), (10, 20, 0.19), (800, 1000, 0.02)])
def test_the_interval_of_a_share_is_never_nothing(hits, of, least):
    share, ci = share_and_ci(torch.arange(of) < hits)
    assert share == hits / of and least < ci < least + 0.02


# ---- the bound -----------------------------------------------------------------------------------------------------


def test_the_mass_of_a_gaussian_on_an_interval_also_far_out():
    for lower, upper in ((-1.0, 0.5), (0.2, 0.3), (-0.3, -0.2), (5.0, 6.0), (-math.inf, 1.0), (-1.0, math.inf)):
        ours = bound.log_probability_between(torch.tensor(lower).double(), torch.tensor(upper).double())
        assert ours.item() == pytest.approx(math.log(norm.cdf(upper) - norm.cdf(lower)), rel=1e-6)
    far = bound.log_probability_between(torch.tensor(40.0).double(), torch.tensor(41.0).double())
    assert far.item() == pytest.approx(norm.logsf(40), rel=1e-6)  # the mass beyond 41 is nothing beside it


def test_the_decoder_is_a_distribution_over_256_levels():
    levels = scale(torch.arange(256, dtype=torch.uint8))
    for mean, std in ((0.1, 0.02), (-1.0, 0.007), (0.999, 0.5)):
        nll = bound.decoder_nll(levels, torch.tensor(mean), std)
        assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_transitions_are_the_divergence_of_the_two_gaussians_that_the_scheduler_steps_by(variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    images, prediction = (gaussian(1, 16, seed).view(1, 1, 4, 4).clamp(-1, 1) for seed in (0, 1))
    for t in (1, 30, 999):
        kl = bound.transition_nll(images, prediction, torch.tensor([t]), scheduler).sum().item()
        # eq. 7 by hand, in numpy
        alphas_cumprod = np.cumprod(1 - scheduler.betas.double().numpy())
        beta, bar, before = scheduler.betas.double().numpy()[t], alphas_cumprod[t], alphas_cumprod[t - 1]
        posterior = (1 - before) / (1 - bar) * beta
        sigma = posterior if variance_type == "fixed_small" else beta
        shift = np.sqrt(before) * beta / (1 - bar) * (images - prediction).double().numpy()
        expected = 0.5 * (np.log(sigma / posterior) + (posterior + shift**2) / sigma - 1)
        assert kl == pytest.approx(expected.sum(), rel=1e-3)


def test_the_prior_term_is_what_is_left_of_the_image():
    scheduler = DDPMScheduler()
    expected = -0.5 * math.log(1 - scheduler.alphas_cumprod[-1].item())  # for an image of ones
    assert bound.prior_kl(torch.ones(1, 1, 2, 2), scheduler).mean().item() == pytest.approx(expected, rel=1e-3)


class Oracle:
    """Knows x_0 (all images are one) and so the noise."""

    config, device = SimpleNamespace(num_class_embeds=None), torch.device("cpu")

    def __init__(self, x_0, scheduler):
        self.x_0, self.scheduler = x_0.double(), scheduler

    def __call__(self, sample, timesteps, class_labels=None):
        bar = self.scheduler.alphas_cumprod[timesteps][:, None, None, None].double()
        self.snr = (bar / (1 - bar)).max().item()
        return SimpleNamespace(sample=(sample.double() - bar.sqrt() * self.x_0) / (1 - bar).sqrt())


def test_a_model_that_knows_the_image_needs_the_decoder_and_the_prior_alone():
    scheduler = DDPMScheduler(clip_sample=False)
    test = Images(torch.full((4, 1, 4, 4), 200, dtype=torch.uint8), None)
    x_0 = scale(test.images[:1])
    exact, off = (
        bound.variational_bound(Oracle(x, scheduler), scheduler, test, per_timestep=2) for x in (x_0, x_0 + 0.05)
    )
    assert len(exact["terms"]) == 1001 and exact["evaluations"] == 2 * (980 + 20 * 10)
    assert exact["bits_per_dim"] == pytest.approx(exact["terms"][0] + exact["terms"][-1], abs=1e-4)
    assert 0 < exact["terms"][-1] < 1e-4 < exact["terms"][0] < 2
    # each L_t is weight^2 off^2 / (2 sigma^2), and their sum telescopes to half of off^2 times the first SNR's
    first, last = (bar / (1 - bar) for bar in scheduler.alphas_cumprod[[1, -1]].double())
    assert sum(off["terms"][2:-1]) == pytest.approx((0.5 * 0.05**2 * (first - last) / math.log(2)).item(), rel=0.01)


def test_the_error_of_x_0_is_that_at_the_log_snr():
    scheduler = DDPMScheduler(clip_sample=True)  # an error beyond [-1, 1] counts too
    images, noise = torch.ones(3, 1, 4, 4), gaussian(3, 16, 0).view(3, 1, 4, 4)
    for log_snr in error.LOG_SNRS:
        model = SimpleNamespace(unet=Oracle(images[:1] + 0.1, scheduler), scheduler=scheduler)
        difference = error.model_x0(model, images, noise, log_snr) - images
        torch.testing.assert_close(difference, torch.full_like(images, 0.1), rtol=1e-3, atol=0)
        assert math.log(model.unet.snr) == pytest.approx(log_snr, abs=0.05)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1, 2])])
def test_no_output_is_better_than_the_mean_of_the_training_images_by_their_probability(labels, monkeypatch):
    """The definition, image by image; whatever part of the training set is read at a time."""
    train = Images(
        torch.randint(0, 256, (60, 1, 4, 4), generator=torch.Generator().manual_seed(1)).byte(), torch.arange(60) % 3
    )
    x_t, alpha_prod = gaussian(4, 16, 0).view(4, 1, 4, 4), torch.tensor(0.3)
    candidates = scale(train.images).double()
    for part in (7, 1000):
        monkeypatch.setattr(error, "PART", part)
        best = error.best_x0(x_t, alpha_prod, train, labels)
        for i in range(4):
            chosen = candidates if labels is None else candidates[train.labels == labels[i]]
            log_density = -((x_t[i] - 0.3**0.5 * chosen) ** 2).sum(dim=(1, 2, 3)) / (2 * 0.7)
            mean = (log_density.softmax(0)[:, None, None, None] * chosen).sum(0)
            torch.testing.assert_close(best[i].double(), mean, rtol=1e-4, atol=1e-5)


def test_a_perfect_model_has_the_least_error_and_nothing_above_it():
    train = bars(12, 0)
    scheduler = DDPMScheduler(prediction_type="sample")

    def unet(sample, timesteps, class_labels=None):
        alpha_prod = scheduler.alphas_cumprod[timesteps][:1]
        return SimpleNamespace(sample=error.best_x0(sample, alpha_prod, train))

    unet.device = torch.device("cpu")
    model = SimpleNamespace(unet=unet, scheduler=scheduler, num_classes=None)
    errors = error.error_by_snr(model, train)
    assert [e["above"] for e in errors] == [0] * len(error.LOG_SNRS)
    least = [e["least"] for e in errors]
    assert least == sorted(least) and least[0] < 0.01 < least[-1]  # more noise, more error


# ---- the classifier, and what it says of samples ---------------------------------------------------------------------


def bars(count: int, seed: int) -> Images:
    """Four classes of thick bars, in noise."""
    labels = torch.arange(count) % 4
    pixels = torch.zeros(count, 1, 28, 28)
    for i, label in enumerate(labels):
        pixels[i, 0, 6 * label : 6 * label + 6, 4:24] = 255
    noise = 40 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return Images((pixels + noise).clamp(0, 255).byte(), labels)


@pytest.fixture(scope="module")
def judge() -> classifier.Judge:
    data = SimpleNamespace(train=bars(300, 2), test=bars(200, 3))
    trained = classifier.train_classifier(bars(400, 0), steps=30)
    return classifier.Judge(data, bars(120, 1), trained, 1.0, classifier.classify(trained, data.test.images)[2], seed=0)


def test_metrics_tell_copies_from_new_images_and_noise_from_both(judge):
    generator = torch.Generator().manual_seed(0)
    sets = {
        "new": bars(100, 4).images,
        "copies": judge.data.train.images[:100],
        "noise": torch.randint(0, 256, (100, 1, 28, 28), generator=generator, dtype=torch.uint8),
        "one class": bars(400, 5).images[::4],
    }
    measured = {name: report.measure(Images(images, None), judge) for name, images in sets.items()}
    names = {"frechet_distance", "frechet_unbiased", "precision", "recall", "confident", "nearest_ratio"}
    assert all(values.keys() == names for values in measured.values())
    new, copies, noise, one_class = ({n: v[0] for n, v in measured[name].items()} for name in sets)
    assert noise["frechet_distance"] > 10 * new["frechet_distance"]
    assert noise["precision"] < 0.1 < 0.7 < new["precision"] and noise["confident"] < new["confident"]
    assert one_class["recall"] < 0.5 < new["recall"]
    assert new["nearest_ratio"] == pytest.approx(1, abs=0.05) and copies["nearest_ratio"] < 0.1
    for name, (value, ci, real) in measured["new"].items():  # new images are as the real ones are
        assert ci > 0 and abs(value - real) < 0.1 * max(1, noise[name]), name


def test_requested_classes_are_recognized(judge):
    samples = bars(100, 4)
    samples.labels[:25] = (samples.labels[:25] + 1) % 4
    values = report.measure(samples, judge)
    assert values["class_accuracy"][0] == pytest.approx(0.75, abs=0.03) and values["class_accuracy"][2] > 0.95


# ---- the command ---------------------------------------------------------------------------------------------------


def arguments(model, dataset_dir) -> list:
    args = ["--model", model, "--dataset_name", dataset_dir, "--num_images", 20, "--num_inference_steps", 3]
    return [*args, "--bound_images", 2, "--classifier_steps", 15]


def test_evaluate_writes_what_the_card_takes(conditional_model, tiny_dataset_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    said = []
    for name in ("results", "again"):
        args = [*arguments(conditional_model, tiny_dataset_dir), "--output_dir", tmp_path / name]
        assert in_process(command.main, *args) == 0
        said.append(capfd.readouterr())
    results, again = (json.loads((tmp_path / f"{n}/evaluation.json").read_text()) for n in ("results", "again"))
    assert results["weights_sha256"] == weights_sha256(conditional_model)
    assert results["metrics"].keys() == report.METRICS.keys() == results["texts"].keys()
    assert 0 < results["metrics"]["bits_per_dim"] < 40 and results["ci"]["bits_per_dim"] > 0
    assert all(math.isfinite(v) for v in results["metrics"].values()) and again["metrics"] == results["metrics"]
    table = (tmp_path / "results/evaluation.md").read_text(encoding="utf-8")
    assert table in said[0].out and "20 samples by ddpm in 3 steps" in table
    assert {path.name for path in (tmp_path / "results").iterdir()} == set(command.OUTPUTS)
    training = ["training the classifier" in each.err.split("sampling")[0] for each in said]
    assert training == [True, False]  # the second time it comes from the cache
    (kept,) = (tmp_path / "home/ddpm-mnist").iterdir()
    assert {"config.json", "model.safetensors"} == {path.name for path in kept.iterdir()}
    (kept / "model.safetensors").write_bytes(b"damaged")
    assert in_process(command.main, *args, "--bound_images=0") == 0
    assert "training the classifier" in capfd.readouterr().err
    assert not (tmp_path / "again/evaluation_bound.png").exists()  # of the evaluation before


def test_data_of_more_classes_than_the_model_has_is_one_line(conditional_model, tmp_path, capfd):
    rows = make_dataset([blob(i) for i in range(60)], [i % 10 for i in range(60)]).remove_columns("label")
    rows = rows.add_column("label", [i % 12 for i in range(60)], feature=ClassLabel(num_classes=12))
    rows.to_parquet(tmp_path / "train.parquet")
    assert in_process(command.main, *arguments(conditional_model, tmp_path / "train.parquet")) == 2
    assert "which is not a class number below 10" in capfd.readouterr().err


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 8, 16)])
def test_only_square_images_in_grey_or_colour_are_evaluated(shape):
    with pytest.raises(ConfigError, match="--model other: draws images"):
        report.measure_model(SimpleNamespace(shape=shape), SimpleNamespace(model="other"))


def test_what_is_not_defined_is_null_in_json_and_said_in_the_table(model, tiny_dataset_dir, tmp_path, monkeypatch):
    """0/0: most test images have exact copies among the images that they are compared with."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(report, "nearest_distances", lambda images, **options: torch.zeros(len(images), 2))
    args = [*arguments(model, tiny_dataset_dir), "--bound_images", 0, "--output_dir", tmp_path]
    assert in_process(command.main, *args) == 0

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert results["metrics"]["nearest_ratio"] is None
    assert "not defined: test images have exact copies" in (tmp_path / "evaluation.md").read_text(encoding="utf-8")


def test_the_images_are_by_default_those_that_the_model_was_trained_on_and_nothing_else_is_the_models(tmp_path):
    """From its own record; the command line wins. A stranger's model must not say where this machine caches."""
    options = ["--dataset_name=/some/set", "--image_column=mask", "--center_crop", "--seed=5"]
    recorded = parse_args([*options, "--cache_dir=/a/strangers", "--dataloader_num_workers=64"])
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(recorded.saved()), encoding="utf-8")
    (tmp_path / "checkpoint-8/unet").mkdir(parents=True)
    (tmp_path / "checkpoint-8/state.pt").write_bytes(b"")
    for model in (tmp_path, tmp_path / "checkpoint-8"):
        config = command.parse_args(["--model", str(model), "--image_column=image"])
        images = {"dataset_name": "/some/set", "image_column": "image", "center_crop": True}
        assert config == command.EvaluateConfig(model=str(model), **images)


def test_a_local_set_is_the_one_that_was_trained_on_or_a_line(tmp_path, monkeypatch):
    """Never another folder that has the same name today, and never a question to the Hub."""
    (tmp_path / "then/sets/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "then")
    (tmp_path / "run").mkdir()
    config = parse_args(["--dataset_name=sets/mine"])
    (tmp_path / "run/train_config.yaml").write_text(yaml.safe_dump(config.saved()), encoding="utf-8")
    (tmp_path / "run/train_results.json").write_text(json.dumps({"dataset_is_local": True}), encoding="utf-8")
    (tmp_path / "now/sets/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "now")
    arguments = ["--model", str(tmp_path / "run")]
    assert command.parse_args(arguments).dataset_name == str(tmp_path / "then/sets/mine")
    (tmp_path / "then/sets/mine").rmdir()
    with pytest.raises(ConfigError, match="--dataset_name: the model was trained on .*mine, which does not exist"):
        command.parse_args(arguments)
    assert command.parse_args([*arguments, "--dataset_name=sets/mine"]).dataset_name == "sets/mine"


BAD_INPUT = {  # (options, part of the one line that is the answer)
    "learned variance": (["--model=learned"], "--bound_images: no bound of a learned variance"),
    "steps": (["--num_inference_steps=1001"], "--num_inference_steps 1001: ddpm takes at most 1000"),
    "file as folder": (["--output_dir", ROOT / "README.md/out"], "README.md is a file; name a folder"),
    "one image": (["--bound_images=1"], "--bound_images 1: must be 2 or more"),
    "not a model": (["--model", ROOT / "configs"], "holds no model_index.json"),
    "no such model": (["--model=no/such-model"], "--model no/such-model: the Hub cannot be reached"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_evaluate_answers_bad_input_in_one_line_before_the_work(model, tmp_path, name, monkeypatch, capfd):
    options, part = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "learned")
    path = tmp_path / "learned/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": "learned_range"}))
    config = UNet2DModel.load_config("learned/unet") | {"out_channels": 2}
    UNet2DModel.from_config(config).save_pretrained("learned/unet")
    monkeypatch.setattr(classifier, "load_data", None)  # it comes before the data
    assert in_process(command.main, *arguments(model, "none"), *options) == 2
    stderr = capfd.readouterr().err
    assert part in stderr.strip().splitlines()[-1] and "Traceback" not in stderr
    assert not (model / "evaluation.json").exists()


@pytest.mark.parametrize("name", command.OUTPUTS)
def test_evaluate_looks_for_what_stands_in_the_way_of_its_files(tmp_path, name, capfd):
    (tmp_path / name).mkdir()
    assert in_process(command.main, "--model", tmp_path, "--output_dir", tmp_path) == 2
    assert f"{name} is a folder, but must be a file" in capfd.readouterr().err
