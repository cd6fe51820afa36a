"""Every bad input: one line on stderr that names option, value and cure, exit code 2, no traceback, nothing written."""

import json
import os
import random

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, blob, make_dataset, python, smoke_args

import train_ddpm_mnist
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.options import options_of, run_script
from ddpm_mnist.training.config import TrainConfig, parse_args
from ddpm_mnist.training.models import check_models


def answer(args: list[str], capfd) -> tuple[int, str]:
    """Exit code and stderr of the training script, run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    code = run_script(lambda _: train_ddpm_mnist.train(parse_args(args)))
    return code, capfd.readouterr().err


CASES = [
    # options: (arguments, what the line must contain)
    (["--output_dir="], ["--output_dir: is empty"]),
    (["--dataset_name="], ["--dataset_name: is empty", "leave it out"]),
    (["--resume_from_checkpoint="], ["--resume_from_checkpoint: is empty"]),
    (["--train_batch_sise=3"], ["--train_batch_sise", "did you mean --train_batch_size"]),
    (["--train_batch_size=many"], ["--train_batch_size", "'many'"]),
    (["--train_batch_size=0"], ["--train_batch_size 0", "at least 1"]),
    (["--train_batch_size=-4"], ["--train_batch_size -4", "at least 1"]),
    (["--max_train_steps=0"], ["--max_train_steps 0", "at least 1"]),
    (["--max_train_steps=-1"], ["--max_train_steps -1", "at least 1"]),
    (["--gradient_accumulation_steps=0"], ["--gradient_accumulation_steps 0"]),
    (["--num_train_epochs=0"], ["--num_train_epochs 0"]),
    (["--checkpointing_steps=0"], ["--checkpointing_steps 0"]),
    (["--checkpoints_total_limit=0"], ["--checkpoints_total_limit 0"]),
    (["--learning_rate=0"], ["--learning_rate 0", "positive"]),
    (["--learning_rate=nan"], ["--learning_rate nan", "positive"]),
    (["--snr_gamma=0"], ["--snr_gamma 0", "positive"]),
    (["--uniform_timesteps=0.5", "--log_snr_mean=20", "--log_snr_std=0.2"], ["--log_snr_mean 20.0", "no timestep"]),
    (["--scheduler.rescale_betas_zero_snr=true"], ["scheduler.prediction_type epsilon", "use v_prediction"]),
    (
        [
            "--scheduler.rescale_betas_zero_snr=true",
            "--scheduler.prediction_type=v_prediction",
            "--loss_weighting=noise",
        ],
        ["--loss_weighting noise", "--loss_weighting output"],
    ),
    (["--uniform_timesteps=1.5"], ["--uniform_timesteps 1.5", "at most 1"]),
    (["--log_snr_mean=nan"], ["--log_snr_mean nan", "at most 20"]),
    (["--log_snr_std=0"], ["--log_snr_std 0", "positive"]),
    (["--timestep_sampling=sobol"], ["--timestep_sampling", "'sobol'"]),
    (["--max_grad_norm=-1"], ["--max_grad_norm -1", "positive"]),
    (["--adam_beta2=1"], ["--adam_beta2 1", "[0, 1)"]),
    (["--ema_max_decay=1.5"], ["--ema_max_decay 1.5", "[0, 1)"]),
    (["--lr_scheduler=cosin"], ["--lr_scheduler", "'cosin'"]),
    (["--lr_warmup_steps=-1"], ["--lr_warmup_steps -1"]),
    (["--mixed_precision=fp8"], ["--mixed_precision", "'fp8'"]),
    (["--mixed_precision=fp16"], ["--mixed_precision fp16", "needs a GPU"]),
    (["--report_to=mlflow"], ["--report_to", "'mlflow'"]),
    (["--use_ema=perhaps"], ["--use_ema", "perhaps"]),
    (["--seed=-1"], ["--seed -1"]),
    (["--config=no/such.yaml"], ["--config no/such.yaml", "no such file"]),
    # the model
    (["--unet.block_out_chanels=[8,16]"], ["unet.block_out_chanels", "did you mean block_out_channels"]),
    (["--unet.norm_num_groups=5"], ["unet.norm_num_groups=5", "[8, 16]"]),
    (["--unet.down_block_types=[DownBlock2D]"], ["unet.down_block_types", "block_out_channels"]),
    (["--unet.down_block_types=[DownBlock2D,DownBlok2D]"], ["unet.down_block_types", "DownBlok2D"]),
    (["--unet.sample_size=29"], ["unet.sample_size 29", "multiple of 2"]),
    (["--unet.sample_size=0"], ["unet.sample_size 0"]),
    (["--unet.in_channels=2"], ["unet.in_channels 2", "grayscale"]),
    (["--unet.layers_per_block=0"], ["unet.layers_per_block=0"]),
    (["--unet.attention_head_dim=99"], ["unet.attention_head_dim=99"]),
    (["--unet.class_embed_type=timestep"], ["unet.class_embed_type", "timestep"]),
    (["--unet.layers_per_block"], ["--unet.layers_per_block", "needs a value"]),
    (["--scheduler.beta_schedul=linear"], ["scheduler.beta_schedul", "did you mean beta_schedule"]),
    (["--scheduler.beta_schedule=cosine"], ["scheduler.beta_schedule='cosine'", "squaredcos_cap_v2"]),
    (["--scheduler.beta_end=1.5"], ["scheduler.beta_start, beta_end"]),
    (["--scheduler.variance_type=learned"], ["scheduler.variance_type"]),
    (["--scheduler.num_train_timesteps=3"], ["--ddpm_num_inference_steps 4", "only 3"]),
    # data
    (["--dataset_name=./no/such/folder"], ["--dataset_name ./no/such/folder", "no such folder"]),
    (["--dataset_name=someone/unknown"], ["--dataset_name someone/unknown", "local folder"]),
    (["--image_column=picture"], ["--image_column picture", "image"]),
    (["--label_column=digit"], ["--label_column digit", "label"]),
    (["--unet.num_class_embeds=4"], ["raise unet.num_class_embeds", "0 to 9"]),
    (["--unet.num_class_embeds=10", "--class_dropout_prob=0.1"], ["raise unet.num_class_embeds", "0 to 8"]),
    (["--class_dropout_prob=0.1"], ["--class_dropout_prob 0.1", "unet.num_class_embeds"]),
    # hub
    (["--push_to_hub"], ["--hub_model_id: missing"]),
    (["--push_to_hub", "--hub_model_id=a/b/c"], ["--hub_model_id a/b/c", "USER/NAME"]),
    (["--push_to_hub", "--hub_model_id=a/b", "--token_file=no/such"], ["--token_file no/such", "cannot be read"]),
    (["--dataset_config_name=other"], ["--dataset_name", "other"]),
    # checkpoints
    (["--resume_from_checkpoint=no/such/folder"], ["--resume_from_checkpoint no/such/folder", "no such folder"]),
    (["--resume_from_checkpoint=latest", "--overwrite_output_dir=true"], ["--overwrite_output_dir", "one of them"]),
]


@pytest.mark.parametrize(("args", "parts"), CASES, ids=lambda case: " ".join(case) if case[0][:2] == "--" else "")
def test_bad_option(args, parts, dataset_dir, tmp_path, capfd):
    code, stderr = answer(smoke_args(dataset_dir, tmp_path / "out") + args, capfd)
    lines = stderr.strip().splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train_batch_size: [", ["cannot be read as YAML"]),
        ("- a\n- b\n", ["must hold `option: value` lines"]),
        ("", ["must hold `option: value` lines"]),
        ("train_batch_sise: 3\n", ["unknown key 'train_batch_sise'", "did you mean train_batch_size"]),
        ("unet: 3\n", ["unet must hold"]),
        ("unet: {layers: 2}\n", ["unet.layers", "did you mean layers_per_block"]),
        ("learning_rate: fast\n", ["--learning_rate", "fast"]),
        ("\xff\xfe", ["cannot be read as YAML"]),
    ],
)
def test_bad_file(text, parts, dataset_dir, tmp_path, capfd):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    code, stderr = answer(["--config", str(tmp_path / "bad.yaml"), "--output_dir", str(tmp_path / "out")], capfd)
    assert code == 2 and len(stderr.strip().splitlines()) == 1
    assert all(part in stderr for part in parts), stderr
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file_or_below_one(dataset_dir, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        code, stderr = answer(smoke_args(dataset_dir, output), capfd)
        assert code == 2 and "is a file; name a folder" in stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_output_dir_with_something_in_it(dataset_dir, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    for extra in ([], ["--resume_from_checkpoint=latest"]):
        code, stderr = answer(smoke_args(dataset_dir, tmp_path / "out") + extra, capfd)
        assert code == 2 and "--overwrite_output_dir" in stderr
        assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_overwriting_deletes_only_what_a_run_writes(train, tmp_path):
    out = train("run", max_train_steps=4)
    (out / "thesis.txt").write_text("mine")
    train("run", max_train_steps=2, overwrite_output_dir="true")
    assert (out / "thesis.txt").read_text() == "mine"
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_set_with_no_images_to_train_on(rows, tmp_path, capfd):
    (tmp_path / "set").mkdir()
    make_dataset([blob(i) for i in range(rows)], [0] * rows).to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    code, stderr = answer(smoke_args(str(tmp_path / "set"), tmp_path / "out"), capfd)
    assert code == 2 and stderr.count("\n") == 1 and "--dataset_name" in stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_no_data(tmp_path, capfd):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/readme.txt").write_text("nothing here")
    code, stderr = answer(smoke_args(str(tmp_path / "set"), tmp_path / "out"), capfd)
    assert code == 2 and "--dataset_name" in stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"unet.layers_per_block": 2}, "unet.layers_per_block = 1, this run has 2"),
        ({"scheduler.num_train_timesteps": 500}, "scheduler.num_train_timesteps = 1000, this run has 500"),
        ({"seed": 5}, "seed = 0, this run has 5"),
        ({"learning_rate": 0.5}, "learning_rate = 0.001, this run has 0.5"),
        ({"mixed_precision": "bf16"}, "mixed precision = no, this run has bf16"),
        ({"train_batch_size": 8}, "global batch = 16, this run has 8"),
        ({"unet.sample_size": 14}, "unet.sample_size = 28, this run has 14"),
    ],
)
def test_another_run_cannot_go_on_from_a_checkpoint(change, part, train, dataset_dir, tmp_path, capfd):
    out = train("run", max_train_steps=1, validation_steps=0)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capfd.readouterr()
    code, stderr = answer(smoke_args(dataset_dir, out, resume_from_checkpoint="latest", **change), capfd)
    assert code == 2 and part in stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_the_process_exits_with_2_and_debug_shows_the_traceback(tmp_path):
    args = ["train_ddpm_mnist.py", "--train_batch_size", "0"]
    done = python(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: --train_batch_size 0: must be at least 1"
    done = python(*args, "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_every_shipped_config_is_valid():
    names = [p.name for p in (ROOT / "configs").glob("*.yaml")]
    assert {"mnist.yaml", "smoke.yaml", "mnist_large.yaml"} <= set(names)
    for name in names:
        check_models(parse_args(["--config", str(ROOT / "configs" / name)]))


def test_null_in_a_section_is_the_default(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "unet: {block_out_channels: null}\nscheduler: {beta_start: null}", encoding="utf-8"
    )
    assert parse_args([f"--config={tmp_path / 'a.yaml'}", "--unet.norm_num_groups=null"]) == TrainConfig()


def test_paper_yaml_is_algorithm_1_to_the_letter():
    config = parse_args(["--config", str(ROOT / "configs/paper.yaml")])
    assert config.scheduler["prediction_type"] == "epsilon" and config.uniform_timesteps == 1
    assert (config.timestep_sampling, config.optimizer, config.snr_gamma) == ("uniform", "adamw", None)
    assert config.unet == TrainConfig().unet and config.max_train_steps == TrainConfig().max_train_steps


def test_mnist_yaml_states_the_defaults():
    assert parse_args([]) == parse_args(["--config", str(ROOT / "configs/mnist.yaml")]) == TrainConfig()


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-3\nuse_ema: false\nunet: {norm_eps: 1e-6, dropout: 0.2}\n")
    args = ["--config", str(tmp_path / "a.yaml"), "--learning_rate", "5e-4", "--unet.norm_num_groups", "4"]
    config = parse_args([*args, "--unet.block_out_channels=[8, 8, 8, 8]", "--unet.sample_size=32"])
    assert config.learning_rate == 5e-4 and config.use_ema is False
    assert config.unet["norm_eps"] == 1e-6 and config.unet["dropout"] == 0.2 and config.unet["norm_num_groups"] == 4
    assert config.unet["block_out_channels"] == [8, 8, 8, 8]


# ---- files of options ----------------------------------------------------------------------------------------------


def parsed(tmp_path, text: str) -> TrainConfig:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return parse_args(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("name", [option.name for option in options_of(TrainConfig)])
def test_null_means_the_default_unless_the_type_allows_none(tmp_path, name):
    value = getattr(TrainConfig(), name)
    if name == "max_train_steps":  # None is allowed, and then the run has no length
        with pytest.raises(ConfigError, match="--max_train_steps: missing"):
            parsed(tmp_path, f"{name}: null\n")
        return
    allowed = name == "checkpoints_total_limit"  # None keeps all
    assert getattr(parsed(tmp_path, f"{name}: null\n"), name) == (None if allowed else value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("train_batch_size: 32.0", "train_batch_size", 32),
        ("seed: '7'", "seed", 7),
        ("use_ema: no", "use_ema", False),
        ("use_ema: 'false'", "use_ema", False),
        ("dataset_config_name: 3", "dataset_config_name", "3"),
        ("num_train_epochs: 2", "max_train_steps", None),
    ],
)
def test_values_are_taken_for_what_they_are(tmp_path, line, name, value):
    found = getattr(parsed(tmp_path, line + "\n"), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("train_batch_size: 3.5", "--train_batch_size 3.5: must be int"),
        ("train_batch_size: true", "--train_batch_size True: must be int"),
        ("train_batch_size: [3]", "--train_batch_size"),
        ("train_batch_size: .nan", "--train_batch_size nan: must be int"),
        ("learning_rate: .inf", "--learning_rate inf"),
        ("learning_rate: {a: 1}", "--learning_rate"),
        ("use_ema: 3", "--use_ema 3: must be bool"),
        ("mixed_precision: yes", "choose from auto, no, fp16, bf16"),
        ("optimizer: sgd", "choose from adamw, muon"),
        ("output_dir: [a]", "--output_dir"),
        ("output_dir: 2020-01-01", "--output_dir"),
        ("seed: 99999999999999999999", "--seed 99999999999999999999: must be at most"),
        ("1: 2", "unknown key '1'"),
        ("unet: {1: 2}", "unet.1: unknown key"),
        ("unet: {layers_per_block: 99999999}", "unet.layers_per_block 99999999: must be at most 64"),
        ("unet: {block_out_channels: many}", "unet."),
        ("unet: {num_class_embeds: ten}", "unet."),
        ("scheduler: {num_train_timesteps: 1e12}", "scheduler.num_train_timesteps"),
        ("scheduler: {beta_start: small}", "scheduler."),
        ("class_dropout_prob: 0.1", "--class_dropout_prob 0.1"),
        ("resolution: 32\nunet: {sample_size: 16}", "--resolution 32: unet.sample_size is 16"),
    ],
)
def test_values_that_cannot_be_right_are_named(tmp_path, line, part):
    with pytest.raises(ConfigError) as error:
        check_models(parsed(tmp_path, line + "\n"))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_resolution_is_the_size_of_the_unet():
    assert parse_args(["--resolution=32"]).unet["sample_size"] == 32
    assert parse_args(["--resolution", "32", "--unet.sample_size=32"]).unet["sample_size"] == 32


@pytest.mark.parametrize("seed", range(1))
def test_any_text_is_a_config_or_one_line(tmp_path, seed):
    """Characters flipped, dropped, doubled, lines swapped: 100 mutations of each config. Never another error."""
    chance, valid = random.Random(seed), 0
    for path in (ROOT / "configs").glob("*.yaml"):
        for _ in range(100):
            text = list(path.read_text(encoding="utf-8"))
            for _ in range(chance.randint(1, 5)):
                place = chance.randrange(len(text))
                what = chance.choice(("", text[place] * 2, chance.choice("0123456789.-:[]{}#&*!|>'\"%@\t\n ~aé\x00")))
                text[place] = what
            try:
                check_models(parsed(tmp_path, "".join(text)))
                valid += 1
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, error
    assert valid > 20


# ---- files of a run ------------------------------------------------------------------------------------------------


def test_a_bad_line_in_the_log_of_a_run_is_passed_over(train):
    out = train("run", max_train_steps=4, validation_steps=0)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('not json\n[1]\n{"loss": 3}\n{"step": 4, "lo')
    resumed = train("run", max_train_steps=6, validation_steps=0, resume_from_checkpoint="latest")
    lines = (resumed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_a_disk_that_is_full_at_the_export_is_said(train, tmp_path, monkeypatch):
    import diffusers
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(diffusers.DDPMPipeline, "save_pretrained", full)
    with pytest.raises(ConfigError, match="No space left.*--resume_from_checkpoint latest.*checkpoint-8"):
        train("run", validation_steps=0)
    monkeypatch.undo()
    assert (train("run", validation_steps=0, resume_from_checkpoint="latest") / "model_index.json").exists()


def test_an_error_of_the_system_is_one_line_too(capsys):
    def main(arguments):
        try:
            raise PermissionError(13, "Permission denied", "/somewhere")
        except OSError as error:
            raise OSError("while doing a thing") from error

    assert run_script(main) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/somewhere'; --debug shows where\n"


@pytest.mark.parametrize("name", ["state.pt", "unet/diffusion_pytorch_model.safetensors"])
def test_a_checkpoint_whose_manifest_fits_garbage_is_one_line(train, name, capfd):
    """As a hostile or a broken tool might leave it: the manifest is made anew after the damage."""
    from ddpm_mnist.training.checkpoint import sha256

    out = train("run", max_train_steps=1, validation_steps=0)
    path, manifest = out / "checkpoint-1" / name, out / "checkpoint-1/manifest.json"
    path.write_bytes(b"garbage")
    listed = json.loads(manifest.read_text(encoding="utf-8"))
    listed["files"][name] = {"size": 7, "sha256": sha256(path)}
    manifest.write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(ConfigError, match="--resume_from_checkpoint .*cannot be read"):
        train("run", max_train_steps=2, validation_steps=0, resume_from_checkpoint="latest")
