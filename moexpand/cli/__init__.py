"""The `moexpand` command: finds the command, composes its configuration, runs it, turns errors into sentences and exit codes."""

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import moexpand
from moexpand.base.errors import DONE, ENVIRONMENT, WRONG_INPUT, InputError, MoexpandError
from moexpand.cli import help

# Name -> one line of help. `moexpand --help` shows it without importing the schema; a test compares the names.
COMMANDS = {
    "train": "train a checkpoint (or a fresh model) on shards",
    "upcycle": "expand a parent checkpoint into a child, streaming",
    "convert": "make another kind of model of a checkpoint: text alone, Intern-S1-Pro's kind, other positions, a fresh tower",
    "calibrate": "run a parent over shards and write how it routes",
    "verify": "prove that every tensor of a child equals its recipe",
    "count": "count parameters by part, in all and active per token",
    "diff": "show two models' configs and derived sizes side by side",
    "export": "write a run's checkpoint as a Hugging Face folder",
    "logits": "run the engine forward on a Hugging Face folder",
    "report": "write a run, or several, as one HTML page with plots",
    "plan": "plan a run on a cluster: layouts that fit, memory by part, traffic by link, a configuration",
    "doctor": "say what this machine has for training, what is missing and what mends it",
    "data build": "turn PDFs and other sources into shards",
    "data index": "index webdataset or energon tars in place",
    "data inspect": "show what a shard folder holds, what was dropped and why",
}
TOLD_KEYS = ("upcycle",)
"""Commands whose `run` is also told which keys were given: beside a plan, a default that was written out is a contradiction."""

INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Request:
    """A command line, taken apart.

    Attributes:
        command: a name of `COMMANDS`, or "" when only options were given.
        overrides: `key=value` words.
        help, version, multirun, config_dir, config_name: the options.
    """

    command: str
    overrides: list[str]
    help: bool = False
    version: bool = False
    multirun: bool = False
    config_dir: str | None = None
    config_name: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `moexpand`; those of the process when not given.

    Returns:
        The exit code (base/errors.py); 130 when interrupted from the keyboard.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _wants_debug(words)
    try:
        request = parse(words)
        if request.help or request.version or not request.command:
            return _show_page(request)
        if request.multirun:
            from moexpand.cli.multirun import multirun

            return multirun(request.overrides, request.config_dir, request.config_name)
        from moexpand.conf.compose import compose

        config = compose(request.command, request.overrides, request.config_dir, request.config_name)
        debug = config.debug
        module = importlib.import_module(f"moexpand.cli.{request.command.replace(' ', '_')}")
        given = [word.lstrip("+").partition("=")[0] for word in request.overrides]
        return int((module.run(config, given) if request.command in TOLD_KEYS else module.run(config)) or DONE)
    except KeyboardInterrupt:
        return _fail("Interrupted.", INTERRUPTED)
    except MoexpandError as error:
        return _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; closing it quietly keeps the interpreter from saying so again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        hint = "" if debug else "; run again with debug=true for the traceback"
        return _fail(f"Unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}", ENVIRONMENT, debug)


def parse(words: list[str]) -> Request:
    """Take a command line apart.

    Raises:
        InputError: no such command or option.
    """
    overrides: list[str] = []
    options: dict[str, str | bool] = {}
    names: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            options["help"] = True
        elif word == "--version":
            options["version"] = True
        elif word in ("-m", "--multirun"):
            options["multirun"] = True
        elif name in ("--config-dir", "--config-name", "-cd", "-cn"):
            option = {"d": "config_dir", "r": "config_dir", "n": "config_name", "e": "config_name"}[name[-1]]
            options[option] = value if equals else next(rest, "")
            if not options[option]:
                raise InputError(f"{name} needs a value, as in {name} NAME.")
        elif word.startswith("-"):
            raise InputError(f"{word} is not an option; there are --help, --version, --multirun, --config-dir and --config-name.")
        elif equals or (names and _is_command(names)):
            overrides.append(word)
        else:
            names.append(word)
    command = " ".join(names)
    if command and command not in COMMANDS:
        raise InputError(_unknown(command))
    if options.get("multirun") and command != "train":
        raise InputError("--multirun starts several runs of moexpand train; no other command has it.")
    return Request(command, overrides, **options)  # type: ignore[arg-type]


def _show_page(request: Request) -> int:
    """Print the version or a page of help; without any command the overview goes to stderr, as an error."""
    if request.version:
        print(f"moexpand {moexpand.__version__}")
    elif request.command:
        print(help.of_command(request.command, COMMANDS[request.command]))
    elif request.help:
        print(help.overview(COMMANDS))
    else:
        print(help.overview(COMMANDS), file=sys.stderr)
        return WRONG_INPUT
    return DONE


def _is_command(names: list[str]) -> bool:
    return " ".join(names) in COMMANDS


def _unknown(command: str) -> str:
    inside = [name for name in COMMANDS if name.startswith(f"{command} ")]
    near = inside or difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    guess = f"did you mean `moexpand {near[0]}`?" if near else "`moexpand --help` lists them."
    return f"{command} is not a command; {guess}"


def _wants_debug(words: list[str]) -> bool:
    return any(word.lstrip("+").lower() in ("debug=true", "debug=1", "debug=yes", "debug=on") for word in words)


def _fail(sentence: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(f"moexpand: {sentence}", file=sys.stderr, flush=True)
    return code
