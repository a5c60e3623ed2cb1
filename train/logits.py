"""Logits of a Hugging Face folder through the engine, so that others can check us.

A worker: `torchrun ... -m moexpand.train.logits key=value ...`.
"""

import io
import os
import sys
from pathlib import Path

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import write_atomic
from moexpand.conf.check import check_layout
from moexpand.conf.schema import LogitsCommand
from moexpand.train.preflight import open_supported
from moexpand.train.worker import work
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.logical import StoredWeights


def check(config: LogitsCommand, world_size: int) -> tuple[Checkpoint, np.ndarray]:
    """Open checkpoint and tokens and check that they fit; nothing here imports torch.

    Returns:
        The checkpoint and the tokens, int64 [B, S].
    """
    checkpoint = open_supported(config.checkpoint)
    check_layout(config.parallel, checkpoint.architecture, world_size, "processes")
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
    engine = Engine(shape_of(checkpoint.architecture), layout, RouterRules(), config.precision.name, here)
    weights.load(engine, StoredWeights(checkpoint))
    batches = [PackedBatch.from_sequences(torch.from_numpy(row[None]).to(cpu.device())) for row in tokens]
    outputs = engine.logits(batches)
    if outputs and here.data_rank == 0 and here.tensor_rank == 0:
        content = io.BytesIO()
        np.save(content, torch.stack(outputs).float().cpu().numpy())
        write_atomic(Path(config.out), content.getbuffer())
    ranks.barrier()
    ranks.stop()


def result_folder(config: LogitsCommand) -> Path:
    """Where workers leave their result and their log, beside the output file; removed when all went well."""
    return Path(f"{config.out}.run")


if __name__ == "__main__":
    sys.exit(work("logits", sys.argv[1:], result_folder, run_worker))
