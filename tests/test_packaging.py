"""The wheel and the sdist, built without network and installed into empty environments."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = PROJECT["tool"]["setuptools"]["package-dir"]
VERSION = PROJECT["project"]["version"]


def run(*command, cwd, **environment) -> str:
    """Standard output of a command that has to succeed, in an environment without our own paths."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """`sdist`, `wheel` and `wheel_from_sdist`, built from a copy, so that the checkout stays as it is."""
    base = tmp_path_factory.mktemp("packaging")
    source = base / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif path.name in {*ROOMS.values(), "tests", "benchmarks", ".ci"}:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", source]
    run(*build, "--wheel", "--outdir", base / "direct", cwd=base)
    shutil.rmtree(source / "build")
    run(*build, "--outdir", base / "dist", cwd=base)  # the sdist, then a wheel out of it
    return {
        "sdist": next((base / "dist").glob("*.tar.gz")),
        "wheel": next((base / "direct").glob("*.whl")),
        "wheel_from_sdist": next((base / "dist").glob("*.whl")),
    }


@pytest.mark.parametrize("kind", ["wheel", "wheel_from_sdist"])
def test_it_installs_in_an_empty_environment_and_says_its_version(built, tmp_path, kind):
    """`--no-deps` keeps 2 GB and the network out of it; --version needs the standard library alone."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built[kind], cwd=tmp_path
    )
    assert run(tmp_path / "empty" / "bin" / "affekt", "--version", cwd=tmp_path) == f"affekt {VERSION}\n"
    assert run(python, "-m", "affekt", "--version", cwd=tmp_path) == f"affekt {VERSION}\n"


def test_the_wheel_holds_the_rooms_and_nothing_else(built, repository_files):
    wanted = set()
    for path in repository_files():
        for package, folder in ROOMS.items():
            if path.is_relative_to(ROOT / folder):
                wanted.add("/".join((*package.split("."), *path.relative_to(ROOT / folder).parts)))
    for kind in ("wheel", "wheel_from_sdist"):
        with zipfile.ZipFile(built[kind]) as wheel:
            found = {name for name in wheel.namelist() if not name.startswith(f"affekt-{VERSION}.dist-info/")}
        assert found == wanted, f"{kind}: missing {sorted(wanted - found)}, not wanted {sorted(found - wanted)}"


def test_the_metadata_are_complete(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        info = f"affekt-{VERSION}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
        assert "affekt = affekt.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"test", "export", "text", "wandb", "opensmile", "s3", "gs", "http"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert metadata.get_payload().startswith("# affekt")


def test_the_sdist_can_test_itself(built):
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    here = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    assert {"Makefile", "constraints-cpu.txt", "LICENSE", "CITATION.cff", "CHANGELOG.md", "README.md", *here} <= names


@pytest.mark.slow
def test_it_installs_with_all_its_dependencies(built, tmp_path):
    """Needs a package index and 2 GB: the whole command line in an environment that pip filled by itself."""
    run(sys.executable, "-m", "venv", "full", cwd=tmp_path)
    python = tmp_path / "full" / "bin" / "python"
    constraints = ROOT / "constraints-cpu.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, built["wheel"], cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    assert "pretrain" in run(tmp_path / "full" / "bin" / "affekt", "--help", cwd=tmp_path)
    run(python, "-c", "import affekt.data.torch_extensions, timm, torchaudio, deepspeed", cwd=tmp_path)
