"""The design holds: imports flow one way, `train` fits a screen, and what is written out of the code is current."""

import ast
import graphlib
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

SCRIPTS = ("train_ddpm_mnist", "generate", "evaluate", "push_to_hub")
WINGS = ("training", "evaluation", "hub")
BASE = ("ddpm_mnist", "errors", "options", "record", "offline", "randomness")  # the rest is the paper


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree of every module of the project, tests and benchmarks apart."""
    paths = [*(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "ddpm_mnist").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {names[path]: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, at its top or late."""
    graph, trees = {}, modules()
    for name, tree in trees.items():
        package = name.split(".")[:-1]
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                target = ".".join([*base, *([node.module] if node.module else [])])
                members = {f"{target}.{alias.name}" for alias in node.names}
                graph[name] |= {m for m in (members & trees.keys()) or {target} if m in trees and m != name}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & trees.keys()
    return graph


def layer(name: str) -> int:
    """0 for the base, 1 for the paper, 2 for the wings, 3 for the scripts."""
    parts = name.split(".")
    if name in SCRIPTS:
        return 3
    if len(parts) > 1 and parts[1] in WINGS:
        return 2
    return 0 if parts[-1] in BASE and len(parts) < 3 else 1


def test_imports_flow_one_way_and_there_are_no_circles():
    graph = imports()
    assert len(graph) > 25 and "ddpm_mnist.training.run" in graph["train_ddpm_mnist"]
    up = [f"{name} -> {other}" for name, others in graph.items() for other in others if layer(other) > layer(name)]
    assert not up
    assert not [name for name, others in graph.items() if others & set(SCRIPTS)]  # no part imports a script
    wings = {name: name.split(".")[1] for name in graph if layer(name) == 2}
    across = {(wings[a], wings[b]) for a in wings for b in graph[a] & wings.keys() if wings[a] != wings[b]}
    assert across == {("training", "hub")}  # a run pushes
    graphlib.TopologicalSorter(graph).prepare()  # CycleError: a circle


def test_train_is_one_flat_screen():
    (train,) = [node for node in modules()["train_ddpm_mnist"].body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno + 1 <= 45
    inner = [node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda | ast.Nonlocal)]
    assert inner == [train]
    called = {ast.unparse(node.func) for node in ast.walk(train) if isinstance(node, ast.Call)}
    assert {"scheduler.add_noise", "unet", "run.target", "F.mse_loss"} <= called


def test_an_installed_package_needs_what_requirements_txt_lists_without_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line.partition("#")[0].strip() for line in lines]
    assert project["dependencies"] + project["optional-dependencies"]["test"] == required


def show_help(script: str, *arguments: str) -> str:
    """What `--help` prints, 100 columns wide, in a process in which torch cannot be imported: it takes seconds."""
    code = "import os, runpy, sys; sys.modules['torch'] = None; os.environ['COLUMNS'] = '100'; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, f"{script}.py", *arguments, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch_and_is_what_the_list_of_options_says(script):
    """docs/options.md holds the text of `--help` of each script, in a block of code."""
    text = show_help(script)
    assert text.startswith(f"usage: {script}.py [--option value ...]") and "(default: None)" not in text
    options = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert text.strip() in options, f"docs/options.md is out of date: put the output of {script}.py --help there"


def test_help_shows_the_defaults_of_the_config_that_is_given():
    smoke = show_help("train_ddpm_mnist", "--config", "configs/smoke.yaml")
    assert "(default: adamw)" in smoke and "(default: muon)" not in smoke
    assert "unet.block_out_channels [8, 16]" in " ".join(smoke.split())
