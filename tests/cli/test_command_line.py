import os
import subprocess
import sys
from pathlib import Path

import pytest

from frpo.__main__ import COMMANDS
from frpo.cli.arguments import split_arguments
from frpo.foundation.errors import ConfigError

HEAVY = ("torch", "lightning", "transformers", "jsonargparse", "mlflow", "yaml")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_help_imports_nothing_heavy_and_answers_at_once():
    out = run_python(
        "import sys, time; start = time.process_time()\n"
        "from frpo.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        f"print('SECONDS', time.process_time() - start, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    text, _, rest = out.partition("SECONDS")
    seconds, loaded = rest.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.2
    for name in COMMANDS:
        assert f"  {name} " in text


def test_the_installed_script_answers_help_in_a_fifth_of_a_second_of_cpu_time():
    script = Path(sys.executable).with_name("frpo")
    if not script.is_file():
        pytest.skip("the console script is not installed beside this Python")
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([script, "--help"], check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fitt", "did you mean `frpo fit`?"),
        ("valid", "`frpo validate`"),
        ("track", "`frpo track replay`"),
        ("xyzzy", "choose"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(frpo, word, said):
    status, out, err = frpo(word)
    assert (status, out) == (2, "")
    assert word in err
    assert said in err


def test_no_command_prints_the_list_and_fails(frpo):
    status, out, _ = frpo()
    assert status == 2
    assert "commands:" in out


def test_version(frpo):
    from frpo import __version__

    assert frpo("--version") == (0, f"frpo {__version__}\n", "")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(frpo, name):
    status, out, _ = frpo(*name.split(), "--help")
    assert status == 0
    assert f"frpo {name}" in out


def test_options_apply_after_files_wherever_they_stand(folder):
    found = split_arguments(["--name", "x", "--config", "base.yaml", "--trainer.max_steps=7", "--print_config"])
    assert [document.source for document in found.documents] == ["base.yaml"]
    assert found.words(folder) == [f"--config={folder}/0.yaml", "--name=x", "--trainer.max_steps=7"]
    assert found.print_config


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["extra"], "got 'extra'"),
        (["--name"], "--name needs a value"),
        (["--name", "--overwrite", "true"], "--name needs a value"),
        (["-n", "x"], "got '-n'"),
        (["--trainer.callbacks", "[{"], "--trainer.callbacks, line 1, column"),
    ],
)
def test_words_that_are_no_option_are_refused(args, said):
    with pytest.raises(ConfigError) as caught:
        split_arguments(args)
    assert said in str(caught.value)


def test_a_negative_number_is_a_value(tmp_path):
    assert split_arguments(["--data.seed", "-1"]).words(tmp_path) == ["--data.seed=-1"]


def test_help_on_a_class_of_ours_takes_its_name():
    for words in (["--model.help", "TamperResistance"], ["--model.help=TamperResistance"]):
        assert split_arguments(words).help == ["--model.help=frpo.tar.module.TamperResistance"]
    assert split_arguments(["--model.help", "--name", "x"]).help == ["--model.help"]


@pytest.mark.parametrize("words", [["--model.help", "cli_fakes.Line"], ["--model.help=cli_fakes.Line"]])
def test_help_on_a_class_lists_what_it_takes(folder, frpo, words):
    status, out, err = frpo("fit", *words)
    assert status == 0, err
    assert "--model.mode" in out


def test_help_on_a_command_is_short_of_its_usage(folder, frpo):
    status, out, _ = frpo("fit", "--help")
    assert status == 0
    assert out.startswith("usage: frpo fit --config FILE [--config FILE ...] [--key value ...]\n")
    assert "--output_dir" in out
