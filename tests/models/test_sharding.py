"""What FSDP1 refuses of a policy, and a model in its wrapper; in one process, whose group is of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap

from frpo.models import sharding
from frpo.models.policy import LoRA, Policy

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def fsdp1() -> Iterator[None]:
    """The context of Lightning's FSDPStrategy."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True):
            yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("fsdp1")
def test_a_policy_is_wrapped_layer_by_layer_and_named_as_before(model_dir: Path) -> None:
    module = runs.full(model_dir)
    module.configure_model()
    bare = Policy(str(model_dir), dtype="float64").load()
    for model in (module.policy_model, module.reference_model):
        assert len(FullyShardedDataParallel.fsdp_modules(model)) == 1 + bare.config.num_hidden_layers
        assert sharding.unwrapped(model).config.vocab_size == bare.config.vocab_size
    assert module.shapes == {f"policy_model.{name}": list(p.shape) for name, p in bare.named_parameters()}
    assert module.state_dict().keys() >= module.shapes.keys()
    ids = torch.arange(2, 8)[None]
    with torch.no_grad():
        expected = bare(input_ids=ids).logits
        assert torch.equal(module.policy_model(input_ids=ids).logits, expected)
        with sharding.gathered(module.policy_model), sharding.gathered(module.policy_model):
            assert torch.equal(module.policy_model(input_ids=ids).logits, expected)
        assert torch.equal(module.policy_model(input_ids=ids).logits, expected)


@pytest.mark.usefixtures("fsdp1")
def test_an_adapter_of_another_type_than_its_base_is_refused(model_dir: Path) -> None:
    module = runs.module(model_dir, policy=Policy(str(model_dir), adapter=LoRA(r=2), dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"got bfloat16 and float32.*dtype: float32.*fsdp2\.yaml"):
        module.configure_model()


def by_shape(parameters):
    matrices, rest = [], []
    for p in parameters:
        (matrices if p.ndim > 1 else rest).append(p)
    return torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)


@pytest.mark.parametrize("optimizer", [by_shape, torch.optim.Adafactor])
@pytest.mark.usefixtures("fsdp1")
def test_an_optimizer_that_goes_by_shapes_is_refused(model_dir: Path, optimizer) -> None:
    module = runs.full(model_dir, optimizer=optimizer)
    module.configure_model()
    with pytest.raises(ValueError, match="in one dimension: .*torch.optim.AdamW"):
        module.configure_optimizers()


def test_without_a_strategy_nothing_is_wrapped(model_dir: Path) -> None:
    model = Policy(str(model_dir)).load()
    assert sharding.shard(model, None) is model
    assert sharding.unwrapped(model) is model
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    assert sharding.total_norm(nn.ParameterList([w]), [w]) == 5
