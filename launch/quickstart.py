"""`make quickstart`: the whole way on one small machine, stage by stage, through the same commands that a cluster run uses.

    pdfs -> shards -> parent (128 experts, trained) -> calibration -> child (512 experts in 8 groups) -> verified ->
    trained on two ranks, stopped and resumed once -> exported, its step 0 checked by transformers; beside it the parent
    continued on the same tokens.

`python -m moexpand.launch.quickstart [folder=quickstart] [stage=NAME]` runs every stage that is not done yet, or one alone.
A stage is done when its output is there; remove the output to run it again.
"""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import STOPPED, EnvironmentFailure, InputError, MoexpandError
from moexpand.launch.summary import summarise

RESUME_AFTER = 60


@dataclass(frozen=True)
class Paths:
    """Where each stage puts its output."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name.replace("_", "-")


def pdfs(paths: Paths) -> None:
    """Fetch real PDFs with figures."""
    _run([sys.executable, "-m", "moexpand.data.sample_pdfs", str(paths.pdfs)])


def shards(paths: Paths) -> None:
    """Text and figures with captions, as webdataset shards."""
    _moexpand("data build", f"pdfs={paths.pdfs}", f"out={paths.shards}", "tokenizer=qwen-8192")
    _moexpand("data inspect", f"shards={paths.shards}")


def parent(paths: Paths) -> None:
    """Train a small parent and save it as an ordinary Hugging Face folder."""
    _train(paths, "parent_run", "quickstart_parent", "data.held_out=0.05")
    _moexpand("export", f"run={paths.parent_run}", f"target={paths.parent}")


def calibration(paths: Paths) -> None:
    """Count which experts of the parent fire together, and keep router logits for the prediction of step 0."""
    words = (f"checkpoint={paths.parent}", f"data.shards={paths.shards}", f"out={paths.calibration}")
    _moexpand("calibrate", *words, "tokens=65536", "seq_length=512")


def child(paths: Paths) -> None:
    """Expand the parent, 128 -> 512 experts in 8 groups, those that fire together in different groups."""
    words = (f"source={paths.parent}", f"target={paths.child}", f"calibration={paths.calibration}")
    _moexpand("upcycle", *words, "num_experts=512", "num_groups=8", f"plan_out={paths.folder / 'plan.json'}")
    _moexpand("count", f"model={paths.child}")


def verified(paths: Paths) -> None:
    """Prove every tensor of the child."""
    _moexpand("verify", f"source={paths.parent}", f"target={paths.child}")
    paths.verified.touch()


def trained(paths: Paths) -> None:
    """Train the child on two ranks with expert parallelism 2; a signal stops it half-way and the same command goes on."""
    words = _train_words(
        paths, "child_run", "quickstart_child", f"checkpoint={paths.child}", "launch.processes=2", "parallel.expert=2", "seed=1"
    )
    if not (paths.child_run / "checkpoints").exists():
        _stop_after(RESUME_AFTER, words)
    _run(words)
    _moexpand("export", f"run={paths.child_run}", f"target={paths.trained}")


def checked(paths: Paths) -> None:
    """The child's loss at step 0 once more, by transformers."""
    _run([sys.executable, "-m", "moexpand.train.reference", str(paths.child_run)])
    paths.checked.touch()


def continued(paths: Paths) -> None:
    """Train the parent on the tokens that the child had."""
    _train(paths, "continued_run", "quickstart_continued", f"checkpoint={paths.parent}", "seed=1")
    paths.continued.touch()


STAGES: dict[str, Callable[[Paths], None]] = {
    stage.__name__: stage for stage in (pdfs, shards, parent, calibration, child, verified, trained, checked, continued)
}


def _train_words(paths: Paths, run: str, experiment: str, *words: str) -> list[str]:
    common = [f"run.dir={getattr(paths, run)}", f"data.shards={paths.shards}", f"experiment={experiment}", "plain=true"]
    return [sys.executable, "-m", "moexpand", "train", *common, *words]


def _train(paths: Paths, run: str, experiment: str, *words: str) -> None:
    _run(_train_words(paths, run, experiment, *words))


def _moexpand(command: str, *words: str) -> None:
    _run([sys.executable, "-m", "moexpand", *command.split(), *words])


def _run(words: list[str]) -> None:
    print(f"$ {shlex.join(words)}", flush=True)
    code = subprocess.run(words).returncode
    if code:
        raise EnvironmentFailure(f"A stage ended with exit code {code}: {shlex.join(words)}")


def _stop_after(step: int, words: list[str]) -> None:
    """Start a run, ask it to stop once it has printed that step, and expect it to say that it did."""
    print(f"$ {shlex.join(words)}   # will be asked to stop after step {step}", flush=True)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    asked = False
    for line in process.stdout:
        print(line, end="", flush=True)
        if not asked and line.startswith("step") and line.split("/")[0].endswith(f" {step}"):
            process.send_signal(signal.SIGTERM)
            asked = True
    if process.wait() != STOPPED:
        raise EnvironmentFailure(f"The run that was asked to stop ended with exit code {process.returncode}, not {STOPPED}.")


def main(arguments: list[str]) -> int:
    """Run the stages and print the summary."""
    options = dict(word.partition("=")[::2] for word in arguments)
    unknown = options.keys() - {"folder", "stage"}
    if unknown or options.get("stage", "pdfs") not in STAGES:
        raise InputError(f"The quickstart takes folder=DIR and stage={'|'.join(STAGES)}, not {' '.join(arguments)}.")
    paths = Paths(Path(options.get("folder", "quickstart")))
    paths.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name, stage in STAGES.items():
        if options.get("stage", name) != name:
            continue
        if getattr(paths, name).exists():
            print(f"== {name}: done already ({getattr(paths, name)})", flush=True)
            continue
        print(f"== {name}: {(stage.__doc__ or '').strip()}", flush=True)
        started = time.monotonic()
        stage(paths)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    if "stage" not in options:
        summarise(paths.folder)
        print(f"The quickstart took {time.monotonic() - began:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MoexpandError as error:
        print(f"moexpand: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
