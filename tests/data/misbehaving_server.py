"""A real HTTP server on this machine that answers as a model would, or as badly as the test says."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

PROMPT_TOKENS = 100
COMPLETION_TOKENS = 20


@dataclass(frozen=True)
class Call:
    """One request as it came in: its number from 0, JSON body, path, headers, and time."""

    number: int
    body: dict[str, Any]
    path: str
    headers: dict[str, str]
    at: float

    @property
    def text(self) -> str:
        """The prompt."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def image(self) -> str:
        """The image as a data URL, or empty."""
        content = self.body["messages"][-1]["content"]
        return "" if isinstance(content, str) else content[0]["image_url"]["url"]


@dataclass(frozen=True)
class Answer:
    """What the server does with a call.

    `text` and `finish` make a chat completion; `raw` is sent in its place. `reset` closes the connection with a TCP reset, in the
    middle of the body, or before the head of the response.
    """

    text: str = ""
    finish: str = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    seconds: float = 0.0
    reset: str = ""
    usage: bool = True

    def content(self) -> bytes:
        if self.raw is not None:
            return self.raw
        body: dict[str, Any] = {
            "choices": [{"message": {"role": "assistant", "content": self.text}, "finish_reason": self.finish}]
        }
        if self.usage:
            body["usage"] = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
        return json.dumps(body).encode()


def busy(status: int = 429, retry_after: str | None = None) -> Answer:
    """A response that asks to come again."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Answer(status=status, headers=headers, raw=b'{"error": {"message": "busy"}}')


class MisbehavingServer:
    """Serves `/v1/chat/completions` on a free port of 127.0.0.1 while the context is open.

    Attributes:
        calls: what came in so far, in order.
        most_at_once: the largest number of calls that were being answered at a time.
    """

    def __init__(self, behave: Callable[[Call], Answer]) -> None:
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                with server._lock:
                    call = Call(len(server.calls), json.loads(content), self.path, dict(self.headers), time.monotonic())
                    server.calls.append(call)
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                try:
                    answer = behave(call)
                    server._ended.wait(answer.seconds)
                finally:
                    with server._lock:
                        server._at_once -= 1
                try:
                    self.answer(answer)
                except OSError:  # the client has gone
                    self.close_connection = True

            def answer(self, answer: Answer) -> None:
                content = answer.content()
                if answer.reset != "before":
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if answer.reset else content)
                    self.wfile.flush()
                if answer.reset:
                    # Closing with a linger of zero sends RST in place of FIN.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            block_on_close = False  # a kept-alive connection waits for its next request for ever

            def handle_error(self, *args: Any) -> None:  # of connections that were reset
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
