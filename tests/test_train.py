"""The training script: what a run writes, and the traps that other training scripts have fallen into."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import RECOMMENDED, ROOT, metrics, python, same, smoke_args, weights
from PIL import Image

import train_ddpm_mnist
from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.images.batches import Images, index_batches, scale
from ddpm_mnist.loss import prediction_target
from ddpm_mnist.record import weights_sha256
from ddpm_mnist.training import hardware
from ddpm_mnist.training.checkpoint import load_checkpoint
from ddpm_mnist.training.config import parse_args
from ddpm_mnist.training.run import Run, prepare
from ddpm_mnist.training.validation import held_out_loss, noise_error_weights


def test_a_run_writes_everything(train):
    out = train("run", report_to="tensorboard", checkpoints_total_limit=1)
    assert sorted(metrics(out, "loss")) == [2, 4, 6, 8]
    assert metrics(out, "loss")[8] < metrics(out, "loss")[2]
    for key in ("held_out_raw/loss", "held_out_ema/loss", *(f"held_out_ema/loss_q{q}" for q in (1, 2, 3, 4))):
        assert sorted(metrics(out, key)) == [4, 8]
    assert [p.name for p in sorted((out / "samples").iterdir())] == ["step-000004.png", "step-000008.png"]
    picture = Image.open(out / "samples/step-000008.png")
    assert picture.mode == "L" and picture.size == (2 * 2 * 28, 2 * 2 * 28)
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-8"]
    assert list(out.glob("logs/**/events.out.tfevents*"))
    results = json.loads((out / "train_results.json").read_text())
    assert results["parameters"] == sum(p.numel() for p in UNet2DModel.from_pretrained(out / "unet").parameters())
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pkl")]


def test_saved_settings_give_the_same_run_again_and_another_seed_another(train, tmp_path):
    first = train("first", max_train_steps=4)
    saved = yaml.safe_load((first / "train_config.yaml").read_text())
    assert saved["unet"]["block_out_channels"] == [8, 16] and saved["train_batch_size"] == 16
    for name, more in (("same", []), ("other", ["--seed=1"])):
        args = [f"--config={first / 'train_config.yaml'}", f"--output_dir={tmp_path / name}", *more]
        assert train_ddpm_mnist.train(parse_args(args)) == 0
        assert same(weights(first / "unet"), weights(tmp_path / name / "unet")) == (name == "same")


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"mixed_precision": "bf16", "optimizer": "muon", "train_batch_size": 4, **RECOMMENDED},
        {"unet.dropout": 0.1, "use_ema": False, "guide_scale": 1.5, "guide_weak": 0.5},
        {"unet.num_class_embeds": 11, "class_dropout_prob": 0.1, **RECOMMENDED},
    ],
    ids=str,
)
def test_resume_is_exact(train, tmp_path, extra):
    whole = train("whole", **extra)
    train("parts", checkpointing_steps=3, checkpoints_total_limit=3, **extra)
    parts = tmp_path / "parts"
    for name in ("checkpoint-8", "checkpoint-6"):  # as if it had been killed after step 3 to 5
        for path in sorted((parts / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (parts / name).rmdir()
    train("parts", checkpointing_steps=3, resume_from_checkpoint="latest", **extra)
    assert same(weights(whole / "unet"), weights(parts / "unet"))
    assert same(weights(whole / "checkpoint-8/unet"), weights(parts / "checkpoint-8/unet"))
    for key in ("loss", "lr", "held_out_raw/loss"):
        assert metrics(whole, key) == metrics(parts, key), key
    states = [load_checkpoint(folder / "checkpoint-8", {}, {}) for folder in (whole, parts)]
    assert states[0]["optimizer"]["state"]
    for moments in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert same(*({k: torch.as_tensor(v) for k, v in moment.items()} for moment in moments))


# ---- processes -----------------------------------------------------------------------------------------------------


def test_accelerate_launch(dataset_dir, tmp_path):
    """--cpu --num_processes 2 starts one process, which trains, in the precision that accelerate was told."""
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--cpu"]
    options = {"max_train_steps": 1, "train_batch_size": 1, "validation_steps": 0, "mixed_precision": "auto"}
    args = smoke_args(dataset_dir, tmp_path / "run", **options)
    done = python(*launch, "--mixed_precision", "bf16", "train_ddpm_mnist.py", *args)
    assert done.returncode == 0, done.stderr
    assert "mixed precision bf16" in done.stdout
    assert (tmp_path / "run/model_index.json").exists()


# ---- traps ---------------------------------------------------------------------------------------------------------


def test_in_bf16_the_unet_computes_and_nothing_else(train, monkeypatch):
    """The noise is added in float32, and the weights are kept in it."""
    noised, computed = set(), set()
    add_noise, convolve = DDPMScheduler.add_noise, torch.nn.Conv2d.forward

    def watched_noise(self, original_samples, noise, timesteps):
        noisy = add_noise(self, original_samples, noise, timesteps)
        noised.add((original_samples.dtype, noise.dtype, noisy.dtype, torch.is_autocast_enabled("cpu")))
        return noisy

    def watched_convolution(self, x):
        y = convolve(self, x)
        computed.update([] if y.is_meta else [y.dtype])  # the check of the options is on the meta device
        return y

    monkeypatch.setattr(DDPMScheduler, "add_noise", watched_noise)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched_convolution)
    small = {"train_batch_size": 2, **RECOMMENDED}  # the second of two updates is guided
    out = train("run", mixed_precision="bf16", max_train_steps=2, validation_steps=1, **small)
    assert noised == {(torch.float32,) * 3 + (False,)} and computed == {torch.bfloat16}
    assert all(w.dtype == torch.float32 for w in weights(out / "unet").values())


def test_samples_are_drawn_in_eval_mode_and_training_goes_on_in_train_mode(train, monkeypatch):
    modes = []
    original = UNet2DModel.forward

    def forward(self, sample, timestep, **kwargs):
        modes.extend([] if sample.is_meta else [(self.training, torch.is_grad_enabled())])
        return original(self, sample, timestep, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    train("run", max_train_steps=3, validation_steps=2, **{"unet.dropout": 0.1})
    validation = [i for i, mode in enumerate(modes) if mode == (False, False)]
    assert modes[:2] == [(True, True)] * 2 and validation[0] == 2
    assert set(modes) == {(True, True), (False, False)}
    assert modes.count((True, True)) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_the_scaler_skips_moves_nothing(train, monkeypatch, optimizer):
    """fp16 with its gradient scaler, on a CPU, where Accelerate would refuse it.

    The first scale is so large that gradients overflow until it has been halved enough.
    """
    original = hardware.Accelerator

    def accelerator(**kwargs):
        made = original(**kwargs)
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        made.native_amp, made.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return made

    monkeypatch.setattr(hardware, "Accelerator", accelerator)
    steps = 12
    options = {"max_train_steps": steps, "logging_steps": 1, "optimizer": optimizer, "validation_steps": 0}
    out = train("run", checkpointing_steps=1, checkpoints_total_limit=steps, **options)
    skipped = metrics(out, "skipped")
    first = skipped[steps]  # the number of overflows, all at the start
    assert 0 < first < steps - 1
    assert [skipped[s] for s in range(1, steps + 1)] == [min(s, first) for s in range(1, steps + 1)]
    assert sorted(metrics(out, "loss")) == list(range(int(first) + 1, steps + 1))  # those of the updates that were made
    at = {step: load_checkpoint(out / f"checkpoint-{step}", {}, {}) for step in range(1, steps + 1)}
    assert [int(at[s]["optimizer"]["state"][0]["step"]) for s in at] == [max(0, s - first) for s in at]
    assert same(weights(out / "checkpoint-1/unet"), weights(out / f"checkpoint-{int(first)}/unet"))
    assert not same(weights(out / "checkpoint-1/unet"), weights(out / f"checkpoint-{int(first) + 1}/unet"))
    monkeypatch.undo()
    assert metrics(out, "lr") == metrics(train("plain", **options), "lr")
    assert metrics(out, "loss")[steps] < metrics(out, "loss")[first + 1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_moves_nothing(train, monkeypatch, optimizer):
    """In float32 and bf16 too, where no scaler looks after it; and the run goes on."""
    clip, calls = hardware.Accelerator.clip_grad_norm_, []

    def poisoned(self, parameters, max_norm):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad[0] = float("nan")
        return clip(self, parameters, max_norm)

    monkeypatch.setattr(hardware.Accelerator, "clip_grad_norm_", poisoned)
    out = train("run", logging_steps=1, checkpointing_steps=1, checkpoints_total_limit=9, optimizer=optimizer)
    assert [metrics(out, "skipped")[s] for s in range(1, 9)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert sorted(metrics(out, "loss")) == [1, 2, 4, 5, 6, 7, 8]
    states = [weights(out / f"checkpoint-{step}/unet") for step in range(1, 9)]
    assert [same(a, b) for a, b in zip(states, states[1:])] == [False, True, False, False, False, False, False]


def test_a_run_whose_loss_is_not_finite_stops_in_one_line_without_a_checkpoint(train, tmp_path):
    wild = {"learning_rate": 1e30, "lr_scheduler": "constant", "max_grad_norm": 1e30, "adam_epsilon": 1e-30}
    options = {"adam_beta1": 0, "max_train_steps": 40, "checkpointing_steps": 100, "validation_steps": 0}
    with pytest.raises(ConfigError, match=r"--learning_rate 1e\+30") as error:
        train("run", **wild, **options)
    assert "\n" not in str(error.value) and not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("steps", [50, 1000, 20000])
def test_the_average_spans_a_part_of_the_run_and_forgets_the_start(steps, tiny_dataset_dir, tmp_path):
    """Of the weight given to the steps of a run, hardly any goes to its first half, and half to its last tenth."""
    with prepare(parse_args(smoke_args(tiny_dataset_dir, tmp_path / "run"))) as run:
        decays = [run.ema.get_decay(step) for step in range(1, steps + 1)]
    weight, later = [], 1.0
    for decay in reversed(decays):
        weight.append(later * (1 - decay))
        later *= decay
    assert later == 0  # of the initial weights nothing is left
    assert sum(weight[: steps // 10]) > 0.5
    assert sum(weight[steps // 2 :]) < 0.01


@pytest.mark.parametrize(
    ("options", "count"), [({}, 250), ({"random_flip": True}, 250), ({"reference_images": 0}, 0)], ids=str
)
def test_the_target_is_a_mean_over_references(options, count, tiny_dataset_dir, tmp_path):
    given = {"reference_images": 300, **options}
    with prepare(parse_args(smoke_args(tiny_dataset_dir, tmp_path / "run", **given))) as run:
        run.begin()
        images, labels, timesteps, noise = next(run.batches())
        last = torch.full_like(timesteps, 999)
        target = run.target(run.scheduler.add_noise(images, noise, last), images, noise, last, labels)
    if count == 0:
        assert run.target.references is None and torch.equal(target, noise)
        return
    assert len(run.target.references.images) == count  # no more than the set has
    mean_images = (run.scheduler.add_noise(images, noise, last) - target) / run.scheduler.alphas_cumprod[999].sqrt()
    assert (mean_images - mean_images.mean(0)).abs().max() < 0.2  # at t = 999 nothing tells the images apart
    assert (images - images.mean(0)).abs().max() > 0.2
    known = {image.tobytes() for image in scale(run.data.train.images).numpy()}
    unknown = [image for image in run.target.references.images if image.numpy().tobytes() not in known]
    assert bool(unknown) == bool(options.get("random_flip"))
    assert all(image.flip(-1).numpy().tobytes() in known for image in unknown)


def test_references_are_drawn_anew_every_ten_updates_and_allow_one_class(dataset_dir, tmp_path):
    options = {"unet.num_class_embeds": 11, "class_dropout_prob": 0.1, "reference_images": 50}
    with prepare(parse_args(smoke_args(dataset_dir, tmp_path / "run", **options))) as run:
        references, seen = run.target.references, []
        for step in (0, 9, 10, 11):
            references.draw(step)
            seen.append(references.images)
        references.images = None  # as after a resume
        references.draw(9)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    assert torch.equal(references.images, seen[0]) and seen[0].shape == (50, 1, 28, 28)
    same = references.same_class(torch.tensor([7, 10]))  # 10: a dropped label, to which all images may belong
    assert torch.equal(same[0], references.labels == 7) and same[1].all() and not same[0].all()


def test_flips_mirror_about_half_of_the_images(dataset_dir, tmp_path):
    options = {"random_flip": True, "train_batch_size": 64}
    with prepare(parse_args(smoke_args(dataset_dir, tmp_path / "run", **options))) as run:
        run.begin()
        images = next(run.batches())[0]
        plain = next(run.data.train.batches(index_batches(len(run.data.train), 0, 0, 64)))[0]
    kept, mirrored = ((images == x).flatten(1).all(1) for x in (plain, plain.flip(-1)))
    assert (kept | mirrored).all() and 16 < (~kept).sum() < 48


def test_a_schedule_that_ends_in_pure_noise_trains(train):
    out = train("run", optimizer="muon", **RECOMMENDED | {"scheduler.rescale_betas_zero_snr": True})
    assert all(map(math.isfinite, [*metrics(out, "loss").values(), *metrics(out, "held_out_ema/loss").values()]))


def test_a_process_without_held_out_images_takes_part():
    unet = UNet2DModel(**parse_args(["--config", str(ROOT / "configs/smoke.yaml"), "--unet.in_channels=1"]).unet)
    one = Images(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    shares = []
    accelerator = SimpleNamespace(num_processes=3, device="cpu", reduce=lambda sums, _: shares.append(sums) or sums + 1)
    for accelerator.process_index in range(3):
        held_out_loss(unet, DDPMScheduler(), one, accelerator)
    assert [share[1].sum().item() for share in shares] == [1, 0, 0]


def test_gradients_that_are_not_finite_are_dropped_where_fused_adamw_does_not_skip():
    """MPS, simulated: PyTorch's fused AdamW does not look at found_inf there."""
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(parameters))
    clip = SimpleNamespace(sync_gradients=True, scaler=None, clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
    run = SimpleNamespace(accelerator=clip, optimizer=optimizer, config=SimpleNamespace(max_grad_norm=1.0))
    run.unet = SimpleNamespace(parameters=lambda: parameters)
    for device, value, dropped in (("mps", 1.0, False), ("mps", math.nan, True), ("cpu", math.nan, False)):
        parameters[0].grad, clip.device = torch.full((2,), value), torch.device(device)
        Run.clip_gradients(run)
        assert (parameters[0].grad is None) == dropped


def test_an_earlier_checkpoint_is_exported_and_the_log_of_what_came_after_stays(train):
    out = train("run", max_train_steps=8, checkpointing_steps=4)
    log, before = metrics(out, "loss"), json.loads((out / "train_results.json").read_text())
    train("run", max_train_steps=4, resume_from_checkpoint=out / "checkpoint-4")
    after = json.loads((out / "train_results.json").read_text())
    assert metrics(out, "loss") == log and (out / "checkpoint-8").is_dir()
    assert same(weights(out / "unet"), weights(out / "checkpoint-4/unet_ema"))
    assert after["weights_sha256"] == weights_sha256(out) != before["weights_sha256"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_held_out_error_is_that_of_the_noise_whatever_the_network_outputs(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    timesteps = torch.tensor([0, 100, 300, 999])
    images, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    target = prediction_target(scheduler, images, noise, timesteps)
    output = target + 0.1 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    noisy, alpha_prod = scheduler.add_noise(images, noise, timesteps), scheduler.alphas_cumprod.double()[timesteps]
    alpha_prod = alpha_prod[:, None, None, None]
    x0 = scheduler.predict_original_sample(output, alpha_prod, noisy)
    predicted_noise = (noisy - alpha_prod.sqrt() * x0) / (1 - alpha_prod).sqrt()  # eq. 4
    weighted = noise_error_weights(scheduler, timesteps) * (output - target) ** 2
    torch.testing.assert_close(weighted, (predicted_noise - noise) ** 2, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("timesteps", [1000, 50])
def test_a_schedule_that_does_not_end_in_noise_is_warned_of(timesteps, dataset_dir, tmp_path, capsys):
    args = smoke_args(dataset_dir, tmp_path / "run", **{"scheduler.num_train_timesteps": timesteps})
    with prepare(parse_args(args)) as run:
        run.begin()
    warned = "x_T still holds 78% of x_0, but sampling starts from pure noise; raise" in capsys.readouterr().out
    assert warned == (timesteps == 50)


def test_the_first_grid_comes_at_update_100_and_the_last_line_says_what_to_do_next(train, capsys):
    out = train("run", max_train_steps=101, validation_steps=1000, train_batch_size=2, logging_steps=100)
    assert [p.name for p in sorted((out / "samples").iterdir())] == ["step-000100.png", "step-000101.png"]
    lines = capsys.readouterr().out.splitlines()
    assert f"First samples: {out / 'samples/step-000100.png'}" in lines
    last = lines[-1]
    assert "step-000101.png" in last and f"python generate.py --model {out}" in last and "Trained on " in last


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [({"TORCHELASTIC_RUN_ID": "x"}, "all"), ({"ACCELERATE_DYNAMO_MODE": "default"}, "all"), ({}, None)]
    + [({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": odd}, "all") for odd in ("x", "0", "-1")]
    + [({"ACCELERATE_MIXED_PRECISION": "bf16"}, None)],  # a user may set that
)
def test_one_thread_is_overruled_only_if_a_launcher_set_it(monkeypatch, launcher, threads):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())  # other tests keep their kernels
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace())
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"OMP_NUM_THREADS": "1", **launcher}.items():
        monkeypatch.setenv(name, value)
    hardware.use_hardware(SimpleNamespace(device=torch.device("cpu")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert asked == ([cores] if threads else [])


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    show = "import os, ddpm_mnist; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    given = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for environment, policy in ((given, "PASSIVE 10000"), (given | {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")):
        command = [sys.executable, "-c", show]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == policy


def test_a_compiled_run_compiles_once_and_has_the_same_loss_and_names(dataset_dir, tmp_path, train):
    args = smoke_args(dataset_dir, tmp_path / "compiled", logging_steps=1, validation_steps=0)
    logs = {"TORCH_LOGS": "recompiles,graph_breaks,graph_code", "ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}
    done = python("train_ddpm_mnist.py", *args, **logs)
    assert done.returncode == 0, done.stderr
    assert "__graph_code" in done.stderr  # it was compiled
    assert "Recompiling" not in done.stderr and "Graph break" not in done.stderr
    eager = train("eager", logging_steps=1, validation_steps=0)
    assert metrics(tmp_path / "compiled", "loss") == pytest.approx(metrics(eager, "loss"), rel=1e-3)
    for name in ("unet", "checkpoint-8/unet", "checkpoint-8/unet_ema"):
        assert weights(tmp_path / "compiled" / name).keys() == weights(eager / name).keys()


def test_the_logged_loss_is_the_mean_since_the_last_log(train):
    each = metrics(train("each", logging_steps=1, validation_steps=0), "loss")
    mean = metrics(train("mean", logging_steps=4, validation_steps=0), "loss")
    assert mean == pytest.approx({4: sum(each[s] for s in (1, 2, 3, 4)) / 4, 8: sum(each[s] for s in (5, 6, 7, 8)) / 4})
