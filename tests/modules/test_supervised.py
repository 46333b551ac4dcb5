"""Supervised fine-tuning: its loss and gradient are those of a loop over tokens, and runs resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import forks
import pytest
import runs
import supervised_runs
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from transformers import masking_utils

from frpo.data.demonstrations.batch import collate_demonstrations, encode_demonstrations
from frpo.data.demonstrations.module import SupervisedDataModule
from frpo.functional.likelihood import completion_nll
from frpo.models.checkpoint import load_policy
from frpo.models.policy import LoRA, Policy
from frpo.modules import packing
from frpo.modules.supervised import SupervisedFineTuning, answer_nll
from frpo.schedules import Cosine, Linear

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(model: SupervisedFineTuning, root: Path, data=None, ckpt_path: Path | None = None, **options):
    trainer = runs.trainer(root, **{"max_epochs": -1, **options})
    data = supervised_runs.data() if data is None else data
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def encoded(model_dir: Path, n: int):
    return encode_demonstrations(supervised_runs.Echo(n).demonstrations(), Policy(str(model_dir)).tokenizer)


def loop_loss(model, rows) -> torch.Tensor:
    """Mean negative log-likelihood of all answer tokens, one row and one token at a time, without padding."""
    terms = []
    for row in rows:
        logps = model(row.ids[None]).logits[0].log_softmax(-1)
        terms += [-logps[t - 1, row.ids[t]] for t in range(row.answer_start, len(row.ids))]
    return torch.stack(terms).mean()


def test_the_loss_and_its_gradient_are_those_of_a_loop_over_tokens(model_dir: Path) -> None:
    model = Policy(str(model_dir), dtype="float64").load()
    rows = encoded(model_dir, 7)
    batch = collate_demonstrations(rows, pad_token_id=0)
    expected = loop_loss(model, rows)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = answer_nll(model, batch).sum() / batch.tokens
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("sdpa", "float64", 1e-9), ("sdpa", "float32", 1e-5), ("eager", "float32", 1e-5)],  # eager's softmax is float32
)
def test_the_loss_and_gradient_of_packed_rows_are_those_of_the_demonstrations_alone(
    model_dir: Path, attention: str, dtype: str, tolerance: float
) -> None:
    model = Policy(str(model_dir), dtype=dtype, attn_implementation=attention).load()
    rows = encoded(model_dir, 11)
    batch = collate_demonstrations(rows, pad_token_id=0, row_tokens=24)
    parts = list(batch.split(2))
    assert all(part.packed for part in parts)
    assert sum(len(part.input_ids) for part in parts) < len(rows)
    expected = loop_loss(model, rows)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = sum(answer_nll(model, part).sum() for part in parts) / batch.tokens
    assert loss.item() == pytest.approx(expected.item(), abs=tolerance)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        assert (ours - theirs).abs().max() < tolerance * 10
    per_token = {}
    for part in parts:
        values = answer_nll(model, part)[part.answer_mask].tolist()
        for name in part.ids:
            answer = len(rows[int(name)].ids) - rows[int(name)].answer_start
            per_token[name], values = values[:answer], values[answer:]
    for row in rows:
        logps = model(row.ids[None]).logits[0].log_softmax(-1)
        alone = [-logps[t - 1, row.ids[t]].item() for t in range(row.answer_start, len(row.ids))]
        assert per_token[row.prompt.id] == pytest.approx(alone, abs=tolerance)


def test_a_packed_run_is_the_run_without(model_dir: Path, tmp_path: Path) -> None:
    plain, packed = (supervised_runs.module(model_dir, micro_batch_size=2) for _ in range(2))
    fit(plain, tmp_path, supervised_runs.data(20, val=4), max_steps=4, val_check_interval=1)
    fit(packed, tmp_path, supervised_runs.data(20, val=4, packing=True), max_steps=4, val_check_interval=1)
    for name, value in runs.weights(plain).items():
        assert (value - packed.state_dict()[name]).abs().max() < 1e-9, name


def test_packing_refuses_a_model_that_does_not_keep_sequences_apart(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = supervised_runs.module(model_dir, LoRA(r=4, alpha=8, dropout=0.3), "float32")
    model.configure_model()
    packing.check_apart(model.policy_model)
    assert model.policy_model.training
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ValueError, match=r"packing: log-probabilities .*packing: false"):
        fit(model, tmp_path, supervised_runs.data(packing=True))
    fit(supervised_runs.module(model_dir), tmp_path, max_steps=1)  # asked of packed runs alone
    model.policy_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attention is 'flash_attention_2', expected sdpa or eager"):
        fit(model, tmp_path, supervised_runs.data(packing=True))


def test_a_step_is_the_optimisers_on_the_mean_over_tokens_of_the_batch(model_dir: Path, tmp_path: Path) -> None:
    model = supervised_runs.module(
        model_dir, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), max_grad_norm=None, micro_batch_size=3
    )
    trainer = fit(model, tmp_path, supervised_runs.data(8, shuffle=False), max_steps=1)
    oracle = Policy(str(model_dir), dtype="float64").load()
    loss = loop_loss(oracle, encoded(model_dir, 8))
    loss.backward()
    for name, parameter in oracle.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        assert (model.policy_model.get_parameter(name) - expected).abs().max() < 1e-12, name
    assert trainer.callback_metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.callback_metrics["train/tokens"] == sum(1 + i % 5 + 1 for i in range(8))


@pytest.mark.parametrize("size", [1, 5, 8])
def test_the_micro_batch_size_has_no_influence(model_dir: Path, tmp_path: Path, size: int) -> None:
    whole, cut = (supervised_runs.module(model_dir, micro_batch_size=s) for s in (64, size))
    for model in (whole, cut):
        fit(model, tmp_path, max_steps=4)
    for name, value in runs.weights(whole).items():
        assert (value - cut.state_dict()[name]).abs().max() < 1e-9, name


def test_the_learning_rate_and_the_gradient_norm(model_dir: Path, tmp_path: Path) -> None:
    model = supervised_runs.module(model_dir, lr_schedule=Linear(1.0, 1.0, steps=8, warmup=2), max_grad_norm=1e-3)
    seen = []

    class See(runs.L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.policy_model.parameters()])
            seen.append((optimizer.param_groups[0]["lr"], norm.item()))

    fit(model, tmp_path, max_steps=4, callbacks=[See()])
    assert [lr for lr, _ in seen] == [0.0, 0.005, 0.01, 0.01]
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for _, norm in seen)


def test_validation_is_the_mean_over_tokens(model_dir: Path, tmp_path: Path) -> None:
    model = supervised_runs.module(model_dir)
    trainer = runs.trainer(tmp_path)
    (metrics,) = trainer.validate(model, supervised_runs.data(val=11, val_batch_size=4), verbose=False)
    expected = loop_loss(Policy(str(model_dir), dtype="float64").load(), encoded(model_dir, 11))
    assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


class Keep(runs.L.Callback):
    """The weights and metrics at the end, written by the process of rank 0."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_end(self, trainer, module) -> None:
        if trainer.is_global_zero:
            logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "seconds" not in k}
            torch.save({"weights": runs.weights(module), "logged": logged}, self.out)


def ddp_run(model_dir: Path, out: Path, processes: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = supervised_runs.module(model_dir, LoRA(r=4, alpha=8))
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto"
    data = supervised_runs.data(batch_size=8 // processes, val=7, val_batch_size=4 // processes)
    options = {"devices": processes, "strategy": strategy, "val_check_interval": 2, "callbacks": [Keep(out)]}
    fit(model, out.parent, data, max_steps=5, **options)


def test_two_processes_equal_one(model_dir: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        assert forks.call(ddp_run, model_dir, tmp_path / f"{processes}.pt", processes) == 0
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    for name, value in one["weights"].items():
        assert (value - two["weights"][name]).abs().max() < 1e-6, name
    assert {"train/loss", "train/tokens", "val/loss"} <= one["logged"].keys()
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("adapter", [None, LoRA(r=4, alpha=8, dropout=0.3)], ids=["full", "dropout"])
def test_a_resumed_run_is_bit_identical(model_dir: Path, tmp_path: Path, adapter) -> None:
    def model() -> SupervisedFineTuning:
        return supervised_runs.module(model_dir, adapter, "float32", lr_schedule=Cosine(1.0, 0.0, 8, warmup=2))

    options = {"val_check_interval": 1, "log_every_n_steps": 2, "enable_checkpointing": True}
    straight, stopped, resumed = model(), model(), model()
    data = lambda: supervised_runs.data(20, val=4)  # noqa: E731 - 2 steps an epoch, 4 rows left over
    fit(straight, tmp_path, data(), max_steps=8, val_check_interval=1)
    torch.rand(3)  # the state of the generators has no influence
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=5, save_top_k=-1, save_last=True)
    fit(stopped, tmp_path, data(), max_steps=5, callbacks=[keep], **options)
    again = ModelCheckpoint(dirpath=tmp_path / "again")
    fit(resumed, tmp_path, data(), ckpt_path=tmp_path / "kept/last.ckpt", max_steps=8, callbacks=[again], **options)
    final = runs.weights(straight)
    assert all(torch.equal(value, final[name]) for name, value in resumed.state_dict().items())
    assert not all(torch.equal(value, final[name]) for name, value in stopped.state_dict().items())


def test_a_checkpoint_is_exported_and_read_back(model_dir: Path, tmp_path: Path) -> None:
    from frpo.models.export import export_policy

    model = supervised_runs.module(model_dir, LoRA(r=4, alpha=8, dropout=0.3), "float32")
    trainer = fit(model, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_policy(tmp_path / "a.ckpt")
    assert loaded.step == 2
    export_policy(loaded.model, loaded.policy.tokenizer, tmp_path / "out", merge=True)
    ids = torch.tensor([[3, 7, 8, 4]])
    trained = model.policy_model.eval()(ids).logits
    assert (Policy(str(tmp_path / "out")).load().eval()(ids).logits - trained).abs().max() < 1e-5


def test_refuses_what_cannot_work(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SupervisedFineTuning.micro_batch_size: got 0, expected at least 1"):
        supervised_runs.module(model_dir, micro_batch_size=0)
    with pytest.raises(ValueError, match=r"SupervisedFineTuning.max_grad_norm: got .*, expected more than 0"):
        supervised_runs.module(model_dir, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"SupervisedFineTuning.lr_schedule: got -1.0, expected at least 0"):
        supervised_runs.module(model_dir, lr_schedule=Linear(1.0, -1.0, steps=8))
    long = SupervisedDataModule(supervised_runs.Echo(8), batch_size=4, max_length=64)
    model = supervised_runs.module(model_dir)
    model.configure_model()
    model.policy_model.config.max_position_embeddings = 8
    with pytest.raises(
        ValueError, match="a demonstration has 11 tokens, but .* has positions for 8; write .*max_length: 8"
    ):
        fit(model, tmp_path, long)


def test_a_loss_that_is_not_finite_stops_the_run(model_dir: Path, tmp_path: Path) -> None:
    model = supervised_runs.module(model_dir)
    model.configure_model()
    with torch.no_grad():
        model.policy_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"demonstration\(s\) .*weights were not changed"):
        fit(model, tmp_path)


def test_policy_optimisation_refuses_dropout(model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter.dropout must be 0, got 0.1.*SupervisedFineTuning"):
        runs.module(model_dir, policy=Policy(str(model_dir), adapter=LoRA(dropout=0.1)))


def test_refuses_a_checkpoint_of_policy_optimisation(model_dir: Path, tmp_path: Path) -> None:
    first = runs.module(model_dir)
    trainer = runs.trainer(tmp_path, max_steps=1)
    trainer.fit(first, datamodule=runs.data())
    trainer.save_checkpoint(tmp_path / "rl.ckpt")
    with pytest.raises(ValueError, match="the checkpoint"):
        fit(supervised_runs.module(model_dir, LoRA(r=4, alpha=8), "float32"), tmp_path, ckpt_path=tmp_path / "rl.ckpt")


def test_completion_nll_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="one shape and a bool mask"):
        completion_nll(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3))
