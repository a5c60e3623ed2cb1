"""The package: what a wheel holds, that a checkout works without an install, and that nothing imports a room by its bare name."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import moexpand

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["conf", "data", "launch", "parallel", "train", "upcycle"]
FLOORS = {
    "conf": {"base"},
    "upcycle": {"base"},
    "data": {"base"},
    "parallel": {"base"},
    "train": {"base", "conf", "data", "parallel", "upcycle"},
    "launch": {"base", "conf"},
    "moexpand/base": {"base"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, at its head or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(".relative")
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel that was built from a copy of the sources."""
    copy = tmp_path_factory.mktemp("build") / "copy"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "wandb", "quickstart", "runs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    (built,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_the_package_and_nothing_else(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"moexpand", f"moexpand-{moexpand.__version__}.dist-info"}


def test_wheel_holds_every_module_and_every_yaml_file(wheel: list[str]) -> None:
    expected = {f"moexpand/{path.relative_to(ROOT)}" for room in ROOMS for path in sources(room)}
    expected |= {str(path.relative_to(ROOT)) for path in sources("moexpand")}
    expected |= {f"moexpand/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert expected <= set(wheel)
    assert "moexpand/py.typed" in wheel


def test_checkout_works_from_any_folder_without_an_install(tmp_path: Path) -> None:
    program = "import moexpand.train, moexpand.conf.compose, moexpand.conf as conf; print(conf.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "conf" / "__init__.py"), done.stderr


def test_search_path_of_an_installed_package_is_its_own(tmp_path: Path) -> None:
    inside = tmp_path / "site" / "moexpand"
    shutil.copytree(ROOT / "moexpand", inside, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ROOMS:
        (inside / room).mkdir()
        (inside / room / "__init__.py").touch()
        (tmp_path / "site" / room).mkdir()
        (tmp_path / "site" / room / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    program = "import moexpand; print(list(moexpand.__path__))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str([str(inside)]), done.stderr


@pytest.mark.parametrize("folder", [*ROOMS, "moexpand", "tests", "bench"])
def test_nothing_imports_a_room_by_its_bare_name(folder: str) -> None:
    for path in sources(folder):
        if path.parent.name == "model_code":
            continue  # travels with checkpoints, where its files import each other
        bare = {name for name in imported_modules(path) if name.split(".")[0] in {*ROOMS, ""}}
        assert not bare, f"{path}: {bare}"


def test_ruff_bans_the_bare_names(tmp_path: Path) -> None:
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert sorted(banned) == ROOMS
    for room in ROOMS:
        line = f"from {room} import something\nimport {room}.part\n"
        command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--select", "TID251", "-"]
        done = subprocess.run(command, input=line, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.count(f"import it as moexpand.{room}") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("room", list(FLOORS))
def test_no_floor_imports_upward(room: str) -> None:
    own = room.rpartition("/")[2]
    for path in sources(room):
        used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("moexpand.")}
        above = used & {*ROOMS, "cli", "console", "base"} - FLOORS[room] - {own}
        assert not above, f"{path} imports {above}"


def test_only_parallel_imports_megatron() -> None:
    for folder in [*ROOMS, "moexpand"]:
        for path in sources(folder):
            uses = any(name.split(".")[0] == "megatron" for name in imported_modules(path))
            assert folder == "parallel" or not uses, path


def test_git_does_not_ignore_the_data_room() -> None:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert not {"data", "/data", "data/", "/data/"} & {line.strip() for line in lines}


def test_every_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = {line.partition("==")[0].lower() for line in lines}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in wanted}
    assert names <= pins


def test_readme_shows_the_two_commands_and_every_command_of_the_table() -> None:
    from moexpand.cli import COMMANDS

    readme = (ROOT / "README.md").read_text()
    fenced = [line for block in re.findall(r"```\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()]
    assert {"make quickstart", "make test"} <= set(fenced)
    assert all(f"| `{name}` |" in readme for name in COMMANDS)


def test_every_file_stays_under_400_lines() -> None:
    long = {
        str(path): count
        for room in [*ROOMS, "moexpand"]
        for path in sources(room)
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long
