"""Reward-model training on the random policy: exact steps, resume, and scores that are those of RewardModel."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from frpo.data.conversation import ConversationEncoder
from frpo.data.preferences.batch import collate, encode
from frpo.data.preferences.module import JudgedDataModule
from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.models.policy import LoRA, Policy
from frpo.models.scorer import Scorer
from frpo.reward_modelling.losses import Binary, BradleyTerry, Regression
from frpo.reward_modelling.module import RewardModelling
from frpo.rewards.model import RewardModel
from frpo.schedules import Cosine
from frpo.types import Prompt

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


class Judged(JudgedSource):
    """``n`` examples of ``responses`` responses of one to five words; w1 is better than w2."""

    def __init__(self, n: int = 12, responses: int = 2, target: float | None = None) -> None:
        self.n, self.responses, self.target = n, responses, target

    def examples(self) -> list[JudgedExample]:
        def example(i: int) -> JudgedExample:
            prompt = Prompt(str(i), ({"role": "user", "content": f"w{3 + i % 7} w{10 + i % 5}"},), "t")
            good, bad = " ".join(["w1"] * (1 + i % 5)), " ".join(["w2"] * (1 + i % 3))
            if self.responses == 2:
                return JudgedExample(prompt, (good, bad), 0.0 if self.target is None else self.target)
            return JudgedExample(prompt, ((bad, good)[i % 2],), float(i % 2) if self.target is None else self.target)

        return [example(i) for i in range(self.n)]


def module(model_dir: Path, **changes: Any) -> RewardModelling:
    """Bradley-Terry on the random policy, every weight trained in float64, unless ``changes`` say otherwise."""
    base = changes.pop("base", Policy(str(model_dir), dtype="float64"))
    arguments: dict[str, Any] = {
        "scorer": Scorer(base, max_length=changes.pop("max_length", 64)),
        "loss": BradleyTerry(),
        "micro_batch_size": 3,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return RewardModelling(**{**arguments, **changes})


def data(responses: int = 2, **changes: Any) -> JudgedDataModule:
    return JudgedDataModule(**{"train": Judged(responses=responses), "batch_size": 4, **changes})


def fit(model: RewardModelling, root: Path, rows: JudgedDataModule | None = None, **changes: Any) -> Any:
    trainer = runs.trainer(root, **changes)
    trainer.fit(model, datamodule=rows or data(model.loss.responses))
    return trainer


def difference(a: RewardModelling, b: RewardModelling) -> float:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


LOSSES = [BradleyTerry(margin=0.2, centring=0.1), Binary(), Regression("sigmoid")]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_gradient_is_that_of_the_mean_loss(model_dir: Path, tmp_path: Path, loss) -> None:
    """One step on a batch is one step on the mean over its conversations, each run on its own and without padding."""
    seen: dict[str, torch.Tensor] = {}

    class Look(runs.L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            seen.update({n: p.grad.clone() for n, p in module.policy_model.named_parameters()})

    rows = data(loss.responses, shuffle=False)
    fit(module(model_dir, loss=loss, max_grad_norm=None), tmp_path, rows, max_steps=1, callbacks=[Look()])
    fresh = module(model_dir, loss=loss)
    fresh.configure_model()
    encoder = ConversationEncoder(fresh.tokenizer, 64)
    batch = collate(encode(rows.sources["train"].examples()[:4], encoder))
    one_by_one = [fresh.policy_model(torch.tensor([ids])).logits[0, 0] for row in batch.rows for ids in row.ids]
    loss(torch.stack(one_by_one).view(4, -1), batch.targets).mean().backward()
    for name, parameter in fresh.policy_model.named_parameters():
        assert torch.allclose(seen[name], parameter.grad, atol=1e-9), name
    assert max(g.abs().max() for g in seen.values()) > 1e-3


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_micro_batches_change_nothing(model_dir: Path, tmp_path: Path, loss) -> None:
    models = [module(model_dir, loss=loss, micro_batch_size=size) for size in (1, 3, 99)]
    for model in models:
        fit(model, tmp_path)
    assert difference(models[0], models[1]) < 1e-9
    assert difference(models[0], models[2]) < 1e-9
    untrained = module(model_dir, loss=loss)
    untrained.configure_model()
    assert difference(models[0], untrained) > 1e-3


@pytest.mark.parametrize("adapter", [None, LoRA(r=4, alpha=8)], ids=["full", "lora"])
def test_it_learns_and_scores_as_it_was_trained(model_dir: Path, tmp_path: Path, adapter) -> None:
    model = module(
        model_dir, base=Policy(str(model_dir), adapter=adapter), save_dir=str(tmp_path / "rm"), max_length=12
    )
    trainer = fit(model, tmp_path, data(val=Judged(24)), max_steps=15, val_check_interval=1)
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.95
    assert metrics["val/auroc"] > 0.9
    assert metrics["val/loss"] < 0.5
    assert metrics["val/margin"] > 0.5
    reward = RewardModel(str(tmp_path / "rm"))
    reward.setup(CPU)
    assert reward.max_length == 12
    examples = [*Judged(10).examples(), long_example()]
    judged = [j.value for j in reward([c for e in examples for c in e.completions()])]
    with torch.no_grad():
        expected = model.scores(encode(examples, ConversationEncoder(model.tokenizer, 12))).flatten().tolist()
    assert judged == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in judged}) > 5
    assert sorted(path.name for path in tmp_path.iterdir() if "rm" in path.name) == ["rm"]


def long_example() -> JudgedExample:
    """A prompt that has to be cut, and an answer that spells a special token."""
    text = " ".join(f"w{i}" for i in range(30))
    return JudgedExample(Prompt("long", ({"role": "user", "content": text},), "t"), ("w1 <eos> w2", "w5 <pad>"), 0.0)


def test_a_second_run_takes_the_place_of_the_first(model_dir: Path, tmp_path: Path) -> None:
    scores = []
    for seed in (0, 1):
        model = module(model_dir, save_dir=str(tmp_path / "rm"), seed=seed, base=Policy(str(model_dir)))
        fit(model, tmp_path)
        reward = RewardModel(str(tmp_path / "rm"))
        reward.setup(CPU)
        scores.append([j.value for j in reward(Judged(2).examples()[0].completions())])
    assert scores[0] != scores[1]
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


@pytest.mark.parametrize("adapter", [None, LoRA(r=4, alpha=8)], ids=["full", "lora"])
def test_a_resumed_run_is_bit_identical(model_dir: Path, tmp_path: Path, adapter) -> None:
    def run(root: Path, steps: int, ckpt: str | None = None) -> tuple[RewardModelling, dict[str, float]]:
        model = module(
            model_dir, base=Policy(str(model_dir), adapter=adapter), lr_schedule=Cosine(1.0, 0.0, 8, warmup=2)
        )
        saving = ModelCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=1, save_last=True)
        trainer = runs.trainer(
            root, max_steps=steps, max_epochs=-1, log_every_n_steps=4, enable_checkpointing=True,
            val_check_interval=1, callbacks=[saving],
        )  # fmt: skip
        trainer.fit(model, datamodule=data(val=Judged(5)), ckpt_path=ckpt, weights_only=True)
        return model, {k: float(v) for k, v in trainer.callback_metrics.items()}

    whole, logged = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 5)
    resumed, logged_after = run(tmp_path / "parts", 8, str(tmp_path / "parts/checkpoints/last.ckpt"))
    assert difference(whole, resumed) == 0
    assert logged == logged_after
    saved = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    if adapter is not None:
        assert all("lora_" in name or "score" in name for name in saved)
        assert any("score" in name for name in saved), "the head trains beside the adapter"


def test_the_learning_rate_follows_its_schedule(model_dir: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(module(model_dir, lr_schedule=Cosine(1.0, 0.0, 4, warmup=2)), tmp_path, max_steps=4, logger=logger)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([0.0, 0.005, 0.01, 0.005])
    assert [float(row["step"]) for row in rows] == [0, 1, 2, 3]


def test_metrics_of_labels_are_those_of_the_scores(model_dir: Path, tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    model = module(model_dir, loss=Binary())
    trainer = runs.trainer(tmp_path)
    (found,) = trainer.validate(model, datamodule=data(1, val=Judged(9, responses=1)), verbose=False)
    examples = Judged(9, responses=1).examples()
    with torch.no_grad():
        scores = model.scores(encode(examples, ConversationEncoder(model.tokenizer, 64)))[:, 0]
    labels = torch.tensor([e.target for e in examples])
    assert found["val/auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["val/accuracy"] == pytest.approx(((scores > 0) == (labels == 1)).float().mean().item())
    assert found["val/score"] == pytest.approx(scores.mean().item())
    assert "val/margin" not in found


def test_a_loss_that_is_not_finite_names_its_examples_and_changes_no_weight(model_dir: Path, tmp_path: Path) -> None:
    class Break(runs.L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            module.policy_model.score.weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"example\(s\) \d+.*weights were not changed"):
        fit(module(model_dir), tmp_path, callbacks=[Break()])


def test_responses_over_the_length_are_left_out(model_dir: Path, tmp_path: Path) -> None:
    rows = data(batch_size=2)
    fit(module(model_dir, max_length=3), tmp_path, rows, max_steps=1)
    assert rows.dropped["train"] == sum(1 + i % 5 > 3 for i in range(12))
    with pytest.raises(ValueError, match=r"12 of 12 examples have a response over max_length=1 .*none is left"):
        fit(module(model_dir, max_length=1), tmp_path, data(train=Bulky()), max_steps=1)


class Bulky(Judged):
    """Responses of two words or more."""

    def examples(self) -> list[JudgedExample]:
        return [JudgedExample(e.prompt, tuple(f"w3 {r}" for r in e.responses), 0.0) for e in super().examples()]


def without_template(model_dir: Path) -> Policy:
    policy = Policy(str(model_dir))
    policy.__dict__["tokenizer"] = copy.deepcopy(policy.tokenizer)
    policy.tokenizer.chat_template = None
    return policy


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"loss": Binary()}, {}, r"data.init_args.train: Judged gives pairs, but Binary is a loss of labelled"),
        ({}, {"train": Judged(responses=1)}, "gives labelled responses, but BradleyTerry is a loss of pairs"),
        (
            {"loss": Binary()},
            {"train": Judged(responses=1, target=2.0)},
            "row 0: the label: got 2.0, expected one of",
        ),
        ({}, {"train": None}, "no `train` source"),
        ({"max_length": 999}, {}, "max_length: got 999, expected at most the 128 positions"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(model_dir, tmp_path, changes, rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(model_dir, **changes), tmp_path, data(**rows))


def test_tokenizers_that_cannot_write_or_pad_a_conversation_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template to write a conversation with"):
        fit(module(model_dir, base=without_template(model_dir)), tmp_path)
    bare = copy.deepcopy(Policy(str(model_dir)).tokenizer)
    bare.pad_token = None
    other = tmp_path / "bare"
    bare.save_pretrained(other)
    with pytest.raises(ValueError, match="no padding token"):
        fit(module(model_dir, base=Policy(str(other))), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "RewardModelling.micro_batch_size: got 0, expected at least 1"),
        ({"max_grad_norm": 0.0}, "RewardModelling.max_grad_norm: got 0.0, expected more than 0"),
        ({"seed": -1}, "RewardModelling.seed: got -1, expected 0"),
        ({"max_length": 0}, "Scorer.max_length: got 0"),
        ({"base": Policy("x", adapter=LoRA(path="y"))}, "an adapter of a language model has no head"),
    ],
)
def test_bad_settings_are_refused(model_dir: Path, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(model_dir, **changes)
