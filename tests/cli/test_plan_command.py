"""`frpo plan` on the command line."""

from __future__ import annotations

import pytest

from frpo.foundation.shipped import shipped

TINY = str(shipped("recipes") / "tiny" / "frpo.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["frpo"])


def test_a_recipe_is_planned_and_nothing_is_written(frpo, tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    status, out, err = frpo("plan", "--config", TINY, "--memory", "4GiB")
    assert status == 0, err
    assert "119,808 train, 0 are frozen" in out
    assert "update" in out
    assert "<- largest" in out
    assert "4.00 GiB are there: fits" in out
    assert "MALLOC_MMAP_THRESHOLD_=262144" in out
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_with_what_to_turn(frpo):
    status, out, err = frpo("plan", "--config", TINY, "--memory=620MiB", "--model.init_args.sampler.max_sequences", "8")
    assert status == 2
    assert "does not fit" in out
    assert "8 sequences of 32 + 24 tokens (1 prompts x 8, max_sequences 8)" in out
    assert "frpo plan: the run needs" in err
    assert "--model.init_args.micro_batch_size" in err
    assert "Traceback" not in err


def test_a_run_for_gpus_is_planned_on_a_machine_without(frpo, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.strategy", "ddp"]
    status, out, err = frpo("plan", "--config", TINY, *words, "--trainer.precision", "bf16-mixed")
    assert status == 0, err
    assert "DDP on 8 rank(s)" in out
    assert "gradient buckets" in out
    assert "say it by --memory" in out
    assert "glibc" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--config", TINY, "--memory", "much"), "--memory: got 'much'"),
        (
            ("--config", TINY, "--trainer.precision", "transformer-engine"),
            "trainer.precision: got 'transformer-engine'",
        ),
        (("--config", TINY, "--model.init_args.micro_batch_sise", "1"), "micro_batch_size"),
        (("--config", str(shipped("recipes") / "tiny" / "tar.yaml")), "got TamperResistance"),
    ],
)
def test_what_cannot_be_planned_is_answered(frpo, words, said):
    status, _, err = frpo("plan", *words)
    assert status == 2
    assert said in err
    assert "Traceback" not in err


def test_help_is_there(frpo):
    status, out, _ = frpo("plan", "--help")
    assert status == 0
    assert "--memory AMOUNT" in out
