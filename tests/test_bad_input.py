"""Every bad input: one line on stderr that names option, value and cure, exit code 2, no traceback, nothing written."""

import os

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, blob, make_dataset, python, smoke_args

import train_ddpm_mnist
from ddpm_mnist.options import run_script
from ddpm_mnist.training.config import TrainConfig, parse_args
from ddpm_mnist.training.models import check_models


def answer(args: list[str], capfd) -> tuple[int, str]:
    """Exit code and stderr of the training script, run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    code = run_script(lambda _: train_ddpm_mnist.train(parse_args(args)))
    return code, capfd.readouterr().err


CASES = [
    # options: (arguments, what the line must contain)
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
    (["--timestep_sampling=sobol"], ["--timestep_sampling", "'sobol'"]),
    (["--max_grad_norm=-1"], ["--max_grad_norm -1", "positive"]),
    (["--adam_beta2=1"], ["--adam_beta2 1", "[0, 1)"]),
    (["--ema_max_decay=1.5"], ["--ema_max_decay 1.5", "[0, 1)"]),
    (["--lr_scheduler=cosin"], ["--lr_scheduler", "'cosin'"]),
    (["--lr_warmup_steps=-1"], ["--lr_warmup_steps -1"]),
    (["--mixed_precision=fp8"], ["--mixed_precision", "'fp8'"]),
    (["--mixed_precision=fp16"], ["--mixed_precision fp16", "needs a GPU"]),
    (["--report_to=mlflow"], ["--report_to", "'mlflow'"]),
    (["--report_to=trackio"], ["--report_to trackio", "pip install trackio"]),
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
        ("train_batch_sise: 3\n", ["unknown key train_batch_sise", "did you mean train_batch_size"]),
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


def test_mnist_yaml_states_the_defaults():
    assert parse_args([]) == parse_args(["--config", str(ROOT / "configs/mnist.yaml")]) == TrainConfig()


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-3\nuse_ema: false\nunet: {norm_eps: 1e-6, dropout: 0.2}\n")
    args = ["--config", str(tmp_path / "a.yaml"), "--learning_rate", "5e-4", "--unet.norm_num_groups", "4"]
    config = parse_args([*args, "--unet.block_out_channels=[8, 8, 8, 8]", "--unet.sample_size=32"])
    assert config.learning_rate == 5e-4 and config.use_ema is False
    assert config.unet["norm_eps"] == 1e-6 and config.unet["dropout"] == 0.2 and config.unet["norm_num_groups"] == 4
    assert config.unet["block_out_channels"] == [8, 8, 8, 8]
