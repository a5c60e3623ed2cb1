"""The batch script and the one that is started by hand: what stands in them, and what they do with each end of the workers."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moexpand.conf.launch_schema import Launch
from moexpand.launch.scripts import batch_script, torchrun_script

FAKES = {
    "scontrol": """
case $1 in
    show) printf 'n%s\\n' $(seq 1 "${FAKE_NODES:-1}") ;;
    requeue) echo "$2" >> "$FAKE/requeued"; exit "${FAKE_REQUEUE:-0}" ;;
esac""",
    "squeue": 'echo "${FAKE_STATE:-RUNNING}"',
    # Each start takes the next line of `codes`: a code; `save CODE`, a new checkpoint first; `wait CODE`, until USR1 comes.
    "srun": """
echo "$@" >> "$FAKE/starts"
n=$(wc -l < "$FAKE/starts")
set -- $(sed -n "${n}p" "$FAKE/codes")
if [ "$1" = save ]; then mkdir -p "$FAKE/run/checkpoints"; echo "step_$n" > "$FAKE/run/checkpoints/latest"; shift; fi
if [ "$1" = wait ]; then
    got=""
    trap 'got=1' USR1
    touch "$FAKE/waiting"
    until [ "$got" ]; do sleep 0.05; done
    shift
fi
exit "$1\"""",
}


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder whose programs stand for SLURM's; the run folder is `run` in it."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    return tmp_path


def begin(fake: Path, codes: list[str], launch: Launch | None = None, **environment: str) -> subprocess.Popen[str]:
    (fake / "codes").write_text("\n".join(codes) + "\n")
    script = fake / "job.sbatch"
    script.write_text(batch_script(launch or Launch(name="slurm"), fake / "run"))
    given = {"PATH": f"{fake}:{os.environ['PATH']}", "FAKE": str(fake), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1"}
    return subprocess.Popen(
        ["bash", script],
        env=given | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background inherit that SIGINT is ignored, which a shell cannot trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = job.communicate(timeout=30)
    finally:
        job.kill()
    return job.returncode, err


def starts(fake: Path) -> list[str]:
    return (fake / "starts").read_text().splitlines() if (fake / "starts").exists() else []


def requeued(fake: Path) -> list[str]:
    return (fake / "requeued").read_text().split() if (fake / "requeued").exists() else []


@pytest.mark.parametrize("code", [0, 1, 2])
def test_an_end_that_starting_again_would_not_change_is_the_end_of_the_job(fake: Path, code: int) -> None:
    (fake / "run" / "exit.json").write_text(json.dumps({"code": code, "message": "m", "attempt": "a"}))
    assert ended(begin(fake, [str(code), "0"]))[0] == code
    assert len(starts(fake)) == 1
    assert not requeued(fake)


def test_1_that_the_workers_did_not_say_is_a_failure_like_any_other(fake: Path) -> None:
    """srun, and a Python that cannot import, end with 1 as well."""
    assert ended(begin(fake, ["1", "0"]))[0] == 0
    assert len(starts(fake)) == 2


def test_a_failure_starts_again_under_another_name(fake: Path) -> None:
    code, err = ended(begin(fake, ["3", "137", "0"], SLURM_RESTART_COUNT="2"))
    assert code == 0
    assert [line.split()[-1] for line in starts(fake)] == ["41.2.1", "41.2.2", "41.2.3"]
    assert "start 2 failed with code 137" in err


def test_failures_without_a_checkpoint_between_them_are_counted(fake: Path) -> None:
    launch = Launch(name="slurm", restarts=1)
    code, err = ended(begin(fake, ["3", "save 3", "3", "0"], launch))
    assert (code, len(starts(fake))) == (3, 3)
    assert "start 3 failed, the last of 2 without a new checkpoint" in err


def test_no_restarts_means_none(fake: Path) -> None:
    assert ended(begin(fake, ["3", "0"], Launch(name="slurm", restarts=0)))[0] == 3
    assert len(starts(fake)) == 1


@pytest.mark.parametrize(
    ("number", "state", "back"),
    [
        (signal.SIGUSR1, "RUNNING", True),
        (signal.SIGTERM, "RUNNING", True),
        (signal.SIGTERM, "COMPLETING", False),  # scancel
        (signal.SIGINT, "RUNNING", False),
    ],
)
def test_a_signal_reaches_the_step_and_the_job_comes_back_unless_it_is_cancelled(
    fake: Path, number: signal.Signals, state: str, back: bool
) -> None:
    job = begin(fake, ["wait 75", "0"], FAKE_STATE=state)
    end = time.monotonic() + 20
    while not (fake / "waiting").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(number)
    code, err = ended(job)
    assert code == 75
    assert requeued(fake) == (["41"] if back else [])
    assert f"received {number.name}" in err
    assert "moexpand: saved" in err
    assert len(starts(fake)) == 1


def test_workers_that_were_stopped_behind_the_jobs_back_bring_it_back(fake: Path) -> None:
    assert ended(begin(fake, ["75", "0"]))[0] == 75
    assert requeued(fake) == ["41"]


def test_a_failure_after_a_signal_is_not_started_again(fake: Path) -> None:
    job = begin(fake, ["wait 3", "0"])
    while not (fake / "waiting").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    code, err = ended(job)
    assert code == 75
    assert "not saved (code 3); the job is back in the queue" in err
    assert len(starts(fake)) == 1


def test_coming_back_without_a_new_checkpoint_has_an_end(fake: Path) -> None:
    launch, ends = Launch(name="slurm", restarts=1), []
    for restart in range(4):
        (fake / "starts").unlink(missing_ok=True)
        ends.append(ended(begin(fake, ["75"], launch, SLURM_RESTART_COUNT=str(restart)))[0])
    assert ends == [75, 75, 3, 3]
    # A checkpoint between begins the count anew; so does another submission.
    (fake / "starts").unlink()
    assert ended(begin(fake, ["save 75"], launch, SLURM_RESTART_COUNT="4"))[0] == 75
    (fake / "starts").unlink()
    assert ended(begin(fake, ["75"], launch))[0] == 75


def test_a_queue_that_does_not_answer_is_asked_again_and_told(fake: Path) -> None:
    (fake / "squeue").write_text("#!/bin/bash\nexit 1\n")
    (fake / "sleep").write_text("#!/bin/bash\n")
    (fake / "sleep").chmod(0o755)
    code, err = ended(begin(fake, ["75"]))
    assert code == 75
    assert not requeued(fake)
    assert "saved; the job is unknown to squeue and does not go back to the queue by itself" in err


def test_setup_lines_may_read_unset_variables_and_a_failing_one_starts_nothing(fake: Path) -> None:
    fine = Launch(name="slurm", setup=['test -z "$NOT_SET_ANYWHERE"', "export GIVEN=1"])
    assert ended(begin(fake, ["0"], fine))[0] == 0
    code, err = ended(begin(fake, ["0"], Launch(name="slurm", setup=["false", "true"])))
    assert code == 3
    assert "a line of launch.setup failed" in err


def test_a_queue_that_does_not_take_the_job_is_told(fake: Path) -> None:
    code, err = ended(begin(fake, ["75"], FAKE_REQUEUE="1"))
    assert code == 75
    assert "submit it again" in err


def test_another_number_of_nodes_starts_nothing(fake: Path) -> None:
    code, err = ended(begin(fake, ["0"], FAKE_NODES="2"))
    assert code == 2
    assert "SLURM gave 2 nodes and the run needs 1" in err
    assert not starts(fake)


def test_the_node_list_that_cannot_be_read_starts_nothing(fake: Path) -> None:
    (fake / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    code, err = ended(begin(fake, ["0"]))
    assert code == 3
    assert "cannot name the nodes" in err
    assert not starts(fake)


def options(text: str) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (each.partition("=") for each in found)}


def variable(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"{name}=("))
    return shlex.split(line.removeprefix(f"{name}=(").removesuffix(")"))


def test_what_sbatch_is_told() -> None:
    launch = Launch(
        name="slurm", nodes=4, processes=8, time="1-12:00:00", partition="gpu", account="lab", options=["--constraint=h100"]
    )
    told = options(batch_script(launch, Path("/runs/my run")))
    assert told == {
        "job-name": '"my run"', "nodes": "4", "ntasks-per-node": "1", "exclusive": "", "gpus-per-node": "8", "time": "1-12:00:00",
        "signal": "B:USR1@300", "requeue": "", "open-mode": "append",
        "output": '"/runs/my run/slurm-%j.out"', "partition": "gpu", "account": "lab", "constraint": "h100",
    }  # fmt: skip
    part = options(batch_script(Launch(name="slurm", processes=2, gpus_per_node=0, cpus_per_node=16), Path("/runs/one")))
    assert part["cpus-per-task"] == "16"
    assert "exclusive" not in part
    assert "gpus-per-node" not in part


def test_containers_wrap_the_launcher_or_are_options_of_srun() -> None:
    launch = Launch(name="slurm", nodes=2, container="/images/moexpand.sif", mounts=["/data", "/models:/m"])
    text = batch_script(launch, Path("/runs/one"))
    words = variable(text, "WORKERS")
    assert words[:3] == ["apptainer", "exec", "--nv"]
    binds = [words[place + 1] for place, word in enumerate(words) if word == "--bind"]
    assert binds == [f"{Path.cwd()}:{Path.cwd()}", "/runs/one:/runs/one", "/data:/data", "/models:/m"]
    assert words[words.index("/images/moexpand.sif") + 1 :][:3] == ["python3", "-m", "moexpand.launch.node"]

    launch.container_runtime = "pyxis"
    text = batch_script(launch, Path("/runs/one"))
    assert variable(text, "WORKERS")[:2] == ["python3", "-m"]
    assert "--container-image=/images/moexpand.sif" in variable(text, "STEP")
    assert any(word.endswith("/runs/one:/runs/one,/data:/data,/models:/m") for word in variable(text, "STEP"))


@pytest.mark.parametrize("write", [batch_script, torchrun_script])
def test_bash_reads_every_script_and_odd_names_stay_whole(write: object, tmp_path: Path) -> None:
    odd = tmp_path / "it's $HOME; rm"
    launch = Launch(nodes=2, setup=["export A='b c'", "module load cuda || true"], python="/opt/my python/bin/python")
    text = write(launch, odd)  # type: ignore[operator]
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    words = variable(text, "WORKERS")
    assert words[0] == "/opt/my python/bin/python"
    assert words[words.index("--run") + 1] == str(odd)
    assert "\nmodule load cuda || true || {" in text


def test_the_script_for_each_node_asks_for_its_place(tmp_path: Path) -> None:
    script = tmp_path / "torchrun.sh"
    script.write_text(torchrun_script(Launch(name="torchrun", nodes=2), tmp_path))
    for words in ([], ["0"], ["one", "host:1"], ["0", "host"]):
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True, timeout=30)
        assert done.returncode == 2, words
        assert "NODE HEAD:PORT on each of 2 nodes" in done.stderr
    assert sys.executable in script.read_text()
