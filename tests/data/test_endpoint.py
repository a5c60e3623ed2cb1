"""Servers that misbehave: what passes is tried again, what does not ends under its name, and no key or proxy is exposed."""

import collections
import email.utils
import http.server
import json
import threading
import time

import httpx
import pytest

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.data import endpoint
from moexpand.data.endpoint import seconds_of
from moexpand.data.ledger import Ledger
from tests.data.caption_jobs import GOOD, KEY, ask, describe, first_time, jobs_of, number_in
from tests.data.misbehaving_server import COMPLETION_TOKENS, Answer, Call, MisbehavingServer, busy


@pytest.mark.parametrize(
    ("trouble", "name"),
    [
        (busy(429), "429"),
        (busy(500), "500"),
        (busy(503, "0"), "503"),
        (Answer(seconds=5.0), "timeout"),
        (Answer(GOOD, reset="middle"), "reset"),
        (Answer(GOOD, reset="before"), "reset"),
        (Answer(raw=b"<html>gateway</html>"), "malformed"),
        (Answer(raw=b'{"choices": []}'), "malformed"),
        (Answer(raw=b'{"choices": [{"message": {"content": 7}}]}'), "malformed"),
        (Answer(raw=b"[" * 200_000), "malformed"),
        (Answer(raw=b" " * (endpoint.LARGEST_BODY + 1)), "malformed"),
    ],
)
def test_what_passes_is_tried_again_and_every_job_is_answered(tmp_path, trouble, name):
    ledger = Ledger()
    with MisbehavingServer(first_time(lambda call: trouble)) as server:
        answers = ask(server, jobs_of(6), tmp_path, ledger, timeout_seconds=0.8 if name == "timeout" else 30)
    assert [answer.text for answer in answers] == [f"{GOOD} It is the image of job {n}." for n in range(6)]
    assert len(server.calls) == 12
    (part,) = ledger.as_json()
    assert part["troubles"] == {name: 6}
    assert (part["requests"], part["retries"], part["answered"], part["paid"]) == (12, 6, 6, 6)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for_by_all_requests(tmp_path, form):
    wait = "1" if form == "seconds" else None

    def behave(call: Call) -> Answer:
        if call.number:
            return describe(call)
        return busy(429, wait or email.utils.formatdate(time.time() + 2, usegmt=True))

    with MisbehavingServer(behave) as server:
        assert all(answer.text for answer in ask(server, jobs_of(3), tmp_path, concurrency=1))
    assert server.calls[1].at - server.calls[0].at >= 0.95


def test_retry_after_is_capped_and_nonsense_in_it_is_no_wait(monkeypatch, tmp_path):
    assert seconds_of("7") == 7
    assert [seconds_of(text) for text in ("", "soon", "-5", "1e9", "Wed, 21 Oct 1970 07:28:00 GMT", "9" * 400)] == [0.0] * 6
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.2)
    with MisbehavingServer(first_time(lambda call: busy(429, "86400"))) as server:
        assert ask(server, jobs_of(1), tmp_path)[0].text
    assert 0.15 < server.calls[1].at - server.calls[0].at < 5


def test_what_never_passes_is_given_up_under_its_name(tmp_path):
    bad = {
        0: busy(429),
        1: busy(502),
        2: Answer(seconds=5.0),
        3: Answer(raw=b"{"),
        4: Answer(GOOD, reset="middle"),
        5: Answer(status=400, raw=b'{"error": "image too large"}'),
        6: Answer(status=422),
        7: Answer(status=307, headers={"Location": "http://127.0.0.1:1/"}),
    }
    ledger = Ledger()
    with MisbehavingServer(lambda call: bad.get(number_in(call)) or describe(call)) as server:
        answers = ask(server, jobs_of(12), tmp_path, ledger, retries=1, timeout_seconds=1.5, max_failure_fraction=0.7)
    assert [answer.failure for answer in answers[:8]] == [
        "gave_up_429",
        "gave_up_502",
        "timeout",
        "gave_up_malformed",
        "gave_up_reset",
        "refused_400",
        "refused_422",
        "refused_307",
    ]
    assert all(answer.text is None for answer in answers[:8])
    assert all(answer.text for answer in answers[8:])
    tries = collections.Counter(map(number_in, server.calls))
    assert [tries[n] for n in range(12)] == [2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    (part,) = ledger.as_json()
    assert part["jobs"] == part["answered"] + sum(part["failures"].values()) == 12
    assert "image too large" in part["examples"]["refused_400"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_lets_nobody_in_ends_the_run_early_and_the_key_is_never_shown(tmp_path, status):
    said = json.dumps({"error": {"message": f"no entry for\n\x1b[31m{KEY}"}}).encode()
    with (
        MisbehavingServer(lambda call: Answer(status=status, raw=said)) as server,
        pytest.raises(InputError, match=f"answered {status}") as caught,
    ):
        ask(server, jobs_of(1000), tmp_path)
    assert len(server.calls) <= 8
    assert KEY not in str(caught.value)
    assert str(caught.value).isprintable()
    assert "no entry" in str(caught.value)


def test_an_endpoint_that_is_not_there_or_says_nothing_ends_the_run_as_a_failure_of_the_machine(tmp_path):
    with MisbehavingServer(describe) as server:
        pass
    with pytest.raises(EnvironmentFailure, match="no response to 3 tries"):
        ask(server, jobs_of(50), tmp_path, retries=2)
    silent = MisbehavingServer(lambda call: Answer(seconds=20))
    with silent, pytest.raises(EnvironmentFailure, match="no response"):
        ask(silent, jobs_of(50), tmp_path, retries=1, timeout_seconds=0.1)
    assert len(silent.calls) <= 16


def test_a_run_in_which_nothing_succeeds_ends_long_before_its_jobs_do(tmp_path):
    with MisbehavingServer(lambda call: Answer(status=400)) as server, pytest.raises(InputError, match="refused_400"):
        ask(server, jobs_of(5000), tmp_path)
    assert len(server.calls) < 50


def test_more_failures_than_allowed_are_an_error_that_counts_them_and_the_good_answers_stay(tmp_path):
    def behave(call: Call) -> Answer:
        return Answer(status=413) if number_in(call) % 10 == 0 else describe(call)

    with MisbehavingServer(behave) as server:
        with pytest.raises(InputError, match=r"4 of 40 captions failed \(refused_413 4\), more than max_failure_fraction 0.05"):
            ask(server, jobs_of(40), tmp_path)
        assert len(ask(server, jobs_of(40), tmp_path, max_failure_fraction=0.1)) == 40
    assert len(server.calls) == 44


CUT = "The figure shows three"


LOOP = "The plot shows a line. " * 40


@pytest.mark.parametrize(
    ("bad", "name", "asked_again"),
    [
        (Answer(CUT, finish="length"), "cut", {"max_tokens": 1024}),
        (Answer("", finish="length"), "cut", {"max_tokens": 1024}),
        (Answer("<think>The user wants", finish="length"), "cut", {"max_tokens": 1024}),
        (Answer(" \n"), "empty", {"seed": 1}),
        (Answer(LOOP), "nonsense", {"seed": 1}),
        (Answer(LOOP, finish="length"), "nonsense", {"seed": 1}),
        (Answer("I'm sorry, but I can't help with this image."), "refusal", {"seed": 1}),
        (Answer("A figure."), "too_short", {"seed": 1}),
        (Answer(GOOD, finish="abort"), "aborted", {"seed": 1}),
    ],
)
def test_a_bad_answer_is_asked_for_once_more_and_a_second_one_fails_and_neither_is_paid_twice(tmp_path, bad, name, asked_again):
    with MisbehavingServer(first_time(lambda call: bad)) as server:
        answers = ask(server, jobs_of(2), tmp_path / "once")
        assert [answer.failure for answer in answers] == [None, None]
        assert answers[0].completion_tokens == 2 * COMPLETION_TOKENS
        second = server.calls[-1].body
        assert asked_again.items() <= second.items()
        assert len(server.calls) == 4
        assert [answer.text for answer in ask(server, jobs_of(2), tmp_path / "once")] == [answer.text for answer in answers]
        assert len(server.calls) == 4
    with MisbehavingServer(lambda call: bad) as server:
        for _ in range(2):
            answers = ask(server, jobs_of(1), tmp_path / "ever", max_failure_fraction=1)
            assert (answers[0].failure, answers[0].text) == (name, None)
        assert len(server.calls) == 2
    with MisbehavingServer(describe) as server:
        (answer,) = ask(server, jobs_of(1), tmp_path / "ever", retry_failed=True)
        assert answer.text
        assert len(server.calls) == 1


def test_what_a_filter_withheld_is_not_asked_for_again(tmp_path):
    with MisbehavingServer(lambda call: Answer("", finish="content_filter")) as server:
        (answer,) = ask(server, jobs_of(1), tmp_path, max_failure_fraction=1)
    assert (answer.failure, len(server.calls)) == ("filtered", 1)


def test_thoughts_are_no_part_of_a_caption(tmp_path):
    with MisbehavingServer(lambda call: Answer(f"<think>What is it?\nA plot.</think>\n\n{GOOD}")) as server:
        assert ask(server, jobs_of(1), tmp_path)[0].text == GOOD


def test_no_proxy_of_the_environment_sees_a_request(tmp_path, monkeypatch):
    seen = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_error(500)

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with MisbehavingServer(describe) as server:
        assert httpx.post(server.url, json={}).status_code == 500  # the proxy works
        assert ask(server, jobs_of(1), tmp_path)[0].text
    proxy.shutdown()
    proxy.server_close()
    assert len(seen) == 1
