"""One model behind an OpenAI-compatible `/v1/chat/completions` (LMDeploy, vLLM, SGLang, ...): requests, retries, and what a reply
must be.

Nothing is read from the environment, no proxy is used and no redirect followed: the key goes to the address that was given and
nowhere else. What a server says in an error may be shown to the user, shortened, on one line, and without the key.
"""

import asyncio
import email.utils
import json
import random
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.data.caption_cache import Reply
from moexpand.data.ledger import Tolls

LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the backoff and the server's Retry-After say."""
LARGEST_BODY = 4 << 20
"""Bytes of a reply; a longer one is malformed."""
_BUSY = (408, 409, 429)
_SHUT = {
    401: "does not accept the API key; check it",
    403: "does not let this API key in; check its rights",
    404: "does not know the address or the model; check that the url ends with /v1 and that the server has a model of this name",
}
_SHUT_TRIES = 3
_SILENT_REQUESTS = 3
NO_REPLY = ("refused_", "gave_up_", "timeout", "unreachable")
"""How the reasons of a `Failure` begin."""
_RESERVED = ("model", "messages", "max_tokens", "temperature", "seed", "stream", "n")


@dataclass(frozen=True)
class Route:
    """One model at one place.

    Attributes:
        name: the topic that it serves, such as "scientific".
        url: base address, `/v1` included.
        model: name under which the server knows the model.
        extra: further fields of the request, such as {"chat_template_kwargs": {"enable_thinking": false}}.
    """

    name: str
    url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise InputError(f"The url {self.url!r} of the route {self.name!r} is no address: {error}.") from None
        if url.userinfo:
            raise InputError(f"The url of the route {self.name!r} holds a user name or password; give an API key instead.")
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise InputError(
                f"The url {self.url!r} of the route {self.name!r} must look like http://host:port/v1, without anything after it."
            )
        if not self.name or not self.model:
            raise InputError(f"The route {self.name!r} to {self.url} needs a name and a model.")
        if taken := [name for name in _RESERVED if name in self.extra]:
            raise InputError(f"The extra fields of the route {self.name!r} may not set {', '.join(taken)}.")
        try:
            json.dumps(dict(self.extra))
        except (TypeError, ValueError) as error:
            raise InputError(f"The extra fields of the route {self.name!r} cannot be written as JSON: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """How endpoints are asked.

    Attributes:
        concurrency: requests at one url at a time; one that waits for its next try counts, which spares a busy server.
        timeout_seconds: for one try, from connecting to the last byte.
        retries: further tries after a 408, 409, 429 or 5xx, a timeout, a broken connection or a malformed reply.
        backoff_seconds: b; the wait before retry n is drawn evenly from 0 to b * 2^(n-1), at most 60 s, after what Retry-After
            asks for.
        max_failure_fraction: more failed jobs than this part end the run with an error, after the last of them.
        retry_failed: ask again where the cache holds an answer that was judged bad.
    """

    concurrency: int = 32
    timeout_seconds: float = 120.0
    retries: int = 6
    backoff_seconds: float = 1.0
    max_failure_fraction: float = 0.05
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for name, value, lowest, highest in (
            ("concurrency", self.concurrency, 1, 4096),
            ("timeout_seconds", self.timeout_seconds, 0.001, 86_400),
            ("retries", self.retries, 0, 100),
            ("backoff_seconds", self.backoff_seconds, 0, 3600),
            ("max_failure_fraction", self.max_failure_fraction, 0, 1),
        ):
            if not lowest <= value <= highest:
                raise InputError(f"{name} is {value}; it must be from {lowest} to {highest}.")


@dataclass(frozen=True)
class Failure:
    """No answer: a reason that has a name, and what the server or the system said, fit to be shown."""

    reason: str
    message: str


@dataclass(frozen=True)
class _Trouble:
    """A try that failed and may be repeated."""

    reason: str
    message: str
    retry_after: float = 0.0


class Clients:
    """HTTP clients, each used for one request at a time, the last used first.

    Not one client for all: its pool looks at every connection for every request, which takes most of the time from 32 on.
    """

    def __init__(self) -> None:
        self._free: list[httpx.AsyncClient] = []

    @contextmanager
    def one(self) -> Iterator[httpx.AsyncClient]:
        """A client that nobody else uses meanwhile."""
        client = self._free.pop() if self._free else _new_client()
        try:
            yield client
        finally:
            self._free.append(client)

    async def aclose(self) -> None:
        """Close all connections; no client may be in use."""
        for client in self._free:
            await client.aclose()


def _new_client() -> httpx.AsyncClient:
    # Servers close idle connections after 5 s (uvicorn's default): a connection of that age may close under a request.
    limits = httpx.Limits(keepalive_expiry=2.0)
    return httpx.AsyncClient(verify=_certificates(), trust_env=False, follow_redirects=False, timeout=None, limits=limits)


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # reading the authorities takes a tenth of a second


class Endpoint:
    """Sends requests to one route. To be used inside one event loop.

    Args:
        clients: shared by all endpoints.
        route: where to.
        settings: timeouts and retries.
        api_key: sent as a bearer token; None sends none.
        tolls: counts of what is sent.
        slots: the requests that the url may still get; it is held by the caller of `send`.
    """

    def __init__(
        self,
        clients: Clients,
        route: Route,
        settings: ClientSettings,
        api_key: str | None,
        tolls: Tolls,
        slots: asyncio.Semaphore,
    ) -> None:
        self.route = route
        self.slots = slots
        self._clients = clients
        self._settings = settings
        self._key = api_key
        self._tolls = tolls
        self._url = route.url.rstrip("/") + "/chat/completions"
        self._random = random.Random()  # waits decide nothing but time, and a seed would make all processes wait alike
        self._not_before = 0.0
        self._alive = -1.0
        self._silent = 0
        self._good = 0
        self._shut = 0

    async def send(self, body: bytes) -> Reply | Failure:
        """The reply to one request, after as many tries as the settings allow. The caller holds one of `slots`.

        Raises:
            InputError: the endpoint has answered nothing but 401, 403 or 404, three times.
            EnvironmentFailure: in all tries nothing came from the endpoint, for this request and those beside it: no connection,
                or no response to three requests after each other.
        """
        began = time.monotonic()
        trouble = _Trouble("unreachable", "")
        for tries in range(self._settings.retries + 1):
            await self._wait(tries, trouble.retry_after)
            self._tolls.requests += 1
            self._tolls.retries += tries > 0
            outcome = await self._try(body)
            if not isinstance(outcome, _Trouble):
                return outcome
            trouble = outcome
            self._tolls.troubles[trouble.reason] += 1
        self._silent += self._alive < began
        if self._alive < began and (trouble.reason == "unreachable" or self._silent >= _SILENT_REQUESTS):
            raise EnvironmentFailure(
                f"{self._url} gave no response to {self._settings.retries + 1} tries ({trouble.message}); start the server, "
                "check the address, and run the same command again: answers so far are kept."
            )
        name = trouble.reason if trouble.reason in ("timeout", "unreachable") else f"gave_up_{trouble.reason}"
        return Failure(name, trouble.message)

    async def _wait(self, tries: int, retry_after: float) -> None:
        now = time.monotonic()
        if retry_after > 0:  # one 429 tells the others too
            self._not_before = max(self._not_before, now + min(retry_after, LONGEST_WAIT))
        if tries:
            backoff = self._settings.backoff_seconds * 2.0 ** min(tries - 1, 30)
            # Jitter comes after the time that the server asked for, lest all come back at once.
            pause = max(self._not_before - now, 0.0) + self._random.uniform(0.0, min(backoff, LONGEST_WAIT))
            await asyncio.sleep(min(pause, LONGEST_WAIT))
        elif self._not_before > now:
            await asyncio.sleep(self._not_before - now + self._random.uniform(0.0, self._settings.backoff_seconds))

    async def _try(self, body: bytes) -> Reply | Failure | _Trouble:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            with self._clients.one() as client:
                async with (
                    asyncio.timeout(self._settings.timeout_seconds),
                    client.stream("POST", self._url, content=body, headers=headers) as response,
                ):
                    self._alive, self._silent = time.monotonic(), 0
                    content = bytearray()
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > LARGEST_BODY:
                            return _Trouble("malformed", f"more than {LARGEST_BODY} bytes")
        except (TimeoutError, httpx.TimeoutException):
            return _Trouble("timeout", f"nothing complete within {self._settings.timeout_seconds:g} s")
        except httpx.ConnectError as error:
            return _Trouble("unreachable", self._shown(str(error)))
        except httpx.DecodingError as error:
            return _Trouble("malformed", self._shown(str(error)))
        except httpx.HTTPError as error:
            return _Trouble("reset", self._shown(f"{type(error).__name__} {error}"))
        return self._judge(response.status_code, response.headers, bytes(content))

    def _judge(self, status: int, headers: httpx.Headers, content: bytes) -> Reply | Failure | _Trouble:
        if status == 200:
            try:
                reply = parse_reply(content)
            except ValueError as error:
                return _Trouble("malformed", f"{error}: {self._shown(content.decode(errors='replace'))}")
            self._good += 1
            return reply
        message = self._shown(content.decode(errors="replace"))
        if status in _BUSY or status >= 500:
            return _Trouble(str(status), message, seconds_of(headers.get("Retry-After", "")))
        if status in _SHUT:
            self._shut += 1
            if not self._good and self._shut >= _SHUT_TRIES:
                raise InputError(
                    f"{self._url} {_SHUT[status]} (route {self.route.name!r}, model {self.route.model!r}): it answered {status} "
                    f"to all of {self._shut} requests: {message}"
                )
        return Failure(f"refused_{status}", message)

    def _shown(self, text: str) -> str:
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text[:200] + ("..." if len(text) > 200 else "")


def check_key(api_key: str | None) -> None:
    """Refuse a key that no header can carry, without showing it."""
    if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
        raise InputError(
            "The API key is empty or holds white space or characters beyond ASCII; give it as the server's owner gave it."
        )


def parse_reply(content: bytes) -> Reply:
    """The answer in the body of a 200.

    Raises:
        ValueError: it is not the JSON of a chat completion.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ValueError("no message of a first choice")
    text, finish = message.get("content"), choice.get("finish_reason")
    if text is None:  # a refusal, or a model that spent everything on thinking
        text = ""
    if not isinstance(text, str):
        raise ValueError("a content that is not text")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=re.sub("[\ud800-\udfff]", "\ufffd", text),  # lone surrogates, which JSON can express and UTF-8 cannot
        finish=finish if isinstance(finish, str) and finish.isascii() else "",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None


def seconds_of(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for: a number, or an HTTP date; 0 for anything else."""
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", retry_after):
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
