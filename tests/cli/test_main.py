"""The command answers fast, lists what there is, and turns every error into one sentence and an exit code."""

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import moexpand
from moexpand import cli
from moexpand.base.errors import CheckFailed, EnvironmentFailure, InputError, Stopped
from moexpand.conf import schema
from moexpand.conf.keys import keys_of

ROOT = Path(moexpand.__file__).resolve().parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "moexpand", *words], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for moexpand.cli.verify whose `run` each test sets."""
    module = types.ModuleType("moexpand.cli.verify")
    module.run = lambda config: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moexpand.cli.verify", module)
    return module


def test_help_answers_in_half_a_second() -> None:
    run("--help")  # compiles
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert run("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_help_imports_neither_torch_nor_hydra() -> None:
    program = (
        "import sys; from moexpand.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'rich', 'transformers', 'yaml'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_table_of_commands_agrees_with_the_schema() -> None:
    assert list(cli.COMMANDS) == list(schema.COMMANDS)
    for name, dataclass in schema.COMMANDS.items():
        assert dataclass.__doc__ is not None
        assert cli.COMMANDS[name].lower() == dataclass.__doc__.strip().rstrip(".").lower()


def test_every_command_has_a_module() -> None:
    for name in cli.COMMANDS:
        assert (ROOT / "moexpand" / "cli" / f"{name.replace(' ', '_')}.py").is_file(), name


@pytest.mark.parametrize("name", list(schema.COMMANDS))
def test_help_of_a_command_lists_every_key_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for key in keys_of(schema.COMMANDS[name]).values():
        described = [line for line in lines if line.startswith(f"{key.name}=") and key.help in line]
        assert len(described) == 1, key.name
        assert ("???" in described[0]) == key.required
        assert all(choice in described[0] for choice in key.choices)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moexpand {moexpand.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["upcyle", "source=a"], "upcyle is not a command; did you mean `moexpand upcycle`?"),
        (["data"], "data is not a command; did you mean `moexpand data build`?"),
        (["data", "inspct"], "did you mean `moexpand data inspect`?"),
        (["frobnicate"], "`moexpand --help` lists them."),
        (["verify", "--fast"], "--fast is not an option"),
        (["verify", "--config-name"], "--config-name needs a value"),
        (["verify", "source"], "'source' is not key=value; did you mean source?"),
        (["verify", "sorce=a", "target=b"], "sorce is not a key of `moexpand verify`; did you mean source?"),
        (["verify"], "`moexpand verify` needs source and target"),
    ],
)
def test_wrong_words_are_one_sentence_and_2(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moexpand: ")
    assert expected in err
    assert err.count("\n") == 1


def test_no_command_shows_the_overview_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: moexpand COMMAND" in err


def test_command_gets_its_typed_configuration(command: types.ModuleType) -> None:
    seen = []
    command.run = seen.append  # type: ignore[attr-defined]
    assert cli.main(["verify", "source=a", "target=b"]) == 0
    assert seen == [schema.VerifyCommand(source="a", target="b")]


def test_users_yaml_reaches_the_command(command: types.ModuleType, tmp_path: Path) -> None:
    seen = []
    command.run = seen.append  # type: ignore[attr-defined]
    (tmp_path / "mine.yaml").write_text("source: a\ntarget: b\n")
    assert cli.main(["verify", "--config-dir", str(tmp_path), "--config-name=mine", "target=c"]) == 0
    assert seen == [schema.VerifyCommand(source="a", target="c")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckFailed("It differs."), 1),
        (InputError("It is wrong."), 2),
        (EnvironmentFailure("It broke."), 3),
        (Stopped("Saved."), 75),
    ],
)
def test_error_is_its_sentence_and_its_code(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(config: object) -> None:
        raise error

    command.run = fail  # type: ignore[attr-defined]
    assert cli.main(["verify", "source=a", "target=b"]) == code
    assert capsys.readouterr().err == f"moexpand: {error}\n"
    assert cli.main(["verify", "source=a", "target=b", "debug=true"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_error_is_one_line_and_3(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: object) -> None:
        raise ZeroDivisionError("two\nlines")

    command.run = fail  # type: ignore[attr-defined]
    assert cli.main(["verify", "source=a", "target=b"]) == 3
    expected = "moexpand: Unexpected ZeroDivisionError: two lines; run again with debug=true for the traceback\n"
    assert capsys.readouterr().err == expected


def test_keyboard_interrupt_is_130(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    command.run = interrupt  # type: ignore[attr-defined]
    assert cli.main(["verify", "source=a", "target=b"]) == 130
    assert capsys.readouterr().err == "moexpand: Interrupted.\n"


def test_difference_found_is_the_commands_own_code(command: types.ModuleType) -> None:
    command.run = lambda config: 1  # type: ignore[attr-defined]
    assert cli.main(["verify", "source=a", "target=b"]) == 1


def test_reader_that_stops_reading_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f"set -o pipefail; {sys.executable} -m moexpand train --help | head -n 1"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
