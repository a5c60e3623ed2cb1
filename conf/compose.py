"""From a command line and YAML files to one typed configuration.

The parts come in this order, later ones win: the defaults of schema.py, one YAML file of each group (`optim=cosine` chooses
conf/optim/cosine.yaml), the user's own YAML (`--config-dir DIR --config-name NAME`), `key=value` of the command line. Every
mistake is an `InputError`: one sentence that names the key and the nearest one that exists.
"""

from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moexpand.base.errors import InputError
from moexpand.conf.keys import check_tree, did_you_mean, keys_of
from moexpand.conf.overrides import quoted, to_hydra
from moexpand.conf.schema import COMMANDS

FOLDER = Path(__file__).resolve().parent

# The groups of each command with the option that holds when none is chosen, in the order in which they are merged. A group
# with the name of a part fills that part; `recipe` and `experiment` may set any key.
GROUPS: dict[str, dict[str, str | None]] = {
    "train": {
        "model": "quickstart",
        "optim": "wsd",
        "parallel": "single",
        "data": "strict",
        "precision": "fp32",
        "launch": "local",
        "sweep": "basic",
        "track": "offline",
        "experiment": None,
    },
    "upcycle": {"recipe": "512x8"},
    "convert": {"parallel": "single", "precision": "fp32"},
    "calibrate": {"parallel": "single", "precision": "fp32"},
    "logits": {"parallel": "single", "precision": "fp32"},
}


def compose(command: str, overrides: list[str], config_dir: str | None = None, config_name: str | None = None) -> Any:
    """Compose and check the configuration of a command.

    Args:
        command: a name of `COMMANDS`, such as "train" or "data build".
        overrides: `key=value` and `group=option`.
        config_dir: folder with the user's YAML: options of the groups in sub-folders, and `config_name`.
        config_name: the user's YAML in `config_dir` (in the current folder without one), with or without its ending. It
            holds keys of the command, and may hold a `defaults` list of its own that names the command's (`- train`).

    Returns:
        An instance of the command's dataclass, every key of it checked.

    Raises:
        InputError: anything wrong in any of these places, or a key that must be given and is not.
    """
    schema, subject = COMMANDS[command], f"`moexpand {command}`"
    folder = _user_folder(config_dir, config_name)
    user = _user_config(folder, config_name, schema, subject) if folder and config_name else None
    options = group_options(command, folder)
    translated = [to_hydra(text, schema, options, subject) for text in overrides]
    if user is not None:
        _refuse_hidden_choices(user, overrides, options, f"{config_name}")
    primary = _register(command, config_name, user)
    if folder is not None:
        translated.append(f"hydra.searchpath=[{quoted(f'file://{folder}')}]")
    config = _composed(primary, translated, has_groups=command in GROUPS)
    return _build(schema, config, " in the composed configuration", subject)


def compose_words(command: str, words: list[str]) -> Any:
    """Compose from the words of a worker's command line: overrides, `--config-dir DIR`, `--config-name NAME`."""
    options: dict[str, str] = {}
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--config-dir", "--config-name"):
            options[word.removeprefix("--").replace("-", "_")] = next(rest, "")
        else:
            overrides.append(word)
    return compose(command, overrides, **options)


def to_yaml(config: Any) -> str:
    """The configuration as YAML, every key of it, resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def from_yaml(path: Path, command: str) -> Any:
    """Read what `to_yaml` wrote, as strictly as `compose`."""
    subject = f"`moexpand {command}`"
    return _build(COMMANDS[command], OmegaConf.create(_load(Path(path))), f" in {path}", subject)


def group_options(command: str, user_folder: Path | None = None) -> dict[str, list[str]]:
    """Options of every group of a command: the packaged ones and those in the user's folder."""
    folders = [FOLDER, *([user_folder] if user_folder else [])]
    return {
        group: sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        for group in GROUPS.get(command, {})
    }


def _user_folder(config_dir: str | None, config_name: str | None) -> Path | None:
    if config_dir is None and config_name is None:
        return None
    folder = Path(config_dir or ".").resolve()
    if not folder.is_dir():
        raise InputError(f"--config-dir {config_dir} is not a folder.")
    return folder


def _user_config(folder: Path, config_name: str, schema: type, subject: str) -> dict[str, Any]:
    """The user's YAML, its keys checked, its `defaults` list left in."""
    path = folder / f"{config_name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        names = [found.stem for found in folder.glob("*.yaml")]
        guess = did_you_mean(path.stem, names)
        raise InputError(f"{path} does not exist" + (f"{guess}?" if guess else "; --config-name names a file of --config-dir."))
    tree = _load(path)
    check_tree(schema, {key: value for key, value in tree.items() if key != "defaults"}, f" in {path}", subject)
    return tree


def _load(path: Path) -> dict[str, Any]:
    """A YAML file as nested dictionaries, interpolations as they stand."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {_one_line(error)}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} does not hold keys and values.")
    return {str(key): value for key, value in tree.items()}


def _refuse_hidden_choices(user: dict[str, Any], overrides: list[str], groups: dict[str, list[str]], name: str) -> None:
    """Refuse `optim=cosine` beside a user's YAML that sets keys of `optim`: the YAML comes later and would win in silence."""
    for text in overrides:
        group, _, _ = text.lstrip("+").partition("=")
        if group in groups and isinstance(user.get(group), dict) and user[group]:
            key = f"{group}.{next(iter(user[group]))}"
            raise InputError(f"{text} would be hidden by {name}, which sets {key} and comes later; give single keys instead.")


def _register(command: str, config_name: str | None, user: dict[str, Any] | None) -> str:
    """Put the schema and the defaults list into Hydra's store; return the name of the configuration to compose."""
    name = command.replace(" ", "_")
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=COMMANDS[command])
    groups = [{group: option} for group, option in GROUPS.get(command, {}).items()]
    store.store(name=name, node={"defaults": [f"{name}_schema", *groups, "_self_"]})
    if user is None or config_name is None:
        return name
    mine = config_name.removesuffix(".yaml")
    store.store(name=f"{name}_user", node={"defaults": [*([] if "defaults" in user else [name]), mine, "_self_"]})
    return f"{name}_user"


def _composed(primary: str, overrides: list[str], has_groups: bool) -> DictConfig:
    """Let Hydra compose, with its errors as sentences."""
    GlobalHydra.instance().clear()
    # A command without groups must not see the folders of groups: Hydra would take `count model=...` for a choice in conf/model.
    folder = {"config_dir": str(FOLDER)} if has_groups else {"config_path": None}
    start = initialize_config_dir if has_groups else initialize
    try:
        with start(**folder, version_base="1.3", job_name="moexpand"):
            return hydra_compose(primary, overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"The configuration cannot be composed: {_one_line(error)}.") from None


def _build(schema: type, config: Any, where: str, subject: str) -> Any:
    """Check a composed configuration and turn it into the dataclass."""
    try:
        tree: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"The configuration cannot be resolved: {_one_line(error)}.") from None
    check_tree(schema, tree, where, subject)
    typed = OmegaConf.merge(OmegaConf.structured(schema), tree)
    missing = OmegaConf.missing_keys(typed)
    if missing:
        names = [key for key in keys_of(schema) if key in missing]
        raise InputError(f"{subject} needs {_and(names)}; give {'it' if len(names) == 1 else 'them'} as {names[0]}=...")
    return OmegaConf.to_object(typed)


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _one_line(error: Exception) -> str:
    """A library's message on one line, without the lines that describe its own types."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [
        line for line in lines if line and not line.startswith(("reference_type=", "object_type=", "provider=", "Config search"))
    ]
    return " ".join(kept).rstrip(".")
