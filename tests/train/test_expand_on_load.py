"""Training from a parent and a plan is training from the written child: the same bits on every rank, of fewer bytes read."""

import hashlib
import json
import os
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
from moexpand.upcycle.logical import ExpandedWeights, StoredWeights, Weights
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.recipe import Recipe
from tests.commands import moexpand
from tests.expansions import INITS, SIZES, SLOTS, expert_bytes, needed_bytes, plan_of, recorded_reads, write_child
from tests.parents import TINY, make_child, make_parent
from tests.processes import run_on_ranks
from tests.train.conftest import from_checkpoint, settings
from tests.upcycle import families, stacks

RANKS = 4
EXPERT_PARALLEL: tuple[dict[str, Any], ...] = ({"expert": 1}, {"expert": 2}, {"expert": 4})
MIXED: tuple[dict[str, Any], ...] = ({"pipeline": 2, "expert": 2}, {"tensor": 2, "expert": 2})
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("split", "fused")
BLOCK, BALANCED = "expert noise", "exact copies"
"""Inits whose placements keep few parents on a rank, and all on every rank."""

Digests = dict[str, dict[str, str]]
"""SHA-256 of every parameter of a rank, by source."""


# ---------------------------------------------------------------- on the ranks


def _sources(parents: Path, children: Path, init: str) -> dict[str, Weights]:
    """The same child four times: written in either layout, and unwritten, of a parent in either."""
    found: dict[str, Weights] = {}
    for layout in LAYOUTS:
        recipe = Recipe(open_checkpoint(parents / layout), read_plan(children / f"{init} {layout}.json"))
        found[f"of a {layout} parent"] = ExpandedWeights(recipe)
        found[f"written {layout}"] = StoredWeights(open_checkpoint(children / f"{init} {layout}"))
    return found


def _fill(engine: Any, weights: Weights) -> dict[str, str]:
    """Load into parameters that hold no numbers and hash all bytes."""
    from moexpand.train.weights import load

    with torch.no_grad():
        for parameter in engine.stages[0].parameters():
            parameter.fill_(float("nan"))
    load(engine, weights)
    assert not any(parameter.isnan().any() for parameter in engine.stages[0].parameters())
    return {
        name: hashlib.sha256(stacks.bits(parameter.detach().contiguous()).numpy().tobytes()).hexdigest()
        for name, parameter in engine.stages[0].named_parameters()
    }


def _fill_all(base: Path) -> tuple[dict[tuple[str, str, str], Digests], dict[str, dict[tuple[int, int], int]]]:
    """On a rank: what was filled by layout, precision and init, and the expert bytes that were read at EP 4 by init."""
    from moexpand.parallel import ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import Layout, RouterRules
    from moexpand.train.setup import shape_of

    cases = [(dtype, init) for dtype in DTYPES for init in INITS]
    sources = {case: _sources(base / case[0] / "parents", base / case[0] / "children", case[1]) for case in cases}
    filled: dict[tuple[str, str, str], Digests] = {}
    read: dict[str, dict[tuple[int, int], int]] = {}
    for layout in EXPERT_PARALLEL + MIXED:
        here = ranks.start(Layout(**layout), timeout_seconds=120)
        for (dtype, init), each in sources.items():
            if layout in MIXED and dtype == "fp32":
                continue
            precision = "fp32" if layout in MIXED else dtype  # a bf16 folder in an fp32 engine, too
            shape = shape_of(each["written split"].architecture)
            engine = Engine(shape, Layout(**layout), RouterRules(), precision, here)
            filled[str(layout), dtype, init] = {name: _fill(engine, weights) for name, weights in each.items()}
            if layout == {"expert": RANKS} and dtype == "bf16" and init in (BLOCK, BALANCED):
                with recorded_reads() as reads:
                    _fill(engine, each["of a split parent"])
                read[init] = expert_bytes(base / dtype / "parents" / "split", reads)
        ranks.stop()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # a quicker rank would meet the others' old store
    return filled, read


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parents in both layouts and dtypes, and for every init a plan and a child of each."""
    base = tmp_path_factory.mktemp("expansions")
    for name, dtype in DTYPES.items():
        parents, children = base / name / "parents", base / name / "children"
        children.mkdir(parents=True)
        for layout in LAYOUTS:
            parent = families.make("qwen3_moe", parents / layout, fused=layout == "fused", dtype=dtype, **SIZES).folder
            for init in INITS:
                plan = plan_of(parent, init)
                (children / f"{init} {layout}.json").write_text(json.dumps(plan.to_json()))
                write_child(parent, plan, children / f"{init} {layout}", layout)
    return base


@pytest.fixture(scope="module")
def answers(base: Path) -> list[Any]:
    """What `_fill_all` found on each of four ranks."""
    return run_on_ranks(_fill_all, RANKS, base)


@pytest.mark.parametrize("init", INITS)
def test_every_rank_holds_the_bits_of_the_written_child(answers: list[Any], init: str) -> None:
    """At EP 1, 2 and 4 in bf16 and fp32, and under pipeline and tensor parallelism."""
    cases = [case for case in answers[0][0] if case[2] == init]
    assert len(cases) == len(EXPERT_PARALLEL) * len(DTYPES) + len(MIXED)
    for filled, _ in answers:
        for case in cases:
            first, *others = filled[case].values()
            assert len(first) >= 10
            assert len(others) == 3
            for name, digests in filled[case].items():
                assert digests == first, (case, name)


def test_ranks_and_inits_differ(answers: list[Any]) -> None:
    """Equal digests mean something: no two inits fill the same, and no two ranks of EP 4 hold the same experts."""
    filled = [answer[0] for answer in answers]
    of_inits = {json.dumps(filled[0][str({"expert": 1}), "fp32", init]["written split"]) for init in INITS}
    assert len(of_inits) == len(INITS)
    for init in INITS:
        ranks = [each[str({"expert": 4}), "fp32", init]["written split"] for each in filled]
        experts = {json.dumps({name: digest for name, digest in each.items() if ".experts." in name}) for each in ranks}
        assert len(experts) == RANKS, init


@pytest.mark.parametrize("init", [BLOCK, BALANCED])
def test_a_rank_reads_each_parent_of_its_slots_once_and_no_other(answers: list[Any], base: Path, init: str) -> None:
    parent, own = base / "bf16" / "parents" / "split", SLOTS // RANKS
    plan = read_plan(base / "bf16" / "children" / f"{init} split.json")
    for rank, (_, read) in enumerate(answers):
        assert read[init] == needed_bytes(parent, plan, range(rank * own, (rank + 1) * own))
        if init == BLOCK:
            assert len(read[init]) == SIZES["layers"] * SIZES["experts"] // RANKS, "a quarter of the parent"


# ---------------------------------------------------------------- the command


def _main(*words: object) -> int:
    from moexpand.cli import main

    return main([str(word) for word in words])


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
    assert _main("upcycle", f"source={parent}", f"target={parent.with_name('none')}", *asked, f"plan_out={file}") == 0
    return file


@pytest.fixture(scope="module")
def child(parent: Path, plan: Path) -> Path:
    """The child that the real command writes by the plan."""
    folder = parent.with_name("child")
    assert _main("upcycle", f"source={parent}", f"target={folder}", f"plan={plan}", "plain=true") == 0
    return folder


def _words(shards: Path, run: Path, checkpoint: Path, **changes: object) -> list[str]:
    return settings(shards, run, **from_checkpoint(checkpoint) | {"save.every": 0, "precision": "bf16"} | changes)


def _train_here(words: list[str]) -> None:
    """What a worker does, in this process."""
    from moexpand.conf.compose import compose_words
    from moexpand.parallel import ranks
    from moexpand.train.__main__ import run

    config = compose_words("train", words[1:])
    Path(config.run.dir).mkdir(exist_ok=True)
    try:
        run(config)
    finally:
        ranks.stop()


def _train_on_ranks(commands: list[list[str]]) -> None:
    """What every worker does for each of these commands."""
    for words in commands:
        _train_here(words)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # a quicker rank would meet the others' old store


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
    run_on_ranks(_train_on_ranks, 2, [*goes_on, _words(shards, written, child, train__steps=4)])
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
    assert _main("export", f"run={expanded_run}", f"target={target}") == 0
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
    assert _main("logits", f"checkpoint={target}", *words) == 0
    with torch.no_grad():
        due = model.float()(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - due).max() <= 1e-5


def test_an_export_with_another_vocabulary_has_the_tokenizer_of_the_shards(base: Path, shards: Path, tmp_path: Path) -> None:
    """The parent's own tokenizer would give ids of other rows."""
    from transformers import AutoTokenizer

    from moexpand.data.loader import PackedData

    parent = Path(shutil.copytree(base / "bf16" / "parents" / "split", tmp_path / "parent"))
    (parent / "NOTICE").write_text("of the parent")
    (tmp_path / "ids.json").write_text(json.dumps([*range(40), *[None] * (8448 - 40)]))
    asked = ("num_experts=32", "num_groups=4", f"vocab_map={tmp_path / 'ids.json'}", "dry_run=true", "plain=true")
    assert _main("upcycle", f"source={parent}", f"target={tmp_path / 'none'}", *asked, f"plan_out={tmp_path / 'plan.json'}") == 0
    alone = {"launch.processes": 1, "parallel.expert": 1, "train.steps": 1}
    _train_here(_words(shards, tmp_path / "run", parent, expand=tmp_path / "plan.json", **alone))
    (tmp_path / "plan.json").unlink()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert _main("export", f"run={tmp_path / 'elsewhere'}", f"target={tmp_path / 'exported'}") == 0
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
        assert _main("logits", *words) == 0
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
            _train_here(words)
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
        code = _main(*settings(shards, tmp_path / "run", **{**from_checkpoint(Path("none")), "checkpoint": None} | changes))
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert not (tmp_path / "run").exists()
        return lines[0]

    return run


def test_a_plan_needs_its_parent(refused: Any, plan: Path, parent: Path, child: Path, base: Path, tmp_path: Path) -> None:
    assert "checkpoint=FOLDER" in refused(expand=plan)
    said = refused(checkpoint=base / "bf16" / "parents" / "split", expand=plan)
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
    assert _main("upcycle", f"source={parent}", f"target={tmp_path / 'child'}", f"plan={tmp_path / 'edited.json'}") == 2
    assert capsys.readouterr().err.strip() == said
    (tmp_path / "edited.json").write_text(json.dumps(edited | {"placement": "map"}))
    config = compose(
        "train", [f"checkpoint={parent}", f"expand={tmp_path / 'edited.json'}", "data.shards=x", f"run.dir={tmp_path}"]
    )
    found = source_of(config).plan
    assert found is not None
    assert list(found.slot_to_parent[1]) == row


def _fp8(tensors: stacks.Tensors) -> stacks.Tensors:
    """Matrices in E4M3 with scales of 1, one for each is enough below 128 rows and columns."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith("_proj.weight"):
            found |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    return found


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("interns1", {"dense": ()}, "model_type=interns1, whose vision tower the engine does not compute"),
        ("qwen3_moe", {"change": _fp8, "dense": ()}, "FP8 weights; the engine reads bf16, fp16 and fp32"),
        ("qwen3_moe", {"dense": (1,)}, "layers without experts (mlp_only_layers, decoder_sparse_step)"),
    ],
    ids=["InternViT", "FP8", "dense layers"],
)
def test_parents_that_the_engine_cannot_run_are_refused(
    refused: Any, tmp_path: Path, family: str, settings: dict[str, Any], says: str
) -> None:
    """With a plan by which they can be written, and without one."""
    parent = families.make(family, tmp_path / "parent", **settings).folder
    plan = plan_of(parent, BALANCED)
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
