"""Packed batches as a pure function of (shards, seed, step): no state to save or restore, the same on any number of ranks.

Optimiser step k takes the packs k * global_batch ... (k + 1) * global_batch - 1 of the run's endless sequence. They are cut into
micro-batches of `micro_batch` packs, and each goes to one data-parallel rank: the set of micro-batches is the same however many
ranks share it. Only data-parallel ranks get different tokens; expert-parallel ranks are data-parallel ranks here, and their
number enters nothing.

Legend: T tokens of a micro-batch (micro_batch * seq_length), P patches of its images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moexpand.base.errors import InputError
from moexpand.data.dataset import Corpus
from moexpand.data.images import ImageProcessor
from moexpand.data.mixture import Mixture
from moexpand.data.parts import series_ids, vision_ids
from moexpand.data.sharing import share
from moexpand.data.stream import Reading, Source, Stream
from moexpand.data.tokens import load_tokenizer

Segment = tuple[int, int, int]


@dataclass(frozen=True)
class MicroBatch:
    """Packs laid end to end as one stream; attention must stay inside the segments that `cu_seqlens` bounds.

    A segment is a sample, a chunk of a long one, or the padding at the end of a pack. `labels[t]` is `tokens[t + 1]` where both
    are of one segment; everywhere else (last token of a segment, padding, unreadable samples, what is not to be learnt)
    `loss_mask` is 0 and the label has no meaning.
    """

    tokens: np.ndarray
    """int64 [T]"""
    labels: np.ndarray
    """int64 [T]"""
    loss_mask: np.ndarray
    """float32 [T], 0 or 1"""
    positions: np.ndarray
    """int64 [T], from 0 in every segment"""
    cu_seqlens: np.ndarray
    """int32 [segments + 1], first token of every segment and, last, T"""
    patches: np.ndarray | None = None
    """uint8 [P, channels * side * side] of all images in the order of their tokens, for `ImageProcessor.normalise` or its table
    on a device; None without images"""
    grids: np.ndarray | None = None
    """int64 [images, 3]: time, height and width of each in patches"""
    series: list[np.ndarray] | None = None
    """float32 [points, channels] of all time series in the order of their tokens, each channel standardised over time; None
    without series"""
    rates: list[float] | None = None
    """sampling rate of each, in Hz"""


class PackedData:
    """Training and evaluation batches of one or several folders of shards.

    Args:
        sources: a folder or address written by `moexpand data build` or `data index`, or several with their weights.
        seq_length: tokens of a pack.
        global_batch: packs of an optimiser step, over all ranks.
        seed: decides the order of the samples.
        held_out: fraction of the samples, chosen by the hash of their keys, that training never sees.
        tokenizer: name or folder; None takes the one that the shards were indexed with.
        max_bad_fraction: largest fraction of unreadable samples of a source; beyond it, reading raises. A bad sample's place
            stays, masked.
        reading: order, images and places; see `Reading`.

    Raises:
        InputError: a shard or index is missing, truncated or damaged, or the tokenizer is not the one of the index.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[Source],
        seq_length: int,
        global_batch: int,
        seed: int,
        held_out: float = 0.05,
        tokenizer: str | None = None,
        max_bad_fraction: float = 0.0,
        reading: Reading | None = None,
    ) -> None:
        if not 0.0 <= held_out < 1.0:
            raise InputError(f"data.held_out is {held_out}; it must be at least 0 and below 1.")
        if seq_length < 2 or global_batch < 1:
            raise InputError(
                f"seq_length is {seq_length} and global_batch {global_batch}; they must be at least 2 and at least 1."
            )
        self.seq_length, self.global_batch, self.seed = seq_length, global_batch, seed
        self.sources = [Source(str(sources))] if isinstance(sources, str | Path) else list(sources)
        self.names = _different([source.name for source in self.sources])
        self._mixture = Mixture([source.weight for source in self.sources])
        reading = reading or Reading()
        corpora = [Corpus(source.place, max_bad_fraction, reading.cache, reading.cache_bytes) for source in self.sources]
        self.tokenizer_name = tokenizer or corpora[0].tokenizer_name
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        self.fingerprint = self.tokenizer.fingerprint
        self.vocab_size = self.tokenizer.vocab_size
        for corpus in corpora:
            if corpus.fingerprint != self.fingerprint:
                raise InputError(
                    f"The shards in {corpus.place} were indexed with the tokenizer {corpus.tokenizer_name}, and"
                    f" {self.tokenizer_name} splits text differently; build the shards with it, or do not set data.tokenizer."
                )
        self.images = reading.images
        self.streams = [Stream(corpus, self.tokenizer, seq_length, seed, held_out, reading) for corpus in corpora]
        if self.has_series:
            series_ids(self.tokenizer)  # a tokenizer without their tokens is refused now and not at the first series

    @cached_property
    def corpus_fingerprint(self) -> str:
        """SHA-256 over the samples of all sources in their order, and their shares: what the order of batches follows from."""
        if len(self.streams) == 1:
            return self.streams[0].fingerprint
        said = [f"{stream.fingerprint} {share}" for stream, share in zip(self.streams, self._mixture.shares, strict=True)]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    @property
    def has_pictures(self) -> bool:
        """Whether any sample brings pictures to the model."""
        return any(bool(stream.vision.any()) for stream in self.streams)

    @property
    def image_token(self) -> int:
        """The token that stands for a picture's features.

        Raises:
            InputError: the tokenizer has none.
        """
        return vision_ids(self.tokenizer)[1]

    @property
    def has_series(self) -> bool:
        """Whether any usable sample brings time series to the model."""
        return any(stream.has_series for stream in self.streams)

    @property
    def series_token(self) -> int:
        """The token that stands for a time series' features.

        Raises:
            InputError: the tokenizer has none.
        """
        return series_ids(self.tokenizer)[1]

    @cached_property
    def pixel_table(self) -> np.ndarray | None:
        """float32 [channels, 256], what each value of a picture becomes; None where images are left out."""
        return None if self.images is None else ImageProcessor(self.images).table

    @property
    def packs_per_epoch(self) -> int:
        """Packs of epoch 0 of all sources together; other epochs may have a few more or less."""
        return sum(stream.packs.packs_of_epoch(0) for stream in self.streams)

    @property
    def fill(self) -> float:
        """Fraction of the tokens of epoch 0's packs that are not padding."""
        tokens = sum(int(stream.lengths[stream.train].sum()) for stream in self.streams)
        return tokens / (self.packs_per_epoch * self.seq_length)

    def loss_tokens(self) -> np.ndarray:
        """int64 [packs of epoch 0 of the first source]: tokens of each pack that are predicted where all text is."""
        plans = self.streams[0].windows(0)
        return np.concatenate([np.add.reduceat(plan.length - 1, plan.first[:-1]) for plan in plans])

    @property
    def bad_samples(self) -> dict[str, str]:
        """Keys of the unreadable samples met so far, each with what is wrong."""
        return {key: problem for stream in self.streams for key, problem in stream.corpus.bad.items()}

    @property
    def bad_by_source(self) -> list[dict[str, str]]:
        """The same, one dictionary a source."""
        return [stream.corpus.bad for stream in self.streams]

    def learn_bad(self, bad: list[dict[str, str]]) -> None:
        """Take over the unreadable samples that another process has met; the arguments of its `bad_by_source`.

        Raises:
            InputError: together they are more than `max_bad_fraction` allows.
        """
        for stream, met in zip(self.streams, bad, strict=True):
            for key in sorted(met.keys() - stream.corpus.bad.keys()):
                stream.corpus.set_aside(key, met[key])

    def check_epochs(self, steps: int) -> None:
        """Refuse a run that would read a source more often than its `max_epochs` allows.

        Raises:
            InputError: names the source and how often it would be read.
        """
        packs = self._mixture.packs_read(steps * self.global_batch)
        for source, stream, read in zip(self.sources, self.streams, packs.tolist(), strict=True):
            if source.max_epochs is not None and (epochs := read / stream.packs.packs_of_epoch(0)) > source.max_epochs:
                raise InputError(
                    f"{steps} steps would read {source.place} {epochs:.2f} times, and it may be read {source.max_epochs:g} times;"
                    " lower its weight, or train.steps."
                )

    def left_out(self) -> list[str]:
        """A sentence for each kind of sample that is neither trained on nor held out."""
        why = {
            "empty": "hold no text and are left out",
            "image_shape": "have images of a shape that the model does not take (too long and thin) and are left out",
            "image_too_long": f"with images are longer than {self.seq_length} tokens and are left out",
            "series_too_long": f"with a series are longer than seq_length={self.seq_length} tokens and are left out",
        }
        return [
            f"{count} of {len(stream.corpus)} samples of {source.place} {why[reason]}"
            for source, stream in zip(self.sources, self.streams, strict=True)
            for reason, count in stream.left_out.items()
        ]

    def epochs_at(self, step: int) -> dict[str, float]:
        """How often each source has been read when `step` steps are done."""
        packs = self._mixture.packs_read(step * self.global_batch).tolist()
        return {
            name: stream.packs.epochs_before(read) for name, stream, read in zip(self.names, self.streams, packs, strict=True)
        }

    def tokens_of(self, step: int) -> dict[str, int]:
        """Tokens of a global batch by source, padding left out."""
        tokens = dict.fromkeys(self.names, 0)
        for pack in range(step * self.global_batch, (step + 1) * self.global_batch):
            source, segments = self._locate(pack)
            tokens[self.names[source]] += sum(length for _, _, length in segments)
        return tokens

    def batch(self, step: int, rank: int = 0, ranks: int = 1, micro_batch: int = 1) -> list[MicroBatch]:
        """Micro-batches of one data-parallel rank for one optimiser step.

        Args:
            step: from 0.
            rank: data-parallel rank, below `ranks`.
            ranks: data-parallel ranks that share the global batch.
            micro_batch: packs of a micro-batch.

        Raises:
            InputError: micro_batch * ranks does not divide the global batch, or too many samples are unreadable.
        """
        if self.global_batch % (micro_batch * ranks) or not 0 <= rank < ranks:
            raise InputError(
                f"A global batch of {self.global_batch} packs cannot be shared by {ranks} data-parallel ranks (this is rank"
                f" {rank}) in micro-batches of {micro_batch}; micro_batch times ranks must divide it."
            )
        numbers = share(self._seen_of(step, micro_batch), ranks)[:, rank]
        first = step * self.global_batch
        return [
            self._micro_batch([self._locate(first + m * micro_batch + i) for i in range(micro_batch)]) for m in numbers.tolist()
        ]

    def vision_tokens(self, step: int, ranks: int = 1, micro_batch: int = 1) -> np.ndarray:
        """int64 [ranks]: tokens of images and series that each data-parallel rank has in a step."""
        costs = self._seen_of(step, micro_batch)
        return costs[share(costs, ranks)].sum(axis=0)

    def held_out(self, packs: int, micro_batch: int = 1) -> list[MicroBatch]:
        """The same evaluation batches at every call and for every seed.

        Args:
            packs: packs in all; fewer where the held-out samples do not fill as many.
            micro_batch: packs of a micro-batch; the last one is filled up with packs of padding.

        Raises:
            InputError: nothing is held out.
        """
        wanted = [self._mixture.locate(pack)[0] for pack in range(packs)]
        found = [stream.held_out(wanted.count(number)) for number, stream in enumerate(self.streams)]
        taken = [0] * len(found)
        parts: list[tuple[int, list[Segment]]] = []
        for source in wanted:
            if taken[source] < len(found[source]):
                parts.append((source, found[source][taken[source]]))
                taken[source] += 1
        if not parts:
            places = ", ".join(source.place for source in self.sources)
            raise InputError(f"No sample of {places} is held out; raise data.held_out, or do not evaluate.")
        parts += [(0, [])] * (-len(parts) % micro_batch)
        return [self._micro_batch(parts[i : i + micro_batch]) for i in range(0, len(parts), micro_batch)]

    def _locate(self, pack: int) -> tuple[int, list[Segment]]:
        """Source and segments of a pack of the run."""
        source, number = self._mixture.locate(pack)
        return source, self.streams[source].segments(number)

    def _seen_of(self, step: int, micro_batch: int) -> np.ndarray:
        """int64 [micro-batches of the step]: tokens of images and series in each."""
        if self.images is None and not self.has_series:  # every rank would locate the packs of all for nothing
            return np.zeros(self.global_batch // micro_batch, dtype=np.int64)
        packs = [self._locate(step * self.global_batch + i) for i in range(self.global_batch)]
        costs = [sum(int(self.streams[source].seen[sample]) for sample, _, _ in segments) for source, segments in packs]
        return np.array(costs, dtype=np.int64).reshape(-1, micro_batch).sum(axis=1)

    def _micro_batch(self, packs: list[tuple[int, list[Segment]]]) -> MicroBatch:
        """Lay out packs."""
        total = len(packs) * self.seq_length
        tokens = np.full(total, self.tokenizer.eos_id, dtype=np.int64)
        labels = tokens.copy()
        loss_mask = np.zeros(total, dtype=np.float32)
        bounds = [0]
        patches: list[np.ndarray] = []
        grids: list[tuple[int, int, int]] = []
        series: list[np.ndarray] = []
        rates: list[float] = []
        for i, (source, segments) in enumerate(packs):
            for sample, start, length in segments:
                begin, end = bounds[-1], bounds[-1] + length
                made = self.streams[source].encoded(sample)
                if made is not None:
                    tokens[begin:end] = made.ids[start : start + length]
                    labels[begin : end - 1] = tokens[begin + 1 : end]
                    loss_mask[begin : end - 1] = made.loss[start + 1 : start + length]
                    patches += made.patches
                    grids += made.grids
                    series += made.series
                    rates += made.rates
                bounds.append(end)
            if bounds[-1] < (i + 1) * self.seq_length:
                bounds.append((i + 1) * self.seq_length)
        cu_seqlens = np.array(bounds, dtype=np.int32)
        positions = np.arange(total, dtype=np.int64) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        seen, grid = (np.concatenate(patches), np.array(grids, dtype=np.int64)) if patches else (None, None)
        return MicroBatch(tokens, labels, loss_mask, positions, cu_seqlens, seen, grid, series or None, rates or None)


def _different(names: list[str]) -> list[str]:
    """Names of which none comes twice."""
    return [name if name not in names[:i] else f"{name}#{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def unigram_entropy(batches: list[MicroBatch]) -> float:
    """Entropy, in nats, of the target tokens' own frequencies: what a model must beat to have learnt any context."""
    targets = np.concatenate([batch.labels[batch.loss_mask > 0] for batch in batches])
    counts = np.bincount(targets)
    shares = counts[counts > 0] / max(len(targets), 1)
    return float(-(shares * np.log(shares)).sum())
