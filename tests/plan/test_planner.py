"""Plans of toy jobs against exact counts and against steps that were run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import Graded
from torch import nn
from toy_models import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled, FrozenCopy
from frpo.modules.micro_batches import MicroBatch, TokenPass
from frpo.penalty import KLPenalty
from frpo.plan.blank import blank_policy
from frpo.plan.jobs import PolicyJob, SupervisedJob
from frpo.plan.memory import parse_bytes, show_bytes
from frpo.plan.optimizers import optimizer_cost
from frpo.plan.phases import Rollout
from frpo.plan.plan import size, trainable, weights
from frpo.plan.planner import PROCESS, advise, make_plan
from frpo.plan.ranks import Ranks, gathered, read_ranks
from frpo.plan.tracing import LiveBytes
from frpo.rollouts.in_process import InProcessSampler

ONE = Ranks("one process", 1)
HIDDEN, LAYERS, VOCABULARY = 64, 3, 46


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """A Llama whose activations are large beside its own bookkeeping."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def job(
    path, *, P=2, G=4, L=16, T=8, mbs=8, reference=None, kl=None, autocast=False, sampler=None, **policy
) -> PolicyJob:
    rollout = Rollout("rollout", sampler or InProcessSampler(max_new_tokens=T), P, G, L)
    return PolicyJob(
        Policy(path, **policy), torch.optim.AdamW, mbs, autocast, reference or FrozenCopy(),
        kl or KLPenalty(beta=0.1, estimator="full"), Graded(), (rollout,), 0,
    )  # fmt: skip


def line(plan, name, phase=None):
    lines = plan.held if phase is None else next(p for p in plan.phases if p.name == phase).lines
    return next(line.bytes for line in lines if line.name == name)


def test_weights_gradients_and_states_are_counted_exactly(wide_dir):
    model = Policy(wide_dir).load()
    number = sum(p.numel() for p in model.parameters())
    plan = make_plan(job(wide_dir), ONE, gpu=False)
    assert (plan.trainable, plan.frozen) == (number, 0)
    assert line(plan, "policy weights") == line(plan, "reference weights") == weights(model)
    tensors = len(list(model.parameters()))
    assert line(plan, "optimiser states") == 2 * 4 * number + 4 * tensors  # and a step count each
    assert line(plan, "gradients", "optimiser step") == 4 * number
    held = sum(line.bytes for line in plan.held)
    assert held == PROCESS + 2 * weights(model) + 8 * number + 4 * tensors
    assert plan.total == held + max(phase.total for phase in plan.phases)


def test_an_adapter_trains_alone_in_float32(wide_dir):
    adapted = job(wide_dir, adapter=LoRA(r=4, alpha=8), dtype="bfloat16", reference=AdapterDisabled())
    plan = make_plan(adapted, ONE, gpu=False)
    model = adapted.policy.load()
    assert plan.trainable == sum(p.numel() for p in trainable(model))
    assert plan.frozen == sum(p.numel() for p in model.parameters()) - plan.trainable
    assert line(plan, "gradients", "optimiser step") == 4 * plan.trainable
    assert [one.name for one in plan.held] == ["process", "policy weights", "optimiser states"]


@pytest.mark.parametrize(
    ("build", "states"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), lambda p: 2 * p.numel() * 4 + 4),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True), lambda p: 3 * p.numel() * 4 + 4),
        (lambda p: torch.optim.SGD(p, lr=1e-3), lambda p: 0),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), lambda p: p.numel() * 4),
        (lambda p: torch.optim.Adafactor(p, lr=1e-3), None),
    ],
)
def test_states_are_those_the_optimiser_makes(build, states):
    parameters = [nn.Parameter(torch.zeros(5, 12)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(3, 4))]
    cost = optimizer_cost(build, parameters, at_once=False)
    optimizer = build(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    made = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert cost.states == size(made)
    if states is not None:
        assert cost.states == sum(map(states, parameters))


def test_the_cache_is_counted_exactly(wide_dir):
    plan = make_plan(job(wide_dir, P=3, G=4, L=10, T=6), ONE, gpu=False)
    head = HIDDEN // 4
    longest = 10 + 6 - 1  # the last token is drawn, not computed
    assert line(plan, "KV cache", "rollout") == 12 * LAYERS * 2 * 2 * head * longest * 4
    few = make_plan(job(wide_dir, P=3, G=4, sampler=InProcessSampler(6, max_sequences=4), L=10), ONE, gpu=False)
    assert line(few, "KV cache", "rollout") * 3 == line(plan, "KV cache", "rollout")


def saved_bytes(path, b, L, T, checkpointing, kl) -> int:
    """Bytes that autograd saves in a forward pass that is really made, weights left out."""
    policy = Policy(path, gradient_checkpointing=checkpointing)
    model = policy.load()
    frozen = FrozenCopy().load(policy, model)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), *frozen.parameters()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = tensor  # held, so that no two have one address
        return tensor

    ids, mask = torch.randint(2, VOCABULARY, (b, L + T)), torch.ones(b, T, dtype=torch.bool)
    attention = torch.ones_like(ids)
    attention[0, 0] = 0  # a padded prompt: else attention takes no mask
    batch = MicroBatch(torch.arange(b), ids, attention, torch.arange(L + T).expand(b, -1), ids[:, L:], mask)
    token_pass = TokenPass(model, FrozenCopy(), frozen, InProcessSampler(T), kl)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = token_pass(batch, with_reference=True)
    assert tokens.logps.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("shape", [(2, 24, 8), (8, 16, 16), (4, 8, 64)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_activations_are_what_autograd_saves(wide_dir, shape, checkpointing, estimator):
    b, L, T = shape
    kl = KLPenalty(beta=0.1, estimator=estimator)
    plan = make_plan(job(wide_dir, P=8, L=L, T=T, mbs=b, kl=kl, gradient_checkpointing=checkpointing), ONE, gpu=False)
    planned = line(plan, "activations", "update") + line(plan, "logits", "update")
    assert planned == pytest.approx(saved_bytes(wide_dir, b, L, T, checkpointing, kl), rel=0.2)


@pytest.mark.parametrize("mbs", [3, 8])
def test_the_peak_of_an_update_is_that_of_one_that_is_run(wide_dir, mbs):
    planned = job(wide_dir, L=24, T=16, mbs=mbs)
    phase = next(p for p in make_plan(planned, ONE, gpu=False).phases if p.name == "update")
    model = planned.policy.load()
    frozen = FrozenCopy().load(planned.policy, model)
    update = planned.update(model)
    with LiveBytes([*model.parameters(), *model.buffers(), *frozen.parameters(), *frozen.buffers()]) as live:
        for _ in range(update.passes):
            loss, _ = update.forward(model, frozen)
            loss.backward()
            del loss
    assert phase.total == pytest.approx(live.peak, rel=0.1)  # run with no padding, attention takes no mask


def test_half_precision_halves_the_activations(wide_dir):
    wide, narrow = (make_plan(job(wide_dir, L=24, T=16, autocast=on), ONE, gpu=False) for on in (False, True))
    assert line(narrow, "logits", "update") * 2 == line(wide, "logits", "update")
    assert line(narrow, "activations", "update") < 0.8 * line(wide, "activations", "update")


def test_weights_that_the_trainer_casts_are_planned_so(wide_dir):
    wide, narrow = (make_plan(replace(job(wide_dir), cast=cast), ONE, gpu=False) for cast in (None, torch.bfloat16))
    for name in ("policy weights", "reference weights", "optimiser states"):
        assert line(narrow, name) == pytest.approx(line(wide, name) / 2, rel=0.01)
    assert line(narrow, "logits", "update") * 2 == line(wide, "logits", "update")
    assert line(narrow, "KV cache", "rollout") * 2 == line(wide, "KV cache", "rollout")


def test_models_of_the_evaluation_are_held_whole_on_every_rank(wide_dir):
    beside = replace(job(wide_dir), kl_to=[wide_dir])
    for ranks in (ONE, read_ranks("fsdp", 4, 1, gpu=False)):
        plan = make_plan(beside, ranks, gpu=False)
        assert line(plan, f"evaluation, kl_to {wide_dir}") == weights(Policy(wide_dir).load())


def test_supervised_steps_are_planned(wide_dir):
    plan = make_plan(SupervisedJob(Policy(wide_dir), torch.optim.AdamW, 2, False, 4, 64), ONE, gpu=False)
    assert [phase.name for phase in plan.phases] == ["update", "optimiser step"]
    assert line(plan, "logits", "update") == 2 * 64 * VOCABULARY * 4
    assert line(plan, "gradients", "update") == 4 * plan.trainable  # those of the first of two micro-batches


def test_what_is_sharded_is_divided(wide_dir):
    one = make_plan(job(wide_dir), ONE, gpu=False)
    ranks = read_ranks("fsdp", 4, 2, gpu=False)
    cut = make_plan(job(wide_dir), ranks, gpu=False)
    assert ranks.number == 8
    for name in ("policy weights", "reference weights", "optimiser states"):
        assert line(cut, name) == -(-line(one, name) // 8)
    assert line(cut, "gradients", "optimiser step") == -(-line(one, "gradients", "optimiser step") // 8)
    assert line(cut, "gathered weights", "update") == gathered(blank_policy(Policy(wide_dir)))
    assert line(cut, "gathered weights", "rollout") == weights(Policy(wide_dir).load())
    assert line(cut, "gradients", "update") == -(-line(one, "gradients", "update") // 8)
    summed = make_plan(job(wide_dir, mbs=4), ranks, gpu=False)  # over two micro-batches each rank has them whole
    assert line(summed, "gradients", "update") == 4 * one.trainable
    adapted = make_plan(job(wide_dir, mbs=4, adapter=LoRA(r=2, alpha=4)), ranks, gpu=False)
    assert line(adapted, "frozen gradients", "update") == 4 * adapted.frozen
    ddp = make_plan(job(wide_dir), read_ranks("ddp", 4, 1, gpu=False), gpu=False)
    assert line(ddp, "policy weights") == line(one, "policy weights")
    assert line(ddp, "gradient buckets") == 4 * one.trainable
    assert read_ranks("auto", "1", 1, gpu=False).name == "one process"
    assert read_ranks("auto", [0, 1], 1, gpu=False).buckets
    with pytest.raises(ValueError, match="trainer.strategy: got 'nothing'"):
        read_ranks("nothing", 1, 1, gpu=False)


def test_advice_is_computed_and_most_saved_comes_first(wide_dir):
    large = job(wide_dir, P=4, L=32, T=32, mbs=16, adapter=LoRA(r=2, alpha=4), reference=FrozenCopy())
    plan = make_plan(large, ONE, gpu=False)
    found = advise(large, ONE, plan, limit=PROCESS + 2**20, gpu=False)
    settings = [one.setting.split()[0].rsplit(".", 1)[-1] for one in found]
    assert set(settings) == {"micro_batch_size", "gradient_checkpointing", "dtype", "reference"}
    saved = [plan.total - one.plan.total for one in found]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) > 0
    smaller = next(one for one in found if "micro_batch_size" in one.setting)
    assert smaller.setting.endswith("micro_batch_size 1")  # none fits, so the last
    assert smaller.plan == make_plan(replace(large, micro_batch_size=1, known={}), ONE, gpu=False)
    generous = advise(large, ONE, plan, limit=plan.total - 1, gpu=False)
    assert next(one for one in generous if "micro_batch_size" in one.setting).setting.endswith("micro_batch_size 8")


def test_a_rollout_that_is_too_large_is_answered_by_fewer_sequences(wide_dir):
    wordy = job(wide_dir, P=16, G=8, L=8, T=64, mbs=1)
    plan = make_plan(wordy, ONE, gpu=False)
    assert plan.largest.name == "rollout"
    found = advise(wordy, ONE, plan, limit=PROCESS, gpu=False)
    assert [one.setting for one in found] == ["--model.init_args.sampler.init_args.max_sequences 8"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 mib", 3 * 2**19), ("512", 512)],
)
def test_amounts_are_read(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "24 bits", "0GiB", "nanGiB"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="--memory: got"):
        parse_bytes(text)


def test_amounts_are_shown():
    assert [show_bytes(n) for n in (12, 2**20, 3 * 2**29)] == ["12 B", "1.00 MiB", "1.50 GiB"]
