import sqlite3

import cache_writer
import forks
import pytest
from judge_server import chat, endpoint, says, serving

from frpo.rewards.judges.asking import MalformedAnswerError
from frpo.rewards.judges.cache import AnswerCache, question_key
from frpo.rewards.judges.chat import chat_text

PATH = "/chat/completions"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def opened(server, path, **settings):
    client = endpoint(server, cache=str(path), **settings)
    client.setup()
    return client


def echo(asked, before):
    return says(asked.text.upper())


def test_what_was_answered_is_not_asked_again_also_by_another_client_on_another_port(tmp_path):
    bodies = [chat(str(i)) for i in range(12)]
    with serving(echo) as server:
        client = opened(server, tmp_path / "deep" / "cache.sqlite")
        first = client.ask(PATH, bodies, chat_text)
        assert client.ask(PATH, bodies, chat_text) == first
        assert len(server.asked) == 12
    with serving(echo) as server:
        again = opened(server, tmp_path / "deep" / "cache.sqlite").ask(PATH, [*bodies, chat("new")], chat_text)
        assert again == [*first, "NEW"]
        assert [asked.text for asked in server.asked] == ["new"]


def test_a_killed_round_keeps_what_was_answered(tmp_path):
    def read(body):
        text = chat_text(body)
        if text == "9":
            raise KeyboardInterrupt
        return text

    bodies = [chat(str(i)) for i in range(10)]
    with serving(lambda asked, before: says(asked.text)) as server:
        client = opened(server, tmp_path / "cache.sqlite", concurrency=1)
        with pytest.raises(KeyboardInterrupt):
            client.ask(PATH, bodies, read)
        assert client.ask(PATH, bodies, chat_text) == [str(i) for i in range(10)]
        assert len(server.asked) == 11, "only the last is asked twice"


@pytest.mark.parametrize("other", [{"model": "another"}, {"revision": "2"}])
def test_another_model_or_revision_is_another_question(other, tmp_path):
    with serving(echo) as server:
        opened(server, tmp_path / "cache.sqlite").ask(PATH, [chat("a")], chat_text)
        opened(server, tmp_path / "cache.sqlite", **other).ask(PATH, [chat("a")], chat_text)
        assert len(server.asked) == 2


def test_the_key_holds_everything_asked_and_no_order_of_fields():
    base = question_key("/v1/x", "m", None, {"a": 1, "b": 2})
    assert base == question_key("/v1/x", "m", None, {"b": 2, "a": 1})
    others = [
        question_key("/v2/x", "m", None, {"a": 1, "b": 2}),
        question_key("/v1/x", "n", None, {"a": 1, "b": 2}),
        question_key("/v1/x", "m", "1", {"a": 1, "b": 2}),
        question_key("/v1/x", "m", None, {"a": 1, "b": 3}),
    ]
    assert len({base, *others}) == 5


def test_an_answer_that_can_no_longer_be_read_is_asked_for_again(tmp_path):
    def stricter(body):
        if chat_text(body) == "OLD":
            raise MalformedAnswerError("not any more")
        return chat_text(body)

    with serving(lambda asked, before: says("OLD" if before == 0 else "new")) as server:
        client = opened(server, tmp_path / "cache.sqlite")
        assert client.ask(PATH, [chat("a")], chat_text) == ["OLD"]
        assert client.ask(PATH, [chat("a")], stricter) == ["new"]
        assert client.ask(PATH, [chat("a")], stricter) == ["new"]
        assert len(server.asked) == 2


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to have a header of its own" * 20)
    with pytest.raises(ValueError, match=r"cache: got .*notes\.txt.*expected a file to create.*name another path"):
        AnswerCache(tmp_path / "notes.txt").setup()


def test_many_keys_are_found_in_one_go(tmp_path):
    cache = AnswerCache(tmp_path / "cache.sqlite")
    cache.setup()
    for i in range(5):
        cache.put(f"k{i * 300}", {"i": i})
    assert cache.get([f"k{i}" for i in range(1300)]) == {f"k{i * 300}": {"i": i} for i in range(5)}


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "cache.sqlite"
    workers = [forks.context().Process(target=cache_writer.write, args=(path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (150,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
