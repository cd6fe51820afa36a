"""Two real processes over gloo do what one does. In few launches: a process that starts imports for seconds."""

import json
from pathlib import Path

import pytest
from conftest import RECOMMENDED, metrics, python, same, smoke_args, weights
from PIL import Image, ImageChops

SEVERAL = Path(__file__).with_name("several_runs.py")
MOVED = {"logging_steps": 1, "validation_steps": 0, "lr_scheduler": "constant_with_warmup"}
WARM_UP = {"lr_scheduler": "linear", "lr_warmup_steps": 4, "logging_steps": 1, "validation_steps": 0}
EXACT = {"logging_steps": 3, "checkpointing_steps": 4, "validation_steps": 0}


def test_two_processes(train, dataset_dir, tmp_path):
    """1 x 16, 2 x 8 and 1 x 8 x 2: the same losses, learning rates, held-out losses and samples. A run may go on with
    another number of processes. One of two processes resumes bit for bit, in other processes."""
    options = {"num_validation_images": 5, **RECOMMENDED}
    train("moved", max_train_steps=2, **MOVED)
    given = {
        "two": options,
        "warm-up": WARM_UP | {"train_batch_size": 2},
        "moved": MOVED | {"resume_from_checkpoint": "latest", "max_train_steps": 5},
        "exact": EXACT | RECOMMENDED,
        "again": EXACT | RECOMMENDED | {"resume_from_checkpoint": tmp_path / "exact/checkpoint-4"},
    }
    runs = {name: smoke_args(dataset_dir, tmp_path / name, **{"train_batch_size": 8} | o) for name, o in given.items()}
    again = runs.pop("again")
    done = python(SEVERAL, json.dumps([*runs.values()]), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(2 process(es) x 8 x 1)") == 3 and "at step 2" in done.stdout
    done = python("train_ddpm_mnist.py", *again, processes=2)
    assert done.returncode == 0 and "at step 4" in done.stdout, done.stderr
    assert list((tmp_path / "two").glob("checkpoint-8/*.pt")) == [tmp_path / "two/checkpoint-8/state.pt"]

    one = train("one", **options)
    for other in (tmp_path / "two", train("sums", train_batch_size=8, gradient_accumulation_steps=2, **options)):
        assert metrics(other, "lr") == metrics(one, "lr")
        for key in ("loss", "held_out_raw/loss", "held_out_ema/loss"):
            assert metrics(other, key) == pytest.approx(metrics(one, key), rel=1e-4), key
        pictures = [Image.open(run / "samples/step-000008.png") for run in (one, other)]
        assert max(ImageChops.difference(*pictures).getextrema()) <= 2

    updates = {s + 1: 1e-3 * min(s / 4, (8 - s) / 4) for s in range(8)}  # whatever the processes
    sums = train("warm-up sums", gradient_accumulation_steps=3, train_batch_size=2, **WARM_UP)
    for out in (tmp_path / "warm-up", sums):
        assert metrics(out, "lr") == pytest.approx(updates)

    train("moved", resume_from_checkpoint="latest", **MOVED)
    assert metrics(tmp_path / "moved", "loss") == pytest.approx(metrics(train("whole", **MOVED), "loss"), rel=1e-4)

    whole, again = tmp_path / "exact", tmp_path / "again"
    assert same(weights(whole / "unet"), weights(again / "unet"))
    assert metrics(again, "loss") == {step: loss for step, loss in metrics(whole, "loss").items() if step > 4}
