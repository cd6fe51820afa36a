"""Time from the command to the first update: `python -m benchmarks.startup --dataset_name ylecun/mnist`

Run it twice: the first run fills the caches (decoded images, Python's compiled files).
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm_mnist.record import METRICS_FILE, read_metrics

from .common import ROOT, machine, table

LIBRARIES = ("torch", "diffusers", "accelerate", "datasets", "transformers", "train_ddpm_mnist")


def first_update(launcher: list[str], dataset: list[str]) -> float:
    """Seconds until the first update's loss is in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--output_dir={folder}/run", "--max_train_steps=1", "--logging_steps=1", "--validation_steps=0"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*launcher, "train_ddpm_mnist.py", *dataset, *options],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log = Path(folder, "run", METRICS_FILE)
        while process.poll() is None and not read_metrics(log):
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if process.wait():
            raise SystemExit(f"training failed with exit code {process.returncode}; run it by hand to see why")
        assert read_metrics(log)[0]["step"] == 1
    return seconds


def import_seconds() -> dict[str, float]:
    """Seconds that each library's import takes within the script's, including what the library itself imports."""
    command = [sys.executable, "-X", "importtime", "-c", "import train_ddpm_mnist"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    imports = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)$", lines, re.MULTILINE)
    return {name: int(microseconds) / 1e6 for microseconds, name in imports if name in LIBRARIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", help="default: the script's own")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dataset = [f"--dataset_name={args.dataset_name}"] if args.dataset_name else []
    launchers = {"accelerate launch": [sys.executable, "-m", "accelerate.commands.launch"], "python": [sys.executable]}
    print(f"Seconds from the command to the first update, median of {args.repeats}. {machine()}.\n")
    table(
        ("launcher", "seconds"),
        (
            (f"`{name}`", f"{statistics.median(first_update(launcher, dataset) for _ in range(args.repeats)):.1f}")
            for name, launcher in launchers.items()
        ),
    )
    print("Of these seconds, the imports (each includes what it is the first to import):\n")
    table(("import", "seconds"), ((name, f"{seconds:.2f}") for name, seconds in import_seconds().items()))


if __name__ == "__main__":
    main()
