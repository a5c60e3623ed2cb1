"""Logits of a Hugging Face folder through the engine, so that others can check us.

A worker: `torchrun ... -m moexpand.train.logits key=value ...`.
"""

import os
import sys
import traceback
from pathlib import Path

import numpy as np

from moexpand.base.errors import InputError, MoexpandError
from moexpand.base.files import disk_errors
from moexpand.base.result import write_result
from moexpand.conf.check import check_layout
from moexpand.conf.compose import compose_words
from moexpand.conf.schema import LogitsCommand
from moexpand.train.preflight import open_supported
from moexpand.upcycle.checkpoint import Checkpoint


def check(config: LogitsCommand, world_size: int) -> tuple[Checkpoint, np.ndarray]:
    """Open checkpoint and tokens and check that they fit; nothing here imports torch.

    Returns:
        The checkpoint and the tokens, int64 [B, S].
    """
    checkpoint = open_supported(config.checkpoint)
    check_layout(config.parallel, checkpoint.architecture, world_size)
    tokens = _read_tokens(Path(config.tokens), checkpoint.architecture.vocab_size)
    if tokens.shape[1] % config.parallel.tensor:
        raise InputError(
            f"Sequences of {tokens.shape[1]} tokens cannot be split over parallel.tensor={config.parallel.tensor} ranks; "
            "cut or pad them to a multiple."
        )
    return checkpoint, tokens


def _read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"tokens={path} does not exist; an int64 .npy file [B, S] is needed.") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"tokens={path} is not a .npy file: {error}.") from None
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise InputError(f"tokens={path} holds {tokens.dtype} {list(tokens.shape)}; int64 [B, S] is needed.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f"tokens={path} holds ids {tokens.min()} to {tokens.max()}; the vocabulary has 0 to {vocab_size - 1}.")
    return tokens.astype(np.int64)


def run_worker(config: LogitsCommand) -> None:
    """Compute the logits, one sequence after the other, and write them on the rank that holds them."""
    checkpoint, tokens = check(config, int(os.environ.get("WORLD_SIZE", "1")))
    import torch

    from moexpand.parallel import cpu, ranks
    from moexpand.parallel.batch import PackedBatch
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import RouterRules
    from moexpand.train import weights
    from moexpand.train.setup import layout_of, shape_of

    layout = layout_of(config.parallel)
    here = ranks.start(layout, config.parallel.timeout_seconds)
    try:
        engine = Engine(shape_of(checkpoint.architecture), layout, RouterRules(), config.precision.name, here)
        weights.load(engine, checkpoint)
        batches = [PackedBatch.from_sequences(torch.from_numpy(row[None]).to(cpu.device())) for row in tokens]
        outputs = engine.logits(batches)
        if outputs and here.data_rank == 0 and here.tensor_rank == 0:
            out = Path(config.out)
            with disk_errors(f"writing {out}"), open(out, "wb") as file:
                np.save(file, torch.stack(outputs).float().cpu().numpy())
        ranks.barrier()
    finally:
        ranks.stop()


def result_folder(config: LogitsCommand) -> Path:
    """Where workers leave their result and their log, beside the output file; removed when all went well."""
    return Path(f"{config.out}.run")


def main(arguments: list[str]) -> int:
    """Run one worker; its result goes beside the output file."""
    folder: Path | None = None
    try:
        config = compose_words("logits", arguments)
        folder = result_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        run_worker(config)
        code, message = 0, ""
    except MoexpandError as error:
        code, message = error.exit_code, str(error)
    except Exception as error:
        code, message = 3, f"A worker failed with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        traceback.print_exc()
    if folder is not None and (code or os.environ.get("RANK", "0") == "0"):
        write_result(folder, code, message)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
