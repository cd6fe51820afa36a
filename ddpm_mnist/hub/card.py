"""The model card: README.md of a trained model, filled in from what the run wrote and measured."""

import hashlib
import json
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..options import ConfigError, first_line, read_yaml
from .export import weights_sha256

TEMPLATE = Path(__file__).with_name("card_template.md")

THREE_LINES = """from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{repo_id}")
pipe(batch_size=4).images[0].save("{file}.png")"""
THREE_LINES_CONDITIONAL = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)
pipe(class_labels=[{class_label}] * 4, guidance_scale=2.0).images[0].save("{file}.png")"""
FASTER = """from diffusers import DPMSolverMultistepScheduler

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe({arguments}, num_inference_steps=20)"""


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


def read_json(path: Path) -> dict:
    """The mapping in a JSON file; empty where there is none. ConfigError: it holds something else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no mapping")
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); delete it, or make it again") from None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are whole: a run that was killed may leave half a line."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def is_digits(dataset: str) -> bool:
    """Whether a dataset is one of handwritten digits, by its name without the path."""
    return dataset.split("/")[-1].lower() in ("mnist", "scikit-learn digits")


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
    for name, value in evaluation(model_dir).get("metrics", {}).items():
        results.append(EvalResult(**task, metric_type=name, metric_name=name, metric_value=value))
    return results


def evaluation(model_dir: Path) -> dict:
    """What `python evaluate.py` measured of these very weights; empty where it did not."""
    found = read_json(model_dir / "evaluation.json")
    return found if found.get("weights_sha256") == weights_sha256(model_dir) else {}


def loss_curve(model_dir: Path) -> bool:
    """Draw `loss_curve.png` from metrics.jsonl; False where there is nothing to draw."""
    lines = read_metrics(model_dir / "metrics.jsonl")
    if not any("loss" in line for line in lines):
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    for key, label, marker in (
        ("loss", "training", ""),
        ("held_out_raw/loss", "held out, raw weights", "o"),
        ("held_out_ema/loss", "held out, averaged weights", "o"),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=label, marker=marker, linewidth=1)
    axes.set(xlabel="update", ylabel="loss", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(model_dir / "loss_curve.png", dpi=100, metadata={"Software": None})  # no date: the same file again
    plt.close(figure)
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
    """Write `README.md` (and `loss_curve.png`, `samples.png`) into the folder of a trained model; returns the card.

    A README.md that a person wrote or edited stays as it is, which is said through `say`.

    Raises:
        ValueError: the metadata breaks the Hub's rules.
    """
    settings = read_yaml("--model_dir", model_dir / "train_config.yaml")
    run = read_json(model_dir / "train_results.json")
    dataset = run.get("dataset", "")
    on_hub = dataset.count("/") == 1 and not run.get("dataset_is_local", True)
    dataset = dataset if on_hub else dataset.replace("\\", "/").rsplit("/", 1)[-1]
    digits = is_digits(dataset)
    unet = read_json(model_dir / "unet" / "config.json")
    conditional = unet.get("num_class_embeds") is not None
    results = measured(model_dir, dataset or "unknown")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", *(["mnist"] if digits else []), *(["class-conditional"] if conditional else [])],
        datasets=[dataset] if on_hub else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )

    pictures = ""
    grids = sorted((model_dir / "samples").glob("*.png")) if (model_dir / "samples").is_dir() else []
    if grids:
        (model_dir / "samples.png").write_bytes(grids[-1].read_bytes())
        steps = settings["ddpm_num_inference_steps"]
        pictures = f"![samples](samples.png)\n\n*Not selected: the run's last grid, by DDIM in {steps} steps.*\n"
    curve = "## Loss\n\n![loss over updates](loss_curve.png)\n" if loss_curve(model_dir) else ""
    rows = {
        "dataset": dataset or "unknown",
        "parameters": f"{run['parameters']:,}" if "parameters" in run else "unknown",
        "global batch": settings["train_batch_size"]
        * settings["gradient_accumulation_steps"]
        * run.get("processes", 1),
        "updates": settings["max_train_steps"] or f"{settings['num_train_epochs']} epochs",
        "optimizer": f"{settings.get('optimizer', 'adamw')}, {settings['learning_rate']}, {settings['lr_scheduler']}",
        "warm-up": f"{settings['lr_warmup_steps']} updates",
        "averaged weights": "yes" if settings["use_ema"] else "no",
        "mixed precision": run.get("mixed_precision", settings["mixed_precision"]),
        "seed": settings["seed"],
        "trained on": f"{run.get('device', 'unknown')}, {run.get('processes', 1)} process(es)",
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
        training=table,
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
