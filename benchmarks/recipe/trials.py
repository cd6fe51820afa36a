"""Compare recipes at equal training time: `python -m benchmarks.recipe.trials --dataset_name ylecun/mnist`

Each trial is the default with something changed. A short run measures its speed, without start-up, validation and
export. The trial then trains for as many updates as fit into `--minutes` at that speed, and `python evaluate.py`
measures the model, by DDIM in 50 steps in all rows. Results are appended to `trials.jsonl` in this folder, and all
rows of this machine are printed.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ddpm_mnist.record import METRICS_FILE, read_metrics

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
EPSILON, UNIFORM = ["--scheduler.prediction_type=epsilon"], ["--uniform_timesteps=1"]
TRIALS = {  # name: options over configs/mnist.yaml
    "the default": [],
    "the paper's recipe": ["--config=configs/paper.yaml"],
    "epsilon, uniform t": EPSILON + UNIFORM,
    "without the guide": ["--guide_scale=1"],
    "targets as drawn": ["--reference_images=0"],
    "widths (32, 64, 64)": ["--unet.block_out_channels=[32,64,64]"],
    "epsilon": EPSILON,
    "uniform t": UNIFORM,
    "cosine betas": ["--scheduler.beta_schedule=squaredcos_cap_v2"],
    "narrow (16, 32, 64)": ["--unet.block_out_channels=[16,32,64]"],
    "wide (32, 64, 128)": ["--unet.block_out_channels=[32,64,128]"],
    "batch 32": ["--train_batch_size=32"],
    "batch 128": ["--train_batch_size=128"],
    "AdamW, learning rate 2e-3": ["--optimizer=adamw", "--learning_rate=2e-3"],
    "linear decay": ["--lr_scheduler=linear"],
    "learning rate 2e-3": ["--learning_rate=2e-3"],
    "learning rate 8e-3": ["--learning_rate=8e-3"],
    "two layers a block": ["--unet.layers_per_block=2"],
}
PEERS = {  # name: options of benchmarks.peer
    "stock, its defaults": [],
    "stock, bf16, batch 64, learning rate 2e-3": [
        "--mixed_precision=bf16",
        "--train_batch_size=64",
        "--learning_rate=2e-3",
        "--lr_warmup_steps=100",
    ],
}


def train(name: str, options: list[str], steps: int, output_dir: Path, dataset: list[str]) -> tuple[float, float]:
    """Train in a process of its own; returns images a second, and the loss at the end."""
    script = ["-m", "benchmarks.peer"] if name in PEERS else ["train_ddpm_mnist.py"]
    command = [sys.executable, *script, *dataset, *options, f"--output_dir={output_dir}", f"--max_train_steps={steps}"]
    if name not in PEERS:
        command += ["--validation_steps=0", "--checkpointing_steps=1000000", "--logging_steps=10", "--report_to=none"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if name in PEERS:
        results = json.loads((output_dir / "peer.json").read_text(encoding="utf-8"))
        return results["images_per_second"], results["loss"]
    lines = read_metrics(output_dir / METRICS_FILE)
    rate = statistics.median(line["images_per_second"] for line in lines[1:] or lines)
    return rate, statistics.mean(line["loss"] for line in lines[-10:])


def batch_size(options: list[str], name: str) -> int:
    """The batch size of a trial, from its options or the default."""
    given = [int(o.split("=")[1]) for o in options if o.startswith("--train_batch_size=")]
    return given[0] if given else 16 if name in PEERS else 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--minutes", type=float, nargs="+", default=[4], help="one model of each trial for each")
    parser.add_argument("--machine", default=platform.machine(), help="noted in the rows: compare those of one only")
    parser.add_argument("--only", nargs="*", help="names of trials; default: all, with the peers")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--keep", help="folder to keep the models in; default: they are deleted")
    args = parser.parse_args()
    dataset, results = [f"--dataset_name={args.dataset_name}"], HERE / "trials.jsonl"
    trials = {name: options for name, options in (TRIALS | PEERS).items() if not args.only or name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(args.keep or folder)
        rates = {}
        for i, (name, options) in enumerate(trials.items()):  # all speeds first, while the machine is quiet
            rates[name], _ = train(name, options, 30, Path(folder, f"speed-{i}"), dataset)
            print(f"{name}: {rates[name]:.0f} images/s", flush=True)
        for minutes, (name, options) in itertools.product(args.minutes, trials.items()):
            steps = max(1, round(minutes * 60 * rates[name] / batch_size(options, name)))
            output_dir = kept / "".join(c if c.isalnum() else "-" for c in f"{name} {minutes:g}")
            _, loss = train(name, options, steps, output_dir, dataset)
            command = [sys.executable, "evaluate.py", f"--model={output_dir}", *dataset]
            command += [f"--num_images={args.num_images}", "--bound_images=0", "--scheduler=ddim"]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            metrics = json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
            row = {
                "trial": name,
                "options": options,
                "machine": args.machine,
                "minutes": minutes,
                "updates": steps,
                "images_per_second": rates[name],
                "loss": loss,
                "num_images": args.num_images,
            }
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | metrics) + "\n")
            print(name, metrics, flush=True)

    print(f"\nOn {args.machine}:\n")
    print("| minutes | recipe | updates | images/s | loss | Fréchet | confident | precision | recall |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("machine") == args.machine]
    for r in sorted(rows, key=lambda r: (r["minutes"], r["frechet_distance"])):
        print(
            f"| {r['minutes']:g} | {r['trial']} | {r['updates']:,} | {r['images_per_second']:.0f} | {r['loss']:.4f} |"
            f" {r['frechet_distance']:.2f} | {r['confident']:.1%} | {r['precision']:.3f} | {r['recall']:.3f} |"
        )


if __name__ == "__main__":
    main()
