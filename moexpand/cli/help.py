"""The help pages: the table of commands, and the keys of one command. The table needs no import at all."""

USAGE = "moexpand COMMAND key=value ..."
OPTIONS = {
    "--help": "this page; `moexpand COMMAND --help` lists the keys of a command",
    "--config-dir DIR": "folder with YAML of your own: options of the groups, and the file of --config-name",
    "--config-name NAME": "your own YAML; key=value on the command line comes after it",
    "--multirun": "`train` alone: a run for each combination of values, as in optim.lr=1e-5,3e-5 seed=range(0,3)",
    "--version": "print the version",
}


def overview(commands: dict[str, str]) -> str:
    """The page of `moexpand --help`.

    Args:
        commands: name -> one line.
    """
    examples = [
        "moexpand upcycle source=parent target=child num_experts=512 num_groups=8",
        "moexpand train checkpoint=child data.shards=shards run.dir=run parallel=ep2 launch.processes=2 precision=bf16",
    ]
    return "\n\n".join(
        [f"Usage: {USAGE}", _section("Commands", commands), _section("Options", OPTIONS), _lines("Examples", examples)]
    )


def of_command(command: str, summary: str) -> str:
    """The page of `moexpand COMMAND --help`: groups, then keys with types, defaults, words and one line each."""
    from moexpand.conf.compose import GROUPS, group_options
    from moexpand.conf.keys import Key, keys_of, parts_of
    from moexpand.conf.schema import COMMANDS

    def entry(key: Key) -> tuple[str, str]:
        allowed = "|".join(key.choices) if key.choices else key.type_name + _interval(key.within)
        return f"{key.name}={_default(key.default)}", f"{key.help} ({allowed})"

    schema = COMMANDS[command]
    keys, parts = keys_of(schema), parts_of(schema)
    pages = [f"Usage: moexpand {command} key=value ...\n\n{summary[0].upper()}{summary[1:]}."]
    options = group_options(command)
    groups = {f"{group}={default or 'null'}": " | ".join(options[group]) for group, default in GROUPS.get(command, {}).items()}
    if groups:
        pages.append(_section("Groups (each fills several keys from a YAML file)", groups))
    pages.append(_section("Keys (??? must be given)", dict(entry(key) for key in keys.values() if "." not in key.name)))
    for part, help in parts.items():
        own = [key for key in keys.values() if key.name.rpartition(".")[0] == part]
        pages.append(_section(f"{part}: {help}", dict(entry(key) for key in own)))
    return "\n\n".join(pages)


def _default(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _interval(within: str) -> str:
    """ "[1, inf)" as " >= 1"; an interval with two ends as it stands."""
    if not within.endswith("inf)"):
        return f" in {within}" if within else ""
    return f" {'>=' if within[0] == '[' else '>'} {within[1:].partition(',')[0]}"


def _section(title: str, entries: dict[str, str]) -> str:
    width = max(len(name) for name in entries)
    return _lines(title, [f"{name.ljust(width)}  {text}" for name, text in entries.items()])


def _lines(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)])
