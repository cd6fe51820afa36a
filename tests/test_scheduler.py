"""The in-repo scheduler against stock diffusers, bit for bit."""

import diffusers
import pytest
import torch

from ddpm_mnist import DDPMScheduler

BETAS = [
    {},
    {"num_train_timesteps": 1000},
    {"beta_start": 0.002, "beta_end": 0.05},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace"},
    {"trained_betas": torch.linspace(0.001, 0.3, 100).tolist()},
    {"rescale_betas_zero_snr": True},
]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
CLIPS = [
    {},
    {"clip_sample": False},
    {"clip_sample_range": 2.0},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
]


def pair(**config) -> tuple[DDPMScheduler, diffusers.DDPMScheduler]:
    config = {"num_train_timesteps": 100, **config}
    return DDPMScheduler(**config), diffusers.DDPMScheduler(**config)


def draw(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same_trajectory(ours, stock, channels: int = 2, **timesteps) -> None:
    """Every step of a whole sampling loop is the same to the bit, for the same generator."""
    samples = [draw(0, 2, 2, 5, 5)] * 2
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    if timesteps:
        for scheduler in (ours, stock):
            scheduler.set_timesteps(**timesteps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    for i, t in enumerate(stock.timesteps):
        assert int(ours.previous_timestep(t)) == int(stock.previous_timestep(t))
        model_output = draw(i + 2, 2, channels, 5, 5) * 0.7
        steps = [
            scheduler.step(model_output, t, sample, generator=generator)
            for scheduler, sample, generator in zip((ours, stock), samples, generators)
        ]
        for name in ("prev_sample", "pred_original_sample"):
            torch.testing.assert_close(*(step[name] for step in steps), rtol=0, atol=0, equal_nan=True)
        samples = [step.prev_sample for step in steps]


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_schedule_and_forward_process(betas):
    ours, stock = pair(**betas)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(ours, name), getattr(stock, name)), name
    assert len(ours) == len(stock) and ours.init_noise_sigma == stock.init_noise_sigma
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        images, noise = draw(0, 4, 1, 6, 6, dtype=dtype), draw(1, 4, 1, 6, 6, dtype=dtype)
        t = torch.tensor([0, 1, 50, 99])
        assert torch.equal(ours.add_noise(images, noise, t), stock.add_noise(images, noise, t))
        assert torch.equal(ours.get_velocity(images, noise, t), stock.get_velocity(images, noise, t))
        assert ours.scale_model_input(images, 3) is images
    assert_same_trajectory(ours, stock)


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_reverse_process_by_variance_and_prediction(variance_type, prediction_type):
    channels = 4 if variance_type.startswith("learned") else 2
    for clip in CLIPS:
        ours, stock = pair(variance_type=variance_type, prediction_type=prediction_type, **clip)
        if variance_type == "learned":  # takes a square root of the model's output: nan in both for a negative one
            assert_same_trajectory(ours, stock, channels, num_inference_steps=3)
        else:
            assert_same_trajectory(ours, stock, channels)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 7, 33, 99])
def test_timestep_spacings(spacing, offset, steps):
    ours, stock = pair(timestep_spacing=spacing, steps_offset=offset)
    assert_same_trajectory(ours, stock, num_inference_steps=steps)


def test_steps_with_a_list_of_generators_and_as_a_tuple():
    ours, stock = pair()
    results = [
        s.step(draw(0, 2, 1, 4, 4), 5, draw(1, 2, 1, 4, 4), [torch.Generator().manual_seed(i) for i in (3, 4)], False)
        for s in (ours, stock)
    ]
    assert isinstance(results[0], tuple)
    for mine, theirs in zip(*results):
        assert torch.equal(mine, theirs)


def test_configs_are_read_both_ways(tmp_path):
    ours, stock = pair(variance_type="fixed_large", clip_sample=False)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert diffusers.DDPMScheduler.from_pretrained(tmp_path / "ours").config.variance_type == "fixed_large"
    assert DDPMScheduler.from_pretrained(tmp_path / "stock").config.clip_sample is False
    assert diffusers.DDIMScheduler in ours.compatibles
