import pytest
import yaml

from frpo.foundation.redaction import HIDDEN, is_secret_name, redact, redact_config, redact_text


@pytest.mark.parametrize(
    "name",
    [
        "token", "hf_token", "HF_TOKEN", "accessToken", "auth-token", "password", "db_password", "passwd", "api_key",
        "apiKey", "apikey", "OPENAI_API_KEY", "client_secret", "authorization", "Authorization", "credentials",
        "aws_secret_access_key", "private_key", "pwd", "cookie",
    ],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokens", "max_new_tokens", "tokenizer", "pad_token", "eos_token", "eos_token_id", "decoder_start_token_id",
        "answer_key", "ratio", "keys", "compass", "author", "passes", "yes_token",
    ],
)  # fmt: skip
def test_names_that_are_no_secret(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://ann:pw@host:5000/x", f"https://{HIDDEN}@host:5000/x"),
        ("postgresql+psycopg://u:p%40ss@db/ml", f"postgresql+psycopg://{HIDDEN}@db/ml"),
        ("see https://h/a?token=abc&n=1", f"see https://h/a?token={HIDDEN}&n=1"),
        ("https://h/a?api_key=abc", f"https://h/a?api_key={HIDDEN}"),
        ("Authorization: Bearer abcdef", f"Authorization: {HIDDEN}"),
        ("got bearer abcdefghijklmnop back", f"got bearer {HIDDEN} back"),
        ("run --api-key abc --steps 3", f"run --api-key {HIDDEN} --steps 3"),
        ("hf_abcdefghijklmnopqrstuv", HIDDEN),
        ("sk-proj-abcdefghijklmnop1234", HIDDEN),
        ("per-token loss, basic arithmetic", "per-token loss, basic arithmetic"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("mail me@example.com", "mail me@example.com"),
    ],
)
def test_text(text, expected):
    assert redact_text(text) == expected


def test_secret_environment_values_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_JUDGE_API_KEY", "plain-looking-value")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody Else")
    monkeypatch.setenv("SHORT_TOKEN", "1")
    assert redact_text("x plain-looking-value y") == f"x {HIDDEN} y"
    assert redact_text("Somebody Else 1") == "Somebody Else 1"


def test_tree_keeps_numbers_called_token_and_interpolations():
    tree = {
        "api_key": "abc",
        "token": 7,
        "password": 1234,
        "judge": {"headers": {"Authorization": "x"}, "urls": ["http://a:b@c"]},
        "hub_token": "${oc.env:HF_TOKEN}",
        "use_auth": False,
        "credentials": {"user": "u", "value": "v"},
        "secret": None,
    }
    assert redact(tree) == {
        "api_key": HIDDEN,
        "token": 7,
        "password": HIDDEN,
        "judge": {"headers": {"Authorization": HIDDEN}, "urls": [f"http://{HIDDEN}@c"]},
        "hub_token": "${oc.env:HF_TOKEN}",
        "use_auth": False,
        "credentials": HIDDEN,
        "secret": None,
    }
    assert redact("abc", "reward/init_args/api_key") == HIDDEN


def test_config_without_secrets_is_untouched_and_with_them_stays_yaml():
    plain = "a: 1  # why\nsampler:\n  max_new_tokens: 8\n"
    assert redact_config(plain) == plain
    text = "a: 1\nreward:\n  init_args:\n    api_key: planted\n    url: http://u:planted@h\n"
    hidden = redact_config(text)
    assert "planted" not in hidden
    assert yaml.safe_load(hidden)["reward"]["init_args"] == {"api_key": HIDDEN, "url": f"http://{HIDDEN}@h"}


def test_config_that_is_no_yaml_is_redacted_line_by_line():
    hidden = redact_config("a: [1\napi_key: planted\n  - password: 'planted'\ntokens: 3\n")
    assert "planted" not in hidden
    assert "tokens: 3" in hidden
