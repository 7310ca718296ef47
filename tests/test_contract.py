"""Rules across files: one source of truth for parameters, the direction of imports, consistent pins."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest
import yaml

from cxr.cli import cli
from cxr.config import TrainConfig, flatten, parameters_of
from cxr.evaluation.metrics import METRICS
from cxr.options import ENTRY_POINTS, render_mlproject
from cxr.parameters import default_of, spec_of, text_of

ROOT = Path(__file__).parent.parent
# Upper layers first. A package imports from lower layers and itself; the lowest are the other modules of `cxr/`.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"options"},
    {"studies"},
    {"runs"},
    {"tracking"},
    {"serving"},
    {"training", "figures"},
    {"evaluation", "audit", "network"},
    {"data"},
)
LOWEST = len(LAYERS)
ALLOWED_IN = {  # the only places that may import a package
    "mlflow": ("tracking", "runs", "studies", "serving.pyfunc_model"),
    "optuna": tuple(
        f"studies.{name}"
        for name in ("search", "search_report", "trial", "trial_queue", "optuna_study", "patient_storage")
    ),
    "click": ("cli", "options"),
    "jinja2": ("figures.html", "tracking.cards"),
    "ray": ("studies.on_ray",),
    "starlette": ("serving.demo",),
    "uvicorn": ("serving.demo", "serving.server"),
}


def modules() -> dict[str, Path]:
    """Dotted name below `cxr` -> file, the package files left out."""
    files = [path for path in (ROOT / "cxr").rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT / "cxr").with_suffix("").parts): path for path in files}


def package_of(module: str) -> str:
    return module.split(".")[0]


def layer(module: str) -> int:
    """From 0 at the top; modules of `cxr/` that are not named in `LAYERS` are in the lowest layer."""
    return next((number for number, names in enumerate(LAYERS) if package_of(module) in names), LOWEST)


def imports(path: Path) -> set[str]:
    """Every module named in an import of the file, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The imported modules of `cxr` itself, without the prefix."""
    return {name.removeprefix("cxr.") for name in imports(path) if name.removeprefix("cxr.") in modules()}


def test_every_package_has_a_layer_and_a_docstring() -> None:
    folders = {path.name: path for path in (ROOT / "cxr").iterdir() if (path / "__init__.py").exists()}
    assert folders.keys() == {name for names in LAYERS[3:] for name in names}
    for folder in folders.values():
        tree = ast.parse((folder / "__init__.py").read_text())
        assert len(tree.body) == 1
        assert len(ast.get_docstring(tree) or "") > 60


def test_no_import_from_an_upper_or_the_same_layer() -> None:
    seen = 0
    for name, path in modules().items():
        for used in own_imports(path):
            inside = package_of(used) == package_of(name) or layer(name) == LOWEST
            assert layer(used) > layer(name) or (inside and layer(used) == layer(name)), f"{name} imports {used}"
            seen += 1
    assert seen > 150


def test_there_are_no_circular_imports() -> None:
    graph = {name: own_imports(path) for name, path in modules().items()}
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("package", ALLOWED_IN)
def test_heavy_packages_are_imported_only_where_allowed(package: str) -> None:
    users = [name for name, path in modules().items() if any(i.split(".")[0] == package for i in imports(path))]
    assert users
    assert [
        name for name in users if name not in ALLOWED_IN[package] and package_of(name) not in ALLOWED_IN[package]
    ] == []


def test_the_committed_mlproject_is_the_rendered_one() -> None:
    assert (ROOT / "MLproject").read_text() == render_mlproject()


def test_mlproject_options_and_fields_are_one_set() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert set(project["entry_points"]) == set(ENTRY_POINTS)
    for name, cls in ENTRY_POINTS.items():
        declared = project["entry_points"][name]["parameters"]
        options = {p.name: p for p in cli.commands[cls.command].params if isinstance(p, click.Option)}
        expected = {item.name: text_of(default_of(item)) for item in parameters_of(cls)}
        assert {key: value["default"] for key, value in declared.items()} == expected
        assert {key: text_of(option.default) for key, option in options.items() if key in expected} == expected
        assert options.keys() - expected.keys() <= {"first"}  # `compare --runs`, which trains nothing
        assert set(re.findall(r"{(\w+)}", project["entry_points"][name]["command"])) == set(expected)


def test_every_parameter_is_logged_under_a_dotted_key() -> None:
    assert set(flatten(TrainConfig())) == {f"train.{item.name}" for item in fields(TrainConfig)}


def test_every_parameter_has_help_and_every_search_range_holds_its_default() -> None:
    searched = 0
    for item in fields(TrainConfig):
        spec = spec_of(item)
        assert spec.help
        if spec.search:
            low, high = spec.search
            assert low <= default_of(item) <= high
            searched += 1
    assert searched >= 4


def test_metric_names_are_unique() -> None:
    assert len(set(METRICS)) == len(METRICS) == 11


def test_every_experiment_builds_valid_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments")  # as when Python runs one of the scripts
    found = 0
    for path in sorted((ROOT / "experiments").glob("*.py")):
        space = runpy.run_path(str(path), run_name="contract")
        if "configs" in space:
            configs = space["configs"]("synthetic", "random")
            assert configs
            assert all(isinstance(config, TrainConfig) for config in configs)
            found += 1
    assert found >= 1


def locked() -> dict[str, str]:
    """Package -> version, from requirements.lock."""
    pins = re.findall(r"^([a-z0-9._-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return dict(pins)


def test_pins_agree_with_pyproject_and_conda_yaml() -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    assert len(requirements) > 8
    for requirement in requirements:
        assert requirement.specifier.contains(locked()[requirement.name]), requirement
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    python = next(entry.removeprefix("python=") for entry in conda if str(entry).startswith("python="))
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.0")
    assert {"pip": ["-r requirements.lock"]} in conda


def test_everything_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    declared = {re.split(r"[\[<>=]", text)[0] for text in [*project["dependencies"], *extras]}
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    used = {name.split(".")[0] for path in modules().values() for name in imports(path)}
    used -= {*sys.stdlib_module_names, "cxr"}
    assert len(used) > 12
    assert {names.get(name, name) for name in used} <= declared


def test_files_that_are_not_python_are_installed_with_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for name, globs in declared.items()
        for glob in globs
        for path in (ROOT / name.replace(".", "/")).glob(glob)
    }
    files = {path for path in (ROOT / "cxr").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files
    assert files == installed


def test_the_lock_names_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.findall(r"^[a-z0-9][^#]*?(?=^[a-z0-9]|^ *#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= len(locked()) > 50
    for block in blocks:  # one without a hash would make pip refuse all
        assert re.fullmatch(r"[a-z0-9._-]+==\S+( ;[^\\]+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+", block), block
    assert "://" not in text


def test_lower_bounds_are_above_the_advisories() -> None:
    """As SECURITY.md lists them."""
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["dicom"]]
    bounds = dict(text.split(">=") for text in texts)
    rows = re.findall(r"^\| (\w[\w-]*)[^|]*\| ([\d.]+) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    names = {"Pillow": "pillow", "PyTorch": "torch"}
    assert len(rows) == 4
    assert all(Version(bounds[names.get(name, name)]) == Version(bound) for name, bound in rows)


def functions() -> dict[str, ast.FunctionDef]:
    """Dotted name below `cxr` -> definition, methods and nested functions included."""
    return {
        f"{name}.{node.name}": node
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_functions_are_short() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions().items()}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 50} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 12


def test_functions_below_runs_take_six_arguments_at_most() -> None:
    taken = {
        name: [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        for name, node in functions().items()
        if layer(name) > layer("runs")
    }
    counts = {name: len([arg for arg in args if arg not in ("self", "cls")]) for name, args in taken.items()}
    assert len(counts) > 100
    assert {name: count for name, count in counts.items() if count > 6} == {}
