"""A configuration is complete and typed, and every mistake is one sentence that names the key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.conf.compose import FOLDER, GROUPS, compose, from_yaml, group_options, to_yaml
from moexpand.conf.schema import COMMANDS
from moexpand.conf.train_schema import TrainCommand

NEEDED = ["run.dir=/runs/one", "data.shards=/shards"]


def train(*overrides: str, **options: str) -> TrainCommand:
    config = compose("train", [*NEEDED, *overrides], **options)  # type: ignore[arg-type]
    assert isinstance(config, TrainCommand)
    return config


def sentence(*overrides: str, command: str = "train", **options: str) -> str:
    needed = NEEDED if command == "train" else []
    with pytest.raises(InputError) as caught:
        compose(command, [*needed, *overrides], **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert text.rstrip()[-1] in ".?"
    return text


def test_values_and_group_choices_arrive_typed() -> None:
    config = train("precision=bf16", "optim.lr=3e-4", "launch.processes=2", "train.steps=7", "plain=true", "optim=cosine")
    assert config.precision.name == "bf16"
    assert config.optim.lr == 3e-4
    assert (config.launch.processes, config.train.steps, config.plain) == (2, 7, True)
    assert config.optim.schedule == "cosine"
    assert config.checkpoint is None


def test_defaults_are_those_of_the_schema() -> None:
    expected = TrainCommand()
    expected.run.dir, expected.data.shards = "/runs/one", "/shards"
    assert train() == expected


@pytest.mark.parametrize(
    ("command", "group", "option"), [(c, g, o) for c in GROUPS for g, os in group_options(c).items() for o in os]
)
def test_every_packaged_option_composes(command: str, group: str, option: str) -> None:
    needed = {
        "train": NEEDED,
        "upcycle": ["source=a", "target=b"],
        "convert": ["source=a", "target=b"],
        "calibrate": ["checkpoint=a", "data.shards=b", "out=c"],
        "logits": ["checkpoint=a", "tokens=b", "out=c"],
    }
    compose(command, [*needed[command], f"{group}={option}"])


def test_every_yaml_file_belongs_to_a_group_of_a_command() -> None:
    groups = {group for options in GROUPS.values() for group in options}
    assert {path.parent.name for path in FOLDER.rglob("*.yaml")} == groups


def test_presets_are_the_published_shapes() -> None:
    small, large = train("model=qwen3_30b_a3b").model, train("model=qwen3_235b_a22b").model
    for model, total, active in ((small, 30.5e9, 3.3e9), (large, 235.1e9, 22.2e9)):
        attention = model.hidden_size * model.head_dim * 2 * (model.num_attention_heads + model.num_key_value_heads)
        expert = 3 * model.hidden_size * model.moe_intermediate_size
        both_ends = 2 * model.vocab_size * model.hidden_size
        assert both_ends + model.num_hidden_layers * (attention + 128 * expert) == pytest.approx(total, rel=3e-3)
        assert both_ends + model.num_hidden_layers * (attention + 8 * expert) == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=3", "optim.lrr is not a key of `moexpand train`; did you mean optim.lr?"),
        ("+stpes=3", "stpes is not a key of `moexpand train`; did you mean train.steps?"),
        ("+optim.lrr=3", "did you mean optim.lr?"),
        ("lr=3", "did you mean optim.lr?"),
        ("quux=1", "`moexpand train --help` lists them."),
        ("hydra.run.dir=x", "hydra.run.dir is not a key"),
        ("precision=fp16", "precision=fp16 is not an option of the group precision"),
        ("experiment=smok", "did you mean smoke?"),
        ("launch=slrm", "launch=slrm is not an option of the group launch"),
        ("optim.schedule=wsdd", "optim.schedule=wsdd is not among wsd, cosine, constant; did you mean wsd?"),
        ("train.steps=1.5", "train.steps=1.5 has the wrong type: train.steps takes a whole number."),
        ("train.steps=many", "train.steps takes a whole number."),
        ("optim.lr=[1]", "optim.lr takes a number."),
        ("plain=maybe", "plain takes true or false."),
        ("run.dir=null", "run.dir takes text."),
        ("optim.lr=-1e-3", "outside [0, inf)"),
        ("optim.lr=inf", "outside [0, inf)"),
        ("optim.lr=nan", "outside [0, inf)"),
        ("optim.beta2=1", "outside [0, 1)"),
        ("train.steps=0", "outside [1, inf)"),
        ("router.temperature=0", "outside (0, inf)"),
        ("run=x", "give them one by one, such as run.dir=..."),
        ("optim.lr=1,2", "gives several values to optim.lr"),
        ("optim.lr='1", "cannot be read"),
        ("optim.lr=", "gives no value to optim.lr"),
        ("optim.lr", "is not key=value; did you mean optim.lr?"),
        ("=3", "is not key=value"),
        ("~optim.lr=1", "would delete a key"),
        ("run.dir=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("optim.lr=${run.dir}", "optim.lr"),
    ],
)
def test_mistake_on_the_command_line_is_one_sentence(override: str, expected: str) -> None:
    assert expected in sentence(override)


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"`moexpand train` needs run\.dir and data\.shards; give them as run\.dir=\.\.\.$"):
        compose("train", [])
    with pytest.raises(InputError, match=r"needs checkpoint, tokens and out"):
        compose("logits", [])
    with pytest.raises(InputError, match=r"needs target; give it as target=\.\.\.$"):
        compose("verify", ["source=a"])


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0$"), min_size=1).filter(lambda text: text[0] not in "'\""))
def test_text_arrives_as_it_was_typed(text: str) -> None:
    if text != "null":
        assert compose("verify", [f"source={text}", "target=b"]).source == text


@pytest.mark.parametrize("text", ["/a=b,(c) [d]", "1e-3", "007", "true", r"C:\x\'", "a  b"])
def test_grammar_characters_in_a_path_are_text(text: str) -> None:
    assert train(f"checkpoint={text}").checkpoint == text


def test_null_takes_an_optional_key_back() -> None:
    assert train("checkpoint=x", "checkpoint=null").checkpoint is None


def test_list_takes_one_word_or_several() -> None:
    assert compose("data build", ["out=o", "sources=my file.jsonl"]).sources == ["my file.jsonl"]
    assert compose("data build", ["out=o", "sources=[a.jsonl,b.txt]"]).sources == ["a.jsonl", "b.txt"]


def test_experiment_chooses_groups_and_the_command_line_wins() -> None:
    config = train("experiment=continue_30b_512", "train.steps=3")
    assert (config.precision.name, config.parallel.expert, config.optim.lr, config.train.steps) == ("bf16", 8, 1e-5, 3)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path.parent)


def test_users_yaml_comes_before_the_command_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine.yaml", "optim:\n  lr: 0.5\n  beta1: 0.8\n")
    config = train("optim.beta1=0.7", config_dir=folder, config_name="mine")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (0.5, 0.7, 0.95)


def test_users_yaml_may_hold_its_own_defaults_list(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine.yaml", "defaults:\n  - train\n  - override precision: bf16\n  - _self_\nseed: 3\n")
    config = train("precision=bf16", config_dir=folder, config_name="mine.yaml")
    assert (config.precision.name, config.seed) == ("bf16", 3)


def test_users_folder_adds_options_to_a_group(tmp_path: Path) -> None:
    write(tmp_path / "optim" / "gentle.yaml", "lr: 1e-6\n")
    assert train("optim=gentle", config_dir=str(tmp_path)).optim.lr == 1e-6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lrr: 1\n", r"optim.lrr in FILE is not a key of `moexpand train`; did you mean optim.lr?"),
        ("stpes: 3\n", "stpes in FILE is not a key of `moexpand train`; did you mean train.steps?"),
        ("train:\n  steps: soon\n", "train.steps=soon in FILE has the wrong type"),
        ("optim:\n  schedule: linear\n", "optim.schedule=linear in FILE is not among"),
        ("optim:\n  lr: -1\n", "optim.lr=-1 in FILE is outside"),
        ("optim: fast\n", "optim=fast in FILE gives one value to a part"),
        ("run:\n  dir: [a]\n", "run.dir takes text."),
        ("optim:\n  lr: [1\n", "FILE is not valid YAML"),
        ("optim:\n  lr: 1\noptim:\n  lr: 2\n", "found duplicate key optim"),
        ("- a\n", "FILE does not hold keys and values."),
        ("just words\n", "FILE"),
        ("defaults:\n  - nothing\n", "nothing"),
    ],
)
def test_mistake_in_users_yaml_names_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    folder = write(tmp_path / "mine.yaml", text)
    assert expected.replace("FILE", str(tmp_path / "mine.yaml")) in sentence(config_dir=folder, config_name="mine")


@pytest.mark.parametrize(("text", "key"), [("lrr: 1\n", "lrr"), ("lr: fast\n", "lr")])
def test_mistake_in_users_option_names_option_and_key(tmp_path: Path, text: str, key: str) -> None:
    write(tmp_path / "optim" / "odd.yaml", text)
    text = sentence("optim=odd", config_dir=str(tmp_path))
    assert "optim/odd" in text
    assert key in text


def test_unknown_key_of_an_experiment_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "experiment" / "odd.yaml", "# @package _global_\nstpes: 3\n")
    assert "stpes" in sentence("experiment=odd", config_dir=str(tmp_path))


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine.yaml", "seed: 1\n")
    assert "did you mean mine?" in sentence(config_dir=folder, config_name="mime")
    assert "/no/such is not a folder" in sentence(config_dir="/no/such", config_name="mine")


def test_group_choice_that_users_yaml_would_hide_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine.yaml", "precision:\n  name: fp32\n")
    text = sentence("precision=bf16", config_dir=folder, config_name="mine")
    assert text.startswith("precision=bf16 would be hidden by mine, which sets precision.name")


def test_run_folders_yaml_round_trips_and_is_read_strictly(tmp_path: Path) -> None:
    config = train("experiment=continue_30b_512", "model.vocab_size=${model.hidden_size}", "track.name=a: b")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path, "train") == config
    path.write_text(to_yaml(config).replace("warmup_steps", "warmup_stops"))
    with pytest.raises(
        InputError, match=r"optim\.warmup_stops in .*config\.yaml is not a key.*did you mean optim\.warmup_steps\?"
    ):
        from_yaml(path, "train")


def test_composing_imports_no_torch() -> None:
    program = (
        "import sys; from moexpand.conf.compose import compose; import moexpand.conf.check; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=FOLDER.parent, env=dict(os.environ)).returncode == 0


def test_every_command_has_a_key_of_help_for_each_field() -> None:
    from moexpand.conf.keys import keys_of

    for command, schema in COMMANDS.items():
        for key in keys_of(schema).values():
            assert key.help, f"{command}: {key.name}"
            assert not key.choices or key.default in key.choices


def test_lists_of_words_need_no_quotes_of_their_own() -> None:
    given = [
        "launch=slurm",
        "launch.options=[--constraint=h100,--mem=0]",
        "launch.setup=[module load cuda/13,export NCCL_SOCKET_IFNAME=ib0]",
    ]
    config = train(*given)
    assert config.launch.options == ["--constraint=h100", "--mem=0"]
    assert config.launch.setup == ["module load cuda/13", "export NCCL_SOCKET_IFNAME=ib0"]
    assert train("vision.freeze=[tower,projector]").vision.freeze == ["tower", "projector"]
    assert train("launch.options=['--a=b, c']").launch.options == ["--a=b, c"]
