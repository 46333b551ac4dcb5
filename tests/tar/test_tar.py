"""Tamper resistance: the outer gradient, what is restored, what resumes, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import forks
import pytest
import runs
import tampering
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from toy_models import build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from frpo.data.demonstrations.batch import SupervisedBatch
from frpo.models.checkpoint import load_policy
from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled
from frpo.tar.attacks import Attack
from frpo.tar.losses import DPO, Entropy, Refusal

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(model, root: Path, ckpt: str | None = None, data=None, **changes):
    trainer = runs.trainer(root, **changes)
    trainer.fit(model, datamodule=data or tampering.data(), ckpt_path=ckpt, weights_only=True)
    return trainer


def difference(a, b) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def exact_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2: Llama's norms round to float32 whatever the dtype, and differently batch by batch."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Watch(runs.L.Callback):
    """The batch and the weights at the start of a step, weights and gradients when the optimiser sees them."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.batch, self.start = batch, runs.weights(module)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.weights = runs.weights(module)
        self.gradient = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# An implementation of its own: whole batches, loops over rows, torch's cross-entropy, autograd.


def logps(model, batch: SupervisedBatch, b: int) -> torch.Tensor:
    """Log-probabilities of the answer tokens of row ``b``, alone and without padding."""
    ids = batch.input_ids[b, batch.mask[b]]
    picked = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return picked[batch.answer_mask[b, batch.mask[b]][1:]]


def nll(model, batch: SupervisedBatch) -> torch.Tensor:
    return -torch.cat([logps(model, batch, b) for b in range(len(batch))]).mean()


def dpo(model, reference, pairs) -> torch.Tensor:
    def gain(batch, b: int) -> torch.Tensor:
        return logps(model, batch, b).sum() - logps(reference, batch, b).sum().detach()

    margins = [0.5 * (gain(pairs.chosen, b) - gain(pairs.rejected, b)) for b in range(len(pairs))]
    return -F.logsigmoid(torch.stack(margins)).mean()


def entropy(model, reference, pairs) -> torch.Tensor:
    rows = []
    for b in range(len(pairs)):
        ids, kept = (x[b, pairs.rejected.mask[b]] for x in (pairs.rejected.input_ids, pairs.rejected.answer_mask))
        p = model(input_ids=ids[None], use_cache=False).logits[0, :-1].softmax(-1)
        rows.append((p * p.log()).sum(-1)[kept[1:]].mean())
    return torch.stack(rows).mean()


def refusal(model, reference, pairs) -> torch.Tensor:
    return -torch.stack([logps(model, pairs.chosen, b).mean() for b in range(len(pairs))]).mean()


def retain(model, reference, batch: SupervisedBatch) -> torch.Tensor:
    distances = []
    for b in range(len(batch)):
        ids = batch.input_ids[b, batch.mask[b]][None]
        now, before = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, reference))
        layers = [(a - c.detach()).square().sum(-1) for a, c in zip(now, before, strict=True)]
        distances.append(torch.stack(layers).mean(0)[0])
    return nll(model, batch) + 0.2 * torch.cat(distances).mean()


def outer_gradient(start, reference, batch, loss) -> dict[str, torch.Tensor]:
    total = {name: torch.zeros_like(p) for name, p in start.named_parameters()}
    for attack in batch.attacks:
        attacked = copy.deepcopy(start)
        attacker = torch.optim.AdamW(attacked.parameters(), lr=attack.learning_rate)
        K = len(attack.batches)
        points = {2, 3} if K == 3 else {2, 4}
        for k in range(1, K + 1):
            attacker.zero_grad()
            nll(attacked, attack.batches[k - 1]).backward()
            attacker.step()
            if k in points:
                gradients = torch.autograd.grad(loss(attacked, reference, attack.pairs), list(attacked.parameters()))
                for sum_, g in zip(total.values(), gradients, strict=True):
                    sum_ += 0.7 * g / (len(batch.attacks) * len(points))
    own = torch.autograd.grad(1.3 * retain(start, reference, batch.retain), list(start.parameters()))
    return {name: total[name] + g for (name, _), g in zip(start.named_parameters(), own, strict=True)}


LOSSES = {"dpo": (lambda: DPO(beta=0.5), dpo), "entropy": (Entropy, entropy), "refusal": (Refusal, refusal)}


@pytest.mark.parametrize("name", LOSSES)
def test_outer_gradient_is_that_of_an_independent_implementation(exact_dir: Path, tmp_path: Path, name: str) -> None:
    """The second outer step, where policy and reference differ; and the weights come back bit for bit."""
    build, loss = LOSSES[name]
    watch = Watch()
    model = tampering.module(exact_dir, loss=build(), micro_batch_size=3, max_grad_norm=None)
    metrics = fit(model, tmp_path, max_steps=2, callbacks=[watch]).callback_metrics
    reference, start = (Policy(str(exact_dir), dtype="float64").load() for _ in range(2))
    parameters = dict(start.named_parameters())
    with torch.no_grad():
        for key, value in watch.start.items():
            parameters[key.removeprefix("policy_model.")].copy_(value)
    expected = outer_gradient(start, reference, watch.batch, loss)
    assert {len(attack.batches) for attack in watch.batch.attacks} <= {3, 4}
    assert max(g.abs().max().item() for g in expected.values()) > 1e-2
    for key, gradient in expected.items():
        assert (watch.gradient[f"policy_model.{key}"] - gradient).abs().max() < 1e-9, key
    assert all(torch.equal(watch.weights[key], value) for key, value in watch.start.items())
    assert metrics["train/retain_distance"] > 0
    assert metrics["train/attack_nll_last"] < metrics["train/attack_nll_first"]


def test_weights_come_back_when_an_attack_fails(model_dir: Path, tmp_path: Path) -> None:
    class Fails(DPO):
        def __call__(self, policy, reference, pairs):
            return super().__call__(policy, reference, pairs) * torch.nan

    model = tampering.module(model_dir, loss=Fails())
    model.configure_model()
    before = runs.weights(model)
    with pytest.raises(FloatingPointError, match=r"demonstration\(s\) pair\d+"):
        fit(model, tmp_path, max_steps=1)
    assert all(torch.equal(value, before[name]) for name, value in runs.weights(model).items())


def test_micro_batches_have_no_influence(model_dir: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 3, 16):
        model = tampering.module(model_dir, micro_batch_size=size)
        fit(model, tmp_path, max_steps=2, data=tampering.data(attacks_per_step=1))
        results.append(runs.weights(model))
    assert all(difference(results[0], other) < 1e-9 for other in results[1:])


def test_an_adapter_alone_is_attacked_and_trained(model_dir: Path, tmp_path: Path) -> None:
    policy = Policy(str(model_dir), adapter=LoRA(r=2, alpha=4), dtype="float64")
    model = tampering.module(model_dir, policy=policy, reference=AdapterDisabled())
    metrics = fit(model, tmp_path, max_steps=2).callback_metrics
    assert all("lora_" in name for name in model.state_dict())
    base = Policy(str(model_dir), dtype="float64").load()
    trained = dict(model.policy_model.base_model.model.named_parameters())
    for name, value in base.named_parameters():
        assert torch.equal(trained[name.replace("_proj.weight", "_proj.base_layer.weight")], value), name
    assert metrics["train/retain_distance"] > 0


def test_resumed_is_bit_identical_and_its_checkpoint_is_read_as_a_policy(model_dir: Path, tmp_path: Path) -> None:
    def run(root: Path, steps: int, ckpt: str | None = None):
        adamw = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
        model = tampering.module(model_dir, policy=Policy(str(model_dir)), micro_batch_size=16, **adamw)
        keep = ModelCheckpoint(dirpath=root, every_n_train_steps=1, save_last=True)
        changes = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True, "callbacks": [keep]}
        # 40 rows in batches of 16 and 2 steps an epoch: the cut lies within the second.
        data = tampering.data(batch_size=16, attacks_per_step=1)
        trainer = fit(model, root, ckpt=ckpt, data=data, **changes)
        return runs.weights(model), {k: float(v) for k, v in trainer.callback_metrics.items() if "seconds" not in k}

    whole, metrics = run(tmp_path / "whole", 5)
    run(tmp_path / "cut", 3)
    resumed, resumed_metrics = run(tmp_path / "cut", 5, ckpt=str(tmp_path / "cut" / "last.ckpt"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert {k: v for k, v in metrics.items() if k.startswith("train/")} == {
        k: v for k, v in resumed_metrics.items() if k.startswith("train/")
    }
    loaded = load_policy(tmp_path / "whole" / "last.ckpt")
    assert loaded.step == 5
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, whole[f"policy_model.{name}"]), name


def test_validation_measures_the_unattacked_policy(model_dir: Path, tmp_path: Path) -> None:
    model = tampering.module(model_dir)
    trainer = runs.trainer(tmp_path)
    (measured,) = trainer.validate(model, datamodule=tampering.data(val=tampering.Pairs(6)), verbose=False)
    assert measured["val/tamper"] == pytest.approx(torch.tensor(2.0).log().item())  # the policy is the reference


def run_on(model_dir: Path, out: Path, processes: int) -> None:
    class Keep(runs.L.Callback):
        def on_train_end(self, trainer, module) -> None:
            if trainer.is_global_zero:
                torch.save(runs.weights(module), out)

    torch.set_num_threads(1)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto"
    data = tampering.data(batch_size=4 // processes, attacks_per_step=1)
    fit(
        tampering.module(model_dir),
        out.parent,
        data=data,
        devices=processes,
        strategy=strategy,
        max_steps=2,
        callbacks=[Keep()],
    )


def test_two_processes_make_one_attack(model_dir: Path, tmp_path: Path) -> None:
    run_on(model_dir, tmp_path / "1.pt", 1)
    assert forks.call(run_on, model_dir, tmp_path / "2.pt", 2) == 0
    results = [torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2)]
    assert difference(results[0], results[1]) < 1e-9


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda d: Attack(tampering.Rows("a"), [1e-3], steps=[8, 0]), r"Attack\.steps: got 0.*at least 1"),
        (lambda d: Attack(tampering.Rows("a"), [1e-3], steps=[]), r"Attack\.steps: got \[\]"),
        (lambda d: Attack(tampering.Rows("a"), [0.0]), r"Attack\.learning_rates: got 0\.0"),
        (lambda d: Attack(tampering.Rows("a"), [1e-3], weight=0.0), r"Attack\.weight: got 0\.0"),
        (lambda d: tampering.module(d, lambda_tr=0.0), r"lambda_tr: got 0.0, .*SupervisedFineTuning"),
        (lambda d: tampering.module(d, lambda_retain=-1.0), r"lambda_retain: got -1\.0"),
        (lambda d: tampering.module(d, measure_every=0), r"measure_every: got 0"),
        (lambda d: tampering.module(d, micro_batch_size=0), r"micro_batch_size: got 0"),
        (lambda d: DPO(beta=0.0), r"DPO\.beta: got 0\.0"),
    ],
)
def test_refusals(model_dir: Path, build, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(model_dir)
