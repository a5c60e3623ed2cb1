"""A real SLURM of one node on loopback: munged, slurmctld and slurmd under one folder, as root, stopped again at the end.

    with cluster(folder) as environment:   # SLURM_CONF and what else its commands need
        subprocess.run(["sbatch", ...], env=environment)

Two partitions share the node: jobs of `high` preempt those of `low`, which get 60 s and are put back into the queue.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CORES = 2

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@contextmanager
def cluster(folder: Path, patience: float = 60.0) -> Iterator[dict[str, str]]:
    """Start the daemons, wait until the node is idle, and stop what was started.

    Yields:
        The environment for SLURM's commands.

    Raises:
        RuntimeError: a daemon ended or the node is not idle in time; the message holds the end of its log.
    """
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    munge = folder / "munge"
    munge.mkdir()
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    for own in (munge, munge / "key"):
        shutil.chown(own, "munge", "munge")
    for parent in (folder, *folder.parents):  # munged runs as its user, who must reach the folder
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, cores=CORES, controller=free_port(), daemon=free_port()))
    environment = {**os.environ, "SLURM_CONF": str(config)}
    words = ["munged", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key", f"--pid-file={munge}/pid"]
    words += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", *words]
        started.append(subprocess.Popen(as_munge, stderr=subprocess.DEVNULL))
        wait_until(lambda: (munge / "socket").exists(), "munged made no socket", munge / "log", patience)
        started.append(subprocess.Popen(["slurmctld", "-D"], env=environment, stderr=subprocess.DEVNULL))
        started.append(subprocess.Popen(["slurmd", "-D"], env=environment, stderr=subprocess.DEVNULL))
        idle = ["sinfo", "--noheader", "--format=%T"]
        wait_until(
            lambda: said(idle, environment).split()[:1] == ["idle"], "the node is not idle", folder / "slurmctld.log", patience
        )
        yield environment
    finally:
        said(["scancel", "--user=root"], environment)
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_until(true: Callable[[], bool], otherwise: str, log: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while not true():
        if time.monotonic() > end:
            text = log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"
            raise RuntimeError(f"After {patience:.0f} s {otherwise}:\n{text}")
        time.sleep(0.2)


def said(words: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
