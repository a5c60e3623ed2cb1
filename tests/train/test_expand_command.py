"""`moexpand train expand=PLAN`: the run, the export and the refusals are those of the written child."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moexpand.base.errors import InputError
from moexpand.conf.compose import compose
from moexpand.train.preflight import source_of
from moexpand.train.setup import rounded_routers
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.recipe import Recipe
from tests.commands import moexpand, run_here
from tests.expansions import SIZES, plan_of, write_child
from tests.parents import TINY, make_child, make_parent
from tests.processes import run_on_ranks
from tests.train.conftest import from_checkpoint, settings
from tests.train.workers import train_here, train_on_ranks
from tests.upcycle import families


def _trajectory(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in ("step", "tokens", "loss", "grad_norm", "moe/load_cv")) for row in rows]


@pytest.fixture(scope="module")
def parent(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused bf16 parent with the shards' vocabulary and tokenizer."""
    from moexpand.data.loader import PackedData

    made = families.make("qwen3_moe", tmp_path_factory.mktemp("command") / "parent", fused=True, **SIZES | {"vocab": 8448})
    PackedData(shards, 64, 4, 0).tokenizer.save(made.folder)
    return made.folder


@pytest.fixture(scope="module")
def plan(parent: Path) -> Path:
    """The plan that the real command writes: router noise and drop, experts to be split."""
    file = parent.with_name("plan.json")
    asked = ("num_experts=32", "num_groups=4", "init=drop", "seed=5", "experts_layout=split", "plain=true", "dry_run=true")
    assert run_here("upcycle", f"source={parent}", f"target={parent.with_name('none')}", *asked, f"plan_out={file}") == 0
    return file


@pytest.fixture(scope="module")
def child(parent: Path, plan: Path) -> Path:
    """The child that the real command writes by the plan."""
    folder = parent.with_name("child")
    assert run_here("upcycle", f"source={parent}", f"target={folder}", f"plan={plan}", "plain=true") == 0
    return folder


def _words(shards: Path, run: Path, checkpoint: Path, **changes: object) -> list[str]:
    return settings(shards, run, **from_checkpoint(checkpoint) | {"save.every": 0, "precision": "bf16"} | changes)


@pytest.fixture(scope="module")
def runs(parent: Path, plan: Path, child: Path, shards: Path) -> tuple[Path, Path]:
    """Four steps on two ranks, from parent and plan and from the written child; the first two steps by the real command.

    The third step begins when the plan's file is gone, the fourth with the same plan as the child's expansion.json has it.
    """
    run, written, moved = parent.with_name("expanded"), parent.with_name("written"), parent.with_name("moved.json")
    shutil.copy(plan, moved)
    done = moexpand(*_words(shards, run, parent, expand=moved, train__steps=2))
    assert done.returncode == 0, done.stderr
    moved.unlink()
    goes_on = [
        _words(shards, run, parent, expand=file, train__steps=steps)
        for steps, file in ((3, moved), (4, child / "expansion.json"))
    ]
    run_on_ranks(train_on_ranks, 2, [*goes_on, _words(shards, written, child, train__steps=4)])
    return run, written


@pytest.fixture(scope="module")
def expanded_run(runs: tuple[Path, Path]) -> Path:
    return runs[0]


def test_the_run_is_the_run_of_the_written_child(runs: tuple[Path, Path], child: Path, plan: Path) -> None:
    run, written = runs
    assert _trajectory(run) == _trajectory(written)
    assert [row[0] for row in _trajectory(run)] == [1, 2, 3, 4]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["expand"] == str(child / "expansion.json")
    assert config["checkpoint"] == str(child.with_name("parent"))
    assert read_plan(run / "plan.json") == read_plan(plan)
    assert not (written / "plan.json").exists()


def test_the_export_is_a_whole_grouped_folder(expanded_run: Path, tmp_path: Path, shards: Path, parent: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "exported"
    assert run_here("export", f"run={expanded_run}", f"target={target}") == 0
    model, info = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "Qwen3MoeGroupedForCausalLM"
    assert not any(info.values()), info
    assert (model.config.num_experts, model.config.router_n_groups) == (32, 4)
    ours, own = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(parent)
    assert ours.encode("the router sends 随机 tokens") == own.encode("the router sends 随机 tokens")
    assert (target / "chat_template.jinja").read_bytes() == (parent / "chat_template.jinja").read_bytes()
    tokens = np.random.default_rng(2).integers(0, 8448, (2, 16))
    np.save(tmp_path / "tokens.npy", tokens)
    words = (f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'out.npy'}")
    assert run_here("logits", f"checkpoint={target}", *words) == 0
    with torch.no_grad():
        due = model.float()(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - due).max() <= 1e-5


def test_an_export_with_another_vocabulary_has_the_tokenizer_of_the_shards(shards: Path, tmp_path: Path) -> None:
    """The parent's own tokenizer would give ids of other rows."""
    from transformers import AutoTokenizer

    from moexpand.data.loader import PackedData

    parent = families.make("qwen3_moe", tmp_path / "parent", **SIZES).folder
    (parent / "NOTICE").write_text("of the parent")
    ids, plan = tmp_path / "ids.json", tmp_path / "plan.json"
    ids.write_text(json.dumps([*range(40), *[None] * (8448 - 40)]))
    asked = ("num_experts=32", "num_groups=4", f"vocab_map={ids}", "dry_run=true", "plain=true", f"plan_out={plan}")
    assert run_here("upcycle", f"source={parent}", f"target={tmp_path / 'none'}", *asked) == 0
    alone = {"launch.processes": 1, "parallel.expert": 1, "train.steps": 1}
    train_here(_words(shards, tmp_path / "run", parent, expand=plan, **alone))
    plan.unlink()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert run_here("export", f"run={tmp_path / 'elsewhere'}", f"target={tmp_path / 'exported'}") == 0
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "exported"), PackedData(shards, 64, 4, 0).tokenizer
    assert tokenizer.encode("the router sends tokens") == own.encode("the router sends tokens")
    assert (tmp_path / "exported" / "NOTICE").read_text() == "of the parent"
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == 8448


def test_logits_of_a_fused_child_are_those_of_the_split_one(child: Path, parent: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(0, 8448, (1, 24)))
    fused = write_child(parent, read_plan(child / "expansion.json"), tmp_path / "fused", "fused")
    assert not any(".experts.0." in name for name in open_checkpoint(fused).tensors)
    for name, folder in (("split", child), ("fused", fused)):
        words = (f"checkpoint={folder}", f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / name}.npy")
        assert run_here("logits", *words) == 0
    assert (tmp_path / "split.npy").read_bytes() == (tmp_path / "fused.npy").read_bytes()


def test_another_plan_is_not_gone_on_from(expanded_run: Path, parent: Path, plan: Path, child: Path, shards: Path) -> None:
    """The sentence names the plan with both digests. The run's own copy is no way round."""
    other, own, gone = parent.with_name("other.json"), expanded_run / "plan.json", parent.with_name("gone.json")
    other.write_text(json.dumps(json.loads(plan.read_text()) | {"seed": 6}))
    before, alone = _trajectory(expanded_run), {"launch.processes": 1, "parallel.expert": 1, "train.steps": 5}
    copy = own.read_text()
    for checkpoint, expand, edited in ((parent, other, copy), (child, None, copy), (parent, gone, other.read_text())):
        own.write_text(edited)
        words = _words(shards, expanded_run, checkpoint, expand=expand, **alone)
        with pytest.raises(InputError, match="the plan of expand was 'sha256:") as caught:
            train_here(words)
        assert f"and is {None if expand is None else repr(read_plan(other).digest)}" in str(caught.value)
        assert own.read_text() == edited
    own.write_text(copy)
    assert _trajectory(expanded_run) == before


# ---------------------------------------------------------------- errors


@pytest.fixture
def refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `train` in this process; returns its sentence and shows that no run folder was made."""

    def run(**changes: object) -> str:
        capsys.readouterr()
        code = run_here(*settings(shards, tmp_path / "run", **{**from_checkpoint(Path("none")), "checkpoint": None} | changes))
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert not (tmp_path / "run").exists()
        return lines[0]

    return run


def test_a_plan_needs_its_parent(refused: Any, plan: Path, parent: Path, child: Path, tmp_path: Path) -> None:
    assert "checkpoint=FOLDER" in refused(expand=plan)
    said = refused(checkpoint=families.make("qwen3_moe", tmp_path / "other", **SIZES).folder, expand=plan)
    assert str(plan) in said
    assert "another parent" in said
    assert "another parent" in refused(checkpoint=child, expand=plan)
    assert "nowhere.json does not exist" in refused(checkpoint=parent, expand=tmp_path / "nowhere.json")
    for name, text in (("config", "{}"), ("list", "[]"), ("text", "plan")):
        (tmp_path / name).write_text(text)
        assert str(tmp_path / name) in refused(checkpoint=parent, expand=tmp_path / name)


def test_a_map_that_its_placement_does_not_give_is_refused_as_upcycle_does(
    refused: Any, plan: Path, parent: Path, child: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = json.loads(plan.read_text())
    row = edited["slot_to_parent"][1]
    row[0], row[1] = row[1], row[0]
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    said = refused(checkpoint=parent, expand=tmp_path / "edited.json")
    assert f"edited.json maps slot 0 of layer 1 to expert {row[0]}, but placement quarters_spread to {row[1]}" in said
    assert run_here("upcycle", f"source={parent}", f"target={tmp_path / 'child'}", f"plan={tmp_path / 'edited.json'}") == 2
    assert capsys.readouterr().err.strip() == said
    (tmp_path / "edited.json").write_text(json.dumps(edited | {"placement": "map"}))
    config = compose(
        "train", [f"checkpoint={parent}", f"expand={tmp_path / 'edited.json'}", "data.shards=x", f"run.dir={tmp_path}"]
    )
    found = source_of(config).plan
    assert found is not None
    assert list(found.slot_to_parent[1]) == row


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("interns1", {"dense": ()}, "model_type=interns1, whose vision tower the engine does not compute"),
        ("qwen3_moe", {"dense": (1,)}, "layers without experts (mlp_only_layers, decoder_sparse_step)"),
    ],
    ids=["InternViT", "dense layers"],
)
def test_parents_that_the_engine_cannot_run_are_refused(
    refused: Any, tmp_path: Path, family: str, settings: dict[str, Any], says: str
) -> None:
    """With a plan by which they can be written, and without one."""
    parent = families.make(family, tmp_path / "parent", **settings).folder
    plan = plan_of(parent, "exact copies")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    Recipe(open_checkpoint(parent), plan)
    for expand in (None, tmp_path / "plan.json"):
        said = refused(checkpoint=parent, expand=expand)
        assert str(parent) in said
        assert says in said


@pytest.mark.parametrize(
    ("precision", "router_dtype", "told"), [("bf16", "float32", 1), ("bf16", "same", 0), ("fp32", "float32", 0)]
)
def test_an_fp32_router_that_the_precision_rounds_is_told(tmp_path: Path, precision: str, router_dtype: str, told: int) -> None:
    parent = make_parent(tmp_path / "parent", **TINY | {"dtype": "bfloat16"})
    wishes = {"num_experts": 16, "num_groups": 2, "placement": "halves_tile", "router_dtype": router_dtype}
    child = make_child(parent, tmp_path / "child", **wishes)
    config = compose("train", [f"checkpoint={child}", "data.shards=x", "run.dir=y", f"precision={precision}"])
    assert len(rounded_routers(config, source_of(config))) == told
