"""Sharpness-aware minimisation: the gradient is that of the ascent point, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import forks
import pytest
import runs
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from frpo.functional.kl import k3
from frpo.functional.masked import masked_mean
from frpo.models.policy import LoRA, Policy
from frpo.modules.micro_batches import completion_logits, micro_batches
from frpo.modules.sam import SAM
from frpo.objectives import FRPO, GRPO
from frpo.rollouts.in_process import InProcessSampler

pytestmark = pytest.mark.filterwarnings("ignore")
RADIUS = 0.3


def fit(model, root: Path, data=None, ckpt: str | None = None, **changes):
    trainer = runs.trainer(root, **changes)
    trainer.fit(model, datamodule=data or runs.data(), ckpt_path=ckpt, weights_only=True)
    return trainer


def difference(a, b) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Watch(runs.L.Callback):
    """Weights at the start of a step, and weights and gradients when the optimiser sees them."""

    def on_train_batch_start(self, trainer, module, *args) -> None:
        self.start = runs.weights(module)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.weights = runs.weights(module)
        self.gradient = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_on_a_quadratic_the_gradient_is_that_of_the_ascent_point() -> None:
    """f(w) = w.A.w/2 at w: the gradient at w + r g/|g| is A (w + r A w / |A w|)."""
    scale = torch.tensor([1.0, 4.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.tensor([0.1, -0.7], dtype=torch.float64))
    untouched = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def accumulate() -> None:
        (scale * w * w / 2).sum().backward()

    start = w.detach().clone()
    accumulate()
    before, after = SAM(radius=0.2).move_gradient(torch.nn.ParameterList([w, untouched]), accumulate)
    g = scale * start
    expected = scale * (start + 0.2 * g / g.norm())
    assert torch.allclose(w.grad, expected, rtol=0, atol=1e-15)
    assert torch.equal(w.detach(), start)
    assert untouched.grad is None
    assert [before.item(), after.item()] == pytest.approx([g.norm().item(), expected.norm().item()])


def test_weights_come_back_when_the_second_pass_fails_and_where_there_is_no_direction() -> None:
    w = torch.nn.Parameter(torch.tensor([0.1, 0.3]))
    start = w.detach().clone()

    def fail() -> None:
        assert not torch.equal(w, start)
        raise FloatingPointError("planted")

    w.grad = torch.ones(2)
    with pytest.raises(FloatingPointError, match="planted"):
        SAM().move_gradient(torch.nn.ParameterList([w]), fail)
    assert torch.equal(w, start)
    w.grad = torch.zeros(2)
    SAM().move_gradient(torch.nn.ParameterList([w]), fail)
    assert torch.equal(w.grad, torch.zeros(2))
    w.grad = torch.full((2,), torch.inf)
    with pytest.raises(FloatingPointError, match="gradient norm is"):
        SAM().move_gradient(torch.nn.ParameterList([w]), fail)
    assert torch.equal(w, start)


@pytest.mark.parametrize("objective", [lambda: FRPO(lam=0.3), lambda: GRPO()], ids=["frpo", "grpo"])
def test_gradient_is_autograds_at_the_perturbed_weights(model_dir: Path, tmp_path: Path, objective) -> None:
    """The gradient the optimiser sees, against autograd of the public objective on the whole batch, twice."""
    watch = Watch()
    model = runs.full(model_dir, objective=objective(), micro_batch_size=3, max_grad_norm=None, sam=SAM(RADIUS))
    metrics = fit(model, tmp_path, max_steps=1, callbacks=[watch]).callback_metrics
    scored = model.last_step.scored
    mask = scored.rollout.mask
    (batch,) = micro_batches(scored.rollout, 10_000)
    back = batch.rows.argsort()

    def logps(policy) -> torch.Tensor:
        logits = completion_logits(policy, batch).log_softmax(-1)
        return logits.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)[back].view(mask.shape)

    oracle = Policy(str(model_dir), dtype="float64").load()
    parameters = list(oracle.parameters())
    with torch.no_grad():
        ref = logps(oracle)

    def gradient(old: torch.Tensor | None) -> list[torch.Tensor]:
        now = logps(oracle)
        out = objective()(now, scored.rewards, mask, old_logps=old, reward_mask=scored.reward_mask)
        return list(torch.autograd.grad(out.loss + 0.1 * masked_mean(k3(now, ref), mask).mean(), parameters))

    plain = gradient(None)
    norm = torch.cat([g.flatten() for g in plain]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, plain, strict=True):
            p += RADIUS * g / norm
    expected = gradient(ref)
    seen = [watch.gradient[f"policy_model.{name}"] for name, _ in oracle.named_parameters()]
    assert max((a - b).abs().max().item() for a, b in zip(seen, expected, strict=True)) < 1e-9
    assert max((a - b).abs().max().item() for a, b in zip(seen, plain, strict=True)) > 1e-2
    assert metrics["train/sam_norm_before"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics["train/sam_norm_after"] == pytest.approx(metrics["train/grad_norm"].item())
    assert difference(watch.start, watch.weights) == 0


def trained(model_dir: Path, root: Path, **changes):
    # Adam would turn a difference of 1e-9 in a gradient of nearly 0 into a step of another size.
    model = runs.full(model_dir, objective=GRPO(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **changes)
    fit(model, root, max_steps=3)
    return runs.weights(model)


def test_a_vanishing_radius_is_plain_grpo(model_dir: Path, tmp_path: Path) -> None:
    plain = trained(model_dir, tmp_path)
    assert difference(plain, trained(model_dir, tmp_path, sam=SAM(1e-9))) < 1e-6
    assert difference(plain, trained(model_dir, tmp_path, sam=SAM(RADIUS))) > 1e-3


def test_micro_batch_size_has_no_influence_on_the_ascent(model_dir: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 3, 16):
        model = runs.full(
            model_dir,
            objective=FRPO(lam=0.3),
            micro_batch_size=size,
            epochs_per_rollout=2,
            reward=runs.Graded(fail_every=5),
            max_failure_rate=1.0,
            sam=SAM(RADIUS),
        )
        fit(model, tmp_path, max_steps=4)
        results.append(runs.weights(model))
    assert all(difference(results[0], other) < 1e-6 for other in results[1:])


def test_resumed_with_sam_is_bit_identical(model_dir: Path, tmp_path: Path) -> None:
    def run(root: Path, steps: int, ckpt: str | None = None):
        model = runs.module(model_dir, sam=SAM(RADIUS))
        keep = ModelCheckpoint(dirpath=root, every_n_train_steps=2, save_last=True)
        fit(model, root, ckpt=ckpt, max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=[keep])
        return runs.weights(model)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, ckpt=str(tmp_path / "cut" / "last.ckpt"))
    assert whole
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def run_on(model_dir: Path, out: Path, processes: int) -> None:
    """As in tests/distributed: the weights are written inside the run, where the ranks still exist."""

    class Keep(runs.L.Callback):
        def on_train_end(self, trainer, module) -> None:
            if trainer.is_global_zero:
                torch.save(runs.weights(module), out)

    torch.set_num_threads(1)
    model = runs.module(
        model_dir,
        policy=Policy(str(model_dir), adapter=LoRA(r=4, alpha=8), dtype="float64"),
        group_size=3,
        micro_batch_size=2,
        reward=runs.Graded(fail_every=3),
        max_failure_rate=1.0,
        sam=SAM(RADIUS),
    )
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto"
    data = runs.data(n=24, batch_size=8 // processes)
    fit(model, out.parent, data=data, devices=processes, strategy=strategy, max_steps=3, callbacks=[Keep()])


def test_two_processes_ascend_to_one_point(model_dir: Path, tmp_path: Path) -> None:
    run_on(model_dir, tmp_path / "1.pt", 1)
    assert forks.call(run_on, model_dir, tmp_path / "2.pt", 2) == 0
    results = [torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2)]
    assert difference(results[0], results[1]) < 1e-6


@pytest.mark.parametrize("radius", [0.0, -0.1, float("nan"), float("inf")])
def test_refuses_a_radius_that_is_none(radius: float) -> None:
    with pytest.raises(ValueError, match=r"SAM\.radius: got .*expected a finite number > 0"):
        SAM(radius)


def test_refuses_truncated_sampling(model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"got sam with top_p=0\.9.*Leave out sam"):
        runs.module(model_dir, sam=SAM(), sampler=InProcessSampler(top_p=0.9))
