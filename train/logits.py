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
from moexpand.base.routes import check_routes
from moexpand.conf.check import check_layout, check_sequence
from moexpand.conf.schema import LogitsCommand
from moexpand.train.preflight import open_supported
from moexpand.train.worker import work
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.logical import StoredWeights


def check(config: LogitsCommand, world_size: int) -> tuple[Checkpoint, np.ndarray, np.ndarray | None]:
    """Open checkpoint, tokens and routes and check that they fit; nothing here imports torch.

    Returns:
        The checkpoint, the tokens int64 [B, S], and routes to replay, [B, S, layers, K].
    """
    checkpoint = open_supported(config.checkpoint)
    check_layout(config.parallel, checkpoint.architecture, config.precision.name, world_size, "processes")
    tokens = _read_tokens(Path(config.tokens), checkpoint.architecture.vocab_size)
    check_sequence(f"the length of the sequences in {config.tokens}", tokens.shape[1], config.parallel)
    vision, encoder = checkpoint.architecture.vision, checkpoint.architecture.time_series
    if encoder is not None and (tokens == encoder.ts_token_id).any():
        row = int((tokens == encoder.ts_token_id).any(axis=1).argmax())
        raise InputError(
            f"tokens={config.tokens} holds ts_token_id={encoder.ts_token_id} in sequence {row}, a place for a time series, and "
            "logits takes text alone; leave such sequences out."
        )
    if vision is not None and (tokens == vision.image_token_id).any():
        row = int((tokens == vision.image_token_id).any(axis=1).argmax())
        raise InputError(
            f"tokens={config.tokens} holds image_token_id={vision.image_token_id} in sequence {row}, a place for a picture, and "
            "pictures cannot be given here; give sequences of text."
        )
    if config.routes is None:
        return checkpoint, tokens, None
    routes, arch = _read_array("routes", Path(config.routes)), checkpoint.architecture
    shape = (*tokens.shape, arch.num_hidden_layers, arch.num_experts_per_tok)
    check_routes(routes, shape, arch.num_experts, arch.router_n_groups, f"routes={config.routes}")
    return checkpoint, tokens, routes


def _read_array(key: str, path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{key}={path} does not exist; a .npy file of whole numbers is needed.") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{key}={path} is not a .npy file: {error}.") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{key}={path} is an .npz archive; a .npy file of whole numbers is needed.")
    return array


def _read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    tokens = _read_array("tokens", path)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise InputError(f"tokens={path} holds {tokens.dtype} {list(tokens.shape)}; int64 [B, S] is needed.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f"tokens={path} holds ids {tokens.min()} to {tokens.max()}; the vocabulary has 0 to {vocab_size - 1}.")
    return tokens.astype(np.int64)


def run_worker(config: LogitsCommand) -> None:
    """Compute the logits, one sequence after the other, and write them on the rank that holds them."""
    checkpoint, tokens, routes = check(config, int(os.environ.get("WORLD_SIZE", "1")))
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
    outputs, recorded = engine.logits(batches, None if routes is None else list(routes), record=config.routes_out is not None)
    if recorded is not None and config.routes_out is not None and here.main:
        _write(Path(config.routes_out), np.stack(recorded))
    if outputs and here.data_rank == 0 and here.tensor_rank == 0:
        _write(Path(config.out), torch.stack(outputs).float().cpu().numpy())
    ranks.barrier()
    ranks.stop()


def _write(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomic(path, content.getbuffer())


def result_folder(config: LogitsCommand) -> Path:
    """Where workers leave their result and their log, beside the output file; removed when all went well."""
    return Path(f"{config.out}.run")


if __name__ == "__main__":
    sys.exit(work("logits", sys.argv[1:], result_folder, run_worker))
