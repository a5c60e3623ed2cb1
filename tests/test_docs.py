"""The documentation: its commands parse and compose, its links resolve, and the files, tests and layouts that it names exist."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moexpand.base.errors import InputError
from moexpand.conf.check import check_batch
from moexpand.conf.check_launch import check_launch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NAMED_FILE = re.compile(r"`((?:\.ci|moexpand|conf|upcycle|parallel|train|data|launch|tests|bench|docs)/[\w./-]*)(?:::(\w+))?`")


def each_page() -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> Iterator[str]:
    """Lines of blocks without a language, continued ones joined, that start moexpand."""
    for language, block in fenced(page):
        for line in [] if language else block.replace("\\\n", " ").splitlines():
            if re.match(r"(\w+=\S* )*moexpand \S", line):
                yield line


def words_of(line: str) -> list[str]:
    """The words after `moexpand`."""
    return shlex.split(line.partition("moexpand ")[2])


def compose_line(words: list[str]) -> Any:
    from moexpand.cli import parse
    from moexpand.conf.compose import compose

    request = parse(words)
    if request.multirun:
        from moexpand.conf.axes import split_axes

        fixed, axes = split_axes(request.overrides)
        assert axes, words
        return compose(request.command, fixed + [axis.first for axis in axes])
    return compose(request.command, request.overrides, request.config_dir, request.config_name)


@each_page()
def test_every_command_line_composes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for language, block in fenced(page):
        name = re.match(r"# (\S+\.yaml)\n", block)
        if language == "yaml" and name:
            (tmp_path / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    for line in command_lines(page):
        config = compose_line(words_of(line))
        assert dataclasses.is_dataclass(config), line
        if words_of(line)[0] == "train":
            check_launch(config.launch)
            check_batch(config.train, config.parallel, config.launch.nodes * config.launch.processes)


def test_command_lines_are_found_and_a_wrong_one_would_fail() -> None:
    lines = [line for page in PAGES for line in command_lines(page)]
    commands = {words[0] if words[0] != "data" else " ".join(words[:2]) for words in map(words_of, lines)}
    from moexpand.cli import COMMANDS

    assert commands == set(COMMANDS)
    with pytest.raises(InputError, match=r"did you mean train\.steps"):
        compose_line(words_of("moexpand train run.dir=r data.shards=s train.stepz=3"))


def test_the_cluster_example_fits_its_own_number_of_ranks() -> None:
    """The README's job of SLURM, with the shape of the model that it names."""
    from moexpand.conf.check import check_train
    from moexpand.upcycle.models import find_model

    (line,) = (line for line in command_lines(ROOT / "README.md") if "launch=slurm" in line)
    config = compose_line(words_of(line))
    check_train(config, find_model("Qwen3-30B-A3B-x4").architecture, config.launch.nodes * config.launch.processes)


@each_page()
def test_every_relative_link_resolves(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}, and there is no such heading"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page()
def test_every_file_and_test_that_is_named_exists(page: Path) -> None:
    for name, test in NAMED_FILE.findall(page.read_text()):
        path = ROOT / name
        assert path.exists(), f"{page.name} names {name}, which does not exist"
        assert not test or re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE), f"{name} has no test {test}"


@each_page()
def test_every_module_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"-m moexpand\.([\w.]+)", page.read_text()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name} names moexpand.{name}"


def test_the_table_of_layouts_is_that_of_the_curves() -> None:
    from tests.parallel.layouts import FOUR, GROUPED_FOUR, GROUPED_TWO, TWO

    section = (ROOT / "docs/training.md").read_text().partition("\n## Layouts\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([A-Z]+\d[^|]*?) \| (\d) \|", section, re.MULTILINE))
    grouped = {f"child {name}" for name in (*GROUPED_TWO, *GROUPED_FOUR)}
    assert rows == dict.fromkeys(TWO, "2") | dict.fromkeys(FOUR, "4")
    assert set(re.findall(r"^\| (child [A-Z]+\d[^|]*?) \| \d \|", section, re.MULTILINE)) == grouped


def test_every_metric_is_explained() -> None:
    import torch

    from moexpand.parallel.engine import StepReport
    from moexpand.parallel.optimizer import Rates
    from moexpand.train.checkpoints import Progress
    from moexpand.train.metrics import step_row

    counts = torch.ones(2, 8, dtype=torch.float64)
    report = StepReport(1.0, 1, 1.0, False, counts, *(torch.ones(2) for _ in range(4)))
    text = (ROOT / "docs/training.md").read_text()
    missing = [name for name in step_row(report, Progress(1, 1, {}, {}, ""), Rates(1e-3), 1.0, 0.0, 2) if f"`{name}`" not in text]
    assert not missing


def test_every_group_and_option_of_a_command_is_in_the_table() -> None:
    from moexpand.conf.compose import GROUPS, group_options

    text = (ROOT / "docs/configuration.md").read_text()
    for command in GROUPS:
        for group, options in group_options(command).items():
            assert all(f"`{word}`" in text for word in (group, *options)), (command, group, options)


def test_every_drop_reason_is_explained() -> None:
    """Names under which the data room drops something: given to drop(), raised as Refused or returned as a reason."""
    text = (ROOT / "docs/data.md").read_text()
    patterns = (r'\.drop\("(\w+)"', r'(?:Refused|Unusable)\("(\w+)"', r'return None, "(\w+)"', r'return "(\w+)"$')
    names = ("filters.py", "pdf.py", "units.py", "tar_index.py", "record_templates.py", "chat.py", "named_files.py")
    names += ("attached.py", "chat_content.py", "parsed.py", "parsed_mineru.py", "parsed_docling.py")
    files = [ROOT / "data" / name for name in names]
    found = {reason for file in files for pattern in patterns for reason in re.findall(pattern, file.read_text(), re.MULTILINE)}
    found |= {"duplicate", "encrypted", "broken", "time_limit", "memory_limit", "crashed"}
    assert len(found) > 15
    assert not {reason for reason in found if f"`{reason}`" not in text}


@each_page()
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.findall(r"\bQS_\w+", page.read_text()), "figures of the last quickstart are to be filled in"
