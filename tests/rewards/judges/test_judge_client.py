import gzip
import json
import logging
import pickle
import random
import threading
import traceback

import pytest
from judge_server import Reply, chat, endpoint, says, serving

from frpo.rewards.calls import UnusableRewardError
from frpo.rewards.judges.asking import MalformedAnswerError, NoAnswer
from frpo.rewards.judges.chat import chat_text
from frpo.rewards.judges.client import Endpoint

KEY = "sk-very-secret-0123456789"
PATH = "/chat/completions"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)


def ask(client, texts):
    return client.ask(PATH, [chat(text) for text in texts], chat_text)


def echo(asked, before):
    return says(asked.text.upper())


def test_answers_come_in_order_whatever_the_delays_and_no_more_at_once_than_allowed():
    delays = random.Random(0)
    texts = [f"text {i}" for i in range(40)]
    with serving(lambda asked, before: says(asked.text.upper(), delay_s=delays.uniform(0.005, 0.03))) as server:
        assert ask(endpoint(server, concurrency=4), texts) == [text.upper() for text in texts]
    assert len(server.asked) == 40
    assert server.most_in_flight == 4


def test_equal_questions_of_one_call_are_sent_once():
    with serving(echo) as server:
        assert ask(endpoint(server), ["a", "b", "a", "a"]) == ["A", "B", "A", "A"]
        assert len(server.asked) == 2
        assert ask(endpoint(server), []) == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(status):
    with serving(lambda asked, before: Reply(status) if before < 2 else says("fine")) as server:
        assert ask(endpoint(server), ["a"]) == ["fine"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("bad", [{"drop": True}, {"cut": 5}, {"delay_s": 1.2}])
def test_broken_connections_cut_answers_and_silence_are_asked_again(bad):
    with serving(lambda asked, before: says("fine", **(bad if before < 1 else {}))) as server:
        assert ask(endpoint(server, read_timeout_s=0.6), ["a"]) == ["fine"]
    assert len(server.asked) >= 2


def test_retry_after_is_honoured_up_to_the_bound():
    def behave(asked, before):
        wait = {"short": "0.3", "long": "3600", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}[asked.text]
        return Reply(429, headers={"Retry-After": wait}) if before < 1 else says("fine")

    with serving(behave) as server:
        assert ask(endpoint(server, longest_wait_s=0.5), ["short", "long", "date"]) == ["fine"] * 3
    waited = {text: server.times(text)[1] - server.times(text)[0] for text in ("short", "long", "date")}
    assert waited["short"] >= 0.3
    assert waited["long"] >= 0.5, "but not an hour: that is over the deadline, and would be no answer"


def test_used_up_retries_are_a_reason_not_a_number():
    with serving(lambda asked, before: Reply(503)) as server:
        (result,) = ask(endpoint(server, retries=2), ["a"])
    assert result == NoAnswer("no answer after 3 request(s), the last: HTTP 503")
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_will_not_pass_is_not_asked_again(status):
    error = json.dumps({"error": {"message": "too\n long" + "!" * 500}}).encode()
    with serving(lambda asked, before: Reply(status, error) if asked.text == "b" else echo(asked, before)) as server:
        first, second = ask(endpoint(server), ["a", "b"])
    assert first == "A"
    assert second.reason.startswith(f"HTTP {status}: too long!!!")
    assert len(second.reason) < 250
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404])
def test_a_refusal_before_any_answer_stops_the_run(status):
    headers = {"Location": "http://127.0.0.1:9/v1"}
    message = f"refused model 'judge': HTTP {status}: no such.*JUDGE_KEY"
    with serving(lambda asked, before: Reply(status, b"no such thing", headers)) as server:
        client = endpoint(server, api_key_env="JUDGE_KEY", concurrency=3)
        with pytest.raises(UnusableRewardError, match=message):
            ask(client, [f"text {i}" for i in range(50)])
    assert len(server.asked) <= 6, "the rest is not asked"


def test_a_refusal_of_one_row_among_answers_fails_that_row():
    def behave(asked, before):
        return Reply(403, b"flagged") if asked.text == "0" else says("fine", delay_s=0.05)

    with serving(behave) as server:
        client = endpoint(server)
        assert ask(client, ["0", "1", "2"]) == [NoAnswer("HTTP 403: flagged"), "fine", "fine"]
        assert ask(client, ["0"]) == [NoAnswer("HTTP 403: flagged")], "it has answered before"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>gateway</html>",
        b"",
        b"null",
        b"[]",
        b"3",
        b'{"error": {"message": "overloaded"}}',
        b'{"choices": []}',
        b'{"choices": [{"message": {}}]}',
        b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}',
        b'{"choices": [{"message": {"content": " \\n"}}]}',
        b'{"choices": [{"message": {"content": ["a"]}}]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_rubbish_is_a_reason_is_asked_once_and_not_kept(body, tmp_path):
    with serving(lambda asked, before: Reply(200, body)) as server:
        client = endpoint(server, cache=str(tmp_path / "cache.sqlite"))
        client.setup()
        (result,) = ask(client, ["a"])
        assert result.reason.startswith("malformed answer: ")
        assert len(server.asked) == 1
        server.behave = echo
        assert ask(client, ["a"]) == ["A"]


def test_the_deadline_ends_a_drip_and_a_row_of_retries():
    with serving(lambda asked, before: says("slow", drip_s=0.02)) as server:
        (result,) = ask(endpoint(server, deadline_s=0.5), ["a"])
    assert result.reason == "no answer within 0.5 s, the last: an answer without end"
    with serving(lambda asked, before: Reply(503, headers={"Retry-After": "60"})) as server:
        (result,) = ask(endpoint(server, deadline_s=1.0, longest_wait_s=60.0), ["a"])
        assert len(server.asked) == 1, "it waits no longer than the deadline allows"
    assert result.reason == "no answer within 1 s, the last: HTTP 503"


def test_a_server_that_dies_leaves_reasons_where_there_is_no_answer():
    lock, answered = threading.Lock(), []

    def behave(asked, before):
        with lock:
            if len(answered) == 10:
                if not server.dead:
                    server.stop()
                return Reply(drop=True)
            answered.append(asked.text)
        return echo(asked, before)

    texts = [f"text {i}" for i in range(30)]
    with serving(behave) as server:
        results = ask(endpoint(server, concurrency=3, retries=1, give_up_after=None), texts)
    assert len(results) == 30
    for text, result in zip(texts, results, strict=True):
        if text in answered:
            assert result == text.upper() or isinstance(result, NoAnswer)
        else:
            assert result.reason == "no answer after 2 request(s), the last: ConnectionError"
    assert sum(isinstance(result, str) for result in results) >= 10 - 3, "those in flight may be lost with the server"


def test_it_gives_up_after_questions_in_a_row_without_answer():
    with serving(lambda asked, before: Reply(500)) as server:
        client = endpoint(server, concurrency=1, retries=1, give_up_after=3)
        results = ask(client, [str(i) for i in range(100)])
        assert len(server.asked) == 6
        assert [r.reason.split(":")[0] for r in results[:4]] == ["no answer after 2 request(s), the last"] * 3 + [
            "not asked"
        ]
        assert {r.reason for r in results[3:]} == {
            "not asked: 3 questions in a row had no answer; no answer after 2 request(s), the last: HTTP 500"
        }
        server.behave = lambda asked, before: Reply(500) if int(asked.text) % 3 else echo(asked, before)
        assert not any(r.reason.startswith("not asked") for r in ask(client, [str(i) for i in range(9)])[1:3])


def test_a_server_that_was_never_there_fails_every_row_soon():
    with serving(echo) as server:
        url = server.url
    results = ask(endpoint(url, retries=1, give_up_after=4, concurrency=2), [str(i) for i in range(200)])
    assert len(results) == 200
    assert all(isinstance(result, NoAnswer) for result in results)


def test_the_key_is_sent_and_stands_nowhere(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    shown = []

    def behave(asked, before):
        if asked.text == "refuse":
            return Reply(401, f"Incorrect API key: {KEY}".encode())
        return says(f"you sent {asked.headers['Authorization']}")

    with serving(behave) as server:
        client = endpoint(server, api_key_env="JUDGE_KEY", cache=str(tmp_path / "cache.sqlite"))
        client.setup()
        with pytest.raises(UnusableRewardError) as caught:
            ask(client, ["refuse"])
        shown += traceback.format_exception(caught.value)
        assert ask(client, ["a"]) == ["you sent Bearer [key]"]
        shown += [str(result) for result in ask(client, ["refuse"])]
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    shown += [repr(vars(client)), str(pickle.dumps(client)), caplog.text]
    assert any("[key]" in text for text in shown)
    assert not any(KEY in text for text in shown)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert files
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_without_a_key_none_is_sent_not_even_from_a_netrc_file(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with serving(echo) as server:
        ask(endpoint(server), ["a"])
        ask(endpoint(server, api_key_env="JUDGE_KEY"), ["a"])
    assert [asked.headers.get("Authorization") for asked in server.asked] == [None, f"Bearer {KEY}"]


def test_a_stand_in_key_is_not_cut_out_of_answers(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "no")
    with serving(lambda asked, before: says("no")) as server:
        assert ask(endpoint(server, api_key_env="JUDGE_KEY"), ["a"]) == ["no"]


@pytest.mark.parametrize("value", [None, "", "  ", "sk-two words", "sk-line\nbreak", "sk-é"])
def test_a_missing_or_broken_key_is_said_at_setup_without_showing_it(value, monkeypatch):
    if value is None:
        monkeypatch.delenv("JUDGE_KEY")
    else:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="environment variable 'JUDGE_KEY'.*export JUDGE_KEY=") as caught:
        Endpoint("https://host/v1", "m", api_key_env="JUDGE_KEY").setup()
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "host/v1"}, "base_url: got 'host/v1', expected one as"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "https://host/v1?key=sk"}, "base_url"),
        ({"base_url": "https://me:pw@host/v1"}, "base_url: got one with a user"),
        ({"api_key_env": "sk-secret"}, "api_key_env: got no name of an environment variable"),
        ({"model": " "}, "model: got ' ', expected text; name the model"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"retries": -1}, "retries: got -1"),
        ({"deadline_s": 0.0}, "deadline_s: got 0"),
        ({"read_timeout_s": float("nan")}, "read_timeout_s: got nan"),
        (
            {"first_wait_s": 9.0, "longest_wait_s": 1.0},
            "first_wait_s: got 9.0, .* at most 1.0; see longest_wait_s",
        ),
        ({"give_up_after": 0}, "give_up_after: got 0"),
    ],
)
def test_bad_settings_say_what_to_write(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"base_url": "https://host/v1/", "model": "m", **settings})
    assert not any(secret in str(caught.value) for secret in ("pw", "sk-secret"))


def test_waits_leave_the_random_numbers_of_the_run_alone():
    random.seed(0)
    state = random.getstate()
    with serving(lambda asked, before: Reply(500)) as server:
        ask(endpoint(server, retries=1), ["a"])
    assert random.getstate() == state


def test_an_error_in_our_own_reader_is_raised_and_ends_the_round():
    def read(body):
        raise ZeroDivisionError("a bug")

    with serving(echo) as server, pytest.raises(ZeroDivisionError, match="a bug"):
        endpoint(server).ask(PATH, [chat(str(i)) for i in range(20)], read)


def test_an_answer_without_text_says_why():
    with pytest.raises(MalformedAnswerError, match="finish_reason='length'"):
        chat_text({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})


def test_a_compressed_answer_is_not_unpacked():
    bomb = gzip.compress(b"[" * 50_000_000)
    with serving(lambda asked, n: Reply(body=bomb, headers={"Content-Encoding": "gzip"})) as server:
        (answer,) = endpoint(server).ask("/chat/completions", [chat("a")], lambda body: body)
    assert isinstance(answer, NoAnswer)
    assert "compressed" in answer.reason
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


def test_an_answer_without_end_is_cut_off():
    with serving(lambda asked, n: Reply(body=b" " * 20_000_000)) as server:
        (answer,) = endpoint(server).ask("/chat/completions", [chat("a")], lambda body: body)
    assert isinstance(answer, NoAnswer)
    assert "over 1048576 bytes" in answer.reason
