"""Which records become samples: filters see the measures of all, near duplicates are found over all that pass, captions are asked
for the pictures among the rest, and a scoring model sees what is left.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moexpand.data.caption_prompts import topic_of
from moexpand.data.captioner import CaptionerSettings, CaptionJob, caption_all
from moexpand.data.document import RECORDS
from moexpand.data.filters import Thresholds, drop_reason
from moexpand.data.ledger import Ledger
from moexpand.data.near_duplicates import NearLimits, near_duplicate_drops
from moexpand.data.scorer import ScorerSettings, score_all
from moexpand.data.shards import Sample
from moexpand.data.sources import SourceFile
from moexpand.data.tally import Tally
from moexpand.data.units import MEASURES


@dataclass(frozen=True)
class Unit:
    """A source and the folder of its records."""

    file: SourceFile
    folder: Path

    def key(self, name: str) -> str:
        """Key of one of its samples."""
        return f"{self.file.key}-{name}"

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Objects of one of its files of lines."""
        with open(self.folder / name, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


@dataclass(frozen=True)
class Asked:
    """What models are asked on the way from records to samples."""

    captioner: CaptionerSettings
    scorer: ScorerSettings
    cache: Path
    """Folder of the answers."""
    api_key: str | None
    captions: Ledger
    scores: Ledger


def refused(units: list[Unit], thresholds: Thresholds, near: NearLimits) -> dict[str, str]:
    """Key of every record that a filter or an equal refuses -> reason."""
    reasons: dict[str, str] = {}

    def passing() -> Iterator[tuple[str, str, dict[str, Any]]]:
        for unit in units:
            for measures in unit.lines(MEASURES):
                key = unit.key(measures["name"])
                reason = drop_reason(measures["kind"], measures, thresholds)
                if reason is None:
                    yield key, measures["kind"], measures
                else:
                    reasons[key] = reason

    near_ones = near_duplicate_drops(passing(), near)
    return reasons | {key: drop.reason for key, drop in near_ones.items()}


def samples_of(units: list[Unit], reasons: dict[str, str], tally: Tally) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """Samples of the records that are not refused, in the order of the sources, each with its record."""
    for unit in units:
        for record in unit.lines(RECORDS):
            key = unit.key(record["name"])
            if key in reasons:
                tally.drop(reasons[key])
                continue
            images = record.get("images", {})
            parts = record.get("parts") or [*({"image": name} for name in sorted(images)), {"text": record["text"]}]
            meta = {"source": unit.file.name} | record["meta"]
            files = {name: unit.folder / file for name, file in images.items()}
            series = {name: unit.folder / file for name, file in record.get("series", {}).items()}
            yield Sample(key, record["kind"], parts, meta, files, series), record


def captioned(
    samples: Iterable[tuple[Sample, dict[str, Any]]], asked: Asked, tally: Tally, say: Callable[[str], None]
) -> Iterator[Sample]:
    """Put the answers of the captioning models before the pictures' own captions; where there is none, these stand alone."""
    if not asked.captioner.routes:
        for sample, _ in samples:
            yield sample
        return
    waiting: deque[tuple[Sample, bool]] = deque()

    def jobs() -> Iterator[CaptionJob]:
        for sample, record in samples:
            asks = "caption" in record and len(sample.images) == 1
            waiting.append((sample, asks))
            if asks:
                image = next(iter(sample.images.values()))
                topic = topic_of(record["text"], asked.captioner.scientific_pattern)
                mentions = tuple(record.get("mentions", ()))
                yield CaptionJob(sample.key, sample.kind, image, record["caption"], mentions, topic)

    for answer in caption_all(jobs(), asked.captioner, asked.cache, asked.api_key, say, asked.captions):
        while not waiting[0][1]:
            yield waiting.popleft()[0]
        sample = waiting.popleft()[0]
        if answer.text is None:
            tally.drop(answer.failure or "none")
        else:
            tally.keep()
            sample.parts = [*sample.parts[:-1], {"text": f"{answer.text.strip()}\n\n{sample.parts[-1]['text']}"}]
            sample.meta |= {"captioner": answer.model, "captioner_route": answer.route, "captioner_template": answer.template}
        yield sample
    for sample, _ in waiting:
        yield sample


def scored(
    samples: Iterable[Sample], asked: Asked, thresholds: Thresholds, tally: Tally, say: Callable[[str], None]
) -> Iterator[Sample]:
    """Drop what the scoring model finds poor; samples without a score are kept. Counts every sample that comes here."""
    waiting: deque[Sample] = deque()

    def texts() -> Iterator[tuple[str, str]]:
        for sample in samples:
            waiting.append(sample)
            yield sample.key, "".join(part.get("text", "") for part in sample.parts if not part.get("special"))

    for answer in score_all(texts(), asked.scorer, asked.cache, asked.api_key, say, asked.scores):
        sample = waiting.popleft()
        if answer.score is not None:
            sample.meta["score"] = answer.score
            if thresholds.min_score is not None and answer.score < thresholds.min_score:
                tally.drop("score")
                continue
        tally.keep()
        yield sample


def counted(samples: Iterable[Sample], kinds: Counter[str]) -> Iterator[Sample]:
    """Count samples by kind as they pass."""
    for sample in samples:
        kinds[sample.kind] += 1
        yield sample
