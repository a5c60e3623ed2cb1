"""How the workers of a run start: on this machine, as a SLURM job, or by a script that is started on each node by hand."""

from dataclasses import dataclass

from moexpand.conf.fields import key, words

LAUNCHERS = ("local", "slurm", "torchrun")
RUNTIMES = ("apptainer", "pyxis")


@dataclass
class Launch:
    name: str = key(
        "local",
        "local starts the workers on this machine; slurm submits a job; torchrun writes a script to be started on each node",
        LAUNCHERS,
    )
    processes: int = key(1, "workers on this machine, or on each node: one a GPU", within="[1, inf)")
    nodes: int = key(1, "machines", within="[1, inf)")
    grace_seconds: float = key(60.0, "time that workers get to save after a signal", within="[0, inf)")
    dry_run: bool = key(False, "check everything, print the command or the script and stop")
    patience_seconds: float = key(300.0, "longest wait at the start until all nodes are there", within="(0, inf)")
    setup: list[str] = words(
        "shell lines before the workers start, such as ['module load cuda']; all nodes get their environment"
    )
    python: str | None = key(None, "interpreter on the nodes; not given: this one, or python3 inside a container")
    container: str | None = key(None, "image in which the workers run")
    container_runtime: str = key("apptainer", "what runs the image: apptainer, or pyxis (SLURM's plugin for enroot)", RUNTIMES)
    mounts: list[str] = words("what the container sees besides the run folder and the current one, as FOLDER or FOLDER:INSIDE")
    job_name: str | None = key(None, "slurm: name of the job; not given: the run folder's name")
    partition: str | None = key(None, "slurm: partition")
    account: str | None = key(None, "slurm: account that is charged")
    time: str = key("24:00:00", "slurm: time limit of one job, as in 1-12:00:00; the run goes on in the next")
    gpus_per_node: int | None = key(
        None, "slurm: GPUs of a node to ask for; not given: launch.processes; 0: none", within="[0, inf)"
    )
    cpus_per_node: int = key(0, "slurm: cores of a node to ask for; 0: the whole node", within="[0, inf)")
    signal_seconds: int = key(
        300, "slurm: how long before its time limit a job saves and goes back to the queue", within="[1, 65535]"
    )
    restarts: int = key(
        3, "slurm: fresh starts in one job after failures between which no checkpoint was saved", within="[0, inf)"
    )
    options: list[str] = words("slurm: further options of sbatch, such as [--constraint=h100,--mem=0]")


@dataclass
class Sweep:
    sampler: str = key(
        "basic", "basic: every combination of the values; optuna: values that Optuna proposes", ("basic", "optuna")
    )
    trials: int = key(20, "optuna: points in all", within="[1, inf)")
    parallel: int = key(1, "optuna with launch=slurm: jobs at the same time", within="[1, inf)")
    metric: str = key("held_out_loss", "optuna: what shall be small at the end", ("held_out_loss", "loss"))
    seed: int = key(0, "optuna: seed of its proposals", within="[0, 4294967295]")
