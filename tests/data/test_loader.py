import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_models import build_tokenizer

from frpo.data.loader import evaluation_slices, permutation
from frpo.data.prompts.batch import EncodedPrompt, EvaluationLoader, PromptLoader, collate, encode
from frpo.types import Prompt

PAD = 0


def rows_of(count: int) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(
            Prompt(id=str(i), messages=({"role": "user", "content": "w0"},), task="normal"),
            text=f"text {i}",
            ids=torch.arange(1, 2 + i % 3),
        )
        for i in range(count)
    ]


def loader_of(count: int, batch_size: int, world_size: int = 1, rank: int = 0, **changes) -> PromptLoader:
    return PromptLoader(
        rows_of(count), batch_size=batch_size, pad_token_id=PAD, world_size=world_size, rank=rank, **changes
    )


def ids(batches) -> list[list[str]]:
    return [[prompt.id for prompt in batch.prompts] for batch in batches]


def flat(lists) -> list:
    return [item for items in lists for item in items]


def positions(batches) -> list[int]:
    return [position for batch in batches for position in batch.position.tolist()]


def epochs(loader: PromptLoader, count: int) -> list:
    return [batch for _ in range(count) for batch in loader]


# Order ---------------------------------------------------------------------------------------------------------------


def test_permutation_is_a_function_of_seed_and_epoch() -> None:
    base = permutation(50, seed=3, epoch=2)
    assert sorted(base) == list(range(50))
    assert (base == permutation(50, seed=3, epoch=2)).all()
    assert (base != permutation(50, seed=3, epoch=3)).any()
    assert (base != permutation(50, seed=4, epoch=2)).any()
    assert (permutation(50, seed=2, epoch=3) != base).any()


def test_permutation_never_changes_between_versions() -> None:
    # A resumed run has to meet the order its checkpoint was written with.
    assert permutation(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, seed=12345, epoch=7).tolist() == [0, 1, 4, 3, 2, 5, 7, 6]


def test_permutation_spreads_every_row_over_every_place() -> None:
    orders = np.stack([permutation(6, seed=0, epoch=epoch) for epoch in range(6000)])
    counts = np.stack([(orders == row).sum(0) for row in range(6)])
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 60, f"25 degrees of freedom, got {chi_square}"  # p about 1e-4


@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    count=st.integers(1, 3),
)
def test_ranks_together_read_what_one_process_reads(rows, batch_size, world_size, seed, count) -> None:
    step = batch_size * world_size
    if rows < step:
        with pytest.raises(ValueError, match="do not fill one step"):
            loader_of(rows, batch_size, world_size)
        return
    alone = epochs(loader_of(rows, step, seed=seed), count)
    ranks = [epochs(loader_of(rows, batch_size, world_size, rank, seed=seed), count) for rank in range(world_size)]
    together = [flat(parts) for parts in zip(*(ids(batches) for batches in ranks), strict=True)]
    assert together == ids(alone)
    assert [positions(parts) for parts in zip(*ranks, strict=True)] == [positions([batch]) for batch in alone]
    per_epoch = rows // step
    assert len(alone) == per_epoch * count
    for epoch in range(count):
        seen = flat(ids(alone[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert len(set(seen)) == len(seen) == per_epoch * step, "a prompt came twice in an epoch"


def test_position_is_the_epoch_and_place_whatever_the_batch_size() -> None:
    for step in (1, 2, 3, 4, 5):
        batches = epochs(loader_of(10, step, seed=1), 3)
        for batch in batches:
            for prompt, position in zip(batch.prompts, batch.position.tolist(), strict=True):
                epoch, place = divmod(position, 10)
                assert prompt.id == str(permutation(10, 1, epoch)[place])
        assert len(set(positions(batches))) == len(positions(batches))
        assert positions(batches) == sorted(positions(batches))


def test_without_shuffle_the_rows_come_in_order() -> None:
    loader = loader_of(5, 2, shuffle=False)
    assert ids(epochs(loader, 2)) == [["0", "1"], ["2", "3"], ["0", "1"], ["2", "3"]]


def test_too_few_rows_for_a_step() -> None:
    with pytest.raises(ValueError, match=r"5 training prompts.*3 \* 2 = 6.*lower `batch_size`"):
        loader_of(5, 3, world_size=2)


# Resume --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", range(13))
def test_a_restored_loader_goes_on_at_the_exact_next_batch(done: int) -> None:
    whole = ids(epochs(loader_of(9, 2, seed=5), 4))
    loader = loader_of(9, 2, seed=5)
    stream = (batch for _ in range(4) for batch in loader)
    assert ids(next(stream) for _ in range(done)) == whole[:done]
    state = loader.state_dict()
    assert state == json.loads(json.dumps(state))
    assert all(type(value) is int for value in state.values())

    restored = loader_of(9, 2, seed=5)
    restored.load_state_dict(state)
    assert ids(epochs(restored, 3)) == whole[done : done + 12] + ids(epochs(loader, 3))[16 - done :]


def test_state_counts_the_batch_that_was_handed_out() -> None:
    loader = loader_of(4, 2)
    iterator = iter(loader)
    next(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (0, 2)
    next(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (0, 4)


def test_making_an_iterator_moves_nothing() -> None:
    loader = loader_of(6, 2)
    iter(loader), iter(loader)
    assert loader.state_dict()["consumed"] == 0


@given(rows=st.integers(4, 40), before=st.integers(1, 4), after=st.integers(1, 4), steps=st.integers(0, 25))
def test_another_batch_size_goes_on_in_the_same_order(rows: int, before: int, after: int, steps: int) -> None:
    first = loader_of(rows, before, seed=2)
    stream = (batch for _ in range(steps + 1) for batch in first)
    seen = positions(next(stream) for _ in range(steps))
    second = loader_of(rows, after, seed=2)
    second.load_state_dict(first.state_dict())
    then = epochs(second, 1)
    for batch in then:
        for prompt, position in zip(batch.prompts, batch.position.tolist(), strict=True):
            epoch, place = divmod(position, rows)
            assert prompt.id == str(permutation(rows, 2, epoch)[place])
    new = positions(then)
    assert new == sorted(set(new))
    last = seen[-1] if seen else -1
    assert new[0] > last
    if rows - (last + 1) % rows >= after and (last + 1) % rows:
        assert new[0] == last + 1, "prompts of the epoch were skipped"


@pytest.mark.parametrize(
    ("change", "name"),
    [({"rows": 8}, "rows=9, this run has rows=8"), ({"seed": 1}, "seed=0"), ({"shuffle": False}, "shuffle=1")],
)
def test_another_order_is_refused(change: dict, name: str) -> None:
    state = loader_of(9, 2).state_dict()
    other = loader_of(change.pop("rows", 9), 2, **change)
    with pytest.raises(ValueError, match=f"checkpoint was written with .*{name}.*restore"):
        other.load_state_dict(state)
    assert other.state_dict()["consumed"] == 0


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match="another kind of loader"):
        loader_of(4, 2).load_state_dict({"_sampler_iter_yielded": 3})


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluation(count: int, batch_size: int, world_size: int = 1, rank: int = 0) -> EvaluationLoader:
    return EvaluationLoader(rows_of(count), batch_size=batch_size, pad_token_id=PAD, world_size=world_size, rank=rank)


@given(rows=st.integers(1, 80), batch_size=st.integers(1, 6), world_size=st.integers(1, 6))
def test_evaluation_reads_every_row_once_in_equal_numbers_of_batches(rows, batch_size, world_size) -> None:
    impossible = rows < world_size or (batch_size == 1 and rows % world_size)
    if impossible:
        with pytest.raises(ValueError, match=r"evaluation prompts cannot be split.*lower the number of devices"):
            evaluation_slices(rows, batch_size, world_size)
        return
    ranks = [list(evaluation(rows, batch_size, world_size, rank)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {-(-rows // (batch_size * world_size))}
    assert all(1 <= len(batch) <= batch_size for batches in ranks for batch in batches)
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert positions(in_order) == list(range(rows))
    assert flat(ids(in_order)) == [str(i) for i in range(rows)]


def test_evaluation_alone_is_full_batches_and_a_short_one() -> None:
    loader = evaluation(10, 4)
    assert len(loader) == 3
    assert [len(batch) for batch in loader] == [4, 4, 2]
    assert [len(batch) for batch in loader] == [4, 4, 2], "a second pass"


def test_evaluation_of_nothing_is_no_batches() -> None:
    assert list(evaluation(0, 4, 2)) == []


def test_evaluation_over_ranks_shares_a_last_step_that_is_too_short() -> None:
    sizes = [[len(batch) for batch in evaluation(9, 4, 2, rank)] for rank in range(2)]
    assert sizes == [[2, 2], [2, 3]]
    assert [[len(batch) for batch in evaluation(19, 4, 2, rank)] for rank in range(2)] == [[4, 4, 1], [4, 4, 2]]


# Batches -------------------------------------------------------------------------------------------------------------


def test_collate_pads_on_the_left() -> None:
    rows = rows_of(3)
    batch = collate(rows, [7, 8, 9], PAD)
    assert batch.input_ids.tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert batch.mask.tolist() == [[False, False, True], [False, True, True], [True, True, True]]
    assert batch.position.tolist() == [7, 8, 9]
    assert batch.texts == ("text 0", "text 1", "text 2")


def prompt_of(*messages: tuple[str, str]) -> Prompt:
    return Prompt("p1", tuple({"role": role, "content": content} for role, content in messages), "normal")


def test_encode_writes_the_prompt_up_to_the_answer() -> None:
    tokenizer = build_tokenizer()
    (row,) = encode([prompt_of(("system", "w1"), ("user", "w2 w3"))], tokenizer)
    assert row.text == "<system> w1 <user> w2 w3 <assistant>"
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["<system>", "w1", "<user>", "w2", "w3", "<assistant>"]


def test_a_template_that_writes_the_first_token_gives_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(["<s>", "w0"])
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = "{{ bos_token }} " + tokenizer.chat_template
    assert tokenizer("w0")["input_ids"][0] == bos, "the tokenizer adds one of its own"
    (row,) = encode([prompt_of(("user", "w0"))], tokenizer)
    assert row.ids.tolist().count(bos) == 1
    assert row.ids[0] == bos


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*model\.init_args\.policy\.init_args\.chat_template"):
        encode([prompt_of(("user", "w0"))], tokenizer)


def test_a_template_that_refuses_a_prompt_names_it_and_not_its_text() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    )
    with pytest.raises(ValueError, match=r"refuses prompt 'p1' with roles \['system', 'user'\]") as caught:
        encode([prompt_of(("system", "w7"), ("user", "w8"))], tokenizer)
    assert "System role not supported" in str(caught.value)
    assert "w7" not in str(caught.value)
    assert "w8" not in str(caught.value)


def test_a_template_that_writes_nothing_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(ValueError, match="into no tokens"):
        encode([prompt_of(("user", "w0"))], tokenizer)
