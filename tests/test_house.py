"""The house holds: packages match folders, rooms import only what they may, versions and dependencies agree."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR = PROJECT["tool"]["setuptools"]["package-dir"]
MAPPED = {"data", "pretrain", "finetune", "launch"}
OURS = MAPPED | {"affekt", "tests", "benchmarks"}
MAY_IMPORT = {
    "affekt": MAPPED | {"affekt"},
    "data": {"data"},
    "pretrain": {"pretrain", "data"},
    "finetune": {"finetune", "pretrain", "data"},
    "launch": {"launch"},
    "tests": OURS - {"tests"},
    "benchmarks": OURS - {"tests"},
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree: ast.Module) -> set[str]:
    """Dotted names of all imports anywhere in the tree, with `import_module("...")` and the names after `from`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def rooms_of(module: str) -> set[str]:
    """The room a dotted module name leads to: `affekt.data.shards` to data, `affekt.cli` to affekt, `torch` to none.

    The version number belongs to no room: results and exports of every room state it.
    """
    if module == "affekt.__version__":
        return set()
    first, _, rest = module.partition(".")
    second = rest.partition(".")[0]
    if first == "affekt" and second in OURS:
        return {second}
    return {first} & OURS


def test_the_package_list_matches_the_folders():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in PACKAGE_DIR.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            if "__pycache__" not in inside:
                found.add(".".join((package, *inside)))
    assert found == listed


def test_a_room_imports_only_what_it_may(repository_files):
    complaints = []
    for path in repository_files(".py"):
        room = path.relative_to(ROOT).parts[0]
        for module in sorted(imported_modules(tree_of(path))):
            where = f"{path.relative_to(ROOT)} imports {module}"
            if module.startswith("."):
                complaints.append(f"{where}: absolute imports only")
            elif module.partition(".")[0] in MAPPED:
                complaints.append(f"{where}: rooms are imported as affekt.<room>")
            elif rooms_of(module) - MAY_IMPORT.get(room, set()):
                complaints.append(f"{where}: {room} may import {sorted(MAY_IMPORT.get(room, set()))}")
    assert not complaints, "\n".join(complaints)


def test_the_import_reader_sees_every_way_to_import():
    source = """
import torch, affekt.data.shards as shards
from affekt import launch
def later():
    from affekt.pretrain.export import load_encoder
    importlib.import_module("affekt.finetune.probes.probe")
from . import sibling
"""
    modules = imported_modules(ast.parse(source))
    assert set().union(*map(rooms_of, modules)) == {"data", "launch", "pretrain", "finetune"}
    assert ".sibling" in modules or "..sibling" in modules


@pytest.mark.parametrize("name", ["data", "data.corpora", "data.media", "data.synth", "pretrain", "finetune", "launch"])
def test_a_room_refuses_its_bare_name_from_the_checkout(name):
    def importing(module):
        command = [sys.executable, "-c", f"import {module}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    refused = importing(name)
    assert refused.returncode != 0
    assert "import it under that name" in refused.stderr and f"affekt.{name.partition('.')[0]}" in refused.stderr
    assert importing(f"affekt.{name}").returncode == 0


def test_versions_agree():
    stated = PROJECT["project"]["version"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert {citation[1], newest[1], version("affekt")} == {stated}


def declared(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_every_declared_dependency_is_pinned_inside_its_range():
    lines = (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, equals, pinned = line.partition("==")
            assert equals and re.fullmatch(r"[A-Za-z0-9_.-]+", name), f"not an exact pin: {line}"
            pins[canonicalize_name(name)] = pinned
    for requirement in declared("test", "export", "text"):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(pinned), f"{requirement} does not hold {pinned}"


def test_what_is_imported_is_declared(repository_files):
    names = {
        canonicalize_name(requirement.name) for requirement in declared("test", "export", "text", "wandb", "opensmile")
    }
    distributions = packages_distributions()
    complaints = []
    for path in repository_files(".py"):
        for module in {name.partition(".")[0] for name in imported_modules(tree_of(path))}:
            if module in OURS or module in sys.stdlib_module_names or not module:
                continue
            origins = {canonicalize_name(name) for name in distributions.get(module, [module])}
            if not origins & names:
                complaints.append(f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare")
    assert not complaints, "\n".join(complaints)
