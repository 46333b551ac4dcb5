"""Secrets planted in the environment and in a configuration stand in nothing that whole runs write or print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from judge_server import Reply, says, serving

TESTS = Path(__file__).parents[2]
ENVIRONMENT = {
    "OPENAI_API_KEY": "plantedOpenaiKey00112233",
    "HF_TOKEN": "hf_plantedHubToken00112233",
    "MLFLOW_TRACKING_PASSWORD": "plantedMlflowPassword0011",
    "MLFLOW_TRACKING_TOKEN": "plantedMlflowToken001122",
    "DB_PASSWORD": "plantedDbPassword00112233",
    "AWS_SECRET_ACCESS_KEY": "plantedAwsSecret00112233",
}
IN_CONFIG = ("plantedOptionKey0011", "plantedTagPassword0011", "plantedBearer00112233445566", "plantedUrlPassword0011")


def settings(url: str, model_dir: Path, **tracker: object) -> dict[str, object]:
    judge = {
        "class_path": "frpo.rewards.judges.harmbench_chat.HarmBenchChat",
        "init_args": {
            "endpoint": {"base_url": url, "model": "judge", "api_key_env": "OPENAI_API_KEY", "retries": 0},
            "options": {"api_key": IN_CONFIG[0]},
        },
    }
    tags = {"password": IN_CONFIG[1], "note": f"Authorization: Bearer {IN_CONFIG[2]}"}
    tags["address"] = f"https://ann:{IN_CONFIG[3]}@host/x"
    return (
        {
            "include": ["conf/trainer/cpu.yaml", "conf/logger/local.yaml"],
            "trainer": {"max_steps": 1, "num_sanity_val_steps": 0},
            "model": {
                "class_path": "frpo.modules.policy_optimization.PolicyOptimization",
                "init_args": {
                    "policy": {"class_path": "frpo.models.policy.Policy", "init_args": {"path": str(model_dir)}},
                    "reference": {"class_path": "frpo.models.reference.FrozenCopy"},
                    "sampler": {
                        "class_path": "frpo.rollouts.in_process.InProcessSampler",
                        "init_args": {"max_new_tokens": 2},
                    },
                    "objective": {"class_path": "frpo.objectives.GRPO"},
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                    "reward": judge,
                    "group_size": 2,
                },
            },
            "data": {
                "class_path": "frpo.data.prompts.module.PromptDataModule",
                "init_args": {"train": {"class_path": "runs.Words"}, "batch_size": 2, "max_prompt_length": 16},
            },
        }
        | tracker
        | {"tags": tags}
    )


def written(folder: Path, name: str, tree: dict[str, object]) -> str:
    tags = tree.pop("tags")
    uri = tree.pop("uri", "sqlite:///mlflow.db")
    own = {"tags": tags, "output_dir": "${output_dir}", "tracking_uri": uri, "timeout_s": 1}
    logger = {"class_path": "frpo.run.tracker.MLflowTracker", "init_args": own}
    csv = {"class_path": "frpo.run.metrics_csv.MetricsCSV", "init_args": {"output_dir": "${output_dir}"}}
    tree["trainer"]["logger"] = [csv, logger]
    text = yaml.safe_dump(tree, sort_keys=False)
    assert all(secret in text for secret in IN_CONFIG)
    # The configuration itself lies elsewhere: what holds the secrets is the user's own file.
    (folder / name).write_text(text)
    return str(folder / name)


def command(work: Path, *words: str) -> str:
    paths = [TESTS.parent, TESTS / "helpers", *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "NO_PROXY": "127.0.0.1"}
    own |= {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "frpo", *words],
        cwd=work, env={**os.environ, **ENVIRONMENT, **own}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


def leaks(work: Path, said: str) -> list[str]:
    """Where a planted secret stands."""
    secrets = [*ENVIRONMENT.values(), *IN_CONFIG]
    found = [f"printed: {secret}" for secret in secrets if secret in said]
    for file in work.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            found += [f"{file.relative_to(work)}: {secret}" for secret in secrets if secret.encode() in data]
    return found


@pytest.mark.slow
def test_no_run_that_ends_well_or_badly_writes_or_prints_a_secret(tmp_path, model_dir):
    conf, work = tmp_path / "conf", tmp_path / "work"
    conf.mkdir()
    work.mkdir()
    refusal = f'{{"error": {{"message": "bad key {ENVIRONMENT["OPENAI_API_KEY"]}"}}}}'.encode()
    with serving(lambda asked, n: says("yes")) as server:
        config = written(conf, "well.yaml", settings(server.url, model_dir))
        well = command(work, "fit", "--config", config, "--name", "well")
        assert well.startswith("exit 0"), well[-3000:]
        assert any(ENVIRONMENT["OPENAI_API_KEY"] in str(asked.headers) for asked in server.asked), (
            "the judge got its key"
        )
    with serving(lambda asked, n: Reply(status=401, body=refusal)) as server:
        config = written(conf, "badly.yaml", settings(server.url, model_dir))
        badly = command(work, "fit", "--config", config, "--name", "badly")
        assert not badly.startswith("exit 0")
        assert "refused model" in badly, badly[-3000:]
    uri = f"http://ann:{IN_CONFIG[3]}@127.0.0.1:9"
    config = written(conf, "away.yaml", settings(server.url, model_dir, uri=uri))
    away = command(work, "fit", "--config", config, "--name", "away")
    assert not away.startswith("exit 0")
    assert leaks(work, well + badly + away) == []
    wrong = command(work, "fit", "--config", config, "--model.init_args.reward.init_args.max_tokens", "x")
    assert wrong.startswith("exit 2")
    assert leaks(work, wrong) == []
    assert (work / "outputs/well/config.yaml").is_file()
    assert (work / "mlflow.db").is_file()
