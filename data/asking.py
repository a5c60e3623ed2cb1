"""Ask models about a stream of jobs: in order, with bounded memory, each request once, and nothing paid for twice.

A thread runs the event loop; the caller's thread takes jobs from its own iterator, hands them over, and yields outcomes in their
order. At most 4 * concurrency jobs are looked ahead, and an image is read only when its request has its turn. Every answer is in
the cache before it is used. What is judged bad is asked once more: a cut answer with twice the tokens, another with another seed.
That second request has a key of its own, so a restart finds both.
"""

import asyncio
import base64
import concurrent.futures
import hashlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moexpand.base.errors import EnvironmentFailure, InputError, MoexpandError
from moexpand.data.caption_cache import AnswerCache, Reply
from moexpand.data.endpoint import NO_REPLY, Clients, ClientSettings, Endpoint, Failure, Route, check_key
from moexpand.data.ledger import Ledger

_FORMAT = 1
_SAY_SECONDS = 30.0
_LOOK_AHEAD = 4
_HOPELESS = 20
_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}

Judge = Callable[[str], str | None]
"""Gives the reason why an answer is bad, or None."""


@dataclass(frozen=True)
class Question:
    """What is asked about one job."""

    key: str
    route: Route
    template: str
    text: str
    image: Path | None
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class _Answer:
    reply: Reply | Failure
    paid: bool


@dataclass(frozen=True)
class Outcome:
    """What came of a question: a text, or the name of the reason why there is none.

    Tokens are those that this job's answers cost when they were paid for, the second request included. `cached`: nothing was
    sent.
    """

    question: Question
    text: str | None
    failure: str | None
    prompt_tokens: int
    completion_tokens: int
    cached: bool


def ask_all(
    questions: Iterable[Question],
    judge: Judge,
    settings: ClientSettings,
    cache: Path,
    api_key: str | None,
    say: Callable[[str], None],
    ledger: Ledger,
) -> Iterator[Outcome]:
    """Ask all questions; outcomes come in the order of the questions, which are taken from their iterator in the caller's thread.

    Args:
        questions: may be endless.
        judge: of an answer's text, thoughts and white space at the ends removed.
        settings: of the client.
        cache: file of the answers.
        api_key: or None.
        say: takes a line about the progress, every 30 s.
        ledger: is filled.

    Raises:
        InputError: an endpoint lets nobody in; the first jobs all failed; in the end too many have; an image cannot be read.
        EnvironmentFailure: an endpoint cannot be reached, the disk is full, ...
    """
    check_key(api_key)
    source = iter(questions)
    waiting: deque[concurrent.futures.Future[Outcome]] = deque()
    said = time.monotonic()
    more = True
    with AnswerCache(cache) as answers, _Loop() as loop:
        asker = _Asker(judge, settings, answers, api_key, ledger, loop)
        while True:
            while more and len(waiting) < _LOOK_AHEAD * settings.concurrency:
                question = next(source, None)
                if question is None:
                    more = False
                else:
                    waiting.append(loop.submit(asker.run(question)))
            if not waiting:
                break
            try:
                outcome = waiting.popleft().result()
            except concurrent.futures.CancelledError:
                raise asker.fatal or RuntimeError("cancelled") from None
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                say(ledger.line())
            yield outcome
    say(ledger.line())
    ledger.check(settings.max_failure_fraction)


class _Asker:
    """What the event loop runs. Its methods run in the loop's thread alone."""

    def __init__(
        self, judge: Judge, settings: ClientSettings, answers: AnswerCache, api_key: str | None, ledger: Ledger, loop: "_Loop"
    ) -> None:
        self.fatal: MoexpandError | None = None
        self._judge = judge
        self._settings = settings
        self._answers = answers
        self._key = api_key
        self._ledger = ledger
        self._loop = loop
        self._endpoints: dict[Route, Endpoint] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._flying: dict[bytes, asyncio.Task[Reply | Failure]] = {}

    async def run(self, question: Question) -> Outcome:
        """The outcome of one question. An error that ends the run also cancels the others, so that the caller sees it at once."""
        if self.fatal is not None:
            raise self.fatal
        try:
            endpoint = self._endpoint(question.route)
            async with endpoint.slots:
                return await self._outcome(endpoint, question)
        except MoexpandError as error:
            if self.fatal is None:
                self.fatal = error
                self._loop.cancel_others()
            raise

    def _endpoint(self, route: Route) -> Endpoint:
        if route not in self._endpoints:
            # One server has one bound on requests, whatever the topics that lead to it.
            slots = self._slots.setdefault(route.url, asyncio.Semaphore(self._settings.concurrency))
            tolls = self._ledger.of(route.name, route.model).tolls
            self._endpoints[route] = Endpoint(self._loop.clients, route, self._settings, self._key, tolls, slots)
        return self._endpoints[route]

    async def _outcome(self, endpoint: Endpoint, question: Question) -> Outcome:
        route, image = question.route, _read_image(question)
        first = await self._reply(endpoint, question, image, final=False)
        replies, result = [first], verdict(first.reply, self._judge)
        second = second_request(question, result.failure)
        if second is not None:
            replies.append(await self._reply(endpoint, second, image, final=True))
            result = verdict(replies[-1].reply, self._judge)
        cached = not any(answer.paid for answer in replies)
        if result.failure is None:
            self._ledger.answer(route.name, route.model, cached)
        else:
            self._ledger.fail(route.name, route.model, cached, result.failure, f"{question.key}: {result.message}")
            if not self._ledger.fresh_answers and self._ledger.fresh_failures >= max(_HOPELESS, 2 * self._settings.concurrency):
                raise self._ledger.error("all that were asked in this run")
        paid_for = [answer.reply for answer in replies if isinstance(answer.reply, Reply)]
        return Outcome(
            question=question,
            text=None if result.failure else result.text,
            failure=result.failure,
            prompt_tokens=sum(reply.prompt_tokens or 0 for reply in paid_for),
            completion_tokens=sum(reply.completion_tokens or 0 for reply in paid_for),
            cached=cached,
        )

    async def _reply(self, endpoint: Endpoint, asked: Question, image: bytes | None, final: bool) -> _Answer:
        """The reply to a request: from the cache, from an equal request under way, or sent for. `final`: none follows."""
        key = request_key(asked, image)
        ledger = self._ledger.of(asked.route.name, asked.route.model)
        if (running := self._flying.get(key)) is not None:
            ledger.shared += 1
            return _Answer(await asyncio.shield(running), paid=False)
        stored = self._answers.get(key)
        if stored is not None and not (self._settings.retry_failed and self._is_end(stored, asked, final)):
            ledger.cached += 1
            return _Answer(stored, paid=False)
        task = asyncio.create_task(self._pay(endpoint, asked, image, key))
        self._flying[key] = task
        try:
            return _Answer(await task, paid=True)
        finally:
            del self._flying[key]

    def _is_end(self, stored: Reply, asked: Question, final: bool) -> bool:
        """Whether a stored answer is bad and what its job ends with."""
        failure = verdict(stored, self._judge).failure
        return failure is not None and (final or second_request(asked, failure) is None)

    async def _pay(self, endpoint: Endpoint, asked: Question, image: bytes | None, key: bytes) -> Reply | Failure:
        reply = await endpoint.send(request_body(asked, image))
        if isinstance(reply, Reply):
            self._answers.put(key, asked.route.model, reply)
            self._ledger.of(asked.route.name, asked.route.model).pay(reply)
        return reply


def request_key(asked: Question, image: bytes | None) -> bytes:
    """SHA-256 over everything that decides an answer: model, prompt, bytes of the image, sampling parameters."""
    digest = None if image is None else hashlib.sha256(image).hexdigest()
    parts = [_FORMAT, asked.route.model, dict(asked.route.extra), asked.text, digest]
    parts += [asked.max_tokens, float(asked.temperature), asked.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def request_body(asked: Question, image: bytes | None) -> bytes:
    """JSON of the request. One message of a user: not every model knows a system role."""
    content: str | list[dict[str, Any]] = asked.text
    if image is not None:
        address = f"data:{_media_type(image)};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": asked.text}]
    return json.dumps(
        {
            **asked.route.extra,
            "model": asked.route.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "seed": asked.seed,
        }
    ).encode()


@dataclass(frozen=True)
class Verdict:
    """The text of a reply without thoughts; the reason why there is none or why it is bad, or None; what to show of a failure."""

    text: str
    failure: str | None
    message: str


def verdict(reply: Reply | Failure, judge: Judge) -> Verdict:
    """What a reply is worth."""
    if isinstance(reply, Failure):
        return Verdict("", reply.reason, reply.message)
    text = reply.text.strip()
    if text.startswith("<think>"):
        text = text.partition("</think>")[2].strip()
    if reply.finish == "content_filter":
        failure: str | None = "filtered"
    elif reply.finish in ("abort", "error"):
        failure = "aborted"
    else:
        failure = judge(text) if text else "empty"
        if reply.finish == "length" and failure != "nonsense":  # a loop is not made better by more tokens
            failure = "cut"
    shown = "".join(c if c.isprintable() else " " for c in text[:80])
    return Verdict(text, failure, f"the answer was {shown!r}")


def second_request(question: Question, failure: str | None) -> Question | None:
    """What to ask after a bad answer: a cut one with twice the tokens, another with the next seed where a seed matters."""
    if failure is None or failure == "filtered" or failure.startswith(NO_REPLY):
        return None
    if failure == "cut":
        return replace(question, max_tokens=2 * question.max_tokens)
    if failure == "aborted" or question.temperature > 0:
        return replace(question, seed=question.seed + 1)
    return None


def _read_image(question: Question) -> bytes | None:
    if question.image is None:
        return None
    try:
        image = question.image.read_bytes()
    except FileNotFoundError:
        raise InputError(f"The image {question.image} of {question.key} does not exist.") from None
    except OSError as error:
        raise EnvironmentFailure(f"{error.strerror or error} while reading the image {question.image}.") from error
    if not _media_type(image):
        raise InputError(f"The image {question.image} of {question.key} is neither PNG nor JPEG; captioners take these two.")
    return image


def _media_type(image: bytes) -> str:
    return next((name for start, name in _TYPES.items() if image.startswith(start)), "")


class _Loop:
    """An event loop in a thread of its own. Leaving the context cancels what runs, closes all connections and ends the thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.clients = Clients()
        self._thread = threading.Thread(target=self._run, name="moexpand-asking", daemon=True)

    def submit(self, work: Coroutine[Any, Any, Outcome]) -> "concurrent.futures.Future[Outcome]":
        """Run `work` in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def cancel_others(self) -> None:
        """Cancel all tasks but the one that calls."""
        for task in asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}:
            task.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _end(self) -> None:
        self.cancel_others()
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        await asyncio.gather(*others, return_exceptions=True)
        with suppress(Exception):
            await self.clients.aclose()

    def __enter__(self) -> "_Loop":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if sys.is_finalizing():  # the interpreter has stopped the thread already
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()
