"""Quality over minutes of training: `python -m benchmarks.recipe.minutes --machine NAME --plot FILE`

    python -m benchmarks.recipe.trials --dataset_name PATH --machine NAME --minutes 1 3 10 \\
        --only "the default" "stock, its defaults"

Prints one row for each model, and after how many seconds the default is as good as the peer after ten minutes. The
distances are those without the bias of a finite sample, since not all models were measured with as many samples.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TRIALS = Path(__file__).with_name("trials.jsonl")
CURVES = {"the default": "ours", "stock, its defaults": "diffusers' train_unconditional.py"}


def crossing(minutes: list[float], distances: list[float], wanted: float) -> float | None:
    """When the distance falls to `wanted`, by a straight line between the logarithms; None: never.

    The first row's minutes where it is there already.
    """
    falling = np.minimum.accumulate(distances)
    if falling[-1] > wanted:
        return None
    return float(np.exp(np.interp(-np.log(wanted), -np.log(falling), np.log(minutes))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", required=True, help="as the trials were noted")
    parser.add_argument("--plot", help="a .png file")
    args = parser.parse_args()
    rows = [json.loads(line) for line in TRIALS.read_text(encoding="utf-8").splitlines()]
    rows = sorted((r for r in rows if r.get("machine") == args.machine), key=lambda r: r["minutes"])
    curves = {name: [r for r in rows if r["trial"] == name] for name in CURVES}

    print("| | minutes | updates | images | samples | Fréchet | without bias | confident | precision, recall |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    figure = Figure(figsize=(7, 3.5))
    axes = figure.add_subplot()
    for name, label in CURVES.items():
        for r in curves[name]:
            seen = round(r["minutes"] * 60 * r["images_per_second"])
            print(
                f"| {label} | {r['minutes']:g} | {r['updates']:,} | {seen:,} | {r['num_images']:,} |"
                f" {r['frechet_distance']:.2f} | {r['frechet_unbiased']:.2f} | {r['confident']:.1%} |"
                f" {r['precision']:.3f}, {r['recall']:.3f} |"
            )
        axes.loglog(
            [r["minutes"] for r in curves[name]], [r["frechet_unbiased"] for r in curves[name]], "o-", label=label
        )
    axes.set(xlabel="minutes of training on 2 cores", ylabel="Fréchet distance to the test split")
    for axis, ticks in ((axes.xaxis, (1, 3, 10, 30, 60)), (axes.yaxis, (1, 3, 10, 30, 100))):
        axis.set_ticks(ticks, labels=map(str, ticks))
        axis.set_ticks([], minor=True)
    axes.legend()
    if args.plot:
        figure.tight_layout()
        figure.savefig(args.plot, dpi=100, metadata={"Software": None})

    peer = [r["frechet_unbiased"] for r in curves["stock, its defaults"] if r["minutes"] == 10]
    ours = curves["the default"]
    if peer and ours:
        minutes = crossing([r["minutes"] for r in ours], [r["frechet_unbiased"] for r in ours], peer[0])
        ours_then = "not within these rows" if minutes is None else f"at latest after {minutes * 60:.0f} seconds"
        print(f"\nThe peer has {peer[0]:.2f} after 10 minutes, ours {ours_then}.")


if __name__ == "__main__":
    main()
