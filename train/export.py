"""A run's checkpoint as a Hugging Face folder."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import refuse_existing
from moexpand.conf.compose import from_yaml
from moexpand.conf.schema import ExportCommand
from moexpand.conf.train_schema import TrainCommand
from moexpand.train import checkpoints, preflight
from moexpand.train.preflight import PLAN, Source
from moexpand.train.run_data import open_data
from moexpand.train.run_inputs import image_settings, write_settings
from moexpand.upcycle.config_json import Config, grouped_config, lmdeploy_config, with_routing
from moexpand.upcycle.fresh_config import architecture_config, parent_type
from moexpand.upcycle.layout import copy_side_files

MISREAD_BY = "transformers, vLLM and SGLang, which run it as plain top-k without a word"


def export(command: ExportCommand, say: Callable[[str], None]) -> None:
    """Write the checkpoint of `command.run` to `command.target`.

    `native` gives a grouped child its own model_type and model code; `lmdeploy` names it qwen3_moe with `router_n_groups`,
    which LMDeploy honours and others do not. The name of a kind is `native` for a run of that kind and refused for others.

    Raises:
        InputError: the target exists, the run has no such checkpoint, or it is damaged.
    """
    run, target = Path(command.run), Path(command.target)
    refuse_existing(target)
    config: TrainCommand = from_yaml(run / "config.yaml", "train")
    if config.expand is not None:
        config = replace(config, expand=str(run / PLAN))
    folder = checkpoints.find(run, command.step)
    wrong = checkpoints.damage(folder)
    if wrong is not None:
        raise InputError(f"{folder} is damaged and is not exported: {wrong}")
    source = preflight.source_of(config)
    _check_kind(command.format, source.architecture.model_type)
    if command.format == "lmdeploy" and source.architecture.router_n_groups == 1:
        raise InputError("format=lmdeploy is for grouped models and this run's router has one group; give format=native.")
    if command.format == "lmdeploy" and not source.architecture.routed_as_usual:
        raise InputError(
            "format=lmdeploy cannot carry this run's selection bias, scoring_func or routed_scaling_factor; give format=native."
        )
    with tempfile.TemporaryDirectory() as scratch:
        side_files = Path(scratch)
        if source.checkpoint is not None:
            copy_side_files(source.checkpoint.folder, source.checkpoint.side_files, side_files)
        if source.checkpoint is None or source.new_vocabulary:
            open_data(config).tokenizer.save(side_files)
        images = image_settings(config.data, source.architecture.vision, config.checkpoint)
        if images is not None:
            write_settings(images, side_files)
        _write(config, source, folder, command, target, side_files)
    say(f"wrote {folder} to {target}")
    if command.format == "lmdeploy":
        say(f"WARNING: {target} is for LMDeploy alone; it is misread by {MISREAD_BY}.")


def _check_kind(format: str, model_type: str) -> None:
    kind = parent_type(model_type)
    if format not in ("native", "lmdeploy", kind):
        raise InputError(
            f"format={format} is for runs of that kind and this one trains {kind}; export it with format=native, then make the "
            f"other kind with moexpand convert family={format}."
        )
    if format == "lmdeploy" and kind != "qwen3_moe":
        raise InputError(f"format=lmdeploy is for qwen3_moe, where LMDeploy honours groups, and this run trains {kind}.")


def _write(config: TrainCommand, source: Source, folder: Path, command: ExportCommand, target: Path, side_files: Path) -> None:
    # The whole model is copied out and nothing is computed: main memory will do.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # one process holds the whole model, wherever it was started
        os.environ.pop(variable, None)
    from moexpand.parallel import checkpoint, ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import DTYPES, Layout, RouterRules
    from moexpand.train import weights
    from moexpand.train.setup import shape_of

    dtype = DTYPES[config.precision.name]
    here = ranks.start(Layout())
    try:
        engine = Engine(shape_of(source.architecture), Layout(), RouterRules(), config.precision.name, here)
        checkpoint.load(engine, folder)
        described = describe(source, str(dtype).removeprefix("torch."), command.format)
        fp8 = command.quantization == "fp8"
        weights.write(engine, source.architecture, described, target, side_files, command.max_shard_size, dtype, fp8)
    finally:
        ranks.stop()


def describe(source: Source, dtype: str, format: str) -> Config:
    """config.json of the exported folder: the source's own where there is one, with the dtype that is written."""
    config: dict[str, Any] = architecture_config(source.architecture) if source.checkpoint is None else source.checkpoint.config
    config = {key: value for key, value in config.items() if key != "quantization_config"}  # no weight is written in FP8
    arch = source.architecture
    if config["model_type"] != arch.model_type:  # the run has taken up a selection bias
        config = grouped_config(config, arch.num_experts, arch.router_n_groups)
    if not arch.routed_as_usual:
        config = with_routing(config, arch)
    return _of_dtype(lmdeploy_config(config) if format == "lmdeploy" else config, dtype)


def _of_dtype(config: Config, dtype: str) -> Config:
    """The config, and the configs of its parts, with the dtype that is written, where they say one."""
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _of_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }
