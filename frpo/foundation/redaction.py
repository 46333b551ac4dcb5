"""Secrets out of everything that is recorded: configuration, tags, parameters, addresses, messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"passw|passphrase|secret|credential|authorization|bearer|cookie|api_?key|access_?key|private_?key"
    r"|(^|_)(pass|pwd|auth)$|(api|auth|access|bearer)_tokens$"
)
_TOKEN_NAME = re.compile(r"(?:^|(?P<owner>[a-z0-9]+)_)token(_id)?$")
# Tokens of a vocabulary, not of an account.
_VOCABULARY = frozenset(
    {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "end", "start", "image", "think", "label", "per"}
    | {"yes", "no", "new", "next", "first", "last", "special", "response", "instruction", "boi", "eoi", "eot"}
)
_ENVIRONMENT_NAME = re.compile(
    r"(^|_)(TOKEN|KEY|APIKEY|SECRETS?|PASSWORD|PASSWD|PASS|CREDENTIALS?|AUTH|PAT)(_|$)", re.IGNORECASE
)
_SHORTEST_ENVIRONMENT_SECRET = 6
_INTERPOLATION = re.compile(r"^\$\{[^}]*\}$")

_SECRET_WORD = r"(?:password|passwd|secret|api[_-]?key|access[_-]?key|credential|signature|token)"
_REPLACEMENTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b([a-z][a-z0-9+.\-]*://)[^\s/'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (
        re.compile(rf"([?&](?:[\w.\-]*{_SECRET_WORD}[\w.\-]*|sig|key)=)[^&\s'\"]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?<!\S)(--[\w.\-]*{_SECRET_WORD}[= ])\s*(?!-)[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(r"(\bauthorization['\"]?\s*[:=]\s*['\"]?)[^\s'\"]+(?:[ ][^\s'\"]+)?", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bbearer\s+)[\w.~+/=\-]{12,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
            r"|glpat-[\w\-]{16,}|xox[abprs]-[\w\-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w\-]{10,}\.[\w\-]+\.[\w\-]+)"
        ),
        HIDDEN,
    ),
)

# `'api_key': 'x'` and `api_key='x'`, as values are quoted in messages.
_QUOTED = re.compile(r"""(?P<key>['"]?(?P<name>[A-Za-z][\w.\-]{2,60})['"]?\s?[:=]\s?)(?P<q>['"])(?!\$\{)[^'"]+(?P=q)""")


def is_secret_name(name: str) -> bool:
    """Whether a key, option or column of this name holds a secret; ``pad_token`` and ``max_tokens`` do not."""
    return _SECRET_NAME.search(_snake(name)) is not None or _is_account_token(name)


def redact_text(text: str) -> str:
    """``text`` without addresses' user and password, bearer tokens, known key formats, or secret environment values.

    An environment variable counts as secret by its name (``HF_TOKEN``, ``OPENAI_API_KEY``, ``DB_PASSWORD``).

    Example: ``redact_text("https://ann:pw@host/x?token=1")`` is ``"https://***@host/x?token=***"``.
    """
    if not text:
        return text
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return _QUOTED.sub(_hidden, text)


def _hidden(found: re.Match[str]) -> str:
    return f"{found['key']}{found['q']}{HIDDEN}{found['q']}" if is_secret_name(found["name"]) else found[0]


def redact(value: Any, name: str = "") -> Any:
    """A copy of a nested structure with every secret replaced by ``***``, found by key and by content.

    Keys may be paths (``reward/init_args/api_key``). An unresolved interpolation such as ``${oc.env:HF_TOKEN}`` names
    a secret without holding one and stays.
    """
    if value is None or isinstance(value, bool):
        return value
    if any(is_secret_name(part) for part in re.split(r"[/.]", name)):
        return value if _holds_no_secret(name, value) else HIDDEN
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_config(text: str) -> str:
    """YAML text without its secrets. Text without any comes back unchanged, comments included."""
    try:
        tree = yaml.safe_load(text)
        hidden = redact(tree)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):  # `!!int x`, say
        return redact_text("\n".join(_redact_line(line) for line in text.split("\n")))
    if hidden == tree or not isinstance(tree, dict | list):
        return redact_text(text)
    return redact_text(yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True, width=110))


def _holds_no_secret(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return value == "" or _INTERPOLATION.match(value) is not None
    # A number called token is an id or a count; a number called password is a password.
    return isinstance(value, int | float) and not _SECRET_NAME.search(_snake(name))


def _is_account_token(name: str) -> bool:
    token = _TOKEN_NAME.search(_snake(name))
    return token is not None and token["owner"] not in _VOCABULARY


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").strip()


def _redact_line(line: str) -> str:
    match = re.match(r"^(\s*(?:- )?[\"']?([\w.\-]+)[\"']?\s*[:=]\s*)\S.*$", line)
    return f"{match[1]}{HIDDEN}" if match and is_secret_name(match[2].split(".")[-1]) else line


def _environment_secrets() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if _ENVIRONMENT_NAME.search(name) and len(value) >= _SHORTEST_ENVIRONMENT_SECRET and not os.path.exists(value)
    }
    return sorted(values, key=len, reverse=True)
