"""Quality over minutes of training: `python -m benchmarks.recipe.minutes --machine NAME --plot FILE`

    python -m benchmarks.recipe.trials --dataset_name PATH --machine NAME --minutes 1 3 10 \\
        --only "the default" "stock, its defaults"

Prints one row for each model. The plot shows the distance without the bias of a finite sample, since not all models
were measured with as many samples.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

TRIALS = Path(__file__).with_name("trials.jsonl")
CURVES = {"the default": "ours", "stock, its defaults": "diffusers' train_unconditional.py"}


def print_row(label: str, r: dict) -> None:
    images = round(r["minutes"] * 60 * r["images_per_second"])
    print(
        f"| {label} | {r['minutes']:g} | {r['updates']:,} | {images:,} | {r['num_images']:,} |"
        f" {r['frechet_distance']:.2f} | {r['frechet_unbiased']:.2f} | {r['confident']:.1%} |"
        f" {r['precision']:.3f}, {r['recall']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", required=True, help="as the trials were noted")
    parser.add_argument("--plot", help="a .png file")
    args = parser.parse_args()
    rows = [json.loads(line) for line in TRIALS.read_text(encoding="utf-8").splitlines()]
    rows = sorted((r for r in rows if r["machine"] == args.machine), key=lambda r: r["minutes"])

    print("| | minutes | updates | images | samples | Fréchet | without bias | confident | precision, recall |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    figure = Figure(figsize=(7, 3.5))
    axes = figure.add_subplot()
    for trial, label in CURVES.items():
        curve = [r for r in rows if r["trial"] == trial]
        for row in curve:
            print_row(label, row)
        axes.loglog([r["minutes"] for r in curve], [r["frechet_unbiased"] for r in curve], "o-", label=label)
    axes.set_xlabel("minutes of training on 2 CPU cores")
    axes.set_ylabel("Fréchet distance, without\nthe bias of a finite sample")
    for axis, ticks in ((axes.xaxis, (1, 3, 10, 30, 60)), (axes.yaxis, (1, 3, 10, 30, 100))):
        axis.set_ticks(ticks, labels=map(str, ticks))
        axis.set_ticks([], minor=True)
    axes.legend()
    if args.plot:
        figure.tight_layout()
        figure.savefig(args.plot, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
