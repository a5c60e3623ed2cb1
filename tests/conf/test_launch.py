"""Keys of `launch`: what each way of starting reads, and what cannot go together."""

import pytest

from moexpand.base.errors import InputError
from moexpand.conf.check_launch import check_launch, time_limit
from moexpand.conf.launch_schema import Launch


def test_defaults_are_sound_everywhere() -> None:
    for name in ("local", "slurm", "torchrun"):
        check_launch(Launch(name=name))
    check_launch(Launch(name="slurm", nodes=8, processes=8, options=["--constraint=h100", "--hint=nomultithread", "--mem=0"]))


@pytest.mark.parametrize("time", ["30", "24:00:00", "1-0", "2-12:00", "7-00:00:00"])
def test_times_of_slurm(time: str) -> None:
    check_launch(Launch(name="slurm", time=time))


def test_seconds_of_a_time() -> None:
    known = {"30": 1800, "01:02:03": 3723, "1-0": 86_400, "2-12:30": 217_800, "1-02:03:04": 93_784}
    assert {text: time_limit(text) for text in known} == known


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"nodes": 2}, "launch.nodes=2 changes nothing on this machine alone; give launch=slurm or launch=torchrun"),
        ({"partition": "gpu"}, "launch.partition=gpu changes nothing"),
        ({"container": "a.sif"}, "launch.container=a.sif changes nothing"),
        ({"name": "torchrun", "time": "10"}, "launch.time=10 belongs to launch=slurm"),
        ({"name": "torchrun", "options": ["--mem=0"]}, r"launch\.options=\[--mem=0\] belongs to launch=slurm"),
        ({"name": "slurm", "time": "1 day"}, "launch.time=1 day is not minutes, HH:MM:SS"),
        ({"name": "slurm", "time": "10:75:00"}, "is not minutes"),
        ({"name": "slurm", "time": "24:00"}, "is not minutes"),
        ({"name": "slurm", "time": "86400"}, "is 86,400 minutes; give HH:MM:SS or D-HH, in YAML between quotes"),
        ({"name": "slurm", "time": "5"}, "is 300 s and a job stops launch.signal_seconds=300 before its end"),
        (
            {"name": "slurm", "options": ["--dependency=singleton"], "container_runtime": "pyxis"},
            "give launch.container=IMAGE as well",
        ),
        ({"name": "slurm", "signal_seconds": 30}, "launch.grace_seconds=60 are given"),
        ({"name": "slurm", "options": ["constraint=h100"]}, "is not an option such as"),
        ({"name": "slurm", "options": ["--nodes=3"]}, "which the script sets itself; give launch.nodes"),
        ({"name": "slurm", "mounts": ["/data"]}, r"launch\.mounts=\[/data\] belong to a container"),
        ({"name": "torchrun", "container": "a.sqsh", "container_runtime": "pyxis"}, "pyxis is a plugin of SLURM"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_launch(Launch(**given))  # type: ignore[arg-type]
