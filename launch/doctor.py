"""What this machine has for training, what is missing, what that costs, and the command that mends it."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

OK, NOTE, MISSING, WRONG = "ok", "note", "missing", "wrong"
"""States of a finding: nothing works without what is WRONG; what is MISSING costs something; a NOTE is for the reader."""

MEGATRON = "0.16.1"
LEAST_TORCH = (2, 13)
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        name: what was looked at.
        found: what there is.
        state: OK, NOTE, MISSING or WRONG.
        cost: what does not work, or works less well; empty where all is well.
        mend: a command or a setting that helps; empty where there is none.
    """

    name: str
    found: str
    state: str = OK
    cost: str = ""
    mend: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Look at the machine, one finding after the other; `folder` is where runs would be written."""
    for check in (_python, _torch, _megatron, _gpus, _transformer_engine, _deepspeed, _nvcc, _processor, _memory, _shared_memory):
        yield check()
    yield from (
        _open_files(),
        _locked_memory(),
        _host_name(),
        _disk(folder),
        _locks(folder),
        _slurm(),
        _container(),
        _wandb(),
        _git(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("Python", found)
    return Finding(
        "Python", found, WRONG, "megatron-core 0.16.1 is tested on 3.11 and 3.12 alone", "PYTHON=python3.11 make setup"
    )


def _torch() -> Finding:
    found = _version("torch")
    if found is None:
        return Finding("torch", "not installed", WRONG, "nothing trains", "make setup")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < LEAST_TORCH:
        return Finding(
            "torch", found, WRONG, "grouped_mm and the checkpoints need 2.13", "make setup, or a container with torch 2.13"
        )
    return Finding("torch", found)


def _megatron() -> Finding:
    found = _version("megatron-core")
    if found == MEGATRON:
        return Finding("megatron-core", found)
    return Finding(
        "megatron-core",
        found or "not installed",
        WRONG,
        f"the engine is written against {MEGATRON}",
        f"pip install megatron-core=={MEGATRON}",
    )


def _gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        kinds = sorted({f"{card.name}, {card.total_memory / GIB:.0f} GiB, sm_{card.major}{card.minor}" for card in cards})
        text = (
            f"{len(cards)}: {'; '.join(kinds)}; CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        )
        if any(card.major < 8 for card in cards):
            return Finding("GPUs", text, NOTE, "no bf16 before sm_80", "precision=fp32")
        if any(card.major < 9 for card in cards):
            return Finding("GPUs", text, NOTE, "no FP8 before sm_89")
        return Finding("GPUs", text)
    if shutil.which("nvidia-smi") and _said("nvidia-smi", "-L"):
        built = "torch is built for CPUs" if torch.version.cuda is None else f"torch is built for CUDA {torch.version.cuda}"
        return Finding(
            "GPUs",
            _said("nvidia-smi", "-L").splitlines()[0],
            WRONG,
            f"{built} and cannot use them",
            "TORCH=keep make setup in a container with CUDA torch",
        )
    return Finding("GPUs", "none", NOTE, "training runs on gloo and CPUs, for small models and tests")


def _transformer_engine() -> Finding:
    found = _version("transformer-engine") or _version("transformer_engine")
    if found:
        return Finding("Transformer Engine", found, NOTE, "no code of this version uses it yet")
    return Finding(
        "Transformer Engine",
        "not installed",
        MISSING,
        "nothing: no code of this version uses it yet",
        "pip install 'moexpand[te]' (needs nvcc)",
    )


def _deepspeed() -> Finding:
    found = _version("deepspeed")
    if found:
        return Finding("DeepSpeed", found, NOTE, "no code of this version uses it yet")
    return Finding(
        "DeepSpeed", "not installed", MISSING, "nothing: no code of this version uses it yet", "pip install 'moexpand[deepspeed]'"
    )


def _nvcc() -> Finding:
    said = _said("nvcc", "--version")
    release = next((part.strip() for line in said.splitlines() for part in line.split(",") if "release" in part), "")
    if release:
        return Finding("nvcc", release)
    return Finding(
        "nvcc", "not found", MISSING, "Transformer Engine cannot be compiled here", "a container with the CUDA toolkit"
    )


def _processor() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    text = f"{usable} of {there} cores"
    if usable < there:
        return Finding(
            "processor", text, NOTE, "this process may use some of the cores alone", "srun --cpus-per-task=N, or another cgroup"
        )
    return Finding("processor", text)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")


def _shared_memory() -> Finding:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return Finding("/dev/shm", "none", MISSING, "data.workers cannot hand batches over", "data.workers=0")
    size = shutil.disk_usage(shared).total
    if size < GIB:
        return Finding(
            "/dev/shm", f"{size / GIB:.2f} GiB", NOTE, "data.workers of pictures may run out of it", "docker run --shm-size=8g"
        )
    return Finding("/dev/shm", f"{size / GIB:.1f} GiB")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Finding("open files", f"{soft} (up to {hard})", NOTE, "many shards and ranks may need more", "ulimit -n 65536")
    return Finding("open files", str(soft))


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    return Finding("locked memory", f"{soft / 2**20:.0f} MiB", NOTE, "InfiniBand needs more", "ulimit -l unlimited")


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding(
            "host name",
            f"{name} does not resolve",
            NOTE,
            "ranks on several nodes cannot meet under it",
            "an entry in /etc/hosts, or the address itself as rendezvous endpoint",
        )
    return Finding("host name", f"{name} is {address}")


def _disk(folder: Path) -> Finding:
    place = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Finding("disk", f"{place} is read-only", WRONG, "no run can be written there", "another run.dir")
    return Finding("disk", f"{free / GIB:,.0f} GiB free at {place}")


def _locks(folder: Path) -> Finding:
    """Whether exclusive creation works, on which the lock of run folders stands."""
    place = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    probe = place / f".moexpand-doctor-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        with suppress(FileExistsError):
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return Finding(
                "locks",
                "a file is created twice",
                WRONG,
                "two jobs could work in one run folder",
                "another file system for run.dir",
            )
    except OSError as error:
        return Finding("locks", str(error.strerror), WRONG, "no run can be written there", "another run.dir")
    finally:
        probe.unlink(missing_ok=True)
    return Finding("locks", "work")


def _slurm() -> Finding:
    said = _said("sinfo", "--version")
    if said:
        return Finding("SLURM", said.strip())
    return Finding("SLURM", "not found", NOTE, "no launch=slurm; several nodes start by launch=torchrun")


def _container() -> Finding:
    found = [name for name in ("apptainer", "singularity", "enroot", "docker", "podman") if shutil.which(name)]
    return Finding("containers", ", ".join(found) or "no runtime found")


def _wandb() -> Finding:
    if os.environ.get("WANDB_API_KEY"):
        return Finding("W&B", "WANDB_API_KEY is set")
    return Finding("W&B", "no WANDB_API_KEY", NOTE, "runs are tracked offline", "export WANDB_API_KEY=..., or wandb sync later")


def _git() -> Finding:
    if shutil.which("git"):
        return Finding("git", _said("git", "--version").strip().removeprefix("git version "))
    return Finding("git", "not found", NOTE, "checkpoints do not say by which revision they were made")


def _said(*words: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
