"""Captions come in order, are paid for once, and survive processes that are killed."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moexpand.base.errors import InputError
from moexpand.data import caption_prompts
from moexpand.data.caption_cache import AnswerCache
from moexpand.data.caption_prompts import caption_prompt
from moexpand.data.captioner import CaptionAnswer, CaptionerSettings, CaptionJob, caption_all
from moexpand.data.endpoint import Route
from moexpand.data.ledger import Ledger
from moexpand.data.scorer import ScorerSettings, score_all
from tests.data.caption_jobs import GOOD, KEY, ask, describe, jobs_of, number_in
from tests.data.misbehaving_server import COMPLETION_TOKENS, PROMPT_TOKENS, Answer, Call, MisbehavingServer, busy


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "figure.png"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(path)
    return path


def test_answers_come_in_the_order_of_the_jobs_with_bounded_requests_and_lookahead(tmp_path, image):
    taken = 0

    def stream() -> Iterable[CaptionJob]:
        nonlocal taken
        for job in jobs_of(60, image):
            taken += 1
            yield job

    def behave(call: Call) -> Answer:
        return replace(describe(call), seconds=0.06 if number_in(call) % 5 == 0 else 0.01)

    with MisbehavingServer(behave) as server:
        options = CaptionerSettings(routes=(Route("scientific", server.url, "tester"),), concurrency=4)
        answers = []
        for answer in caption_all(stream(), options, tmp_path, KEY, lambda line: None):
            answers.append(answer)
            assert taken - len(answers) <= 16
    assert [answer.key for answer in answers] == [f"job-{n}" for n in range(60)]
    assert all(answer.text and answer.text.endswith(f"job {n}.") for n, answer in enumerate(answers))
    assert server.most_at_once == 4
    call = server.calls[0]
    assert call.path == "/v1/chat/completions"
    assert call.headers["Authorization"] == f"Bearer {KEY}"
    assert call.image.startswith("data:image/png;base64,iVBOR")


def test_a_second_run_sends_nothing_and_gives_the_same(tmp_path, image):
    with MisbehavingServer(describe) as server:
        first = ask(server, jobs_of(30, image), tmp_path)
    ledger = Ledger()
    second = ask(server, jobs_of(30, image), tmp_path, ledger)  # the server is gone
    assert [replace(answer, cached=True) for answer in first] == second
    (part,) = ledger.as_json()
    assert (part["requests"], part["cached"], part["prompt_tokens"]) == (0, 30, 0)


def test_the_key_of_an_answer_is_all_that_decides_it(tmp_path, image):
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8), (0, 10, 10)).save(other)
    renamed = tmp_path / "renamed.png"
    renamed.write_bytes(image.read_bytes())
    (job,) = jobs_of(1, image)
    with MisbehavingServer(describe) as server, MisbehavingServer(describe) as moved:
        elsewhere = (Route("scientific", moved.url, "tester"),)
        changes: list[tuple[CaptionJob, dict[str, Any], bool]] = [
            (job, {}, True),
            (replace(job, image=renamed), {}, False),
            (job, {"routes": elsewhere}, False),
            (job, {"concurrency": 2, "retries": 1, "timeout_seconds": 9}, False),
            (replace(job, image=other), {}, True),
            (replace(job, caption="Job number 0. Another caption."), {}, True),
            (job, {"temperature": 0.3}, True),
            (job, {"max_tokens": 100}, True),
            (job, {"seed": 5}, True),
            (job, {"routes": (Route("scientific", server.url, "another"),)}, True),
            (job, {"routes": (Route("scientific", server.url, "tester", {"top_p": 0.5}),)}, True),
        ]
        for changed, options, new in changes:
            before = len(server.calls) + len(moved.calls)
            ask(server, [changed], tmp_path / "cache", **options)
            assert len(server.calls) + len(moved.calls) - before == new, (changed, options)
    assert server.calls[-1].body["top_p"] == 0.5


def test_equal_requests_of_a_run_are_sent_once(tmp_path, image):
    jobs = [replace(job, key="same", caption="Job number 3.") for job in jobs_of(25, image)]
    ledger = Ledger()
    with MisbehavingServer(lambda call: replace(describe(call), seconds=0.1)) as server:
        answers = ask(server, jobs, tmp_path, ledger, concurrency=10)
    assert len(server.calls) == 1
    assert len({answer.text for answer in answers}) == 1
    assert sum(not answer.cached for answer in answers) == 1
    (part,) = ledger.as_json()
    assert (part["paid"], part["shared"] + part["cached"], part["jobs"]) == (1, 24, 25)


CLIENT = """
import signal, sys
from pathlib import Path
from moexpand.data.captioner import CaptionJob, CaptionerSettings, caption_all
from moexpand.data.endpoint import Route

url, cache, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
jobs = [CaptionJob(f"job-{n}", "figure", None, f"Job number {n}.", (), "scientific") for n in range(count)]
options = CaptionerSettings(routes=(Route("scientific", url, "tester"),), concurrency=8)
for answer in caption_all(jobs, options, cache, None, lambda line: None):
    print(answer.key, answer.text, flush=True)
"""


def start_client(server: MisbehavingServer, cache: Path, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url, str(cache), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def wait_for(server: MisbehavingServer, calls: int, client: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(server.calls) < calls:
        assert client.poll() is None, client.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_9_in_the_middle_costs_at_most_the_requests_in_flight(tmp_path):
    count, concurrency = 120, 8
    with MisbehavingServer(lambda call: replace(describe(call), seconds=0.02)) as server:
        for kill_at in (40, 90):
            client = start_client(server, tmp_path, count)
            wait_for(server, kill_at, client)
            client.send_signal(signal.SIGKILL)
            client.communicate()
        with AnswerCache(tmp_path / "captions.sqlite") as cache:
            held = cache.totals()["tester"]["answers"]
        before = len(server.calls)
        client = start_client(server, tmp_path, count)
        out, error = client.communicate(timeout=60)
    assert client.returncode == 0, error
    assert out.splitlines() == [f"job-{n} {GOOD} It is the image of job {n}." for n in range(count)]
    assert held >= 90 - 2 * concurrency
    assert len(server.calls) - before == count - held
    assert count <= len(server.calls) <= count + 2 * concurrency


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_at_once_and_leaves_the_cache_in_order(tmp_path, number):
    with MisbehavingServer(lambda call: replace(describe(call), seconds=0.0 if call.number < 20 else 30.0)) as server:
        client = start_client(server, tmp_path, 100)
        wait_for(server, 28, client)
        started = time.monotonic()
        client.send_signal(number)
        client.communicate(timeout=20)
        assert time.monotonic() - started < 10
    assert client.returncode != 0
    with AnswerCache(tmp_path / "captions.sqlite") as cache:
        assert cache.totals()["tester"]["answers"] == 20


def test_a_consumer_that_stops_early_leaves_no_task_thread_or_lock(tmp_path):
    with MisbehavingServer(lambda call: replace(describe(call), seconds=0.0 if number_in(call) < 3 else 30.0)) as server:
        options = CaptionerSettings(routes=(Route("scientific", server.url, "tester"),), concurrency=4)
        answers = caption_all(jobs_of(1000), options, tmp_path, KEY, lambda line: None)
        assert [answer.key for answer in itertools.islice(answers, 3)] == ["job-0", "job-1", "job-2"]
        started = time.monotonic()
        answers.close()
        assert time.monotonic() - started < 5
        assert not [thread for thread in threading.enumerate() if thread.name == "moexpand-asking"]
        assert ask(server, jobs_of(3), tmp_path)[2].cached
    assert len(server.calls) <= 3 + 4


def test_an_error_in_the_stream_of_jobs_reaches_the_caller(tmp_path):
    def stream() -> Iterable[CaptionJob]:
        yield from jobs_of(2)
        raise ZeroDivisionError

    with MisbehavingServer(describe) as server, pytest.raises(ZeroDivisionError):
        ask(server, stream(), tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "moexpand-asking"]


def test_the_ledger_counts_what_the_server_served(tmp_path):
    def behave(call: Call) -> Answer:
        if call.number % 7 == 3:
            return busy(429)
        if number_in(call) == 2 and call.body["max_tokens"] == 512:
            return Answer("The figure shows three", finish="length")
        return replace(describe(call), usage=number_in(call) != 5)

    routes: list[Route] = []
    with MisbehavingServer(behave) as science, MisbehavingServer(behave) as rest:
        routes = [Route("scientific", science.url, "large"), Route("other", rest.url, "small")]
        jobs = [replace(job, topic=topic) for job, topic in zip(jobs_of(30), itertools.cycle(["scientific", "other", "unknown"]))]
        ledger = Ledger()
        answers = ask(science, jobs, tmp_path, ledger, routes=tuple(routes))
    assert {answer.route for answer in answers[1::3]} == {"other"}
    assert {answer.route for answer in answers[0::3] + answers[2::3]} == {"scientific"}
    assert {call.body["model"] for call in rest.calls} == {"small"}
    ledger.write(tmp_path / "ledger.json")
    written = {part["route"]: part for part in json.loads((tmp_path / "ledger.json").read_text())}
    for route, server in (("scientific", science), ("other", rest)):
        part, refused = written[route], sum(call.number % 7 == 3 for call in server.calls)
        assert part["requests"] == len(server.calls)
        assert part["retries"] == part["troubles"]["429"] == refused
        assert part["paid"] == len(server.calls) - refused
        uncounted = route == "scientific"
        assert part["uncounted"] == uncounted
        assert part["prompt_tokens"] == PROMPT_TOKENS * (part["paid"] - uncounted)
        assert part["completion_tokens"] == COMPLETION_TOKENS * (part["paid"] - uncounted)
    assert sum(part["jobs"] for part in written.values()) == 30
    assert sum(answer.prompt_tokens for answer in answers) == sum(part["prompt_tokens"] for part in written.values())
    with AnswerCache(tmp_path / "captions.sqlite") as cache:
        assert cache.totals()["large"]["prompt_tokens"] == written["scientific"]["prompt_tokens"]
    assert "30 answered, 0 failed" in ledger.line()


def test_without_a_route_nothing_is_asked_and_nothing_is_written(tmp_path):
    answers = list(caption_all(jobs_of(3), CaptionerSettings(), tmp_path, None, lambda line: None))
    assert answers == [CaptionAnswer(f"job-{n}", None, None) for n in range(3)]
    assert not list(tmp_path.iterdir())


def test_context_is_limited_and_can_be_left_out(tmp_path):
    template = caption_prompts.TEMPLATES["figure_dense"]
    assert len(caption_prompt(template, "x" * 10**6, (), 4000)) < 5000
    assert "quoted" not in caption_prompt(template, " ", ("\u200b",))
    (job,) = jobs_of(1)
    with MisbehavingServer(lambda call: Answer(GOOD)) as server:
        ask(server, [job], tmp_path, include_context=False)
    assert "Job number" not in server.calls[0].text


def test_scores_are_numbers_from_0_to_1_or_failures(tmp_path):
    said = {0: "0.25", 1: '{"score": 1}', 2: "8/10", 3: "0.5 because it is fine", 4: " .75\n", 5: "<think>hm</think>0"}
    texts = [(f"t{n}", f"Job number {n}. <|im_end|>") for n in range(6)]
    with MisbehavingServer(lambda call: Answer(said[number_in(call)])) as server:
        options = ScorerSettings(route=Route("score", server.url, "judge"), max_failure_fraction=0.4, backoff_seconds=0.01)
        ledger = Ledger("scores")
        answers = list(score_all(texts, options, tmp_path, KEY, lambda line: None, ledger))
        again = list(score_all(texts, options, tmp_path, KEY, lambda line: None))
        with pytest.raises(InputError, match="2 of 6 scores failed"):
            list(score_all(texts, replace(options, max_failure_fraction=0.1), tmp_path, KEY, lambda line: None))
    assert [answer.score for answer in answers] == [0.25, 1.0, None, None, 0.75, 0.0]
    assert [answer.failure for answer in answers] == [None, None, "nonsense", "nonsense", None, None]
    assert [replace(answer, cached=True) for answer in answers] == again
    assert len(server.calls) == 6
    assert "<|im_end|>" not in server.calls[0].text
    assert server.calls[0].body["temperature"] == 0
    assert ledger.as_json()[0]["completion_tokens"] == 6 * COMPLETION_TOKENS
    assert [answer.score for answer in score_all(texts, ScorerSettings(), tmp_path, None, lambda line: None)] == [None] * 6


def test_a_missing_image_and_one_of_another_format_are_named(tmp_path):
    gif = tmp_path / "a.gif"
    Image.new("L", (4, 4)).save(gif)
    with MisbehavingServer(describe) as server:
        with pytest.raises(InputError, match=r"a\.gif of job-0 is neither PNG nor JPEG"):
            ask(server, jobs_of(1, gif), tmp_path)
        with pytest.raises(InputError, match="does not exist"):
            ask(server, jobs_of(1, tmp_path / "no.png"), tmp_path)
        with pytest.raises(InputError, match="API key") as caught:
            list(caption_all(jobs_of(1), CaptionerSettings(routes=(Route("a", server.url, "m"),)), tmp_path, "sk\n1", print))
    assert "sk\n1" not in str(caught.value)
    assert server.calls == []
