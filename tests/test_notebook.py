"""The notebook runs from top to bottom, and is saved with the outputs of one run."""

import importlib.metadata
import inspect
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from train_ddpm_mnist import train

PATH = ROOT / "notebooks/ddpm_mnist.ipynb"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, output_type: str) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == output_type]


def printed(notebook) -> str:
    return "\n".join(output.text for output in outputs(notebook, "stream"))


def pictures(notebook) -> int:
    return sum("image/png" in output.data for output in outputs(notebook, "display_data"))


def saved():
    return nbformat.read(PATH, as_version=4)


def test_it_runs_on_a_small_budget(dataset_dir, monkeypatch):
    monkeypatch.setenv("DDPM_NOTEBOOK_FAST", "1")
    monkeypatch.setenv("DDPM_MNIST_DATASET", dataset_dir)
    notebook = saved()
    resources = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=600, iopub_timeout=60, resources=resources).execute()  # or raises
    text = printed(notebook)
    assert re.search(r"train_ddpm_mnist\.py:\d+ +loss = F\.mse_loss\(model_output", text)  # eq. 14
    assert inspect.getsource(train) in text
    (bits,) = re.findall(r"bound: ([\d.]+)", text)
    assert 0 < float(bits) < 40
    assert pictures(notebook) == pictures(saved()) > 15


def test_it_is_saved_with_the_outputs_of_one_run():
    notebook = saved()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not outputs(notebook, "error")
    assert {output.name for output in outputs(notebook, "stream")} == {"stdout"}  # no warnings, no progress bars
    assert "FAST" in cells[0].source and PATH.stat().st_size < 3_000_000
    assert not re.search(r"/(root|home|tmp|work|Users)/", printed(notebook))  # nobody's folders


def test_it_names_lines_of_the_repository():
    """`file:number    line` in its outputs: the line is in that file, though its number may have moved."""
    shown = re.findall(r"^(\S+\.py):\d+ {4}(.+)$", printed(saved()), re.MULTILINE)
    assert len(shown) > 15
    for path, line in shown:
        assert line in (ROOT / path).read_text(encoding="utf-8"), (path, line)


def test_on_kaggle_the_first_cell_clones_and_installs_what_it_needs_and_keeps_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    version, commands = importlib.metadata.version, []

    def record(command: list[str], **options) -> None:
        commands.append(command)
        if command[0] == "git":
            shutil.copytree(ROOT, "ddpm-mnist", ignore=shutil.ignore_patterns(".git", "ddpm-mnist*", ".venv"))

    monkeypatch.setattr(subprocess, "run", record)
    cell = code_cells(saved())[0].source
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError, match="put its address into REPOSITORY"):
        exec(cell, {})
    with warnings.catch_warnings():
        exec(cell.replace('REPOSITORY = ""', f'REPOSITORY = "{ROOT}"'), {})
    assert Path.cwd() == tmp_path / "ddpm-mnist" and Path("train_ddpm_mnist.py").is_file()
    clone, install = commands
    assert clone[:2] == ["git", "clone"]
    assert {"diffusers", "transformers", "numpy"} < {part.partition(">")[0] for part in install}  # pip keeps what fits
    assert install[-1] == f"torch=={version('torch')}"
