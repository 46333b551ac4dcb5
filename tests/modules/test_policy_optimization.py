"""The loop on a random policy: exactness, self-checks, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import runs
import torch
from lightning.pytorch.loggers import CSVLogger

from frpo.estimators import Jackknife, Naive
from frpo.functional.kl import k3
from frpo.functional.masked import masked_mean
from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled, FrozenCopy, NamedAdapter
from frpo.modules.micro_batches import check_forward, completion_logits, micro_batches
from frpo.objectives import FRPO, GRPO
from frpo.penalty import KLPenalty
from frpo.rewards.router import Router
from frpo.rollouts.in_process import InProcessSampler
from frpo.schedules import AdaptiveKL, Constant, KLBudget, Linear
from frpo.types import DataFacts

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(model, root: Path, data=None, **changes):
    trainer = runs.trainer(root, **changes)
    trainer.fit(model, datamodule=data or runs.data())
    return trainer


def difference(a, b) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


OBJECTIVES = {
    "jackknife": lambda: FRPO(lam=0.3),
    "naive, ppo clip": lambda: FRPO(lam=0.3, estimator=Naive(), clip="ppo"),
    "sequence ratio": lambda: FRPO(lam=0.3, ratio="sequence"),
    "grpo": lambda: GRPO(),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("epochs", [1, 3])
def test_micro_batch_size_has_no_influence(model_dir: Path, tmp_path: Path, objective: str, epochs: int) -> None:
    """Weights after several steps, in float64, on-policy and off-policy; a group is cut at sizes 1 and 3."""
    results = []
    for size in (1, 3, 4, 16):
        model = runs.full(
            model_dir,
            objective=OBJECTIVES[objective](),
            micro_batch_size=size,
            epochs_per_rollout=epochs,
            reward=runs.Graded(fail_every=5),
            max_failure_rate=1.0,
        )
        trainer = fit(model, tmp_path, max_steps=2 * epochs)
        results.append(runs.weights(model))
    assert all(difference(results[0], other) < 1e-6 for other in results[1:])
    assert difference(results[0], runs.weights(moved_nowhere(model_dir))) > 1e-3
    if epochs > 1:
        assert trainer.callback_metrics["train/clipped"] > 0


def moved_nowhere(model_dir: Path):
    model = runs.full(model_dir)
    model.configure_model()
    return model


@pytest.mark.parametrize("step", [1, 2, 3])
def test_accumulated_gradient_is_that_of_the_whole_loss(model_dir: Path, tmp_path: Path, step: int) -> None:
    """The gradient of a step on one rollout against autograd through the public objective on the whole batch at once.

    From the second step on, ratios are to the policy that drew the rollout, whatever steps came between.
    """
    seen: dict[str, torch.Tensor] = {}

    class Probe(runs.L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == step:
                seen["rows"] = weights_of(module)
                seen["gradient"] = flat_gradient(module)

    model = runs.full(
        model_dir,
        objective=FRPO(lam=0.3),
        micro_batch_size=3,
        max_grad_norm=None,
        epochs_per_rollout=step,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    first = moved_nowhere(model_dir)
    fit(model, tmp_path, max_steps=step, callbacks=[Probe()])
    scored = model.last_step.scored
    rollout = scored.rollout
    (batch,) = micro_batches(rollout, 10_000)
    back = batch.rows.argsort()

    def logps(policy) -> torch.Tensor:
        logits = completion_logits(policy, batch).log_softmax(-1)
        return logits.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)[back].view(rollout.mask.shape)

    reference = first.reference_model
    old = logps(first.policy_model).detach()
    model.load_state_dict(seen["rows"], strict=False)
    model.zero_grad()
    now = logps(model.policy_model)
    out = model.objective(
        now, scored.rewards, rollout.mask, old_logps=old if step > 1 else None, reward_mask=scored.reward_mask
    )
    with torch.no_grad():
        ref = logps(reference)
    (out.loss + 0.1 * masked_mean(k3(now, ref), rollout.mask).mean()).backward()
    expected = flat_gradient(model)
    assert expected.norm() > 0.1
    assert (seen["gradient"] - expected).abs().max() < 1e-9 * max(1.0, expected.abs().max().item())


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def flat_gradient(module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.policy_model.parameters() if p.requires_grad]).clone()


def test_lora_trains_the_adapter_alone(model_dir: Path, tmp_path: Path) -> None:
    model = runs.module(model_dir)
    trainer = fit(model, tmp_path)
    assert model.state_dict()
    assert all("lora_" in name for name in model.state_dict())
    base = Policy(str(model_dir)).load()
    trained = dict(model.policy_model.base_model.model.named_parameters())
    for name, value in base.named_parameters():
        name = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(trained[name], value), name
    assert trainer.callback_metrics["train/kl"] > 0


@pytest.mark.parametrize("reference", ["off", "copy", "named"])
def test_references_agree(model_dir: Path, tmp_path: Path, reference: str) -> None:
    """The adapter switched off, a frozen copy and an untrained named adapter are one reference."""
    references = {
        "off": AdapterDisabled,
        "copy": FrozenCopy,
        "named": lambda: NamedAdapter(str(untrained(model_dir, tmp_path))),
    }
    results = []
    for build in (AdapterDisabled, references[reference]):
        model = runs.module(
            model_dir, policy=Policy(str(model_dir), adapter=LoRA(r=2, alpha=4), dtype="float64"), reference=build()
        )
        torch.manual_seed(0)
        model.configure_model()
        trainer = fit(model, tmp_path, max_steps=3)
        results.append(runs.weights(model))
        assert trainer.callback_metrics["train/kl"] > 1e-3
    assert results[0].keys() == results[1].keys()
    assert difference(*results) < 1e-9


def untrained(model_dir: Path, tmp_path: Path) -> Path:
    Policy(str(model_dir), adapter=LoRA(r=2, alpha=4), dtype="float64").load().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_gradient_checkpointing_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        model = runs.full(model_dir, policy=Policy(str(model_dir), dtype="float64", gradient_checkpointing=on))
        fit(model, tmp_path)
        results.append(runs.weights(model))
    assert difference(*results) < 1e-9


def test_bf16_mixed_runs_and_passes_its_self_checks(model_dir: Path, tmp_path: Path) -> None:
    model = runs.module(model_dir)
    trainer = fit(model, tmp_path, precision="bf16-mixed")
    assert 0 < trainer.callback_metrics["train/sampler_gap"] < 0.1


def test_truncated_sampling_keeps_ratios_at_one(model_dir: Path, tmp_path: Path) -> None:
    model = runs.full(model_dir, sampler=InProcessSampler(max_new_tokens=6, top_p=0.8, top_k=20, temperature=0.9))
    trainer = fit(model, tmp_path)
    assert trainer.callback_metrics["train/sampler_gap"] < 1e-6


def test_full_kl_and_objective_scale(model_dir: Path, tmp_path: Path) -> None:
    kl = KLPenalty(beta=0.05, estimator="full", logged="full", beta_scale="objective")
    trainer = fit(runs.full(model_dir, kl=kl, objective=FRPO(lam=0.5)), tmp_path)
    assert trainer.callback_metrics["train/beta"] == pytest.approx(0.1)
    assert kl.coefficient(0, 2.0) == pytest.approx(0.05)
    assert kl.coefficient(0, None) == pytest.approx(0.05)


def test_schedules_move_beta_lambda_and_learning_rate(model_dir: Path, tmp_path: Path) -> None:
    model = runs.full(
        model_dir,
        objective=FRPO(lam=9.0),
        kl=KLPenalty(beta=AdaptiveKL(initial=0.1, target=1e-6)),
        lam_schedule=Linear(start=1.0, end=0.5, steps=2),
        lr_schedule=Linear(start=1.0, end=0.0, steps=4),
    )
    metrics = fit(model, tmp_path, max_steps=3).callback_metrics
    assert metrics["train/lambda"] == pytest.approx(0.5)
    assert metrics["train/lr"] == pytest.approx(1e-2 * 0.5)
    # KL is 0 before the first update (error -0.2) and above the target after it (+0.2).
    assert metrics["train/beta"] == pytest.approx(0.1 * 0.98 * 1.02)
    budget = runs.full(model_dir, lam_schedule=KLBudget(rho=0.5, smoothing=1.0))
    assert fit(budget, tmp_path).callback_metrics["train/lambda"] != 1.0


def test_no_reference_without_kl(model_dir: Path, tmp_path: Path) -> None:
    trainer = fit(runs.full(model_dir, reference=None, kl=KLPenalty(beta=0.0)), tmp_path)
    assert "train/kl" not in trainer.callback_metrics


def test_metrics_by_task_and_validation(model_dir: Path, tmp_path: Path) -> None:
    model = runs.module(model_dir)
    trainer = fit(model, tmp_path, runs.data(val=6))
    metrics = trainer.callback_metrics
    assert {"train/reward/even", "train/reward/odd"} <= metrics.keys()
    (validated,) = trainer.validate(model, datamodule=runs.data(val=6), verbose=False)
    assert validated["val/reward"] == pytest.approx((validated["val/reward/even"] + validated["val/reward/odd"]) / 2)
    assert validated["val/worst_case_reward"] < validated["val/reward"]
    assert trainer.validate(model, datamodule=runs.data(val=6), verbose=False) == [validated]


def test_metrics_are_averages_since_they_were_last_logged(model_dir: Path, tmp_path: Path) -> None:
    logged = {}
    for every in (1, 3):
        logger = CSVLogger(tmp_path, name=str(every))
        fit(runs.module(model_dir), tmp_path, max_steps=6, logger=logger, log_every_n_steps=every)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            logged[every] = [{k: float(row[k]) for k in ("train/reward", "train/kl")} for row in csv.DictReader(file)]
    assert len(logged[1]) == 6
    for i, row in enumerate(logged[3]):
        three = logged[1][3 * i : 3 * i + 3]
        assert row == pytest.approx({name: sum(r[name] for r in three) / 3 for name in row}, rel=1e-5)
    assert len(logged[3]) == 2


def test_failed_judgements_leave_their_group(model_dir: Path, tmp_path: Path) -> None:
    model = runs.module(model_dir, reward=runs.Graded(fail_every=3), max_failure_rate=1.0)
    metrics = fit(model, tmp_path).callback_metrics
    scored = model.last_step.scored
    failed = torch.tensor([j.status == "failed" for j in scored.judgements]).view(scored.rewards.shape)
    assert 0 < metrics["train/failed"] < 1
    assert torch.equal(failed, ~scored.reward_mask)
    assert (scored.weights[failed] == 0).all()
    with pytest.raises(RuntimeError, match="max_failure_rate"):
        fit(runs.module(model_dir, reward=runs.Graded(fail_every=2), max_failure_rate=0.1), tmp_path)


def test_self_check_finds_a_sampler_of_another_policy(model_dir: Path, tmp_path: Path) -> None:
    class Off(InProcessSampler):
        def _draw(self, logits, noise):
            token, logp = super()._draw(logits, noise)
            return token, logp - 0.01

    with pytest.raises(RuntimeError, match="log-probabilities of the sampler"):
        fit(runs.module(model_dir, sampler=Off(max_new_tokens=6)), tmp_path)


def test_self_check_finds_another_reference(model_dir: Path, tmp_path: Path) -> None:
    class Off(FrozenCopy):
        def load(self, policy, model):
            frozen = super().load(policy, model)
            next(frozen.parameters()).data.add_(0.05 * torch.randn_like(next(frozen.parameters())))
            return frozen

    with pytest.raises(RuntimeError, match="KL to the reference"):
        fit(runs.full(model_dir, reference=Off()), tmp_path)


def test_a_loss_that_is_not_finite_names_its_prompts(model_dir: Path, tmp_path: Path) -> None:
    model = runs.full(model_dir)

    class Break(runs.L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            module.reference_model.get_output_embeddings().weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"prompt\(s\) \d+.*weights were not changed"):
        fit(model, tmp_path, callbacks=[Break()])


def test_a_gradient_that_is_not_finite_changes_no_weight(model_dir: Path, tmp_path: Path) -> None:
    model = runs.full(model_dir)

    class Break(runs.L.Callback):
        def on_after_backward(self, trainer, module) -> None:
            next(p for p in module.policy_model.parameters() if p.grad is not None).grad.fill_(float("inf"))

    with pytest.raises(FloatingPointError, match="gradient norm is inf"):
        fit(model, tmp_path, callbacks=[Break()])
    assert difference(runs.weights(model), runs.weights(moved_nowhere(model_dir))) == 0


def test_weights_that_are_not_finite_are_reported_while_sampling(model_dir: Path, tmp_path: Path) -> None:
    class Break(runs.L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            module.policy_model.get_output_embeddings().weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"prompt\(s\) \d+.*while sampling"):
        fit(runs.full(model_dir), tmp_path, callbacks=[Break()])


def test_validation_kl_is_exact_whatever_samples(model_dir: Path, tmp_path: Path) -> None:
    """Greedy completions give no sampled estimate of a KL; the exact one needs none."""
    model = runs.full(model_dir, val_sampler=InProcessSampler(max_new_tokens=6, temperature=0), val_group_size=1)
    trainer = fit(model, tmp_path)
    (metrics,) = trainer.validate(model, datamodule=runs.data(val=4), verbose=False)
    rollout = model.last_step.scored.rollout
    (batch,) = micro_batches(rollout, 100)
    with torch.no_grad():
        p, q = (completion_logits(m, batch).log_softmax(-1) for m in (model.policy_model, model.reference_model))
    expected = masked_mean((p.exp() * (p - q)).sum(-1), batch.mask).mean().item()
    assert metrics["val/kl"] == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3
    assert "val/worst_case_reward" not in metrics, "a group of one shows no worst case"


def test_metrics_stand_at_the_optimiser_step_of_their_rollout(model_dir: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    model = runs.full(model_dir, epochs_per_rollout=2)
    fit(model, tmp_path, runs.data(val=4), max_steps=6, logger=logger, val_check_interval=3)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/reward"]] == ["0", "2", "4"]
    assert [row["step"] for row in rows if row["val/reward"]] == ["6"]


def test_refuses_tasks_that_the_reward_cannot_score(model_dir: Path) -> None:
    model = runs.module(model_dir, reward=Router({"even": runs.Graded()}))
    with pytest.raises(ValueError, match="odd"):
        model.on_data_read(DataFacts(frozenset({"even", "odd"})))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"on_reward_error": "ignore"}, "on_reward_error: got 'ignore'"),
        ({"group_size": 1}, "group_size: got 1, expected at least 2"),
        ({"micro_batch_size": 0}, "micro_batch_size: got 0, expected at least 1"),
        ({"epochs_per_rollout": 0}, "epochs_per_rollout: got 0, expected at least 1"),
        ({"rho": 0.0}, "rho: got 0.0, expected more than 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0, expected more than 0"),
        ({"max_failure_rate": 2.0}, "max_failure_rate: got 2.0, expected at least 0 and at most 1"),
        ({"reference": None}, "reference is null but kl.beta is not 0"),
        ({"sampler": InProcessSampler(temperature=0)}, "sampler.temperature: got 0, expected more than 0; greedy"),
        ({"sampler": InProcessSampler(top_p=0.9), "epochs_per_rollout": 2}, "top_p=0.9"),
        ({"objective": GRPO(), "lam_schedule": Constant(1.0)}, "GRPO does not have"),
        ({"lam_schedule": Linear(1.0, 0.5, 10, warmup=2)}, "lam_schedule: got 0.0, expected more than 0"),
        ({"lr_schedule": Constant(-1.0)}, "lr_schedule: got -1.0, expected at least 0; it is a factor"),
    ],
)
def test_refuses_before_anything_is_loaded(model_dir: Path, changes, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        runs.module(model_dir, **changes)


def test_refuses_a_negative_beta() -> None:
    with pytest.raises(ValueError, match=r"beta: got -0.1, expected at least 0"):
        KLPenalty(beta=-0.1)
    with pytest.raises(ValueError, match="k4"):
        KLPenalty(estimator="k4")


def test_refuses_an_adapter_switched_off_where_there_is_none(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trains all its weights"):
        fit(runs.full(model_dir, reference=AdapterDisabled()), tmp_path)


def test_refuses_more_tokens_than_the_model_has_positions(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 \\+ max_new_tokens 200 = 216"):
        fit(runs.module(model_dir, sampler=InProcessSampler(max_new_tokens=200)), tmp_path)


def test_refuses_a_model_whose_forward_cannot_be_told_what_is_wanted() -> None:
    class Old(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return None

    with pytest.raises(ValueError, match=r"Old.forward takes no position_ids and no logits_to_keep"):
        check_forward(Old())


def test_jackknife_fallback_is_counted(model_dir: Path, tmp_path: Path) -> None:
    model = runs.module(model_dir, objective=FRPO(lam=0.05, estimator=Jackknife(max_weight=1.0)))
    assert 0 < fit(model, tmp_path).callback_metrics["train/jackknife_fallback"] <= 1
