"""The notebook runs from top to bottom, and is kept as it ran."""

import re

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "notebooks/ddpm_mnist.ipynb"


def outputs(cell, kind: str) -> list:
    return [output for output in cell.outputs if output.output_type == kind]


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_on_a_small_budget(dataset_dir, monkeypatch):
    for name, value in (("FAST", "1"), ("STEPS", "20")):
        monkeypatch.setenv(f"DDPM_NOTEBOOK_{name}", value)
    monkeypatch.setenv("DDPM_MNIST_DATASET", dataset_dir)
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()  # or raises
    text = "\n".join(output.text for cell in code_cells(notebook) for output in outputs(cell, "stream"))
    assert re.search(r"train_ddpm_mnist\.py:\d+ +loss = \(weights \* error\)\.mean\(\)", text)  # eq. 14's line
    (bits,) = re.findall(r"bound: ([\d.]+)", text)
    assert 0 < float(bits) < 40
    pictures = sum("image/png" in o.data for c in code_cells(notebook) for o in outputs(c, "display_data"))
    saved = sum("image/png" in o.data for c in code_cells(nbformat.read(PATH, 4)) for o in outputs(c, "display_data"))
    assert pictures == saved > 15


def test_it_is_saved_with_the_outputs_of_one_run():
    cells = code_cells(nbformat.read(PATH, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(outputs(cell, "error") for cell in cells)
    assert "FAST" in cells[0].source and PATH.stat().st_size < 3_000_000
    text = "\n".join(output.text for cell in cells for output in outputs(cell, "stream"))
    assert "/root" not in text and "/home" not in text  # nobody's folders


def test_it_names_lines_that_are_still_there():
    """`file:number    line` in its outputs: the line is in that file, though its number may have moved."""
    cells = code_cells(nbformat.read(PATH, as_version=4))
    text = "\n".join(output.text for cell in cells for output in outputs(cell, "stream"))
    shown = re.findall(r"^(\S+\.py):\d+ {4}(.+)$", text, re.MULTILINE)
    assert len(shown) > 15
    for path, line in shown:
        assert line in (ROOT / path).read_text(), (path, line)
