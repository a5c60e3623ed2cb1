"""One source of a run: its samples' lengths in tokens, which are trained on and which held out, their packs, their token ids."""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.series import tokens_of, tokens_of_many
from moexpand.data.dataset import Content, Corpus, Unreadable
from moexpand.data.image_decode import BadImage, decode_image
from moexpand.data.images import ImageProcessor, ImageSettings, image_tokens
from moexpand.data.packing import Plan
from moexpand.data.parts import encode_parts
from moexpand.data.planning import Order, PackSequence, SampleOrder, ShardOrder
from moexpand.data.series import MARKS, BadSeries, read_series, sampling_rate
from moexpand.data.tokens import Tokenizer

CACHED_TOKENS = 1 << 24
EVALUATION_SEED = 0
PLANS_FOLDER = ".plans"
IMAGE_MARKS = 2
"""Tokens around an image: its start and its end."""


@dataclass(frozen=True)
class Source:
    """A folder of shards and its part in a mixture."""

    place: str
    """Path or address."""
    weight: float = 1.0
    max_epochs: float | None = None

    @property
    def name(self) -> str:
        """Last part of the place, for metrics and messages."""
        return self.place.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Encoded:
    """A sample ready for packs, end-of-text token included."""

    ids: np.ndarray
    """int32 [n]"""
    loss: np.ndarray
    """bool [n], whether a token is to be predicted"""
    patches: tuple[np.ndarray, ...] = ()
    """uint8 [patches of an image, channels * side * side], one array an image"""
    grids: tuple[tuple[int, int, int], ...] = ()
    series: tuple[np.ndarray, ...] = ()
    """float32 [points, channels], one array a time series"""
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How the sources of a run are read."""

    shuffle: str = "samples"
    """samples: over everything; shards: whole shards, then the samples of some shards together."""
    images: ImageSettings | None = None
    """None leaves images out."""
    series: bool = False
    """Read time series; without, they are left out."""
    answers_only: bool = True
    """Follow the samples' own marks of what is trained on; without, every token counts, those of images too."""
    cache: Path | None = None
    cache_bytes: int = 0
    plans: Path | None = None
    """Keeps counts of packs where the shards' own folder cannot be written."""


class Stream:
    """The training and the held-out samples of one folder of shards.

    Attributes:
        corpus: see `Corpus`.
        packs: the endless sequence of training packs; its samples are places in `train`.
        vision: int64 [samples], tokens that stand for images, without their marks.
        series: int64 [samples], likewise for time series.
        seen: their sum: what encoders have to do for a sample.
        has_series: whether any sample that is not left out brings a time series.
        left_out: what is in neither half, as reason -> samples.

    Raises:
        InputError: the shards are damaged, or hold no training sample.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, seq_length: int, seed: int, held_out: float, reading: Reading
    ) -> None:
        self.corpus = corpus
        self._tokenizer, self._seq_length, self._seed, self._reading = tokenizer, seq_length, seed, reading
        self._processor = None if reading.images is None else ImageProcessor(reading.images)
        self.vision, images, misshapen = self._vision()
        self.series, series = self._series()
        self.lengths = self.corpus.tokens + self.vision + IMAGE_MARKS * images + self.series + MARKS * series + 1
        empty = self.lengths == 1
        # Images and series are never split, so such a sample has to fit as a whole.
        too_long = self.lengths > seq_length
        series_too_long = too_long & (series > 0)
        too_long &= images > 0
        self.left_out = {
            reason: int(count)
            for reason, count in (
                ("empty", empty.sum()),
                ("image_too_long", (too_long & ~series_too_long).sum()),
                ("series_too_long", series_too_long.sum()),
                ("image_shape", (misshapen > 0).sum()),
            )
            if count
        }
        # The hash spread over [0, 1): a sample stays held out whatever is added to the set.
        kept_out = self.corpus.key_hash / 2.0**64 < held_out
        usable = ~(empty | too_long | series_too_long | (misshapen > 0))
        self.seen = self.vision + self.series
        self.has_series = bool(self.series[usable].any())
        self.train = np.flatnonzero(~kept_out & usable)
        self._held_out = np.flatnonzero(kept_out & usable)
        if len(self.train) == 0:
            reasons = f" ({', '.join(f'{reason}: {count}' for reason, count in self.left_out.items())})" if self.left_out else ""
            raise InputError(f"The shards in {corpus.place} hold no training sample with data.held_out={held_out}{reasons}.")
        self.packs = self._sequence(self.train, self._order(), seed)
        self._encoded: OrderedDict[int, Encoded] = OrderedDict()
        self._tokens_held = 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over keys and lengths of all samples in their order, the images' settings and the series that are read: what
        batches follow from."""
        images = self._reading.images.fingerprint.encode() if self._reading.images else b""
        said = self.corpus.key_hash.tobytes() + (self.lengths - 1).tobytes() + images
        if self.series.any():
            said += b"series" + self.corpus.series_points.tobytes() + self.corpus.series_rate.tobytes()
        return hashlib.sha256(said).hexdigest()

    def segments(self, pack: int) -> list[tuple[int, int, int]]:
        """(sample, start, length) of every segment of a training pack."""
        return [(int(self.train[place]), start, length) for place, start, length in self.packs.segments(pack)]

    def held_out(self, packs: int) -> list[list[tuple[int, int, int]]]:
        """Segments of the first packs of the held-out samples, the same for every seed; fewer where they do not fill as many."""
        if len(self._held_out) == 0:
            return []
        order = SampleOrder(len(self._held_out), EVALUATION_SEED)
        sequence = self._sequence(self._held_out, order, EVALUATION_SEED)
        found: list[list[tuple[int, int, int]]] = []
        for window in range(order.windows):
            plan = sequence.window(0, window)
            for pack in range(min(len(plan), packs - len(found))):
                found.append([(int(self._held_out[place]), start, length) for place, start, length in plan.segments(pack)])
        return found

    def windows(self, epoch: int) -> list[Plan]:
        """All packs of an epoch."""
        return self.packs.epoch(epoch)

    def encoded(self, sample: int) -> Encoded | None:
        """A sample's tokens, pixels and series, or None where it cannot be used and the allowed fraction is not yet passed.

        Raises:
            InputError: it has another length than its index says, or too many samples are bad.
        """
        if sample in self._encoded:
            self._encoded.move_to_end(sample)
            return self._encoded[sample]
        try:
            made = self._encode(sample)
        except (Unreadable, BadImage) as problem:
            self.corpus.set_aside(sample, str(problem))
            return None
        if not made.patches and not made.series:  # these are large, and a sample is seen once an epoch
            self._encoded[sample] = made
            self._tokens_held += len(made.ids)
            while self._tokens_held > CACHED_TOKENS:
                self._tokens_held -= len(self._encoded.popitem(last=False)[1].ids)
        return made

    def _encode(self, sample: int) -> Encoded:
        processor = self._processor
        content = self.corpus.content(sample, images=processor is not None, series=self._reading.series)
        patches, grids = [], []
        for number, image in enumerate(content.images if processor else ()):
            try:
                values, grid = processor.process(decode_image(image))  # type: ignore[union-attr]
            except BadImage as error:
                raise Unreadable(f"Image {number} of the sample {self.corpus.name(sample)} cannot be used: {error}.") from None
            patches.append(values)
            grids.append(grid)
        series, rates = self._read_series(sample, content) if self._reading.series else ([], [])
        encoded = encode_parts(
            content.parts,
            self._tokenizer,
            None if processor is None else [image_tokens(grid, processor.settings.merge_size) for grid in grids],
            [tokens_of(len(values), rate) for values, rate in zip(series, rates, strict=True)] if self._reading.series else None,
        )
        count = len(encoded.ids)
        if count + 1 != self.lengths[sample]:
            raise InputError(
                f"The sample {self.corpus.name(sample)} has {count} tokens, and its index says"
                f" {self.lengths[sample] - 1}; build the shards again."
            )
        trained = encoded.loss if self._reading.answers_only else np.ones_like(encoded.loss)
        ids, loss = np.empty(count + 1, np.int32), np.empty(count + 1, bool)
        ids[:count], ids[count] = encoded.ids, self._tokenizer.eos_id
        # The end of the text is to be predicted where what comes before it is.
        loss[:count], loss[count] = trained, trained[-1]
        return Encoded(ids, loss, tuple(patches), tuple(grids), tuple(series), tuple(rates))

    def _read_series(self, sample: int, content: Content) -> tuple[list[np.ndarray], list[float]]:
        """Values and sampling rate of each series."""
        series, rates = [], []
        for part, values in zip((part for part in content.parts if "series" in part), content.series, strict=True):
            try:
                series.append(read_series(values))
                rates.append(sampling_rate(len(series[-1]), part.get("rate")))
            except BadSeries as problem:
                raise Unreadable(problem.of(f"{len(rates)} of the sample {self.corpus.name(sample)}")) from None
        return series, rates

    def _vision(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [samples]: tokens for images, number of images, and how many of them have a shape that no model takes."""
        none = np.zeros_like(self.corpus.tokens)
        if self._reading.images is None:
            return none, none, none
        first = self.corpus.image_first
        tokens = self._reading.images.vision_tokens(self.corpus.image_height, self.corpus.image_width)
        sums = (np.concatenate([[0], np.cumsum(values)]) for values in (tokens, tokens == 0))
        by_sample, misshapen = (before[first[1:]] - before[first[:-1]] for before in sums)
        return by_sample, np.diff(first), misshapen

    def _series(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [samples]: tokens for time series, and their number."""
        first = self.corpus.series_first
        if not self._reading.series or not first[-1]:
            none = np.zeros_like(self.corpus.tokens)
            return none, none
        before = np.concatenate([[0], np.cumsum(tokens_of_many(self.corpus.series_points, self.corpus.series_rate))])
        return before[first[1:]] - before[first[:-1]], np.diff(first)

    def _order(self) -> Order:
        if self._reading.shuffle == "shards":
            return ShardOrder(self.corpus.shard[self.train], self._seed)
        return SampleOrder(len(self.train), self._seed)

    def _sequence(self, samples: np.ndarray, order: Order, seed: int) -> PackSequence:
        written = "://" not in self.corpus.place and os.access(self.corpus.place, os.W_OK)
        folder = Path(self.corpus.place) / PLANS_FOLDER if written else self._reading.cache or self._reading.plans
        return PackSequence(self.lengths[samples], order, self._seq_length, seed, folder, vision=self.seen[samples])
