"""Where demonstrations come from: a file or the hub in one of several layouts, prompts with answers, or several."""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from frpo.data.demonstrations.layouts import Layout
from frpo.data.prompts.sources import FileSource, HubSource, PromptSource, TableSource, check_ids
from frpo.data.rows import read_messages
from frpo.data.sources import Joined, Source
from frpo.foundation import require
from frpo.types import Demonstration, Prompt

log = logging.getLogger(__name__)


class DemonstrationSource(Source):
    """Rows for supervised fine-tuning. Constructors are cheap; files are read by :meth:`demonstrations`."""

    @abstractmethod
    def demonstrations(self) -> list[Demonstration]:
        """The rows in their order; ids are unique."""


class TableDemonstrations(DemonstrationSource):
    """Rows with named columns, turned into demonstrations by a layout.

    A row whose answer is empty is left out, as is one that the layout does not want; :attr:`left_out` counts them.

    Args:
        table: Where the rows are; its ``prompt`` and ``limit`` are not used.
        layout: Which columns make the prompt, and which the answer.
        limit: The first so many demonstrations that are not left out; null takes all.
    """

    left_out: Counter[str]
    """Demonstrations that were left out, by reason."""

    def __init__(self, table: TableSource, layout: Layout, limit: int | None) -> None:
        assert table.default_task is not None, "all rows of a table have one task here"
        self.table, self.layout, self.task = table, layout, table.default_task
        self.limit = require.number("limit", limit, at_least=1, hint="write `limit: null` for all")
        self.left_out = Counter()

    def prepare(self) -> None:
        """Fetch the rows, where they are not a file."""
        self.table.prepare()

    def demonstrations(self) -> list[Demonstration]:
        """Read, check and convert the rows. Raises ``ValueError`` with the place of the first bad one."""
        self.left_out.clear()
        kept = list(islice(self._read(), self.limit))
        if not kept:
            reasons = f" ({dict(self.left_out)} left out)" if self.left_out else ""
            raise ValueError(f"{self.table.origin} holds no demonstrations{reasons}; expected at least one")
        check_ids([demonstration.prompt for demonstration in kept], f"{self.table.origin}, column {self.table.id!r}")
        if self.left_out:
            log.warning("%s: kept %d demonstrations, left out %s", self.table.origin, len(kept), dict(self.left_out))
        return kept

    def _read(self) -> Iterator[Demonstration]:
        for number, row in enumerate(self.table.rows()):
            row_id = self.table.row_id(number, row)
            try:
                exchanges = self.layout.exchanges(row.values)
                prompts = [read_messages(exchange.prompt, self.table.system) for exchange in exchanges]
            except ValueError as error:
                raise self.table.row_error(row, str(error)) from error
            if not exchanges:
                self.left_out[f"rows that {type(self.layout).__name__} filters"] += 1
            for i, (messages, exchange) in enumerate(zip(prompts, exchanges, strict=True)):
                if not exchange.answer.strip():
                    self.left_out["empty answers"] += 1
                    continue
                name = row_id if len(exchanges) == 1 else f"{row_id}.{i}"
                yield Demonstration(Prompt(name, messages, self.task), exchange.answer)


class FileDemonstrations(TableDemonstrations):
    """Demonstrations from a .jsonl, .json, .csv or .parquet file, or a folder of them.

    Args:
        path: The file, or a folder of such files, relative to the working folder or absolute.
        layout: Which columns make the prompt, and which the answer: a class of :mod:`frpo.data.demonstrations.layouts`.
        task: Of all rows.
        id: Column with the row's id, unique. Null: file name and row number.
        limit: The first so many demonstrations that the layout keeps; null takes all.
        system: System message put before every prompt.

    Example: ``FileDemonstrations("alpaca.json", Alpaca(), limit=40000)``.
    """

    def __init__(
        self,
        path: str | Path,
        layout: Layout,
        task: str = "downstream",
        id: str | None = None,
        limit: int | None = None,
        system: str | None = None,
    ) -> None:
        super().__init__(FileSource(path, task=None, default_task=task, id=id, system=system), layout, limit)


class HubDemonstrations(TableDemonstrations):
    """Demonstrations from a data set on the Hugging Face hub. Needs ``pip install frpo[hub]``.

    Args:
        dataset: Its name, ``owner/name``.
        layout: Which columns make the prompt, and which the answer: a class of :mod:`frpo.data.demonstrations.layouts`.
        split: One split, slices included (``train[:100]``).
        subset: Its configuration, where it has several.
        revision: Commit or tag; null takes the newest, which can change between runs.
        task: Of all rows.
        id: Column with the row's id, unique. Null: data set and row number.
        limit: The first so many demonstrations that the layout keeps; null takes all.
        system: System message put before every prompt.
    """

    def __init__(
        self,
        dataset: str,
        layout: Layout,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        task: str = "downstream",
        id: str | None = None,
        limit: int | None = None,
        system: str | None = None,
    ) -> None:
        table = HubSource(
            dataset,
            split=split,
            subset=subset,
            revision=revision,
            task=None,
            default_task=task,
            id=id,
            system=system,
        )
        super().__init__(table, layout, limit)


class AnsweredPrompts(DemonstrationSource):
    """Each prompt with one of ``answers``, drawn by ``seed`` and the prompt's id.

    A policy that never refuses gives a reward nothing to reinforce. Supervised training on a few of these, mixed with
    ordinary answers (:class:`JoinedDemonstrations`), makes one that refuses now and
    then.

    Args:
        prompts: what is asked.
        answers: what may be said to it.
        seed: of the choice.
    """

    def __init__(self, prompts: PromptSource, answers: list[str], seed: int = 0) -> None:
        for answer in require.non_empty("AnsweredPrompts.answers", answers):
            require.non_empty("AnsweredPrompts.answers", answer)
        self.prompts, self.answers, self.seed = prompts, answers, seed

    def prepare(self) -> None:
        """Fetch the prompts."""
        self.prompts.prepare()

    def demonstrations(self) -> list[Demonstration]:
        """The prompts in their order, each with its answer."""
        return [Demonstration(prompt, self._answer(prompt.id)) for prompt in self.prompts.prompts()]

    def _answer(self, prompt_id: str) -> str:
        return random.Random(f"{self.seed} {prompt_id}").choice(self.answers)


class JoinedDemonstrations(Joined[DemonstrationSource], DemonstrationSource):
    """The demonstrations of several sources, one source after the other.

    Args:
        sources: At least one. Their ``limit`` sets the mixture.
    """

    def __init__(self, sources: list[DemonstrationSource]) -> None:
        super().__init__(sources)

    def demonstrations(self) -> list[Demonstration]:
        """Read every source. Raises ``ValueError`` where two of them use the same id."""
        rows = [row for source in self.sources for row in source.demonstrations()]
        check_ids([row.prompt for row in rows], "joined sources")
        return rows
