"""The design holds: imports flow one way, `train` fits a screen, and what is written out of the code is current."""

import ast
import graphlib
import importlib

import pytest
from conftest import ROOT

SCRIPTS = ("train_ddpm_mnist", "generate", "evaluate", "push_to_hub")
WINGS = ("training", "evaluation", "hub")
FIRST = ("options", "client", "randomness")  # what the paper's files stand on


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree of every module of the project, tests and benchmarks apart."""
    paths = [*(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "ddpm_mnist").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {names[path]: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, at its top or late."""
    found, trees = {}, modules()
    for name, tree in trees.items():
        package = name.split(".") if name.count(".") < 2 and name in ("ddpm_mnist",) else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                target = ".".join([*base, *([node.module] if node.module else [])])
                members = {f"{target}.{alias.name}" for alias in node.names}
                found[name] |= {m for m in (members & trees.keys()) or {target} if m in trees and m != name}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & trees.keys()
    return found


def layer(name: str) -> int:
    """0 for options, 1 for the paper, 2 for the wings, 3 for the scripts."""
    if name in SCRIPTS:
        return 3
    parts = name.split(".")
    if len(parts) > 1 and parts[1] in WINGS:
        return 2
    return 0 if parts[-1] in (*FIRST, "ddpm_mnist") else 1


def test_imports_flow_one_way_and_there_are_no_circles():
    graph = imports()
    assert len(graph) > 25 and "ddpm_mnist.loss" in graph["train_ddpm_mnist"]
    up = [f"{name} -> {other}" for name, others in graph.items() for other in others if layer(other) > layer(name)]
    assert not up
    assert not [name for name, others in graph.items() if others & set(SCRIPTS)]  # no part imports a script
    graphlib.TopologicalSorter(graph).prepare()  # CycleError: a circle


def test_train_is_one_flat_screen():
    (train,) = [node for node in modules()["train_ddpm_mnist"].body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno + 1 < 60
    inner = [node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda | ast.Nonlocal)]
    assert inner == [train]


def test_the_list_of_options_is_current():
    from docs.write_options import options_markdown

    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == options_markdown()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_opens_with_what_the_script_does_and_groups_options(script, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{script}.py"])  # argparse names the program by it
    main = importlib.import_module(script).main

    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        return capsys.readouterr().out

    text = shown()
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: {script}.py [--option value ...]") and lines[2][0].isupper()
    assert "(default: None)" not in text and "dataclass" not in text
    if script == "train_ddpm_mnist":
        assert "(default: muon)" in text and "Optimization:" in text
        smoke = shown("--config", str(ROOT / "configs/smoke.yaml"))
        assert "(default: adamw)" in smoke and "(default: muon)" not in smoke
