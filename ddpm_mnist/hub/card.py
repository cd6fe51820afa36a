"""The model card: README.md of a trained model, filled in from what the run wrote and measured."""

import hashlib
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import ConfigError
from ..options import read_yaml
from ..record import is_digits, read_json, read_metrics, weights_sha256
from .notebook import write_notebook

TEMPLATE = Path(__file__).with_name("card_template.md")

THREE_LINES = """from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{repo_id}")
pipe(batch_size=4).images[0].save("{file}.png")"""
THREE_LINES_CONDITIONAL = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
pipe(class_labels=[{class_label}] * 4).images[0].save("{file}.png")"""
TRUST = """
`trust_remote_code=True` runs `pipeline.py` of this repo. Read it, and pin the commit that you have read with
`revision="COMMIT"`.
"""
# The recipe of Ho et al. 2020 for CIFAR-10: section 4, appendix B, and the authors' code.
PAPER = {
    "images": "32 x 32 x 3",
    "U-Net channels": "128, 256, 256, 256",
    "residual blocks per resolution": "2",
    "dropout": "0.1",
    "labels": "none",
    "random flips": "yes",
    "images per update": "128",
    "updates": "800000",
    "optimizer": "adam",
    "peak learning rate": "0.0002",
    "learning rate after the warm-up": "constant",
    "warm-up, updates": "5000",
    "weight average, largest decay": "0.9999",
    "timesteps of a batch": "uniform",
    "target where x_t is mostly noise": "what was drawn",
    "weights of the loss": "1",
    "the network predicts": "epsilon",
    "noise schedule": "linear, 0.0001 to 0.02, T = 1000",
    "variance of the reverse step": "fixed_large",
}
# Names of the Hub's metrics for figures that are one of them.
HUB_METRICS = {"read_as_asked": "accuracy", "accuracy_from_samples": "accuracy"}
FASTER = """from diffusers import DPMSolverMultistepScheduler

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe({arguments}, num_inference_steps=20)"""


# What the card tells of a run, from its train_config.yaml.
NEEDED = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "learning_rate")
NEEDED += ("lr_scheduler", "lr_warmup_steps", "use_ema", "mixed_precision", "ddpm_num_inference_steps", "seed")
SPACE_ID = ".space_id"  # file in the model's folder: the Space that shows it
MARK = "\n<!-- written by ddpm-mnist; edit it and it stays as you leave it: "


def three_lines(repo_id: str, class_label: int | None, digits: bool) -> str:
    """How anyone generates from the model with stock diffusers; `class_label` is None for an unconditional one."""
    lines = THREE_LINES if class_label is None else THREE_LINES_CONDITIONAL
    file = "image" if not digits else "digit" if class_label is None else "seven"
    return lines.format(repo_id=repo_id, class_label=class_label, file=file)


def class_to_show(unet: dict, digits: bool) -> int | None:
    """The class in the examples: a seven of digits, or the first; None for an unconditional U-Net, by its config."""
    if unet.get("num_class_embeds") is None:
        return None
    return 7 if digits else 0


def measured(model_dir: Path, dataset: str) -> list[EvalResult]:
    """What was measured of these very weights: the run's held-out loss, and `evaluation.json` where there is one.

    Both files name the hash of the weights; what belongs to others is left out.
    """
    results, sha = [], weights_sha256(model_dir)
    task = {"task_type": "unconditional-image-generation", "dataset_type": dataset, "dataset_name": dataset}
    run = read_json(model_dir / "train_results.json")
    held_out = run.get("metrics", {}).get("held_out_ema/loss", run.get("metrics", {}).get("held_out_raw/loss"))
    if run.get("weights_sha256") == sha and held_out is not None:
        name = "held-out mean squared error of the predicted noise"
        results.append(EvalResult(**task, metric_type="mse", metric_name=name, metric_value=round(held_out, 6)))
    evaluated = evaluation(model_dir)
    for name, value in evaluated.get("metrics", {}).items():
        text = evaluated.get("texts", {}).get(name, name)
        kind = HUB_METRICS.get(name, name)
        results.append(EvalResult(**task, metric_type=kind, metric_name=text, metric_value=value))
    return results


def differences(settings: dict, unet: dict, scheduler: dict, images_per_update: int) -> str:
    """What the run does otherwise than `PAPER`, as a Markdown table."""
    channels, classes = unet.get("in_channels"), unet.get("num_class_embeds")
    dropped = settings.get("class_dropout_prob", 0.0)
    adam = "adamw" if settings.get("adam_weight_decay") else "adam"
    target, gamma = scheduler.get("prediction_type"), settings.get("snr_gamma")
    own = target != "epsilon" and settings.get("loss_weighting", "output") == "output"  # else it is the noise's error
    uniform, refs = settings.get("uniform_timesteps", 1), settings.get("reference_images", 0)
    density = f"{1 - uniform:.0%} by log SNR ~ N({settings.get('log_snr_mean')}, {settings.get('log_snr_std')}^2)"
    here = {
        "images": f"{unet.get('sample_size')} x {unet.get('sample_size')} x {channels}",
        "U-Net channels": ", ".join(map(str, unet.get("block_out_channels", []))),
        "residual blocks per resolution": unet.get("layers_per_block"),
        "dropout": unet.get("dropout", 0.0),
        "labels": "none" if classes is None else f"yes, {dropped:.0%} of them dropped",
        "random flips": "yes" if settings.get("random_flip") else "no",
        "images per update": images_per_update,
        "updates": settings["max_train_steps"] or f"{settings['num_train_epochs']} epochs",
        "optimizer": adam if settings.get("optimizer", "adamw") == "adamw" else settings["optimizer"],
        "peak learning rate": settings["learning_rate"],
        "learning rate after the warm-up": settings["lr_scheduler"].removesuffix("_with_warmup"),
        "warm-up, updates": settings["lr_warmup_steps"],
        "weight average, largest decay": settings.get("ema_max_decay", 0.9999) if settings["use_ema"] else "none",
        "timesteps of a batch": settings.get("timestep_sampling", "uniform") + (f", {density}" if uniform < 1 else ""),
        "target where x_t is mostly noise": f"its mean, over {refs:,} images" if refs else "what was drawn",
        "weights of the loss": f"min-SNR, gamma {gamma}" if gamma is not None else f"1, for {target}" if own else 1,
        "the network predicts": target,
        "noise schedule": f"{scheduler.get('beta_schedule')}, {scheduler.get('beta_start')} to "
        f"{scheduler.get('beta_end')}, T = {scheduler.get('num_train_timesteps')}",
        "variance of the reverse step": scheduler.get("variance_type"),
    }
    rows = [f"| {name} | {here[name]} | {there} |" for name, there in PAPER.items() if str(here[name]) != there]
    return "\n".join(["| | here | Ho et al. 2020, CIFAR-10 |", "| --- | --- | --- |", *rows])


def gallery(model_dir: Path, classes: int | None, digits: bool) -> list[dict]:
    """The single samples that the run has drawn, as the Hub's Gallery takes them."""
    paths = sorted(path for path in (model_dir / "gallery").glob("*.png") if path.stem.isdigit())
    kind = "digit" if digits else "class"
    texts = ["sample" if classes is None else f"{kind} {number % classes}" for number in range(len(paths))]
    return [{"text": text, "output": {"url": f"gallery/{path.name}"}} for text, path in zip(texts, paths)]


def time_taken(run: dict, settings: dict) -> str:
    """How long the training took; of a run that was resumed, how long its last part took."""
    if "minutes_of_this_session" not in run:
        return "unknown"
    minutes, steps = f"{run['minutes_of_this_session']:.1f}", run["steps_of_this_session"]
    whole = steps == settings["max_train_steps"] or settings["max_train_steps"] is None
    return minutes if whole else f"{minutes} for the last {steps:,} updates"


def evaluation(model_dir: Path) -> dict:
    """What `python evaluate.py` measured of these very weights; empty where it did not."""
    found = read_json(model_dir / "evaluation.json")
    return found if found.get("weights_sha256") == weights_sha256(model_dir) else {}


def loss_curve(model_dir: Path) -> bool:
    """Draw `loss_curve.png` from metrics.jsonl; False where there is nothing to draw."""
    lines = read_metrics(model_dir / "metrics.jsonl")
    if not any("loss" in line for line in lines):
        return False
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    figure = Figure(figsize=(7, 3.5))
    axes = figure.add_subplot()
    for key, label, marker in (
        ("loss", "training", ""),
        ("held_out_raw/loss", "held out, raw weights, error of the noise", "o"),
        ("held_out_ema/loss", "held out, averaged weights, error of the noise", "o"),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=label, marker=marker, linewidth=1)
    axes.set(xlabel="update", ylabel="loss", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(model_dir / "loss_curve.png", dpi=100, metadata={"Software": None})  # no date: the same file again
    return True


def space_line(model_dir: Path) -> str:
    """The link to the Space that the model was last pushed with; empty where there was none."""
    file = model_dir / SPACE_ID
    space_id = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return (
        f"\n\n[Watch it draw](https://huggingface.co/spaces/{space_id}): a page with its steps from noise."
        if space_id
        else ""
    )


def written_by_hand(card: str) -> bool:
    """Whether the text of a card is not, to the letter, one that `write_card` wrote."""
    text, mark, digest = card.replace("\r\n", "\n").rpartition(MARK)
    return not mark or digest != f"{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def write_card(model_dir: Path, repo_id: str, license: str = "mit", say=print) -> ModelCard:
    """Write `README.md` (and `loss_curve.png`, `samples.png`, `notebook.ipynb`) into the folder of a trained model.

    A README.md that a person wrote or edited stays as it is, which is said through `say`.

    Returns:
        The card.

    Raises:
        ConfigError: train_config.yaml lacks what the card tells.
        ValueError: the metadata breaks the Hub's rules.
    """
    settings = read_yaml("--model_dir", model_dir / "train_config.yaml")
    if missing := [name for name in NEEDED if name not in settings]:
        raise ConfigError(f"--model_dir {model_dir}: train_config.yaml lacks {', '.join(missing)}; restore it")
    run = read_json(model_dir / "train_results.json")
    dataset = run.get("dataset", "")
    on_hub = dataset.count("/") == 1 and not run.get("dataset_is_local", True)
    dataset = dataset if on_hub else dataset.replace("\\", "/").rsplit("/", 1)[-1]
    digits = is_digits(dataset)
    unet = read_json(model_dir / "unet" / "config.json")
    conditional = unet.get("num_class_embeds") is not None
    null = read_json(model_dir / "model_index.json").get("null_class_label")
    from ..pipeline import count_classes  # not at the top: an upload alone need not wait for torch

    classes = count_classes(unet.get("num_class_embeds"), null)
    write_notebook(model_dir, repo_id, classes)
    samples = gallery(model_dir, classes, digits)
    results = measured(model_dir, dataset or "unknown")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", *(["mnist"] if digits else []), *(["class-conditional"] if conditional else [])],
        datasets=[dataset] if on_hub else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        **({"widget": samples} if samples else {}),
    )

    pictures = "<Gallery />\n\n" if samples else ""
    grids = sorted((model_dir / "samples").glob("*.png")) if (model_dir / "samples").is_dir() else []
    if grids:
        (model_dir / "samples.png").write_bytes(grids[-1].read_bytes())
        steps = settings["ddpm_num_inference_steps"]
        pictures += f"![samples](samples.png)\n\n*Not selected: the run's last grid, in {steps} steps.*\n"
    if (model_dir / "trajectory.png").is_file():
        pictures += (
            "\n![from noise to images](trajectory.png)\n\n*How four images left the noise. Upper rows: x_t. Lower"
            " rows: the x_0 that the U-Net predicts from it.*\n"
        )
    curve = "## Loss\n\n![loss over updates](loss_curve.png)\n" if loss_curve(model_dir) else ""
    processes = run.get("processes", 1)
    global_batch = settings["train_batch_size"] * settings["gradient_accumulation_steps"] * processes
    rows = {
        "dataset": dataset or "unknown",
        "parameters": f"{run['parameters']:,}" if "parameters" in run else "unknown",
        "global batch": global_batch,
        "updates": settings["max_train_steps"] or f"{settings['num_train_epochs']} epochs",
        "optimizer": f"{settings.get('optimizer', 'adamw')}, {settings['learning_rate']}, {settings['lr_scheduler']}",
        "warm-up": f"{settings['lr_warmup_steps']} updates",
        "averaged weights": "yes" if settings["use_ema"] else "no",
        "mixed precision": run.get("mixed_precision", settings["mixed_precision"]),
        "seed": settings["seed"],
        "hardware": f"{run.get('device_name', run.get('device', 'unknown'))}, {processes} process(es)",
        "minutes": time_taken(run, settings),
        "versions": ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items()) or "unknown",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    figures = "\n".join(f"| {r.metric_name} | {r.metric_value} |" for r in results)
    measurements = (
        f"## Measured\n\n| | |\n| --- | --- |\n{figures}\n\nOf these weights, by the run itself.\n" if results else ""
    )
    memorised = "It was not tested for memorised training images."
    if (evaluated := evaluation(model_dir)) and (model_dir / "evaluation.md").is_file():
        table_of_evaluation = (model_dir / "evaluation.md").read_text(encoding="utf-8")
        measurements = f"## Measured\n\n{table_of_evaluation}\nBy `python evaluate.py`, of these weights.\n"
        if "nearest_ratio" in evaluated["metrics"]:
            memorised = "Whether it memorised training images, the table above says by distances between pixels."
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=data.to_yaml(),
        name=repo_id.split("/")[-1],
        own_file=", and one file of its own" if conditional else "",
        space=space_line(model_dir),
        pictures=pictures,
        three_lines=three_lines(repo_id, class_to_show(unet, digits), digits),
        faster=FASTER.format(
            arguments=f"class_labels=[{class_to_show(unet, digits)}] * 16" if conditional else "batch_size=16"
        ),
        what="handwritten digits" if digits else "small images",
        limits="Some samples are no digit that a person would read." if digits else "Some samples are not convincing.",
        trust=TRUST if conditional else "",
        training=table,
        differences=differences(
            settings, unet, read_json(model_dir / "scheduler" / "scheduler_config.json"), global_batch
        ),
        curve=curve,
        measurements=measurements,
        memorised=memorised,
    )
    card = ModelCard(text, ignore_metadata_errors=False)
    path = model_dir / "README.md"
    if path.is_file() and written_by_hand(path.read_text(encoding="utf-8")):
        say(f"{path} was written or edited by hand: it goes as it is.")
        return ModelCard.load(path)
    text = str(card)
    path.write_text(f"{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n", encoding="utf-8")
    return card
