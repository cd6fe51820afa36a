"""Bad input: one line on stderr that names the option, the value and what to do; exit code 2; nothing is written."""

import math
import os
import random
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, blob, make_dataset, python, reset_accelerate, smoke_args

import evaluate
import train_ddpm_mnist
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.options import ELSEWHERE, options_of, read_options, run_script
from ddpm_mnist.training.build import check_models
from ddpm_mnist.training.config import PAPER, TrainConfig, parse_args
from evaluate import EvaluateConfig
from generate import GenerateConfig
from push_to_hub import PushConfig

READERS = {
    TrainConfig: parse_args,
    EvaluateConfig: evaluate.parse_args,
    GenerateConfig: lambda arguments: read_options(GenerateConfig, arguments, ""),
    PushConfig: lambda arguments: read_options(PushConfig, arguments, ""),
}


def answer(args: list[str], capfd) -> tuple[int, str]:
    """Exit code and stderr of the training script, run in this process."""
    reset_accelerate()
    code = run_script(lambda _: train_ddpm_mnist.train(parse_args(args)))
    return code, capfd.readouterr().err


def outside(option) -> list[float]:
    """Values just outside what the rules of an option allow."""
    rules, margin = option.metadata, 1 if option.type in (int, int | None) else 1e-9
    values = [0.0, math.inf, math.nan] if rules["positive"] else [-1e-9, 1.0, math.nan] if rules["fraction"] else []
    if rules["at_least"] is not None:
        values.append(rules["at_least"] - margin)
    if rules["at_most"] is not None:
        values.append(rules["at_most"] + margin)
    return values


OUTSIDE = [(cls, option.name, value) for cls in READERS for option in options_of(cls) for value in outside(option)]


@pytest.mark.parametrize(("cls", "name", "value"), OUTSIDE)
def test_a_value_just_outside_the_rules(cls, name, value, capsys):
    assert run_script(lambda _: READERS[cls]([f"--{name}={value}"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --{name} {value}: must ")


CASES = [  # (arguments, parts of the line)
    # options
    (["--output_dir="], ["--output_dir: is empty", "or omit it"]),
    (["--train_batch_sise=3"], ["--train_batch_sise", "did you mean --train_batch_size"]),
    (["--train_batch_size=many"], ["--train_batch_size", "'many'"]),
    (["--lr_scheduler=cosin"], ["--lr_scheduler", "'cosin'"]),
    (["--use_ema=perhaps"], ["--use_ema", "perhaps"]),
    (["--mixed_precision=fp16"], ["--mixed_precision fp16", "needs a GPU"]),
    (["--dataloader_num_workers=1000000"], ["--dataloader_num_workers", "256"]),
    (["--config", ""], ["--config: is empty", "a variable that is not set"]),
    (["--unet.sample_size="], ["--unet.sample_size: is empty", "null is the default"]),
    (["--config=no-such.yaml"], ["--config no-such.yaml", "no such file"]),
    # the model
    (["--unet.block_out_chanels=[8,16]"], ["unet.block_out_chanels", "did you mean block_out_channels"]),
    (["--unet.norm_num_groups=5"], ["unet: norm_num_groups=5", "[8, 16]"]),
    (["--unet.down_block_types=[DownBlock2D]"], ["unet: ", "`down_block_types`: ['DownBlock2D']", "same number"]),
    (["--unet.block_out_channels=[8]"], ["unet: ", "`block_out_channels`: [8]", "same number"]),
    (["--unet.down_block_types=[DownBlock2D,DownBlok2D]"], ["unet.down_block_types", "DownBlok2D"]),
    (["--unet.sample_size=29"], ["unet.sample_size 29", "multiple of 2"]),
    (["--unet.sample_size=0"], ["unet.sample_size 0"]),
    (["--unet.in_channels=2"], ["unet.in_channels 2", "grayscale"]),
    (["--unet.layers_per_block=0"], ["unet.layers_per_block 0: must be at least 1"]),
    (["--unet.attention_head_dim=99"], ["unet: attention_head_dim=99"]),
    (["--unet.act_fn=tanh"], ["unet: activation function tanh", "gelu"]),
    (["--unet.downsample_type=fir"], ["unet.downsample_type fir", "resnet"]),
    (["--unet.mid_block_type=other"], ["unet.mid_block_type other", "UNetMidBlock2D"]),
    (["--unet.resnet_time_scale_shift=spatial"], ["unet.resnet_time_scale_shift spatial", "scale_shift"]),
    (["--unet.time_embedding_type=fourier"], ["unet.time_embedding_type fourier", "choose from positional"]),
    (["--unet.class_embed_type=timestep"], ["unet.class_embed_type", "timestep"]),
    (["--unet.layers_per_block"], ["--unet.layers_per_block", "needs a value"]),
    (["--scheduler.clip_sample", "--seed=3"], ["--scheduler.clip_sample", "needs a value"]),
    (["--scheduler.clip_sample=flase"], ["scheduler.clip_sample flase: must be true or false"]),
    (["--scheduler.clip_sample_range=two"], ["unet, scheduler: these settings cannot draw (bad operand"]),
    (["--scheduler.steps_offset=300"], ["cannot draw (index", "out of bounds"]),
    (["--unet.downsample_padding=2", "--unet.sample_size=28"], ["cannot draw (Sizes of tensors must match"]),
    (["--unet.norm_eps=x"], ["cannot draw (group_norm"]),
    (["--unet.dropout", "[1"], ["--unet.dropout [1: cannot be read"]),
    (["--scheduler.beta_schedule=cosine"], ["scheduler.beta_schedule cosine", "squaredcos_cap_v2"]),
    (["--scheduler.beta_end=1.5"], ["scheduler.beta_start, beta_end"]),
    (["--scheduler.variance_type=learned"], ["scheduler.variance_type learned", "fixed_large"]),
    (["--scheduler.prediction_type=v"], ["scheduler: prediction_type='v'", "v_prediction"]),
    (["--scheduler.timestep_spacing=even"], ["scheduler.timestep_spacing even", "trailing"]),
    (["--scheduler.num_train_timesteps=3"], ["--ddpm_num_inference_steps 4", "only 3"]),
    (["--scheduler.trained_betas=[0.1, 0.2]"], ["scheduler.trained_betas", "2 values"]),
    (["--scheduler.rescale_betas_zero_snr=true"], ["scheduler.prediction_type epsilon", "use v_prediction"]),
    (["--scheduler.trained_betas=[.nan]", "--scheduler.num_train_timesteps=1"], ["scheduler.trained_betas: every"]),
    (["--scheduler.beta_start=1e-9"], ["scheduler.beta_start", "no noise in float32", "raise it"]),
    # data
    (["--dataset_name=./no/such/folder"], ["--dataset_name ./no/such/folder", "no such path"]),
    (["--dataset_name=someone/unknown"], ["--dataset_name someone/unknown", "local folder"]),
    (["--dataset_config_name=other"], ["--dataset_name", "other"]),
    (["--unet.num_class_embeds=0"], ["unet.num_class_embeds 0: must be at least 1"]),
    (
        ["--unet.num_class_embeds=10", "--class_dropout_prob=0.1"],
        ["--label_column label", "not a class number below 9 (unet.num_class_embeds)"],
    ),
    # the Hub and checkpoints
    (["--push_to_hub"], ["--hub_model_id: missing"]),
    (["--push_to_hub", "--hub_model_id=a/b/c"], ["--hub_model_id a/b/c", "USER/NAME"]),
    (["--push_to_hub", "--hub_model_id=a/b"], ["no token", "HF_TOKEN"]),
    (["--resume_from_checkpoint=no/such/folder"], ["--resume_from_checkpoint no/such/folder", "no such folder"]),
    (["--resume_from_checkpoint=latest", "--overwrite_output_dir=true"], ["--overwrite_output_dir", "one of them"]),
]


@pytest.mark.parametrize(("args", "parts"), CASES, ids=[" ".join(args) for args, _ in CASES])
def test_bad_option(args, parts, dataset_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("ddpm_mnist.hub.repo.get_token", lambda: None)  # whoever runs the tests may be logged in
    code, stderr = answer(smoke_args(dataset_dir, tmp_path / "out") + args, capfd)
    lines = stderr.strip().splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert not (tmp_path / "out").exists()


def test_the_process_exits_with_2_and_debug_shows_the_traceback():
    args = ["train_ddpm_mnist.py", "--train_batch_size", "0"]
    done = python(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: --train_batch_size 0: must be at least 1"
    done = python(*args, "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_an_error_of_the_system_is_one_line_too(capsys):
    def main(arguments):
        raise OSError("while doing a thing") from PermissionError(13, "Permission denied", "/somewhere")

    assert run_script(main) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/somewhere'; --debug shows where\n"


@pytest.mark.parametrize(
    "error",
    [MemoryError("cannot allocate"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]
    + [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line_that_names_the_batch(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train"])

    def main(arguments):
        raise error

    assert run_script(main) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "--train_batch_size (and raise --gradient_accumulation_steps)" in stderr
    with pytest.raises(RuntimeError, match="of ours"):
        run_script(lambda arguments: (_ for _ in ()).throw(RuntimeError("a bug of ours")))


def test_a_run_that_failed_before_its_first_update_does_not_stand_in_the_way(train, tmp_path):
    (tmp_path / "run/logs").mkdir(parents=True)
    for name in ("train_config.yaml", "metrics.jsonl", ".lock"):
        (tmp_path / "run" / name).touch()
    train("run", max_train_steps=1, validation_steps=0)
    with pytest.raises(ConfigError, match="is not empty"):
        train("run", max_train_steps=1, validation_steps=0)


@pytest.mark.parametrize(
    ("given", "use"),
    [(given, f"use {use}") for given, use in ELSEWHERE.items()]
    + [("--prediction_type", "use --scheduler.prediction_type"), ("--block_out_channels", "use --unet.block_out_")]
    + [("--cooking_time", "known: ")],
)
def test_names_of_other_training_scripts_lead_to_ours(given, use):
    with pytest.raises(ConfigError, match=f"^{given}: no such option; {re.escape(use)}"):
        parse_args([given, "x"])


def test_an_output_dir_that_is_a_file_is_below_one_or_holds_files(dataset_dir, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    for output, more, part in (
        ("file", [], "is a file; name a folder"),
        ("file/below", [], "is a file; name a folder"),
        ("out", [], "is not empty, and holds no earlier run; name another"),
        ("out", ["--overwrite_output_dir"], "is not empty, and holds no earlier run; name another"),
        ("out", ["--resume_from_checkpoint=latest"], "holds other files, but no checkpoint; name another"),
        ("out/below", [f"--dataset_name={tmp_path / 'out'}"], "lies in the folder of the images"),
    ):
        code, stderr = answer(smoke_args(dataset_dir, tmp_path / output) + more, capfd)
        assert code == 2 and part in stderr
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize(("rows", "part"), [(None, "--image_column: name the column"), (0, "no data")])
def test_a_dataset_without_images_to_train_on(rows, part, tmp_path, capfd):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/readme.txt").write_text("no data")
    if rows is not None:
        rows = make_dataset([blob(i) for i in range(rows)], [0] * rows)
        rows.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    code, stderr = answer(smoke_args(str(tmp_path / "set"), tmp_path / "out"), capfd)
    assert code == 2 and stderr.count("\n") == 1 and part in stderr and not (tmp_path / "out").exists()


def test_another_run_cannot_go_on_from_a_checkpoint(train, dataset_dir, capfd):
    out = train("run", max_train_steps=1, validation_steps=0)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capfd.readouterr()
    for change, part in (
        ({"unet.layers_per_block": 2}, "unet.layers_per_block = 1, this run has 2"),
        ({"scheduler.num_train_timesteps": 500}, "scheduler.num_train_timesteps = 1000, this run has 500"),
        ({"seed": 5}, "seed = 0, this run has 5"),
        ({"learning_rate": 0.5}, "learning_rate = 0.001, this run has 0.5"),
        ({"mixed_precision": "bf16"}, "mixed precision = no, this run has bf16"),
        ({"train_batch_size": 8}, "global batch = 16, this run has 8"),
        ({"unet.sample_size": 14}, "unet.sample_size = 28, this run has 14"),
    ):
        code, stderr = answer(smoke_args(dataset_dir, out, resume_from_checkpoint="latest", **change), capfd)
        assert code == 2 and f"it was trained with {part}" in stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# ---- files of options ----------------------------------------------------------------------------------------------


def parsed(tmp_path, text: str) -> TrainConfig:
    """The config that a file with this text gives."""
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return parse_args(["--config", str(tmp_path / "a.yaml")])


def test_every_shipped_config_is_valid_and_two_state_what_the_code_does():
    configs = {p.stem: parse_args(["--config", str(p)]) for p in (ROOT / "configs").glob("*.yaml")}
    assert {"mnist", "paper", "smoke", "mnist_large"} <= set(configs)
    for config in configs.values():
        check_models(config)
    default, paper = TrainConfig(), dict(PAPER)
    assert parse_args([]) == configs["mnist"] == default
    scheduler = default.scheduler | {"prediction_type": paper.pop("prediction_type")}
    assert configs["paper"] == replace(default, output_dir="ddpm-mnist-paper", scheduler=scheduler, **paper)


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-3\nuse_ema: false\nunet: {norm_eps: 1e-6, dropout: 0.2}\n")
    args = ["--config", str(tmp_path / "a.yaml"), "--learning_rate", "5e-4", "--unet.norm_num_groups", "4"]
    config = parse_args([*args, "--unet.block_out_channels=8, 8,8,8", "--unet.sample_size=32"])
    assert config.learning_rate == 5e-4 and config.use_ema is False
    assert config.unet["norm_eps"] == 1e-6 and config.unet["dropout"] == 0.2 and config.unet["norm_num_groups"] == 4
    assert config.unet["block_out_channels"] == [8, 8, 8, 8] and config.unet["sample_size"] == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "cannot be read as YAML .seed is given twice"),
        ("unet: {}\nseed: 1\nunet: {sample_size: 32}\n", "cannot be read as YAML .unet is given twice"),
        ("output_dir: 1.10", "--output_dir 1.1: must be text; put it in quotes"),
        ("hub_model_id: no", "--hub_model_id False: must be text; put it in quotes"),
    ],
)
def test_what_yaml_would_lose_or_change_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"--config .*: {message}"):
        parsed(tmp_path, text)


def test_null_is_the_default_unless_the_type_allows_none(tmp_path):
    lines = [f"{option.name}: null" for option in options_of(TrainConfig)]
    lines += ["unet: {block_out_channels: null}", "scheduler: {beta_start: null}"]
    assert parsed(tmp_path, "\n".join(lines)) == replace(TrainConfig(), checkpoints_total_limit=None)  # keep all


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("seed: '7'", "seed", 7),
        ("use_ema: no", "use_ema", False),
        ("use_ema: 'false'", "use_ema", False),
        ("dataset_config_name: 3", "dataset_config_name", "3"),
    ],
)
def test_values_are_read_in_the_type_of_their_option(tmp_path, line, name, value):
    read = getattr(parsed(tmp_path, line + "\n"), name)
    assert read == value and type(read) is type(value)
    betas = parsed(tmp_path, "scheduler: {num_train_timesteps: 2, trained_betas: [1e-4, 2e-2]}").scheduler
    assert betas["trained_betas"] == [1e-4, 2e-2]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_editors_of_windows_write_byte_order_marks(tmp_path, encoding):
    text = ("\ufeff" if encoding == "utf-16-le" else "") + "output_dir: Ergebnis-ä\n"
    (tmp_path / "config.yaml").write_text(text, encoding=encoding)
    assert parse_args([f"--config={tmp_path / 'config.yaml'}"]).output_dir == "Ergebnis-ä"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train_batch_size: [", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
        ("- a\n- b", "must hold `option: value` lines"),
        ("", "must hold `option: value` lines"),
        ("train_batch_sise: 3", "--train_batch_sise: no such option; did you mean --train_batch_size"),
        ("num_train_epochs: 9", "--num_train_epochs: no such option; use --max_train_steps"),
        ("train_batch_sise: null", "--train_batch_sise: no such option; did you mean --train_batch_size?"),
        ("1: 2", "--1: no such option"),
        ("train_batch_size: 3.5", "--train_batch_size: invalid int value: '3.5'"),
        ("train_batch_size: true", "--train_batch_size: invalid int value"),
        ("train_batch_size: [3]", "--train_batch_size"),
        ("train_batch_size: .nan", "--train_batch_size: invalid int value: 'nan'"),
        ("learning_rate: fast", "--learning_rate"),
        ("learning_rate: .inf", "--learning_rate inf"),
        ("learning_rate: {a: 1}", "--learning_rate"),
        ("use_ema: 3", "--use_ema: Truthy value expected: got 3"),
        ("mixed_precision: yes", "choose from auto, no, fp16, bf16"),
        ("optimizer: sgd", "choose from adamw, muon"),
        ("output_dir: [a]", "--output_dir"),
        ("unet: 3", "unet must hold"),
        ("unet: {1: 2}", "unet.1: unknown key"),
        ("unet: {layers_per_blok: 2}", "unet.layers_per_blok: unknown key; did you mean layers_per_block"),
        ("unet: {layers_per_block: 99999999}", "unet.layers_per_block 99999999: must be at least 1 and at most 64"),
        ("unet: {block_out_channels: many}", "unet: "),
        ("unet: {num_class_embeds: ten}", "unet: "),
        ("scheduler: {num_train_timesteps: 1e12}", "scheduler.num_train_timesteps"),
        ("scheduler: {beta_start: small}", "scheduler: "),
        ("class_dropout_prob: 0.1", "--class_dropout_prob 0.1: needs unet.num_class_embeds"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, part):
    with pytest.raises(ConfigError) as error:
        check_models(parsed(tmp_path, text))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_any_text_is_a_config_or_one_line(tmp_path):
    """30 mutations of each config: characters replaced, dropped and doubled. Never another error."""
    chance, valid = random.Random(0), 0
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for _ in range(30):
            text = list(path.read_text(encoding="utf-8"))
            for _ in range(chance.randint(1, 5)):
                place = chance.randrange(len(text))
                text[place] = chance.choice(("", text[place] * 2, *"0123456789.-:[]{}#&*!|>'\"%@\t\n ~aé\x00"))
            try:
                check_models(parsed(tmp_path, "".join(text)))
                valid += 1
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, error
    assert valid > 5
