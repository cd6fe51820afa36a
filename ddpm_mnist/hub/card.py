"""The model card: README.md of a trained model, from what the run wrote and measured; and its notebook for Colab."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..errors import ConfigError, first_line
from ..options import read_yaml
from ..record import CONFIG_FILE, METRICS_FILE, RESULTS_FILE, read_json, read_metrics, sample_grids, weights_sha256

TEMPLATE = Path(__file__).with_name("card_template.md")
NOTEBOOK = Path(__file__).with_name("notebook_template.ipynb")
REPOSITORY = ""  # the address of this repository, which cards then link to
MARK = "\n<!-- written by ddpm-mnist; edit it and it stays as you leave it: "
CURVES = {  # key in metrics.jsonl -> its label in loss_curve.png
    "loss": "training",
    "held_out_raw/loss": "held out, raw weights, error of the noise",
    "held_out_ema/loss": "held out, averaged weights, error of the noise",
}


def write_card(model_dir: Path, repo_id: str, license: str = "apache-2.0", revision: str | None = None) -> None:
    """Write README.md, loss_curve.png, samples.png and notebook.ipynb into the folder of a trained model.

    `revision`: the branch to which the model goes, and from which its card and notebook load it; None: main.
    A README.md that a person wrote or edited stays, which is printed. ConfigError: a file of the run lacks what the
    card says, or holds it in another form.
    """
    try:
        classes = num_classes(model_dir)
        write_notebook(model_dir, repo_id, classes, revision)
        draw_loss_curve(model_dir)
        card = str(model_card(model_dir, repo_id, license, classes, revision))
    except Exception as error:  # a setting is missing or of another type; the metadata break the Hub's rules
        raise ConfigError(
            f"--model_dir {model_dir}: the model card cannot be written from {CONFIG_FILE} and {RESULTS_FILE} "
            f"({type(error).__name__}: {first_line(error)}); restore them"
        ) from error
    path = model_dir / "README.md"
    if path.is_file() and written_by_hand(path.read_text(encoding="utf-8", errors="replace")):
        print(f"{path} was written or edited by hand: it goes as it is.")
    else:
        path.write_text(signed(card), encoding="utf-8", newline="\n")


def signed(text: str) -> str:
    """The card with a hash of its text at the end, which `written_by_hand` computes again."""
    return f"{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def written_by_hand(card: str) -> bool:
    """True if a person wrote or edited the card."""
    card = card.replace("\r\n", "\n")
    text, mark, _ = card.rpartition(MARK)
    return not mark or card != signed(text)


def model_card(model_dir: Path, repo_id: str, license: str, classes: int | None, revision: str | None) -> ModelCard:
    """The card of the model; copies the run's last grid of samples to samples.png."""
    run = read_yaml("--model_dir", model_dir / CONFIG_FILE) | read_json(model_dir / RESULTS_FILE)
    dataset, on_hub = run["dataset"], "/" in run["dataset"] and not run["dataset_is_local"]
    weights, evaluated = weights_sha256(model_dir), read_json(model_dir / "evaluation.json")
    evaluated = evaluated if evaluated.get("weights_sha256") == weights else {}  # else it measured other weights
    metrics = run["metrics"] if run["weights_sha256"] == weights else {}
    loss = metrics.get("held_out_ema/loss", metrics.get("held_out_raw/loss"))
    samples, table = gallery(model_dir, classes), model_dir / "evaluation.md"
    grids = [*sample_grids(model_dir).values()]
    if grids:
        (model_dir / "samples.png").write_bytes(grids[-1].read_bytes())
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion"] + (["class-conditional"] if classes else []),
        datasets=[dataset] if on_hub else None,
        widget=samples or None,
    )
    return ModelCard.from_template(
        data,
        str(TEMPLATE),
        name=repo_id.split("/")[-1],
        run=run,
        dataset=dataset,
        conditional=classes is not None,
        usage=usage(repo_id, model_dir, revision),
        repository=REPOSITORY,
        unet=read_json(model_dir / "unet" / "config.json"),
        held_out_loss=None if loss is None else round(loss, 6),
        evaluated=evaluated,
        evaluation_table=table.read_text(encoding="utf-8") if evaluated and table.is_file() else "",
        grid=bool(grids),
        trajectory=(model_dir / "trajectory.png").is_file(),
    )


def from_pretrained(repo_id: str, conditional: bool, revision: str | None) -> str:
    """The call that loads the model with stock diffusers."""
    where = f', revision="{revision}"' if revision else ""
    return f'DiffusionPipeline.from_pretrained("{repo_id}"{where}{", trust_remote_code=True" if conditional else ""})'


def usage(repo_id: str, model_dir: Path, revision: str | None = None) -> str:
    """How anyone generates from the model with stock diffusers."""
    conditional = num_classes(model_dir) is not None
    what = "class_labels=[0] * 4" if conditional else "batch_size=4"
    scheduler = read_json(model_dir / "scheduler" / "scheduler_config.json")
    T, large = scheduler.get("num_train_timesteps", 1000), scheduler.get("variance_type") == "fixed_large"
    what += f", num_inference_steps={T if large or T % 50 else 50}"  # fixed_large needs all T: see `make_sampler`
    return f"""from diffusers import DiffusionPipeline

pipe = {from_pretrained(repo_id, conditional, revision)}
pipe({what}).images[0].save("image.png")"""


def num_classes(model_dir: Path) -> int | None:
    """How many classes the model can be asked for; None for an unconditional one."""
    unet, index = read_json(model_dir / "unet" / "config.json"), read_json(model_dir / "model_index.json")
    classes = unet.get("num_class_embeds")
    return classes if index.get("null_class_label") is None else classes - 1  # without importing torch


def gallery(model_dir: Path, classes: int | None) -> list[dict]:
    """The single samples of the run, as the Hub's Gallery takes them."""
    paths = sorted(path for path in (model_dir / "gallery").glob("*.png") if path.stem.isdigit())
    texts = ["sample" if classes is None else f"class {int(path.stem) % classes}" for path in paths]
    return [{"text": text, "output": {"url": f"gallery/{path.name}"}} for text, path in zip(texts, paths)]


def draw_loss_curve(model_dir: Path) -> None:
    """Draw loss_curve.png from metrics.jsonl."""
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    lines = read_metrics(model_dir / METRICS_FILE)
    figure = Figure(figsize=(7, 3.5), layout="tight")
    axes = figure.add_subplot()
    for key, label in CURVES.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=label, marker=".", linewidth=1)
    axes.set(xlabel="update", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(model_dir / "loss_curve.png", dpi=100, metadata={"Software": None})  # no date: the same file again


def write_notebook(model_dir: Path, repo_id: str, classes: int | None, revision: str | None) -> None:
    """Write notebook.ipynb, which the Hub opens in Colab or Kaggle. It needs diffusers and nothing of this package."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    call = from_pretrained(repo_id, classes is not None, revision)
    text = text.replace(r"DiffusionPipeline.from_pretrained(\"MODEL_ID\")", json.dumps(call)[1:-1])
    if classes is not None:
        text = text.replace("batch_size=32", f"class_labels=[number % {classes} for number in range(32)]")
        text = text.replace("labels = None", f"labels = torch.arange(4, device=pipe.device) % {classes}")
    (model_dir / "notebook.ipynb").write_text(text.replace("MODEL_ID", repo_id), encoding="utf-8")
