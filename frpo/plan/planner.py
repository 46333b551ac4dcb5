"""The plan of a job on its ranks, and what to turn where it does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from frpo.plan.jobs import Job, Models
from frpo.plan.optimizers import optimizer_cost
from frpo.plan.plan import Line, MemoryPlan, Phase, size, trainable, weights
from frpo.plan.ranks import Ranks, gathered

# Of an idle process: the interpreter and its libraries in memory, or the context of a GPU's driver. Measured: 0.5 GiB
# with torch, transformers, peft and lightning imported; CUDA's context takes about as much on the card.
PROCESS = 512 * 1024**2

LEAN_DDP = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {gradient_as_bucket_view: true}}"


@dataclass(frozen=True)
class Advice:
    """What to write, and the plan with it."""

    setting: str
    plan: MemoryPlan


def make_plan(job: Job, ranks: Ranks, *, gpu: bool) -> MemoryPlan:
    """The memory of one rank."""
    models = job.models()
    policy = models.trained
    parameters = trainable(policy)
    gradients = size(parameters)
    cost = optimizer_cost(job.optimizer, parameters, at_once=gpu)
    held = [
        Line("process", PROCESS, "context of the device's driver" if gpu else "the interpreter and its libraries"),
        _cut(_weights("policy weights", policy), ranks.weights),
        *_others(models, ranks),
        _cut(
            Line("optimiser states", cost.states, f"{cost.name}, {cost.per_element:.2f} bytes per element that trains"),
            ranks.states,
        ),
    ]
    if ranks.buckets:
        held.append(Line("gradient buckets", gradients, "DDP reduces a copy of the gradients"))
    held += [_weights(f"evaluation, {name}", model) for name, model in job.evaluated()]
    phases = [_share(phase, ranks, models) for phase in job.phases(models)]
    step = Phase(
        "optimiser step",
        (
            _cut(Line("gradients", gradients, "of all parameters that train"), ranks.gradients),
            _cut(Line("workspace", cost.workspace, _handled(gpu)), ranks.states),
        ),
    )
    training = sum(parameter.numel() for parameter in parameters)
    return MemoryPlan(
        training,
        sum(parameter.numel() for parameter in policy.parameters()) - training,
        sum(weights(model) for model in (policy, models.reference) if model is not None),
        tuple(held),
        (*phases, step),
    )


def advise(job: Job, ranks: Ranks, plan: MemoryPlan, limit: int, *, gpu: bool) -> list[Advice]:
    """Of each setting the gentlest value that makes the job fit into ``limit`` bytes, else its last; most saved first.

    A setting that saves nothing is left out.
    """
    found = []
    for change in job.changes():
        if change.phases is not None and plan.largest.name not in change.phases:
            continue
        for value, changed in change.jobs:
            one = Advice(f"--{change.setting} {value}", make_plan(changed, ranks, gpu=gpu))
            if one.plan.total <= limit:
                break
        found.append(one)
    if ranks.buckets:
        lean = Ranks(ranks.name, ranks.number)
        found.append(Advice(f"--trainer.strategy '{LEAN_DDP}'", make_plan(job, lean, gpu=gpu)))
    return sorted((one for one in found if one.plan.total < plan.total), key=lambda one: one.plan.total)


def _others(models: Models, ranks: Ranks) -> Iterable[Line]:
    if models.reference is not None:
        yield _cut(_weights("reference weights", models.reference), ranks.weights)
    for scorer in models.scorers:
        yield _weights(f"reward model {scorer.name}", scorer.model)


def _weights(name: str, model: nn.Module) -> Line:
    parameters = list(model.parameters())
    number = sum(parameter.numel() for parameter in parameters)
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return Line(name, weights(model), f"{number:,} parameters, {' and '.join(kinds)}, and its buffers")


def _handled(gpu: bool) -> str:
    return "all parameters at once" if gpu else "one parameter at a time, for the largest"


def _cut(line: Line, parts: int) -> Line:
    return line if parts == 1 else Line(line.name, -(-line.bytes // parts), f"{line.how}; 1 of {parts} parts")


def _share(phase: Phase, ranks: Ranks, models: Models) -> Phase:
    parts = {"gradients": ranks.gradients, "frozen gradients": ranks.gradients, "copies": ranks.weights}
    lines = list(phase.lines)
    if ranks.flat and phase.name == "update":
        frozen = size(parameter for parameter in models.trained.parameters() if not parameter.requires_grad)
        how = "FSDP1 computes them with those that train"
        lines.append(Line("frozen gradients", frozen, how, whole=any(line.whole for line in lines)))
    lines = [line if line.whole else _cut(line, parts.get(line.name, 1)) for line in lines]
    if ranks.gathers and phase.name != "reward":
        lines.append(_gathered(phase, models))
    return Phase(phase.name, tuple(lines))


def _gathered(phase: Phase, models: Models) -> Line:
    """Weights that are put together for a phase, beside the parts that stay."""
    if phase.name == "update":
        return Line("gathered weights", gathered(models.trained), "the largest layer and what is in no layer, whole")
    if phase.name == "validation" and models.reference is not None:
        whole = weights(models.trained) + weights(models.reference)
        return Line("gathered weights", whole, "the whole policy and the whole reference")
    return Line("gathered weights", weights(models.trained), "the whole policy")
