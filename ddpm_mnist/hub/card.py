"""The model card: README.md of a trained model, filled in from what the run wrote and measured."""

import hashlib
import json
from pathlib import Path
from string import Template

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .export import weights_sha256

TEMPLATE = Path(__file__).with_name("card_template.md")

THREE_LINES = """from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{repo_id}")
pipe(batch_size=4).images[0].save("digit.png")"""
THREE_LINES_CONDITIONAL = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)
pipe(class_labels=[7] * 4, guidance_scale=2.0).images[0].save("seven.png")"""
FASTER = """from diffusers import DPMSolverMultistepScheduler

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe({arguments}, num_inference_steps=20)"""


MARK = "\n<!-- written by ddpm-mnist; edit it and it stays as you leave it: "


def three_lines(repo_id: str, conditional: bool) -> str:
    """How anyone generates from the model with stock diffusers."""
    return (THREE_LINES_CONDITIONAL if conditional else THREE_LINES).format(repo_id=repo_id)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


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
    path = model_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
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


def written_by_hand(path: Path) -> bool:
    """Whether there is a card that is not, to the letter, one that `write_card` wrote."""
    if not path.is_file():
        return False
    text, mark, digest = path.read_text().rpartition(MARK)
    return not mark or digest != f"{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def write_card(model_dir: Path, repo_id: str, license: str = "mit", say=print) -> ModelCard:
    """Write `README.md` (and `loss_curve.png`, `samples.png`) into the folder of a trained model; returns the card.

    A README.md that a person wrote or edited stays as it is, which is said through `say`.

    Raises:
        ValueError: the metadata breaks the Hub's rules.
    """
    settings = yaml.safe_load((model_dir / "train_config.yaml").read_text())
    run = read_json(model_dir / "train_results.json")
    dataset = run.get("dataset", "")
    on_hub = dataset.count("/") == 1 and not dataset.startswith((".", "/", "~"))
    unet = read_json(model_dir / "unet" / "config.json")
    conditional = unet.get("num_class_embeds") is not None
    results = measured(model_dir, dataset if on_hub else "mnist")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", "mnist", *(["class-conditional"] if conditional else [])],
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
        table_of_evaluation = (model_dir / "evaluation.md").read_text()
        measurements = f"## Measured\n\n{table_of_evaluation}\nBy `python evaluate.py`, of these weights.\n"
        if "nearest_ratio" in evaluated["metrics"]:
            memorised = "Whether it memorised training images, the table above says by distances between pixels."
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=data.to_yaml(),
        name=repo_id.split("/")[-1],
        own_file=", and one file of its own" if conditional else "",
        pictures=pictures,
        three_lines=three_lines(repo_id, conditional),
        faster=FASTER.format(arguments="class_labels=[7] * 16" if conditional else "batch_size=16"),
        training=table,
        curve=curve,
        measurements=measurements,
        memorised=memorised,
    )
    card = ModelCard(text, ignore_metadata_errors=False)
    path = model_dir / "README.md"
    if written_by_hand(path):
        say(f"{path} was written or edited by hand: it goes as it is.")
        return ModelCard.load(path)
    text = str(card)
    path.write_text(f"{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n")
    return card
