"""Models without weights: what a run will load, on the meta device, in names, shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from frpo.models.policy import DTYPES, LoRA, Policy, disable_dropout, finding
from frpo.models.reference import REFERENCE_ADAPTER, AdapterDisabled, FrozenCopy, NamedAdapter, Reference
from frpo.models.scorer import MAX_LENGTH, Scorer
from frpo.rewards.base import Reward
from frpo.rewards.judges.causal_judge import CausalJudge
from frpo.rewards.model import DEFAULT_MAX_LENGTH, RewardModel


@dataclass(frozen=True)
class BlankModel:
    """A model that a reward will load, and the largest batch it will run, ``rows`` conversations of ``tokens`` tokens.

    ``arguments`` are those of its forward pass beside ids and mask.
    """

    name: str
    model: Any
    rows: int
    tokens: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


def blank_policy(policy: Policy) -> Any:
    """The model of :meth:`Policy.load`.

    Raises:
        ValueError: the policy's path holds no configuration of a causal language model.
    """
    return policy.ready(_adapted(blank_base(policy), policy.adapter, "CAUSAL_LM"))


def blank_base(policy: Policy, path: str | None = None) -> Any:
    """The model of :meth:`Policy.load_base`. Attention whose kernels are not here becomes ``sdpa``.

    Raises:
        ValueError: ``path``, or the policy's own, holds no configuration of a causal language model.
    """
    what = "configuration of a causal language model"
    with finding(policy.path if path is None else path, what, f"the {what}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            policy.read_config(path),
            dtype=DTYPES[policy.dtype],
            attn_implementation=policy.attn_implementation if policy.attn_implementation in (None, "eager") else "sdpa",
            trust_remote_code=policy.trust_remote_code,
        )
    disable_dropout(model)
    return model


def blank_scorer(scorer: Scorer) -> Any:
    """The classifier of :meth:`Scorer.load`. Raises ``ValueError`` as that does."""
    base = scorer.base
    model = _classifier(scorer.read_config(), base.dtype, base.trust_remote_code)
    return scorer.ready(_adapted(model, base.adapter, "SEQ_CLS"))


@singledispatch
def blank_reference(reference: Reference, policy: Policy, model: Any) -> Any:
    """What :meth:`Reference.load` returns, beside a ``model`` of the meta device to which it adds what ``load`` adds.

    Register a function for a class of your own by ``blank_reference.register``.

    Raises:
        ValueError: the class is not registered, or as ``load`` raises.
    """
    raise ValueError(
        f"reference {type(reference).__name__}: got a class whose memory is not known; register a function that builds "
        "its model without weights by frpo.plan.blank.blank_reference.register, or run a few steps instead: "
        "frpo fit --trainer.max_steps 3"
    )


@blank_reference.register
def _(reference: AdapterDisabled, policy: Policy, model: Any) -> Any:
    return reference.load(policy, model)


@blank_reference.register
def _(reference: FrozenCopy, policy: Policy, model: Any) -> Any:
    return reference.frozen(blank_base(policy, reference.path), model)


@blank_reference.register
def _(reference: NamedAdapter, policy: Policy, model: Any) -> Any:
    reference.check(policy)
    trained = model.active_adapter
    model.add_adapter(REFERENCE_ADAPTER, peft.PeftConfig.from_pretrained(reference.path))
    model.set_adapter(trained)
    disable_dropout(model)


@singledispatch
def blank_models(reward: Reward) -> list[BlankModel]:
    """The models that :meth:`Reward.setup` will load: those of its parts, for a class that is not registered.

    Register a function for a class of your own that loads one by ``blank_models.register``.
    """
    return [model for part in reward.parts().values() for model in blank_models(part)]


@blank_models.register
def _(reward: RewardModel) -> list[BlankModel]:
    config = AutoConfig.from_pretrained(
        reward.path, revision=reward.revision, trust_remote_code=reward.trust_remote_code
    )
    text_config = config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = 0
    tokens = getattr(config, MAX_LENGTH, DEFAULT_MAX_LENGTH) if reward.max_length is None else reward.max_length
    model = _classifier(config, reward.dtype, reward.trust_remote_code)
    return [BlankModel(reward.path, model.eval().requires_grad_(False), reward.batch_size, tokens)]


@blank_models.register
def _(reward: CausalJudge) -> list[BlankModel]:
    """The few weights of a PEFT adapter are left out."""
    path, revision = reward.base_model()
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[reward.dtype])
    arguments = {"use_cache": False, "logits_to_keep": 1}
    model = model.eval().requires_grad_(False)
    return [BlankModel(reward.path, model, reward.batch_size, reward.max_length, arguments)]


def _classifier(config: Any, dtype: str, trust_remote_code: bool) -> Any:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(
            config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )


def _adapted(model: Any, adapter: LoRA | None, task_type: str) -> Any:
    """As :meth:`LoRA.attach`, the adapter of a ``path`` in its shapes alone."""
    if adapter is None:
        return model
    config = adapter.peft_config(task_type)
    config.inference_mode = False
    return peft.get_peft_model(model.requires_grad_(False), config)
