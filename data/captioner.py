"""Captions by a model at hand: figures, tables and other images described through any OpenAI-compatible endpoint.

Without a route nothing is asked, and captions stay the documents' own. How requests are sent, repeated, kept and counted:
`asking.py`, `endpoint.py`, `caption_cache.py`, `ledger.py`. What is asked: `caption_prompts.py`.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.data.asking import Question, ask_all
from moexpand.data.caption_prompts import caption_prompt, check_pattern, check_templates, pick_template
from moexpand.data.endpoint import ClientSettings, Route
from moexpand.data.ledger import Ledger

CACHE_FILE = "captions.sqlite"
MIN_CHARACTERS = 20


@dataclass(frozen=True, kw_only=True)
class CaptionerSettings(ClientSettings):
    """What to ask of whom.

    Attributes:
        routes: by topic; a topic without one of its name goes to the first. Empty: no model is asked.
        max_tokens: of an answer; a cut one is asked for once more with twice as many.
        temperature: 0 and above.
        seed: decides the template of each job, and is sent with the request.
        templates: names of the prompt templates to choose from; empty: the built-in set.
        include_context: whether the prompt quotes the document's caption and the paragraphs that mention the image.
        context_characters: of caption and paragraphs together, at most.
        scientific_pattern: regular expression for `caption_prompts.topic_of`; empty: its own rules.
    """

    routes: tuple[Route, ...] = ()
    max_tokens: int = 512
    temperature: float = 0.2
    seed: int = 0
    templates: tuple[str, ...] = ()
    include_context: bool = True
    context_characters: int = 4000
    scientific_pattern: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [route.name for route in self.routes]
        if len(set(names)) < len(names):
            raise InputError(f"The routes {', '.join(names)} must have different names; each serves the topic of its name.")
        for name, value, lowest, highest in (
            ("max_tokens", self.max_tokens, 1, 1 << 20),
            ("temperature", self.temperature, 0, 5),
            ("seed", self.seed, 0, (1 << 31) - 2),
            ("context_characters", self.context_characters, 0, 1_000_000),
        ):
            if not lowest <= value <= highest:
                raise InputError(f"{name} is {value}; it must be from {lowest} to {highest}.")
        check_templates(self.templates)
        check_pattern(self.scientific_pattern)


@dataclass(frozen=True)
class CaptionJob:
    """One image to describe.

    Attributes:
        key: names the job in answers; with the seed it decides the template.
        kind: figure, table, equation or image.
        image: a PNG or JPEG; None asks about caption and context alone.
        caption, context: of the document; quoted as untrusted text.
        topic: decides the route; see `caption_prompts.topic_of`.
    """

    key: str
    kind: str
    image: Path | None
    caption: str
    context: tuple[str, ...]
    topic: str


@dataclass(frozen=True)
class CaptionAnswer:
    """What came of a job.

    Attributes:
        key: of the job.
        text: the caption; None when there is none, and when no model was asked.
        failure: name of the reason why there is none; None when no model was asked. From the network: `refused_<status>`,
            `gave_up_<status>`, `gave_up_reset`, `gave_up_malformed`, `timeout`, `unreachable`. Of an answer: `cut`, `empty`,
            `too_short`, `nonsense`, `refusal`, `filtered`, `aborted`.
        route, model, template: names; empty when no model was asked.
        prompt_tokens, completion_tokens: what the answer cost when it was paid for.
        cached: nothing was sent for it in this run.
    """

    key: str
    text: str | None
    failure: str | None
    route: str = ""
    model: str = ""
    template: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


def caption_all(
    jobs: Iterable[CaptionJob],
    settings: CaptionerSettings,
    cache: Path,
    api_key: str | None,
    say: Callable[[str], None],
    ledger: Ledger | None = None,
) -> Iterator[CaptionAnswer]:
    """Captions in the order of the jobs.

    Args:
        jobs: taken as needed, at most 4 * concurrency ahead.
        settings: see there.
        cache: folder in which answers are kept (`captions.sqlite`).
        api_key: sent as a bearer token, to all routes; never written or shown.
        say: takes a line about the progress, every 30 s and at the end.
        ledger: is filled with what was asked and paid.

    Raises:
        InputError: an endpoint lets nobody in, nothing succeeds, or in the end more than `max_failure_fraction` of the jobs have
        failed.
        EnvironmentFailure: an endpoint cannot be reached.
    """
    if not settings.routes:
        for job in jobs:
            yield CaptionAnswer(job.key, None, None)
        return
    questions = (_question(job, settings) for job in jobs)
    ledger = Ledger("captions") if ledger is None else ledger
    for outcome in ask_all(questions, bad_caption, settings, Path(cache) / CACHE_FILE, api_key, say, ledger):
        asked = outcome.question
        yield CaptionAnswer(
            key=asked.key,
            text=outcome.text,
            failure=outcome.failure,
            route=asked.route.name,
            model=asked.route.model,
            template=asked.template,
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            cached=outcome.cached,
        )


def route_of(topic: str, routes: tuple[Route, ...]) -> Route:
    """The route of a topic's name, or the first."""
    return next((route for route in routes if route.name == topic), routes[0])


def _question(job: CaptionJob, settings: CaptionerSettings) -> Question:
    template = pick_template(job.kind, job.key, settings.seed, settings.templates)
    caption, context = (job.caption, job.context) if settings.include_context else ("", ())
    return Question(
        key=job.key,
        route=route_of(job.topic, settings.routes),
        template=template.name,
        text=caption_prompt(template, caption, context, settings.context_characters),
        image=job.image,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )


_REFUSAL = re.compile(
    r"(i['’]?m (very )?sorry|i am (very )?sorry|sorry[,.]|i apologi[sz]e|as an ai\b|抱歉|对不起|很抱歉|我无法"
    r"|(unfortunately, )?i (cannot|can['’]?t|can not|am unable to|am not able to)|i['’]m (unable|not able) to)",
    re.IGNORECASE,
)


def bad_caption(text: str) -> str | None:
    """Why a text is no caption, or None.

    - `too_short`: fewer than 20 characters.
    - `refusal`: it begins as models begin when they decline.
    - `nonsense`: more than 1 % of the characters are control or replacement characters; fewer than a quarter of those that are
      not white space are letters; it repeats itself (zlib makes its last 1,000 bytes, or all of it, smaller than an eighth; or
      fewer than a fifth of at least 15 words are different); or it repeats the marks around quoted text.
    """
    if sum(not (c.isprintable() or c in "\n\t\r") or c == "\ufffd" for c in text) > 0.01 * len(text):
        return "nonsense"
    solid = [c for c in text if not c.isspace()]
    words = text.lower().split()
    loops = len(words) >= 15 and 5 * len(set(words)) < len(words)
    if loops or _compresses(text) or "<quoted-" in text or "</quoted-" in text:
        return "nonsense"
    if len(text) < MIN_CHARACTERS:
        return "too_short"
    if 4 * sum(map(str.isalpha, solid)) < len(solid):
        return "nonsense"
    return "refusal" if _REFUSAL.match(text) else None


def _compresses(text: str) -> bool:
    content = text.encode(errors="replace")
    return any(len(part) >= 200 and 8 * len(zlib.compress(part)) < len(part) for part in (content, content[-1000:]))
