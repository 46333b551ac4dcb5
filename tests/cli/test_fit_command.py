import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from frpo.cli.checkpoint import check_checkpoint, find_checkpoint
from frpo.foundation.errors import ConfigError

HELPERS = Path(__file__).parents[1] / "helpers"
RUN = ("fit", "--config", "base.yaml")


def configuration(out: str) -> dict:
    return yaml.safe_load(out)


def test_an_option_reaches_every_reference_in_every_file(folder, frpo):
    (folder / "over.yaml").write_text("trainer: {min_steps: 1}\nmodel: {init_args: {lr: 0.5}}")
    status, out, _ = frpo(*RUN, "--config", "over.yaml", "--output_dir", "elsewhere", "--print_config")
    assert status == 0
    (folder / "full.yaml").write_text(out)
    from frpo.cli.parsing import FrpoCLI

    cli = FrpoCLI("fit", ["--config", "full.yaml", "--output_dir", "third"])
    assert cli.model.label == "third/label"
    assert cli.trainer.default_root_dir == "third"
    assert Path(cli.trainer.checkpoint_callback.dirpath).absolute() == folder / "third/checkpoints"


def test_the_name_reaches_the_default_output_dir_and_what_refers_to_it(folder):
    from frpo.cli.parsing import FrpoCLI

    cli = FrpoCLI(
        "fit",
        ["--config", "base.yaml", "--name", "other", "--model.lr", "${seed_everything}", "--seed_everything", "3"],
    )
    assert cli.config.output_dir == "outputs/other"
    assert cli.model.label == "outputs/other/label"
    assert cli.model.lr == 3.0


def test_the_printed_configuration_is_complete_and_gives_itself_back(folder, frpo):
    (folder / "a.yaml").write_text("include: [base.yaml]\nmodel: {init_args: {lr: 1e-3}}")
    status, first, _ = frpo("fit", "--config", "a.yaml", "--name", "n", "--print_config")
    assert status == 0
    (folder / "b.yaml").write_text(first)
    status, second, _ = frpo("fit", "--config", "b.yaml", "--print_config")
    assert status == 0
    assert first == second
    tree = configuration(first)
    assert "include" not in tree
    assert tree["model"]["init_args"]["lr"] == 1e-3
    assert tree["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert tree["trainer"]["callbacks"][0]["init_args"]["output_dir"] == "${output_dir}"


def test_files_apply_in_order_and_options_last(folder, frpo):
    (folder / "one.yaml").write_text("model: {init_args: {lr: 1.0, label: one}}")
    (folder / "two.yaml").write_text("include: [one.yaml]\nmodel: {init_args: {lr: 2.0}}")
    _, out, _ = frpo("fit", "--model.mode", "slow", "--config", "base.yaml", "--config", "two.yaml", "--print_config")
    settings = configuration(out)["model"]["init_args"]
    assert (settings["lr"], settings["label"], settings["mode"]) == (2.0, "one", "slow")


def test_a_fragment_may_come_before_the_file_that_names_the_class(folder, frpo):
    (folder / "fragment.yaml").write_text("model: {init_args: {lr: 0.25}}")
    status, out, err = frpo("fit", "--config", "fragment.yaml", "--config", "base.yaml", "--print_config")
    assert status == 0, err
    assert configuration(out)["model"]["init_args"]["lr"] == 0.25


@pytest.mark.parametrize("key", ["model.init_args.policy.init_args.adapter", "model.policy.adapter"])
def test_null_removes_what_a_file_has_set(folder, frpo, key):
    status, out, err = frpo("fit", "--config", "recipes/smollm2/safety_frpo.yaml", f"--{key}", "null", "--print_config")
    assert status == 0, err
    policy = configuration(out)["model"]["init_args"]["policy"]["init_args"]
    assert policy["adapter"] is None
    assert policy["path"] == "models/smollm2-135m-instruct"


def test_fit_writes_the_configuration_without_secrets_and_resumes_from_last(folder, frpo, monkeypatch):
    monkeypatch.setenv("FRPO_TEST_API_KEY", "sk-0123456789abcdefghij")
    secret = ("--model.label", "${oc.env:FRPO_TEST_API_KEY}")
    assert frpo(*RUN, *secret)[0] == 0
    out = folder / "outputs/small"
    text = (out / "config.yaml").read_text()
    assert "sk-0123456789" not in text
    assert configuration(text)["trainer"]["max_steps"] == 4
    assert json.loads((out / "seen.json").read_text())["steps"] == 4
    assert frpo(*RUN, "--ckpt_path", "last", "--trainer.max_steps", "6")[0] == 0
    assert json.loads((out / "seen.json").read_text())["steps"] == 6


def test_hyperparameters_in_a_checkpoint_do_not_override_the_configuration(folder, frpo):
    assert frpo(*RUN, "--model.lr", "0.001")[0] == 0
    checkpoint = torch.load(folder / "outputs/small/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.001
    assert frpo(*RUN, "--model.lr", "0.9", "--trainer.max_steps", "6", "--ckpt_path", "last")[0] == 0
    assert json.loads((folder / "outputs/small/seen.json").read_text())["lr"] == 0.9


def test_a_second_run_into_the_same_folder_is_refused_unless_it_may_replace_the_first(folder, frpo, refused):
    assert frpo(*RUN)[0] == 0
    message = refused()
    assert "output_dir: outputs/small holds the checkpoints of a run" in message
    assert all(way in message for way in ("--ckpt_path last", "--name", "--output_dir", "--overwrite true"))
    (folder / "outputs/small/checkpoints/notes.txt").write_text("mine")
    assert frpo(*RUN, "--overwrite", "true", "--trainer.max_steps", "2")[0] == 0
    assert sorted(file.name for file in (folder / "outputs/small/checkpoints").iterdir()) == [
        "last.ckpt",
        "notes.txt",
        "step=000002.ckpt",
    ]


def test_validate_reads_a_run_and_leaves_its_configuration_alone(folder, frpo):
    assert frpo(*RUN)[0] == 0
    config = folder / "outputs/small/config.yaml"
    before = config.read_bytes()
    status, out, err = frpo(
        "validate", "--config", str(config), "--ckpt_path", "last", "--trainer.limit_val_batches", "1"
    )
    assert status == 0, err
    assert "val/reward" in out
    assert config.read_bytes() == before


def test_what_is_refused_before_the_first_batch_has_no_traceback_and_later_errors_have_one(folder, frpo, monkeypatch):
    import cli_fakes

    def refuse(*_: object) -> None:
        raise ValueError("no such prompts; write others")

    monkeypatch.setattr(cli_fakes.Line, "on_fit_start", refuse, raising=False)
    status, _, err = frpo(*RUN)
    assert (status, err[err.index("frpo fit: error") :]) == (2, "frpo fit: error:\n  no such prompts; write others\n")
    monkeypatch.delattr(cli_fakes.Line, "on_fit_start")
    monkeypatch.setattr(cli_fakes.Line, "training_step", refuse)
    with pytest.raises(ValueError, match="no such prompts"):
        frpo(*RUN)


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch exploded",))


@pytest.fixture
def checkpoint(folder, frpo) -> Path:
    assert frpo(*RUN)[0] == 0
    return folder / "outputs/small/checkpoints/last.ckpt"


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_not_a_zip(path: Path) -> None:
    path.write_text("hello")


def damage_code(path: Path) -> None:
    torch.save({"state_dict": {}, "x": Bomb()}, path)


def damage_plain_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def damage_inside(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[0].header_offset
    data[start + 80 : start + 120] = b"\x00" * 40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_not_a_zip, damage_code, damage_plain_pickle_with_code, damage_inside]
)
def test_a_damaged_or_unsafe_checkpoint_is_refused_before_training(checkpoint, folder, refused, damage):
    whole = checkpoint.read_bytes()
    checkpoint.unlink()  # it is a second name of step=000004.ckpt, which stays whole
    checkpoint.write_bytes(whole)
    damage(checkpoint)
    message = refused("--ckpt_path", str(checkpoint), "--trainer.max_steps", "6")
    assert "last.ckpt" in message
    assert "use an earlier checkpoint of the run, or leave ckpt_path out" in message
    assert not (folder / "exploded").exists()


def test_last_passes_over_a_checkpoint_that_was_cut_short(checkpoint):
    (checkpoint.parent / "step=000009.ckpt").write_text("cut")
    assert find_checkpoint("last", [checkpoint.parent]).name in ("last.ckpt", "step=000004.ckpt")


def test_weights_alone_cannot_be_trained_on_but_validated(checkpoint, tmp_path):
    weights = tmp_path / "weights.ckpt"
    full = torch.load(checkpoint, weights_only=True)
    torch.save({key: full[key] for key in ("state_dict", "global_step", "pytorch-lightning_version")}, weights)
    check_checkpoint(weights, for_training=False)
    with pytest.raises(ConfigError, match="holds weights alone"):
        check_checkpoint(weights, for_training=True)


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(checkpoint, refused):
    assert "there is " in refused("--ckpt_path", "outputs/small/checkpoints/lasst.ckpt")
    assert "last.ckpt" in refused("--ckpt_path", "outputs/small/checkpoints/lasst.ckpt")


def test_last_without_any_checkpoint_says_how_to_start(refused):
    message = refused("--ckpt_path", "last")
    assert "no whole checkpoint in" in message
    assert "leave ckpt_path out" in message


def test_a_terminated_run_ends_and_can_be_resumed(folder, frpo):
    """SIGTERM, as a scheduler sends it: the step in hand is finished and the process ends."""
    command = [sys.executable, "-m", "frpo", *RUN, "--trainer.max_steps", "1000000", "--trainer.max_epochs", "-1"]
    env = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = folder / "outputs/small/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    step = torch.load(last, weights_only=True)["global_step"]
    assert frpo(*RUN, "--ckpt_path", "last", "--trainer.max_steps", str(step + 2), "--trainer.max_epochs", "-1")[0] == 0
