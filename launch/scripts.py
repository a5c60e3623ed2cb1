"""Writes the scripts that start a run on several nodes: settings first, as bash variables, then a text that never changes."""

import shlex
import sys
from pathlib import Path

from moexpand.conf.launch_schema import Launch

TEXTS = Path(__file__).resolve().parent / "shell"


def batch_script(launch: Launch, run: Path) -> str:
    """The sbatch script of a run."""
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in sbatch_options(launch, run)),
            "set -uo pipefail",
            "",
            _variable("RUN", str(run)),
            f"NODES={launch.nodes}",
            f"RESTARTS={launch.restarts}",
            _array("STEP", _step_options(launch, run)),
            _array("WORKERS", worker_command(launch, run)),
            "",
            *_setup(launch),
            (TEXTS / "job.sh").read_text(encoding="utf-8"),
        ]
    )


def torchrun_script(launch: Launch, run: Path) -> str:
    """The script that is started on each node by hand."""
    return "\n".join(
        [
            "#!/bin/bash",
            "set -uo pipefail",
            "",
            f"NODES={launch.nodes}",
            _array("WORKERS", worker_command(launch, run)),
            "",
            *_setup(launch),
            (TEXTS / "torchrun.sh").read_text(encoding="utf-8"),
        ]
    )


def sbatch_options(launch: Launch, run: Path) -> list[str]:
    """What stands behind `#SBATCH`, the user's own options last."""
    gpus = launch.processes if launch.gpus_per_node is None else launch.gpus_per_node
    chosen = {"partition": launch.partition, "account": launch.account}
    return [
        _option("job-name", launch.job_name or run.name),
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={launch.cpus_per_node}" if launch.cpus_per_node else "--exclusive",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--time={launch.time}",
        f"--signal=B:USR1@{launch.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        _option("output", str(run / "slurm-%j.out")),
        *(_option(name, value) for name, value in chosen.items() if value),
        *launch.options,
    ]


def worker_command(launch: Launch, run: Path) -> list[str]:
    """What runs on each node, in its container if there is one."""
    python = launch.python or ("python3" if launch.container else sys.executable)
    words = [python, "-m", "moexpand.launch.node", "--run", str(run)]
    words += ["--nodes", str(launch.nodes), "--processes", str(launch.processes)]
    words += ["--grace", f"{grace_seconds(launch):g}", "--patience", f"{launch.patience_seconds:g}"]
    if launch.container and launch.container_runtime == "apptainer":
        binds = [word for mount in _mounts(launch, run) for word in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", *binds, launch.container, *words]
    return words


def grace_seconds(launch: Launch) -> float:
    """How long workers may save after a signal; under SLURM all of the time before its limit, less a little to end in."""
    return max(launch.grace_seconds, launch.signal_seconds - 15.0) if launch.name == "slurm" else launch.grace_seconds


def _step_options(launch: Launch, run: Path) -> list[str]:
    """Options of srun. `--wait` ends nodes that go on long after the first has ended."""
    options = [f"--nodes={launch.nodes}", f"--ntasks={launch.nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--export=ALL"]
    options.append(f"--wait={int(grace_seconds(launch)) + 60}")
    if launch.cpus_per_node:
        options.append(f"--cpus-per-task={launch.cpus_per_node}")
    if launch.container and launch.container_runtime == "pyxis":
        options += [f"--container-image={launch.container}", f"--container-workdir={Path.cwd()}"]
        options.append(f"--container-mounts={','.join(_mounts(launch, run))}")
    return options


def _mounts(launch: Launch, run: Path) -> list[str]:
    """What a container sees: the folder of the submission, the run folder, and what the user names."""
    here = Path.cwd()
    named = [mount.partition(":") for mount in launch.mounts]
    outside = [here / place for place, _, _ in named]
    pairs = [
        (here, here),
        (run, run),
        *((place, Path(inside) if inside else place) for place, (_, _, inside) in zip(outside, named, strict=True)),
    ]
    return [f"{place}:{inside}" for place, inside in dict.fromkeys(pairs)]


def _setup(launch: Launch) -> list[str]:
    """The user's own lines, in the folder of the submission, whose relative paths the configuration may hold."""
    failed = "{ echo 'moexpand: a line of launch.setup failed, so nothing was started' >&2; exit 3; }"
    lines = [f"cd {shlex.quote(str(Path.cwd()))} || exit 3"]
    if launch.setup:  # other people's scripts read variables that are not set
        lines += ["set +u", *(f"{line} || {failed}" for line in launch.setup), "set -u"]
    return lines


def _option(name: str, value: str) -> str:
    plain = shlex.quote(value) == value
    return f"--{name}={value}" if plain else f'--{name}="{value}"'


def _variable(name: str, value: str) -> str:
    return f"{name}={shlex.quote(value)}"


def _array(name: str, words: list[str]) -> str:
    return f"{name}=({shlex.join(words)})"
