"""What evaluation says: of sets whose distances are known, of the bound in closed form, and of a real run."""

import json
import math
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, blob, in_process, python, trained, weights
from safetensors.torch import save_file
from scipy.stats import norm

import evaluate as command
from ddpm_mnist import DDPMScheduler
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.evaluation.bound import (
    decoder_nll,
    log_probability_between,
    prior_kl,
    transition_nll,
    variational_bound,
)
from ddpm_mnist.evaluation.classifier import cache_folder, read, train_classifier
from ddpm_mnist.evaluation.metrics import (
    bootstrap_ci,
    density_coverage,
    frechet_distance,
    gaussian_of,
    jackknife,
    kth_neighbour,
    mean_and_ci,
    nearest,
    precision_recall,
    share_and_ci,
)
from ddpm_mnist.evaluation.report import Figure, bound_picture, compare, neighbours_picture
from ddpm_mnist.images.batches import Images, scale
from ddpm_mnist.images.dataset import EMBEDDED_DATASET
from ddpm_mnist.training.config import parse_args


def gaussian(count: int, dim: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


# ---- distances -----------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_formula():
    a, b = gaussian(200_000, 3, 0), gaussian(200_000, 3, 1, mean=2.0, std=3.0)
    assert frechet_distance(a, b) == pytest.approx(3 * 2.0**2 + 3 * (3 - 1) ** 2, rel=0.01)
    assert abs(frechet_distance(a, a)) < 1e-6
    correlated = a @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 1.0]])  # ones on C's diagonal
    assert frechet_distance(a, correlated) == pytest.approx(frechet_distance(correlated, a), rel=1e-6)
    assert frechet_distance(a, correlated) > 0.1


def test_precision_falls_for_samples_far_off_and_recall_for_samples_all_alike():
    real = gaussian(300, 4, 0)
    same, far, alike = gaussian(300, 4, 1), gaussian(300, 4, 2, mean=50.0), real[:1] + 0.01 * gaussian(300, 4, 3)
    means = {}
    for name, samples in (("same", same), ("far", far), ("alike", alike)):
        values = (*precision_recall(samples, real), *density_coverage(samples, real))
        assert [len(v) for v in values] == [300] * 4
        means[name] = [v.double().mean().item() for v in values]
    precision, recall, density, coverage = zip(*(means[name] for name in ("same", "far", "alike")))
    assert precision[0] > 0.8 and precision[1] == 0 and precision[2] > 0.9
    assert recall[0] > 0.8 and recall[1] == 0 and recall[2] < 0.1
    assert 0.8 < density[0] < 1.2 and density[1] == 0
    assert coverage[0] > 0.9 and coverage[1] == 0 and coverage[2] < 0.1


def test_a_ball_reaches_to_the_kth_other_point_and_nearest_finds_it():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert kth_neighbour(line, 1).tolist() == [1, 1, 2, 4]
    assert kth_neighbour(line, 2).tolist() == [3, 2, 3, 6]
    distances, which = nearest(torch.tensor([[2.9], [6.0]]), line, 2)
    assert which.tolist() == [[2, 1], [3, 2]]
    torch.testing.assert_close(distances, torch.tensor([[0.1, 1.9], [1.0, 3.0]]))


def test_intervals_shrink_with_the_root_of_the_number():
    values = gaussian(40_000, 1, 0)[:, 0]
    mean, ci = mean_and_ci(values)
    assert abs(mean) < 2 * ci and ci == pytest.approx(1.96 / 200, rel=0.02)
    assert mean_and_ci(torch.tensor([True, False] * 50)) == (0.5, pytest.approx(0.0985, rel=0.01))
    assert bootstrap_ci(lambda x: x.mean().item(), values, resamples=200) == pytest.approx(ci, rel=0.2)


def test_the_jackknife_takes_the_bias_away_and_its_interval_holds_the_truth():
    """150 samples of a Gaussian whose Fréchet distance to the reference is 1: the plain value is above 1.5."""
    reference, truth = gaussian_of(gaussian(20_000, 24, 0)), 24 * 0.5**2 / 6
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
    value, ci = jackknife(lambda x: x.mean().item(), gaussian(400, 1, 0))
    assert ci == pytest.approx(1.96 / 20, rel=0.4)
    assert jackknife(lambda x: x.mean().item(), torch.tensor([[1.0], [3.0]]))[0] == pytest.approx(2)


def test_the_jackknife_keeps_a_sample_of_each_class_together():
    """Ten classes far apart, in turn: their means say nothing of how well the mean of all is known."""
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
        ours = log_probability_between(torch.tensor(lower).double(), torch.tensor(upper).double())
        assert ours.item() == pytest.approx(math.log(norm.cdf(upper) - norm.cdf(lower)), rel=1e-6)
    far = log_probability_between(torch.tensor(40.0).double(), torch.tensor(41.0).double())
    assert far.item() == pytest.approx(norm.logsf(40), rel=1e-6)  # the mass beyond 41 is nothing beside it


def test_the_decoder_is_a_distribution_over_256_levels():
    levels = scale(torch.arange(256, dtype=torch.uint8))
    for mean, std in ((0.1, 0.02), (-1.0, 0.007), (0.999, 0.5)):
        nll = decoder_nll(levels, torch.tensor(mean), std)
        assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_transitions_are_the_divergence_of_the_two_gaussians_that_the_scheduler_steps_by(variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    images, prediction = (
        gaussian(1, 16, 0).view(1, 1, 4, 4).clamp(-1, 1),
        gaussian(1, 16, 1).view(1, 1, 4, 4).clamp(-1, 1),
    )
    for t in (1, 30, 999):
        kl = transition_nll(images, prediction, torch.tensor([t]), scheduler).sum().item()
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
    images = torch.ones(1, 1, 2, 2)
    bar = scheduler.alphas_cumprod[-1].item()
    expected = 0.5 * (bar + (1 - bar) - 1 - math.log(1 - bar))
    assert prior_kl(images, scheduler).mean().item() == pytest.approx(expected, rel=1e-3)


class Oracle(torch.nn.Module):
    """Knows x_0 (all images are one) and so the noise; and how far off it is by its own doing."""

    def __init__(self, image, scheduler, off=0.0):
        super().__init__()
        self.image, self.scheduler, self.off = image, scheduler, off
        self.config = type("Config", (), {"num_class_embeds": None})
        self.device = torch.device("cpu")

    def forward(self, sample, timesteps, class_labels=None):
        bar = self.scheduler.alphas_cumprod[timesteps][:, None, None, None].double()
        noise = (sample.double() - bar.sqrt() * (self.image.double() + self.off)) / (1 - bar).sqrt()
        return type("Output", (), {"sample": noise})


def test_a_model_that_knows_the_image_needs_the_decoder_and_the_prior_alone():
    scheduler = DDPMScheduler(clip_sample=False)
    pixels = torch.full((4, 1, 4, 4), 200, dtype=torch.uint8)
    exact = variational_bound(Oracle(scale(pixels[:1]), scheduler), scheduler, Images(pixels, None), per_timestep=2)
    assert len(exact["terms"]) == 1001 and exact["evaluations"] == 2 * (980 + 20 * 10)
    assert exact["bits_per_dim"] == pytest.approx(exact["terms"][0] + exact["terms"][-1], abs=1e-4)
    assert 0 < exact["terms"][-1] < 1e-4 < exact["terms"][0] < 2
    off = variational_bound(Oracle(scale(pixels[:1]), scheduler, 0.05), scheduler, Images(pixels, None), per_timestep=2)
    # each L_t is weight^2 off^2 / (2 sigma^2), and their sum telescopes to half of off^2 times the first SNR's
    first = scheduler.alphas_cumprod[1].double() / (1 - scheduler.alphas_cumprod[1].double())
    gap = sum(off["terms"][2:-1])
    last = scheduler.alphas_cumprod[-1].double() / (1 - scheduler.alphas_cumprod[-1].double())
    assert gap == pytest.approx((0.5 * 0.05**2 * (first - last) / math.log(2)).item(), rel=0.01)


def test_a_learned_variance_is_refused():
    scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="learned_range"):
        variational_bound(None, scheduler, None)


# ---- the classifier, and the figures -------------------------------------------------------------------------------


def bars(count: int, seed: int) -> Images:
    """Four classes of thick bars, in noise."""
    labels = torch.arange(count) % 4
    pixels = torch.zeros(count, 1, 28, 28)
    for i, label in enumerate(labels):
        pixels[i, 0, 6 * label : 6 * label + 6, 4:24] = 255
    noise = 40 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return Images((pixels + noise).clamp(0, 255).byte(), labels)


@pytest.fixture(scope="module")
def reader():
    return train_classifier(bars(400, 0), steps=30)


def test_the_classifier_reads_what_it_was_taught(reader):
    test = bars(100, 1)
    classes, confidence, features = read(reader, test.images)
    assert (classes == test.labels).float().mean() > 0.95 and confidence.mean() > 0.7
    assert features.shape == (100, 128)


def test_figures_tell_copies_from_new_images_and_noise_from_both(reader):
    data = type("Data", (), {"train": bars(300, 2), "test": bars(200, 3)})

    def figures(samples: torch.Tensor) -> dict[str, Figure]:
        return {f.name: f for f in compare(samples, None, data, reader, seed=0)}

    generator = torch.Generator().manual_seed(0)
    new = figures(bars(100, 4).images)
    copies = figures(data.train.images[:100])
    noise = figures(torch.randint(0, 256, (100, 1, 28, 28), generator=generator, dtype=torch.uint8))
    one_class = figures(bars(400, 5).images[::4])
    assert noise["frechet_distance"].value > 10 * new["frechet_distance"].value
    assert noise["precision"].value < 0.1 < 0.7 < new["precision"].value
    assert new["confident"].value > noise["confident"].value
    assert new["class_imbalance"].value < 0.05 and one_class["class_imbalance"].value == pytest.approx(0.75)
    assert one_class["coverage"].value < 0.5 < new["coverage"].value
    assert new["nearest_ratio"].value == pytest.approx(1, abs=0.05) and copies["nearest_ratio"].value < 0.9
    assert {f.floor is None for f in new.values()} == {False}
    assert all("|" in f.row() for f in new.values())


def test_samples_that_were_asked_for_are_read_and_taught_from(reader):
    data = type("Data", (), {"train": bars(300, 2), "test": bars(200, 3)})
    samples = bars(100, 4)
    wrong = samples.labels.clone()
    wrong[:25] = (wrong[:25] + 1) % 4
    figures = {f.name: f for f in compare(samples.images, wrong, data, reader, seed=0, classifier_steps=30)}
    assert figures["read_as_asked"].value == pytest.approx(0.75, abs=0.03)
    assert figures["accuracy_from_samples"].floor > 0.9


def test_conditional_models_are_told_apart_by_the_labels_of_the_images(conditional_model, dataset_dir, tmp_path, capfd):
    args = [*arguments(conditional_model, dataset_dir), "--classifier_steps", 5, "--compare", conditional_model]
    assert in_process(command.main, *args) == 0
    assert capfd.readouterr().out.count("not told apart") == 7


def test_two_models_are_told_apart_by_the_same_noise(model, dataset_dir, tmp_path, monkeypatch, capfd):
    """A model and one whose weights were disturbed differ; a model and itself do not; colour and grey are refused."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    disturbed = tmp_path / "disturbed"
    shutil.copytree(model, disturbed)
    path = disturbed / "unet/diffusion_pytorch_model.safetensors"
    changed = {
        k: v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
        for k, v in weights(path.parent).items()
    }
    save_file(changed, path)
    rows = {}
    for other in (model, disturbed):
        assert in_process(command.main, *arguments(model, dataset_dir), "--compare", other) == 0
        lines = capfd.readouterr().out.strip().splitlines()[-7:]
        rows[other] = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert [row[0] for row in rows[model]][:2] == [
        "Fréchet distance, without the bias of a finite sample",
        "classified with over 0.9 confidence",
    ]
    for _, one, other, difference, verdict in rows[model]:
        assert one == other and float(difference.split(" ± ")[0]) == 0 and verdict == "not told apart"
    told = {row[0]: row for row in rows[disturbed] if row[-1] == "told apart"}
    for log_snr in (2, 0, -1, -2, -3):
        _, one, other, difference, _ = told[f"squared error of x_0 at log SNR {log_snr}"]
        assert float(one) < float(other) and difference.startswith("-")
    assert not (model / "evaluation.json").exists()
    assert in_process(command.main, *arguments(model, dataset_dir), "--compare", ROOT / "configs") == 2
    assert "--compare" in capfd.readouterr().err


def test_pictures_are_drawn(tmp_path):
    picture = neighbours_picture(bars(20, 0).images, bars(50, 1))
    assert picture.size == (16 * 56, 4 * 56)
    bound_picture([0.5, 0.1, 0.05, 0.01], tmp_path / "bound.png")
    assert (tmp_path / "bound.png").stat().st_size > 1000


# ---- the command ---------------------------------------------------------------------------------------------------


def arguments(model, dataset_dir) -> list:
    args = ["--model", model, "--dataset_name", dataset_dir, "--num_images", 20, "--num_inference_steps", 3]
    return [*args, "--bound_images", 2, "--classifier_steps", 40, "--min_classifier_accuracy", 0.05]


def evaluate(model, dataset_dir, home, *options):
    return python("evaluate.py", *arguments(model, dataset_dir), *options, HF_HOME=str(home))


def test_evaluate_writes_what_the_card_takes(conditional_model, tiny_dataset_dir, tmp_path):
    from ddpm_mnist.record import weights_sha256

    done = evaluate(conditional_model, tiny_dataset_dir, tmp_path / "home", "--output_dir", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/evaluation.json").read_text())
    assert results["weights_sha256"] == weights_sha256(conditional_model)
    names = {
        "frechet_distance",
        "frechet_unbiased",
        "precision",
        "recall",
        "density",
        "coverage",
        "confident",
        "read_as_asked",
    }
    assert results["metrics"].keys() == names | {"accuracy_from_samples", "nearest_ratio", "bits_per_dim"}
    assert 0 < results["metrics"]["bits_per_dim"] < 40 and results["ci"]["bits_per_dim"] > 0
    assert all(math.isfinite(v) for v in results["metrics"].values())
    table = (tmp_path / "results/evaluation.md").read_text()
    assert table in done.stdout and "20 samples by ddpm in 3 steps" in table
    assert {p.name for p in (tmp_path / "results").glob("*.png")} == {
        "evaluation_bound.png",
        "evaluation_neighbours.png",
    }
    (kept,) = (tmp_path / "home/ddpm-mnist").iterdir()
    written = (kept / "model.safetensors").stat().st_mtime_ns
    assert {"config.json", "model.safetensors", "dataset.json"} == {p.name for p in kept.iterdir()}

    again = evaluate(conditional_model, tiny_dataset_dir, tmp_path / "home", "--output_dir", tmp_path / "again")
    assert "training the classifier" in done.stderr and again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again/evaluation.json").read_text())["metrics"] == results["metrics"]
    assert (kept / "model.safetensors").stat().st_mtime_ns == written  # read from the cache
    assert "training the classifier" not in again.stderr.split("sampling")[0]


def test_the_data_is_by_default_what_the_model_was_trained_on(tmp_path):
    """All of training's data options, from the model's own record; the command line wins."""
    import evaluate as command
    from ddpm_mnist.options import DataOptions, options_of
    from ddpm_mnist.training.config import TrainConfig

    names = {option.name for option in options_of(DataOptions)}
    for cls in (TrainConfig, command.EvaluateConfig):
        assert names <= {option.name for option in options_of(cls)}
    recorded = parse_args(["--dataset_name=/some/set", "--image_column=mask", "--center_crop", "--max_resident_gb=7"])
    (tmp_path / "train_config.yaml").write_text(recorded.to_yaml(), encoding="utf-8")
    (tmp_path / "checkpoint-8/unet").mkdir(parents=True)
    (tmp_path / "checkpoint-8/state.pt").write_bytes(b"")
    for model in (tmp_path, tmp_path / "checkpoint-8"):
        config = command.parse_args(["--model", str(model), "--image_column=image"])
        assert (config.dataset_name, config.image_column) == ("/some/set", "image")
        assert config.center_crop is True and config.max_resident_gb == 7.0 and config.scheduler == "ddpm"


def test_a_model_that_fell_back_to_the_digits_is_evaluated_on_them(tmp_path):
    """Although the Hub may be there again, and the config names no set."""
    (tmp_path / "train_config.yaml").write_text(parse_args([]).to_yaml(), encoding="utf-8")
    (tmp_path / "train_results.json").write_text(json.dumps({"dataset": EMBEDDED_DATASET}), encoding="utf-8")
    assert command.parse_args(["--model", str(tmp_path)]).dataset_name == EMBEDDED_DATASET


@pytest.mark.parametrize(
    ("options", "change", "part"),
    [
        (["--feature_extractor", "inception"], {}, "--feature_extractor inception: not available"),
        ([], {"variance_type": "learned"}, "--bound_images 2: variance_type learned: only fixed variances"),
    ],
)
def test_evaluate_says_at_its_start_what_it_cannot_do_at_its_end(
    model, dataset_dir, tmp_path, options, change, part, monkeypatch, capfd
):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    monkeypatch.setattr(command, "load_data", None)  # it comes before the data
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", None)  # as where it is not installed
    assert in_process(command.main, *arguments(tmp_path / "model", dataset_dir), *options) == 2
    assert part in capfd.readouterr().err


def test_a_local_set_is_the_one_that_was_trained_on_or_a_line(tmp_path, monkeypatch):
    """Never another folder that has the same name today, and never a question to the Hub."""
    (tmp_path / "then/sets/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "then")
    (tmp_path / "run").mkdir()
    config = parse_args(["--dataset_name=sets/mine", "--init_from=sets"])
    (tmp_path / "run/train_config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (tmp_path / "run/train_results.json").write_text(json.dumps({"dataset_is_local": True}), encoding="utf-8")
    (tmp_path / "now/sets/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "now")
    arguments = ["--model", str(tmp_path / "run")]
    assert command.parse_args(arguments).dataset_name == str(tmp_path / "then/sets/mine")
    (tmp_path / "then/sets/mine").rmdir()
    with pytest.raises(ConfigError, match="--dataset_name: the model was trained on .*mine, which is not here"):
        command.parse_args(arguments)
    assert command.parse_args([*arguments, "--dataset_name=sets/mine"]).dataset_name == "sets/mine"


def test_a_set_with_two_image_columns_is_evaluated_as_it_was_trained(tmp_path, monkeypatch):
    rows = {key: [blob(i) for i in range(40)] for key in ("image", "mask")} | {"label": [i % 4 for i in range(40)]}
    features = {key: datasets.Image() for key in ("image", "mask")} | {"label": datasets.ClassLabel(num_classes=4)}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (tmp_path / "set").mkdir()
    for split, part in (("train", made.select(range(28))), ("test", made.select(range(28, 40)))):
        part.to_parquet(tmp_path / f"set/{split}.parquet")
    out = trained(str(tmp_path / "set"), tmp_path / "out", image_column="image", max_train_steps=1, validation_steps=0)
    args = ["--num_images", 12, "--num_inference_steps", 2, "--bound_images", 0, "--classifier_steps", 5]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert in_process(command.main, "--model", out, *args, "--min_classifier_accuracy", 0) == 0
    results = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert "12 test images of set" in results["protocol"] and str(tmp_path) not in json.dumps(results)


def test_evaluate_looks_whether_it_may_write_before_it_measures(model, tmp_path, capfd):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert in_process(command.main, "--model", model, "--output_dir", tmp_path / "file/out") == 2
    stderr = capfd.readouterr().err
    assert "is a file; name a folder" in stderr and "training" not in stderr


@pytest.mark.parametrize("name", command.OUTPUTS)
def test_evaluate_looks_for_what_stands_in_the_way_of_its_files(tmp_path, name, capfd):
    (tmp_path / name).mkdir()
    assert in_process(command.main, "--model", tmp_path, "--output_dir", tmp_path) == 2
    assert f"{name} is a folder, and a file goes there" in capfd.readouterr().err


def test_the_cache_is_of_one_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_folder("a", 10, 0).parent == tmp_path / "ddpm-mnist"
    assert len({cache_folder(*key) for key in (("a", 10, 0), ("b", 10, 0), ("a", 11, 0), ("a", 10, 1))}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--classifier_steps", "1", "--min_classifier_accuracy", "1"],
            "--min_classifier_accuracy 1.0: the classifier is",
        ),
        (["--min_classifier_accuracy", "99"], "--min_classifier_accuracy 99.0: must be at most 1"),
        (["--num_images", "0"], "--num_images 0: must be at least 1"),
        (["--bound_images", "1"], "--bound_images 1: must be 2 or more"),
        (["--num_images", "5"], "--num_images 5: samples, training and test images must be at least 10"),
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001: the model has 1000 timesteps"),
        (["--model", str(ROOT / "configs")], "holds no model_index.json"),
        (["--model", "no/such-model"], "--output_dir: missing"),
        (["--feature_extractor", "inception"], "--feature_extractor inception: not available"),
    ],
)
def test_evaluate_answers_bad_input_in_one_line(model, dataset_dir, tmp_path, options, message, monkeypatch, capfd):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert in_process(command.main, *arguments(model, dataset_dir), *options) == 2
    stderr = capfd.readouterr().err
    assert message in stderr.strip().splitlines()[-1] and "Traceback" not in stderr
    assert not (model / "evaluation.json").exists()
