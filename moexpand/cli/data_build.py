"""`moexpand data build`."""

import os
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.conf.data_schema import Captioner, DataBuildCommand
from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.captioner import CaptionerSettings
from moexpand.data.chat import ChatSettings
from moexpand.data.document import DocumentLimits
from moexpand.data.endpoint import ClientSettings, Route
from moexpand.data.filters import Thresholds
from moexpand.data.near_duplicates import NearLimits
from moexpand.data.record_templates import read_templates
from moexpand.data.scorer import PROMPT, ScorerSettings
from moexpand.data.units import ReadOptions


def run(config: DataBuildCommand) -> None:
    """Build shards as the configuration says, with a line of progress a file and a shard."""
    filters, chat = config.filters, config.chat
    client = _client(config.captioner)
    options = BuildOptions(
        read=ReadOptions(
            tokenizer=config.tokenizer,
            sample_characters=config.sample_characters,
            text_key=config.text_key,
            pdf=DocumentLimits(config.image_dpi, filters.min_figure_points, config.equations),
            chat=ChatSettings(chat.enable_thinking, chat.history, chat.date),
            chat_template=chat.template,
            templates=read_templates(Path(config.templates)) if config.templates else None,
            template=config.template,
            seed=config.seed,
        ),
        workers=config.workers,
        shard_samples=config.shard_samples,
        pdf_seconds=config.pdf_seconds,
        thresholds=Thresholds(
            min_characters=filters.min_characters,
            max_symbol_ratio=filters.max_symbol_ratio,
            max_repetition=filters.max_repetition,
            max_ngram_repetition=filters.max_ngram_repetition,
            languages=tuple(filters.languages),
            min_language_probability=filters.min_language_probability,
            min_agreement=filters.min_agreement,
            min_ink=filters.min_ink,
            min_score=filters.min_score,
        ),
        near=NearLimits(text_similarity=filters.text_similarity, image_distance=filters.image_distance),
        captioner=CaptionerSettings(
            routes=_routes(config.captioner),
            max_tokens=config.captioner.max_tokens,
            temperature=config.captioner.temperature,
            seed=config.seed,
            templates=tuple(config.captioner.templates),
            include_context=config.captioner.include_context,
            scientific_pattern=config.captioner.scientific_pattern,
            **client,
        ),
        scorer=ScorerSettings(
            route=_route("scorer", config.scorer.url, config.scorer.model),
            prompt=config.scorer.prompt or PROMPT,
            characters=config.scorer.characters,
            seed=config.seed,
            **client,
        ),
        answers=Path(config.answers) if config.answers else None,
    )

    def say(line: str) -> None:
        print(line, flush=True)

    api_key = os.environ.get(config.captioner.api_key_env)
    build_dataset(config.pdfs, list(config.sources), Path(config.out), options, say, api_key)


def _client(captioner: Captioner) -> dict[str, Any]:
    names = set(ClientSettings.__dataclass_fields__) & set(Captioner.__dataclass_fields__)
    return {name: getattr(captioner, name) for name in names}


def _routes(captioner: Captioner) -> tuple[Route, ...]:
    other = _route("captioner", captioner.url, captioner.model)
    scientific = _route("captioner.scientific", captioner.scientific_url, captioner.scientific_model)
    if scientific is not None and other is None:
        raise InputError(
            "captioner.scientific_url is set and captioner.url is not; an endpoint for all pictures is captioner.url."
        )
    routes = (("other", other), ("scientific", scientific))
    return tuple(Route(name, route.url, route.model) for name, route in routes if route is not None)


def _route(key: str, url: str | None, model: str | None) -> Route | None:
    if (url is None) != (model is None):
        join = "_" if "." in key else "."
        raise InputError(f"{key}{join}url and {key}{join}model belong together; give both, or neither.")
    return None if url is None or model is None else Route(key, url, model)
