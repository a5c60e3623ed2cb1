"""Packed batches as a pure function of (shards, seed, step): no state to save or restore, the same on any number of ranks.

Optimiser step k takes the packs k * global_batch ... (k + 1) * global_batch - 1 of the endless sequence of epochs. They are cut
into micro-batches of `micro_batch` packs, and micro-batch m goes to the data-parallel rank m % ranks: the set of micro-batches
is the same however many ranks share it. Only data-parallel ranks get different tokens; expert-parallel ranks are
data-parallel ranks here, and their number enters nothing.

Legend: T tokens of a micro-batch (micro_batch * seq_length).
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moexpand.base.errors import InputError
from moexpand.data.dataset import Corpus
from moexpand.data.packing import Plan, plan_epoch
from moexpand.data.tokens import load_tokenizer

CACHED_TOKENS = 1 << 24
CACHED_PLANS = 2
EVALUATION_SEED = 0


@dataclass(frozen=True)
class MicroBatch:
    """Packs laid end to end as one stream; attention must stay inside the segments that `cu_seqlens` bounds.

    A segment is a sample, a chunk of a long one, or the padding at the end of a pack. `labels[t]` is `tokens[t + 1]` where both
    are of one segment; everywhere else (last token of a segment, padding, unreadable samples) `loss_mask` is 0 and the label
    has no meaning.
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


class PackedData:
    """Training and evaluation batches of a folder of shards.

    Args:
        shards: folder written by `moexpand data build`.
        seq_length: tokens of a pack.
        global_batch: packs of an optimiser step, over all ranks.
        seed: decides the order of the samples.
        held_out: fraction of the samples, chosen by the hash of their keys, that training never sees.
        tokenizer: name or folder; None takes the one that the shards were indexed with.
        max_bad_fraction: largest fraction of unreadable samples; beyond it, reading raises. A bad sample's place stays, masked.

    Raises:
        InputError: a shard or index is missing, truncated or damaged, or the tokenizer is not the one of the index.
    """

    def __init__(
        self,
        shards: Path,
        seq_length: int,
        global_batch: int,
        seed: int,
        held_out: float = 0.05,
        tokenizer: str | None = None,
        max_bad_fraction: float = 0.0,
    ) -> None:
        if not 0.0 <= held_out < 1.0:
            raise InputError(f"data.held_out is {held_out}; it must be at least 0 and below 1.")
        if seq_length < 2 or global_batch < 1:
            raise InputError(
                f"seq_length is {seq_length} and global_batch {global_batch}; they must be at least 2 and at least 1."
            )
        self.seq_length = seq_length
        self.global_batch = global_batch
        self.seed = seed
        self.corpus = Corpus(Path(shards), max_bad_fraction)
        self.tokenizer_name: str = tokenizer or self.corpus.tokenizer_name
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        self.fingerprint = self.tokenizer.fingerprint
        if self.fingerprint != self.corpus.fingerprint:
            raise InputError(
                f"The shards in {shards} were indexed with the tokenizer {self.corpus.tokenizer_name}, and"
                f" {self.tokenizer_name} splits text differently; build the shards with it, or do not set data.tokenizer."
            )
        self.vocab_size = self.tokenizer.vocab_size
        # The hash spread over [0, 1): a sample stays held out whatever is added to the set.
        kept_out = self.corpus.key_hash / 2.0**64 < held_out
        self._train = np.flatnonzero(~kept_out)
        self._held_out = np.flatnonzero(kept_out)
        if len(self._train) == 0:
            raise InputError(f"The shards in {shards} hold no training sample with data.held_out={held_out}.")
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._first_pack = [0]
        self._tokens: OrderedDict[int, np.ndarray] = OrderedDict()
        self._tokens_held = 0

    @cached_property
    def corpus_fingerprint(self) -> str:
        """SHA-256 over keys and token counts of all samples in their order: what the order of batches follows from."""
        return hashlib.sha256(self.corpus.key_hash.tobytes() + self.corpus.tokens.tobytes()).hexdigest()

    @property
    def fill(self) -> float:
        """Fraction of the tokens of epoch 0's packs that are not padding."""
        plan = self._plan(0)
        return float(plan.length.sum() / (len(plan) * self.seq_length))

    @property
    def packs_per_epoch(self) -> int:
        """Packs of epoch 0; other epochs may have a few more or less."""
        return len(self._plan(0))

    def loss_tokens(self) -> np.ndarray:
        """int64 [packs of epoch 0]: the tokens of each that `loss_mask` keeps, as long as every sample can be read."""
        plan = self._plan(0)
        return np.add.reduceat(plan.length - 1, plan.first[:-1])

    @property
    def bad_samples(self) -> dict[str, str]:
        """Keys of the unreadable samples met so far, each with what is wrong."""
        return self.corpus.bad

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
        begin = step * self.global_batch
        numbers = range(rank, self.global_batch // micro_batch, ranks)
        return [self._micro_batch([self._locate(begin + m * micro_batch + i) for i in range(micro_batch)]) for m in numbers]

    def held_out(self, packs: int, micro_batch: int = 1) -> list[MicroBatch]:
        """The same evaluation batches at every call and for every seed.

        Args:
            packs: packs in all; fewer where the held-out samples do not fill as many.
            micro_batch: packs of a micro-batch; the last one is filled up with packs of padding.

        Raises:
            InputError: nothing is held out.
        """
        lengths = self.corpus.tokens[self._held_out] + 1
        plan = plan_epoch(lengths, self.seq_length, EVALUATION_SEED, 0)
        if len(plan) == 0:
            raise InputError(f"No sample of {self.corpus.folder} is held out; raise data.held_out, or do not evaluate.")
        packs = min(packs, len(plan))
        parts = [_segments(plan, pack, self._held_out) for pack in range(packs)]
        parts += [[]] * (-packs % micro_batch)
        return [self._micro_batch(parts[i : i + micro_batch]) for i in range(0, len(parts), micro_batch)]

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            lengths = self.corpus.tokens[self._train] + 1
            self._plans[epoch] = plan_epoch(lengths, self.seq_length, self.seed, epoch)
            while len(self._plans) > CACHED_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def _locate(self, pack: int) -> list[tuple[int, int, int]]:
        """Segments of pack number `pack` of the endless sequence of epochs."""
        while self._first_pack[-1] <= pack:
            self._first_pack.append(self._first_pack[-1] + len(self._plan(len(self._first_pack) - 1)))
        epoch = int(np.searchsorted(self._first_pack, pack, side="right")) - 1
        return _segments(self._plan(epoch), pack - self._first_pack[epoch], self._train)

    def _sample_tokens(self, sample: int) -> np.ndarray | None:
        """int64 [tokens + 1] of a sample, end of text included; None where it cannot be read."""
        if sample in self._tokens:
            self._tokens.move_to_end(sample)
            return self._tokens[sample]
        text = self.corpus.text(sample)
        if text is None:
            return None
        tokens = np.array([*self.tokenizer.encode(text), self.tokenizer.eos_id], dtype=np.int32)
        if len(tokens) != self.corpus.tokens[sample] + 1:
            raise InputError(
                f"The sample {self.corpus.name(sample)} has {len(tokens) - 1} tokens, and its index says"
                f" {self.corpus.tokens[sample]}; build the shards again."
            )
        self._tokens[sample] = tokens
        self._tokens_held += len(tokens)
        while self._tokens_held > CACHED_TOKENS:
            self._tokens_held -= len(self._tokens.popitem(last=False)[1])
        return tokens

    def _micro_batch(self, packs: list[list[tuple[int, int, int]]]) -> MicroBatch:
        """Lay out packs, each a list of (sample, start, length)."""
        total = len(packs) * self.seq_length
        tokens = np.full(total, self.tokenizer.eos_id, dtype=np.int64)
        labels = tokens.copy()
        loss_mask = np.zeros(total, dtype=np.float32)
        bounds = [0]
        for i, segments in enumerate(packs):
            for sample, start, length in segments:
                begin, end = bounds[-1], bounds[-1] + length
                content = self._sample_tokens(sample)
                if content is not None:
                    tokens[begin:end] = content[start : start + length]
                    labels[begin : end - 1] = tokens[begin + 1 : end]
                    loss_mask[begin : end - 1] = 1.0
                bounds.append(end)
            if bounds[-1] < (i + 1) * self.seq_length:
                bounds.append((i + 1) * self.seq_length)
        cu_seqlens = np.array(bounds, dtype=np.int32)
        positions = np.arange(total, dtype=np.int64) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return MicroBatch(tokens, labels, loss_mask, positions, cu_seqlens)


def _segments(plan: Plan, pack: int, samples: np.ndarray) -> list[tuple[int, int, int]]:
    """(sample, start, length) of every segment of a pack; `samples` maps the plan's numbers to the corpus's."""
    span = slice(int(plan.first[pack]), int(plan.first[pack + 1]))
    return list(zip(samples[plan.sample[span]].tolist(), plan.start[span].tolist(), plan.length[span].tolist(), strict=True))


def unigram_entropy(batches: list[MicroBatch]) -> float:
    """Entropy, in nats, of the target tokens' own frequencies: what a model must beat to have learnt any context."""
    targets = np.concatenate([batch.labels[batch.loss_mask > 0] for batch in batches])
    counts = np.bincount(targets)
    shares = counts[counts > 0] / max(len(targets), 1)
    return float(-(shares * np.log(shares)).sum())
