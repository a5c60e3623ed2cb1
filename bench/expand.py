"""Expansion against the disk: our writer, `cp` of the same output, and a straightforward safetensors script, interleaved.

Parents have the real shapes of Qwen3-30B-A3B (hidden 2048, intermediate 768, 128 experts, bf16, random content; a vocabulary of
2,048); 1 and 3 layers give children of about 5 and 15 GB. Every run ends when its files and their folder are synced. Before each
run the page cache is dropped (of the files involved, and as a whole where root may) and the programs, without data, are loaded;
for a warm run the files to read are read as well. The part `verify` compares the proof of the child, from cold caches, with `cat`
and with `sha256sum` of both folders. The part `235b` is one layer of Qwen3-235B-A22B, for its memory. Prints medians with minimum
and maximum.

    python bench/expand.py [sizes=5GB] [rounds=3] [parts=cold,warm,script,verify] [workers=0] [folder=DIR] [cache=DIR]

`sizes=5GB,15GB parts=cold,warm,script,verify,235b` is all of it: 40 GB of disk in `folder` (the outputs) and 10 in `cache`, which
keeps the parents for the next time.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np

LAYERS = {"5GB": 1, "15GB": 3}
EXPERTS, CHILD_EXPERTS, GROUPS = 128, 512, 8
PROGRAMS = "import moexpand.cli.upcycle, moexpand.cli.verify, moexpand.conf.compose, hydra, omegaconf, torch, safetensors.torch"
"""What the measured programs import: loaded after the caches were dropped, since starting Python is not the question."""
HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One measured process: seconds of wall and CPU, peak resident MiB, GB read from and written to disk."""

    seconds: float
    cpu: float
    peak: float
    read: float
    written: float


# ---------------------------------------------------------------- parents


def write_parent(folder: Path, layers: int, hidden: int, intermediate: int) -> None:
    """A random parent in one file as safetensors' own writer lays it out: tensors begin at multiples of 8 bytes."""
    from moexpand.upcycle.architecture import Architecture
    from moexpand.upcycle.fresh_config import architecture_config
    from moexpand.upcycle.tensors import stored_tensors

    arch = Architecture(
        vocab_size=2048, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=EXPERTS, num_experts_per_tok=8, moe_intermediate_size=intermediate, dtype="bfloat16",
    )  # fmt: skip
    header: dict[str, object] = {}
    offset = 0
    for name, shape in stored_tensors(arch).items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.Generator(np.random.SFC64(0))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(architecture_config(arch)))
    with open(folder / "model.safetensors", "wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for begin in range(0, offset, 16 << 20):
            # A sign and 8 bits below it are random in each bf16; exponents stay near 1, so that no value is out of range.
            bits = random.integers(0, 1 << 16, size=min(8 << 20, (offset - begin) // 2), dtype=np.uint16)
            file.write(memoryview((bits & 0x80FF) | np.uint16(0x3E00)).cast("B"))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- the page cache


def drop_caches(*folders: Path) -> None:
    """Forget what the page cache holds of these folders, and all of it where the machine lets us."""
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    subprocess.run([sys.executable, "-c", PROGRAMS], check=True, env=os.environ | {"PYTHONPATH": str(HERE)})


def warm(folder: Path) -> None:
    """Read a folder into the page cache."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


# ---------------------------------------------------------------- runs


def measured(command: list[str]) -> Run:
    """Run a command, with what the kernel counted for it."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - began
    io = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu, usage.ru_maxrss / 1024, int(io["read_bytes"]) / 1e9, int(io["write_bytes"]) / 1e9)


def copy(source: Path, target: Path) -> Run:
    """`cp --reflink=never` and sync."""
    began = time.perf_counter()
    run = measured(["cp", "-r", "--reflink=never", str(source), str(target)])
    sync(target)
    return replace(run, seconds=time.perf_counter() - began)


def script(parent: Path, child: Path) -> None:
    """What one writes in an afternoon: every tensor of the child cloned out of the parent, one `save_file` a shard."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    child.mkdir()
    copies = CHILD_EXPERTS // EXPERTS
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, child / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    def add(name: str, tensor: torch.Tensor) -> None:
        shard[name] = tensor
        if sum(value.nbytes for value in shard.values()) > 5e9:
            flush()

    for file in sorted(parent.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                head, experts, tail = name.partition(".experts.")
                if experts:
                    number, _, matrix = tail.partition(".")
                    for copy in range(copies):
                        add(f"{head}.experts.{copy * EXPERTS + int(number)}.{matrix}", opened.get_tensor(name).clone())
                elif name.endswith("mlp.gate.weight"):
                    add(name, opened.get_tensor(name).repeat(copies, 1))
                else:
                    add(name, opened.get_tensor(name).clone())
    flush()
    (child / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(parent / "config.json", child)
    sync(child)


def sync(folder: Path) -> None:
    """Make every file of a folder, and the folder, durable."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---------------------------------------------------------------- questions


class Bench:
    """Runs of one parent in `folder`; outputs are removed as soon as nothing needs them."""

    def __init__(self, folder: Path, parent: Path, workers: int) -> None:
        self.parent, self.workers = parent, workers
        self.child, self.copied = folder / "child", folder / "copied"

    def expand(self, cold: bool) -> Run:
        """Ours; the child stays."""
        shutil.rmtree(self.child, ignore_errors=True)
        self._prepare(cold, self.parent)
        words = [f"source={self.parent}", f"target={self.child}", f"num_experts={CHILD_EXPERTS}", f"num_groups={GROUPS}"]
        words += ["placement=quarters_spread", f"workers={self.workers}", "reflink=never", "plain=true"]
        return measured([sys.executable, "-m", "moexpand", "upcycle", *words])

    def cp(self, cold: bool) -> Run:
        """cp of the child that is there."""
        self._prepare(cold, self.child)
        run = copy(self.child, self.copied)
        shutil.rmtree(self.copied)
        return run

    def script(self, cold: bool) -> Run:
        """The safetensors script."""
        self._prepare(cold, self.parent)
        run = measured([sys.executable, __file__, "script", str(self.parent), str(self.copied)])
        shutil.rmtree(self.copied)
        return run

    def verify(self) -> Run:
        """The proof of the child that is there, from cold caches."""
        self._prepare(True, self.parent)
        words = [f"source={self.parent}", f"target={self.child}", f"workers={self.workers}", "plain=true"]
        return measured([sys.executable, "-m", "moexpand", "verify", *words])

    def read_both(self, program: str) -> Run:
        """A program over the files of parent and child, from cold caches."""
        self._prepare(True, self.parent)
        files = (path for folder in (self.parent, self.child) for path in folder.rglob("*") if path.is_file())
        return measured([program, *map(str, files)])

    def _prepare(self, cold: bool, source: Path) -> None:
        drop_caches(*(folder for folder in (self.parent, self.child) if folder.exists()))
        if not cold:
            warm(source)


def compare(bench: Bench, rounds: int, parts: set[str], size: str) -> None:
    """Interleaved rounds of what `parts` names."""
    arms: dict[str, Callable[[], Run]] = {}
    for state in ("cold", "warm"):
        if state in parts:
            arms[f"ours {state}"] = lambda cold=state == "cold": bench.expand(cold)
            arms[f"cp {state}"] = lambda cold=state == "cold": bench.cp(cold)
            if "script" in parts:
                arms[f"script {state}"] = lambda cold=state == "cold": bench.script(cold)
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            runs[name].append(arm())
    source, target = folder_bytes(bench.parent) / 1e9, folder_bytes(bench.child) / 1e9
    print(f"\n{size}: {source:.2f} GB -> {target:.2f} GB, {rounds} rounds")
    for name, measured_runs in runs.items():
        print(f"  {name:12s} {spread(measured_runs, 'seconds')} s, {spread(measured_runs, 'cpu')} CPU s, ", end="")
        print(f"{target / median(measured_runs, 'seconds'):.2f} GB/s")
    for name, measured_runs in runs.items():
        if name.startswith("ours"):
            read, written = median(measured_runs, "read") / source, median(measured_runs, "written") / target
            print(
                f"  {name:12s} peak {spread(measured_runs, 'peak')} MiB, read {read:.3f}x source, written {written:.3f}x output"
            )
    for state in ("cold", "warm"):
        if f"ours {state}" in runs:
            own = median(runs[f"ours {state}"], "seconds")
            print(f"  {state}: ours / cp = {own / median(runs[f'cp {state}'], 'seconds'):.2f}", end="")
            if f"script {state}" in runs:
                print(f", script / ours = {median(runs[f'script {state}'], 'seconds') / own:.2f}", end="")
            print()


def prove(bench: Bench, rounds: int) -> None:
    """Interleaved rounds of the proof and of programs that read what it reads."""
    if not bench.child.exists():
        bench.expand(cold=True)
    runs: dict[str, list[Run]] = {"verify": [], "cat": [], "sha256sum": []}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(bench.verify() if name == "verify" else bench.read_both(name))
    both = (folder_bytes(bench.parent) + folder_bytes(bench.child)) / 1e9
    print(f"  proof of {both:.2f} GB, cold, {rounds} rounds")
    for name, found in runs.items():
        print(f"  {name:12s} {spread(found, 'seconds')} s, {spread(found, 'cpu')} CPU s, ", end="")
        print(f"{both / median(found, 'seconds'):.2f} GB/s, peak {spread(found, 'peak')} MiB")
    own = median(runs["verify"], "seconds")
    print("  " + ", ".join(f"verify / {name} = {own / median(runs[name], 'seconds'):.2f}" for name in ("cat", "sha256sum")))


def median(runs: list[Run], what: str) -> float:
    """Median of one figure."""
    return statistics.median(getattr(run, what) for run in runs)


def spread(runs: list[Run], what: str) -> str:
    """Median (minimum to maximum) of one figure."""
    values = [getattr(run, what) for run in runs]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@contextmanager
def parent_of(cache: Path | None, scratch: Path, name: str, *shape: int) -> Iterator[Path]:
    """A parent, kept in `cache` when there is one."""
    folder = (cache or scratch) / f"parent-{name}"
    if not folder.exists():
        write_parent(folder, *shape)
    yield folder
    if cache is None:
        shutil.rmtree(folder)


def main(options: dict[str, str]) -> None:
    """Measure and print."""
    rounds, workers = int(options.get("rounds", "3")), int(options.get("workers", "0"))
    parts = set(options.get("parts", "cold,warm,script,verify").split(","))
    cache = Path(options["cache"]) if "cache" in options else None
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as name:
        scratch = Path(name)
        system = subprocess.run(["stat", "-f", "-c", "%T", name], capture_output=True, text=True, check=True).stdout.strip()
        versions = ", ".join(f"{package} {version(package)}" for package in ("numpy", "torch", "safetensors"))
        print(f"{os.cpu_count()} cores, {system}, Linux {platform.release()}, Python {platform.python_version()}, {versions}")
        for size in options.get("sizes", "5GB").split(","):
            if size and parts & {"cold", "warm", "verify"}:
                with parent_of(cache, scratch, size, LAYERS[size], 2048, 768) as parent:
                    bench = Bench(scratch, parent, workers)
                    if parts & {"cold", "warm"}:
                        compare(bench, rounds, parts, size)
                    if "verify" in parts:
                        prove(bench, rounds)
                shutil.rmtree(scratch / "child", ignore_errors=True)
        if "235b" in parts:
            with parent_of(cache, scratch, "235b", 1, 4096, 1536) as parent:
                run = Bench(scratch, parent, workers).expand(cold=True)
                target = folder_bytes(scratch / "child") / 1e9
                source = folder_bytes(parent) / 1e9
                print(f"\none layer of Qwen3-235B-A22B: {source:.1f} GB -> {target:.1f} GB in {run.seconds:.1f} s")
                print(f"  peak {run.peak:.0f} MiB, read {run.read:.2f} GB, written {run.written:.2f} GB")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] == "script":
        script(Path(words[1]), Path(words[2]))
    else:
        main(dict(word.split("=", 1) for word in words))
