"""A run's page is one file that needs no other, and shows the figures that the run has and no others."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moexpand.cli import main
from moexpand.train.report import short_names
from moexpand.train.report_plots import MOST_POINTS, thinned
from moexpand.train.report_sections import SECTIONS
from moexpand.train.tables import series
from tests.commands import ROOT

CONFIG = """
checkpoint: null
seed: 0
model: {num_experts: 512, router_n_groups: 8}
train: {steps: 6, global_batch: 4}
optim: {lr: 1.0e-03, clip_grad: 1.0}
router: {gradient: ste}
parallel: {expert: 2}
"""


def rows_of(steps: int) -> list[dict[str, Any]]:
    """Rows as a run writes them: some figures at every step, some at every second, siblings at the first and every fourth."""
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "tokens": 100 * step, "loss": 5.0 / step, "grad_norm": 1.0 + 1 / step, "lr": 1e-3}
        row |= {"router_lr": 2e-3, "tokens_per_second": 10.0, "seconds": 1.0, "data_seconds": 0.1, "skipped": 0}
        row |= {"memory_gib": 1.5}
        row |= {"moe/balance_loss": 1.1, "moe/group_balance_loss": 1.2, "moe/z_loss": 40.0 + step, "moe/load_cv": 0.5}
        row |= {"moe/rank_rows_cv": 0.0, "moe/rank_rows_max": 1.0, "moe/group_load_cv": 0.4, "moe/load_max": 2.0 + step}
        row |= {"moe/group_load_max": 2.0, "moe/load_entropy": 0.9, "moe/dead_experts": 0.0}
        if step % 2:
            row |= {f"moe/router_{name}": 0.9 for name in ("entropy", "margin", "parent_overlap", "parents")}
            row |= {f"time/{name}": 0.1 for name in ("router", "dispatch", "experts", "combine", "optimizer")}
            row["time/forward_backward"] = 0.8
        if step == 1 or step % 4 == 0:
            row |= {f"moe/sibling_{name}": 1 - 1e-4 * step for name in ("weights", "router", "outputs")} | {"time/siblings": 0.2}
        rows.append(row)
    return rows


EVALUATIONS = [
    {"step": step, "tokens": 100 * step, "held_out_loss": 6.0 - step / 2, "held_out_tokens": 10, "unigram_entropy": 6.46}
    for step in (0, 3, 6)
]


def make_run(
    folder: Path, rows: list[dict[str, Any]], evaluations: list[dict[str, Any]] | None = None, config: str = CONFIG
) -> Path:
    """A run folder; without evaluations and with an empty `config` those files are missing."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluations is not None:
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def page_of(run: Path, *words: str) -> str:
    """The page that `moexpand report` writes where it writes unless told otherwise."""
    assert main(["report", f"run={run}", *words]) == 0
    assert [each.name for each in (run / "report").iterdir()] == ["index.html"]
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def titles(page: str) -> list[str]:
    """Headings of the plots."""
    return re.findall(r"<h3>(.*?)</h3><svg", page)


def cells(page: str, heading: str) -> list[str]:
    """The cells of a table's first row with this heading."""
    (row,) = re.findall(rf"<tr><th>(?:<code>)?{re.escape(heading)}(?:</code>)?</th>(.*?)</tr>", page)[:1]
    return re.findall(r"<td.*?>(.*?)</td>", row)


class Elements(HTMLParser):
    """Identities, references and open elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.names: set[str] = set()
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("href", "src", "xlink:href"):
                self.targets.append(str(value))
            self.targets += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with all figures."""
    return make_run(tmp_path / "one", rows_of(6), EVALUATIONS)


def test_every_section_and_plot_is_there(run: Path) -> None:
    page = page_of(run)
    for section in SECTIONS:
        assert f'<section id="{section.anchor}">' in page
        assert f'<a href="#{section.anchor}">' in page
    expected = [plot for section in SECTIONS for plot in section.plots if plot.title != "Held-out loss beside the first run's"]
    assert titles(page) == [plot.title.replace("'", "&#x27;") for plot in expected]
    assert page.count("<figcaption>") == len(expected)
    assert page.count(">step</text>") == len(expected), "every plot says what its axis is"


def test_the_page_needs_no_other_file_and_no_script(run: Path) -> None:
    page = page_of(run)
    found = Elements(page)
    assert found.open == []
    assert not found.names & {"script", "link", "img", "iframe", "object", "image"}
    assert len(found.ids) == len(set(found.ids))
    assert found.targets
    assert all(target.startswith("#") and target[1:] in found.ids for target in found.targets)
    assert not re.findall(r"https?:|@import|file:", page)


def test_figures_are_the_first_last_and_median_value(run: Path) -> None:
    page = page_of(run)
    assert cells(page, "moe/load_max") == ["3", "8", "5.5"]
    assert cells(page, "held_out_loss") == ["6", "3", "4.5"]
    assert cells(page, "moe/sibling_weights") == ["0.9999", "0.9996", "0.99975"]
    assert cells(page, "loss") == ["5", "0.83333", "1.4583"]
    assert cells(page, "time/siblings") == ["0.2", "0.2", "0.2"]


def test_the_head_tells_settings_and_progress(run: Path) -> None:
    page = page_of(run)
    assert cells(page, "run folder") == [f"<code>{run}</code>"]
    assert cells(page, "steps") == ["6 of 6"]
    assert cells(page, "tokens") == ["600"]
    assert cells(page, "starts from") == ["fresh weights"]
    assert cells(page, "model") == ["512 experts, groups 8"]
    assert cells(page, "layout") == ["EP 2"]
    assert cells(page, "router") == ["gradient ste"]


def test_the_shape_is_the_checkpoints_and_the_plans(tmp_path: Path) -> None:
    """config.yaml holds the shape of a fresh model even where a checkpoint's replaces it."""
    config = CONFIG.replace("checkpoint: null", f"checkpoint: {tmp_path / 'gone'}")
    run = make_run(tmp_path / "one", rows_of(1), config=config)
    page = page_of(run)
    assert cells(page, "starts from") == [str(tmp_path / "gone")]
    assert "<th>model</th>" not in page
    shape = {"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 24, "num_experts_per_tok": 8, "moe_intermediate_size": 8}
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "config.json").write_text(json.dumps(shape))
    sizes = "top-8, layers 2, hidden 32, inside an expert 8"
    assert cells(page_of(run), "model") == [f"24 experts, groups 1, {sizes}"]
    plan = {"num_experts": 96, "num_groups": 4, "placement": "halves_tile", "init": "drop"}
    (run / "plan.json").write_text(json.dumps(plan))
    page = page_of(run)
    assert cells(page, "model") == [f"96 experts, groups 4, {sizes}"]
    assert cells(page, "expansion") == ["halves_tile, init drop"]


def test_runs_are_compared_on_one_page(tmp_path: Path, run: Path) -> None:
    other_rows = [{key: value for key, value in row.items() if not key.startswith("moe/sibling")} for row in rows_of(4)]
    two = make_run(tmp_path / "two", other_rows, EVALUATIONS[:2], CONFIG.replace("gradient: ste", "gradient: topk"))
    out = tmp_path / "new" / "both.html"
    assert main(["report", f"run={run}", f"compare=[{two}]", f"out={out}"]) == 0
    page = out.read_text()
    assert not (run / "report").exists()
    assert Elements(page).open == []
    assert titles(page)[1] == "Held-out loss beside the first run&#x27;s"
    assert "<h1>moexpand report: one, two</h1>" in page
    for name, colour in (("one", "#0072b2"), ("two", "#d55e00")):
        assert page.count(f'<i style="background:{colour}"></i>{name}</span>') == len(SECTIONS)
    assert cells(page, "router.gradient") == ["ste", "topk"]
    assert "Keys that differ between the runs: 1<" in page
    assert cells(page, "held_out_loss") == ["6", "3", "4.5", "6", "4.5", "5.25"]
    assert cells(page, "moe/sibling_weights") == ["0.9999", "0.9996", "0.99975", "", "", ""]


def test_a_run_is_drawn_once(run: Path) -> None:
    assert page_of(run) == page_of(run, f"compare=[{run}/../one]")


def test_many_runs_have_colours_of_their_own(tmp_path: Path, run: Path) -> None:
    others = [make_run(tmp_path / str(number), rows_of(2)) for number in range(10)]
    page = page_of(run, f"compare=[{','.join(map(str, others))}]")
    assert len(set(re.findall(r'<i style="background:(#\w{6})">', page))) == 11


def test_names_tell_runs_apart() -> None:
    assert short_names([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/run"), Path("/x/run")]) == ["//run", "x/run"]


def test_a_run_of_one_step_without_evaluations_and_settings_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "short", rows_of(1), config="")
    page = page_of(run)
    assert "Training and held-out loss" in titles(page)
    assert cells(page, "evaluations") == ["0"]
    assert cells(page, "settings") == ["no config.yaml in the folder"]
    assert "held_out_loss" not in page


def test_a_run_without_settings_differs_in_no_key(tmp_path: Path, run: Path) -> None:
    bare = make_run(tmp_path / "bare", rows_of(2), config="")
    assert "Keys that differ" not in page_of(run, f"compare=[{bare}]")


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    rows = [{"step": step, "tokens": step, "loss": 1.0, "lr": 1e-3, "router_lr": 1e-3, "new/figure": 3.0} for step in (1, 2, 3)]
    page = page_of(make_run(tmp_path / "bare", rows))
    assert titles(page) == ["Training and held-out loss", "Learning rate"]
    assert re.findall(r'<section id="(\w+)">', page) == ["figures", "loss", "gradient"]
    assert "of the routers" not in page
    assert cells(page, "new/figure") == ["3", "3", "3"]


def test_null_is_a_gap_and_skipped_steps_are_marked_and_counted(tmp_path: Path) -> None:
    rows = rows_of(6)
    for row in rows[2:4]:
        row |= {"loss": None, "grad_norm": None, "skipped": 1}
    for row in rows:
        row["moe/load_entropy"] = None
    page = page_of(make_run(tmp_path / "one", rows, [EVALUATIONS[0] | {"held_out_loss": None}]))
    assert cells(page, "skipped steps") == ["2"]
    assert page.count("skipped steps</text>") == 2, "with the loss and with the gradient norm"
    assert cells(page, "grad_norm") == ["2", "1.1667", "1.35"]
    assert "Entropy of the load" not in titles(page)
    assert not re.findall(r"\bnan\b", page, re.IGNORECASE)


def test_restarts_are_counted_marked_and_listed_with_everything_else_that_happened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows_of(6))
    events = [("started", 0), ("saved", 2), ("stopped", 3), ("started", 3), ("skipped", 4), ("started", 5), ("finished", 6)]
    lines = [
        json.dumps({"time": f"t{n}", "step": step, "event": kind, "text": f"<{kind}>"}) for n, (kind, step) in enumerate(events)
    ]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(run)
    assert cells(page, "restarts") == ["2"]
    assert page.count(">restarts</text>") == 1, "the legend of the loss"
    assert "What happened: started 3, saved 1, stopped 1, skipped 1, finished 1" in page
    assert cells(page, "t3") == ["3", "started", "&lt;started&gt;"]

    quiet = make_run(tmp_path / "quiet", rows_of(6))
    both = page_of(run, f"compare=[{quiet}]")
    assert cells(both, "restarts") == ["2", "0"]
    assert "What happened to run: started 3" in both


def test_many_events_are_cut_to_the_newest_without_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows_of(6))
    rows = [{"time": "t", "step": n, "event": "saved" if n % 2 else "leapt", "text": f"no. {n}."} for n in range(1000)]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(run)
    assert "What happened: leapt 500, saved 500" in page
    assert page.count("<td>leapt</td>") == 300
    assert "no. 998." in page
    assert "<td>saved</td>" not in page


def test_a_run_that_is_all_null_has_a_page(tmp_path: Path) -> None:
    rows = [{key: value if key in ("step", "tokens") else None for key, value in row.items()} for row in rows_of(3)]
    page = page_of(make_run(tmp_path / "broken", rows))
    assert titles(page) == []


def test_siblings_that_are_equal_have_no_distance(tmp_path: Path) -> None:
    rows = rows_of(4)
    for row in rows:
        row |= {key: 1.0 for key in row if key.startswith("moe/sibling_")}
    assert [title for title in titles(page_of(make_run(tmp_path / "one", rows))) if "siblings" in title] == [
        "Likeness of siblings"
    ]


def test_a_line_cut_off_at_the_end_is_left_out(run: Path) -> None:
    whole = page_of(run)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    assert page_of(run) == whole, "and the same rows make the same page"


def test_a_long_run_shows_medians(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "long", rows_of(3000)))
    assert "faint lines are single steps" in page
    assert len(page) < 3_000_000


def test_names_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>&'x", rows_of(2), EVALUATIONS, CONFIG.replace("ste}", '"<script>alert(1)</script>"}'))
    two = make_run(tmp_path / "_$x$_数", rows_of(2), EVALUATIONS)
    command = ["report", f"run='{run}'".replace("&'", "&\\'"), f"compare=['{two}']", f"out={tmp_path / 'page.html'}"]
    assert main(command) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = Elements(page)
    assert found.open == []
    assert not found.names & {"b", "script"}
    assert "&lt;b&gt;&amp;&#x27;x" in page
    assert "_$x$_数" in page


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing", None, "does not exist; give run.dir"),
        ("empty", {}, "holds no metrics.jsonl, so it is no run folder; give run.dir"),
        ("fresh", {"metrics.jsonl": ""}, "metrics.jsonl holds no step yet; wait"),
        ("cut", {"metrics.jsonl": '{"step": 1'}, "metrics.jsonl holds no step yet; wait"),
        ("text", {"metrics.jsonl": "hello\n"}, "metrics.jsonl is damaged: line 1 is no JSON object with a step; remove"),
        ("other", {"metrics.jsonl": '{"step": 1}\n{"loss": 1}\n'}, "metrics.jsonl is damaged: line 2 is"),
        ("bytes", {"metrics.jsonl": b"\xff\xfe\n"}, "metrics.jsonl is damaged"),
        ("table", {"metrics.jsonl": '{"step": 1}\n', "evaluations.jsonl": "3\n"}, "evaluations.jsonl is damaged"),
        ("yaml", {"metrics.jsonl": '{"step": 1}\n', "config.yaml": "a: [\n"}, "config.yaml is damaged: it is no YAML of keys"),
        ("words", {"metrics.jsonl": '{"step": 1}\n', "config.yaml": "hello\n"}, "config.yaml is damaged"),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["run", "compare"])
def test_what_is_no_run_is_refused_in_a_sentence(
    name: str, content: dict[str, Any] | None, expected: str, beside: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.with_name(name)
    if content is not None:
        folder.mkdir()
        for file, text in content.items():
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    words = [f"run={run}", f"compare=[{folder}]"] if beside else [f"run={folder}"]
    assert main(["report", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moexpand: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert str(folder) in err
    assert expected in err
    assert not (run / "report").exists()
    assert not (folder / "report").exists()


def test_a_file_in_the_place_of_a_run_folder_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"run={run / 'metrics.jsonl'}"]) == 2
    assert "metrics.jsonl is not a folder; give run.dir" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["page", "config.yaml", "folder.html"])
def test_a_place_that_is_no_page_is_refused(out: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "folder.html").mkdir()
    assert main(["report", f"run={run}", f"out={run / out}"]) == 2
    assert f"{out} is not the name of a page; give a file that ends with .html." in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == CONFIG


def test_a_full_disk_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old = page_of(run)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["report", f"run={run}"]) == 3
    assert "The disk is full while writing" in capsys.readouterr().err
    assert [each.name for each in (run / "report").iterdir()] == ["index.html"]
    assert (run / "report" / "index.html").read_text() == old


def test_no_torch_is_imported_and_matplotlib_only_to_draw(run: Path) -> None:
    program = (
        "import sys; import moexpand.train.report; assert 'matplotlib' not in sys.modules; from moexpand.cli import main; "
        f"code = main(['report', 'run={run}']); assert 'matplotlib.pyplot' not in sys.modules; "
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {run / 'report' / 'index.html'}: runs 1, steps 6, plots 20\n"


def test_a_series_has_the_rows_with_its_key() -> None:
    rows = [{"step": 1, "a": 2}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": math.inf}, {"step": 5, "a": "x"}]
    steps, values = series(rows, "a")
    assert steps.tolist() == [1, 3, 4, 5]
    np.testing.assert_array_equal(values, [2, np.nan, np.nan, np.nan])


def test_thinning_keeps_ends_and_peaks() -> None:
    steps = np.arange(100_000, dtype=float)
    values = np.sin(steps / 1e4)
    values[[33_333, 77_777]] = 50, -50
    values[:2000] = np.nan
    fewer, kept = thinned(steps, values)
    assert len(fewer) <= MOST_POINTS + 2
    assert (fewer[0], fewer[-1]) == (0, 99_999)
    assert (np.diff(fewer) > 0).all()
    assert kept[fewer == 33_333] == 50
    assert kept[fewer == 77_777] == -50
    assert np.isnan(kept[0])
