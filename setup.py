"""Maps the flat folders of the checkout into the package: train/ becomes moexpand.train, and so on. Metadata: pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ["conf", "data", "launch", "parallel", "train", "upcycle"]
inside = [package for room in ROOMS for package in (room, *(f"{room}.{name}" for name in find_packages(room)))]

setup(
    packages=[
        "moexpand",
        *(f"moexpand.{name}" for name in find_packages("moexpand")),
        *(f"moexpand.{package}" for package in inside),
    ],
    package_dir={"moexpand": "moexpand", **{f"moexpand.{room}": room for room in ROOMS}},
    package_data={
        "moexpand": ["py.typed"],
        "moexpand.conf": ["*/*.yaml"],
        "moexpand.launch": ["shell/*.sh"],
        "moexpand.data": ["*/*.md", "*/*.txt", "*/*.pdf", "*/*.json", "*/*.model"],
    },
)
