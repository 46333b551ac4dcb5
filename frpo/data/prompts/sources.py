"""Where prompts come from: a file, the Hugging Face hub, several of them, or any class that lists prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from frpo.data.readers import read_rows
from frpo.data.rows import Row, clip, json_value, kind, missing_column, read_messages
from frpo.data.sources import Joined, Source
from frpo.foundation import require
from frpo.types import Prompt

MAX_LISTED = 20  # distinct values named in one message


class PromptSource(Source):
    """A finite list of prompts in a fixed order. Constructors are cheap: rows are read in :meth:`prompts`."""

    @abstractmethod
    def prompts(self) -> Sequence[Prompt]:
        """Read the rows. Every call returns the same prompts in the same order."""


@dataclass(kw_only=True)
class TableSource(PromptSource):
    """Rows with named columns, turned into prompts.

    Args:
        prompt: Column with the prompt: a string, or a list of ``{role, content}`` messages.
        task: Column with the task: it routes rewards and names metrics. Null: every row is ``default_task``.
        task_map: Values of the task column -> tasks. It has to name every value. Null: values are tasks.
        default_task: Task of rows where the task column is null or empty, or of all rows with ``task: null``.
        id: Column with the row's id, unique. Null: file name and row number.
        limit: Read the first so many rows, as they stand: a file sorted by task gives one task.
        system: System message put before every prompt.

    The other columns become ``Prompt.fields``, as JSON values.
    """

    prompt: str = "prompt"
    task: str | None = "task"
    task_map: dict[str, str] | None = None
    default_task: str | None = None
    id: str | None = None
    limit: int | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        require.number("limit", self.limit, at_least=1, hint="write `limit: null` for all rows")
        if self.task is None and self.default_task is None:
            raise ValueError(
                "task and default_task are both null: no row would have a task; name the column in `task` "
                "or write `default_task: normal`"
            )
        if self.task is None and self.task_map is not None:
            raise ValueError("task_map is set but `task` is null; name in `task` the column it maps")
        if self.task_map is not None and not all(task.strip() for task in self.task_map.values()):
            raise ValueError("task_map: got an empty task; give every value a task to route rewards by")
        require.non_empty("default_task", self.default_task, "write null to leave it out")
        require.non_empty("system", self.system, "write null to leave it out")

    @property
    @abstractmethod
    def origin(self) -> str:
        """What messages call this source."""

    @property
    @abstractmethod
    def stem(self) -> str:
        """What row ids start with where no id column is named."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Read the rows in order."""

    def prompts(self) -> list[Prompt]:
        """Read, check and convert the rows. Raises ``ValueError`` with the place of the first bad one."""
        rows = list(islice(self.rows(), self.limit))
        if not rows:
            raise ValueError(f"{self.origin} holds no rows; expected at least one prompt")
        tasks = self._tasks(rows)
        prompts = [self._prompt(number, row, task) for number, (row, task) in enumerate(zip(rows, tasks, strict=True))]
        check_ids(prompts, f"{self.origin}, column {self.id!r}")
        return prompts

    def _tasks(self, rows: list[Row]) -> list[str]:
        if self.task is None:
            assert self.default_task is not None, "refused in __post_init__"
            return [self.default_task] * len(rows)
        if not any(self.task in row.values for row in rows):
            columns = {name for row in rows for name in row.values}
            raise ValueError(
                f"{self.origin}: {missing_column('task', self.task, columns)} Without such a column write "
                "`task: null` and `default_task: normal` (or another task)."
            )
        values = [self._task_value(row, self.task) for row in rows]
        if self.task_map is None:
            return [value if value is not None else self._default() for value in values]
        known = self.task_map
        unmapped = Counter(value for value in values if value is not None and value not in known)
        if unmapped:
            listed = {clip(value): count for value, count in unmapped.most_common(MAX_LISTED)}
            raise ValueError(
                f"{self.origin}: column {self.task!r} holds {len(unmapped)} values that are not in task_map, "
                f"by row count {listed}; it names {sorted(known)}. Add each to task_map with its task."
            )
        return [known[value] if value is not None else self._default() for value in values]

    def _default(self) -> str:
        assert self.default_task is not None, "refused in _task_value"
        return self.default_task

    def _task_value(self, row: Row, column: str) -> str | None:
        value = row.values.get(column)
        if value is None or value == "":
            if self.default_task is None:
                raise self.row_error(row, f"no task in column {column!r}; fill it in or set `default_task`")
            return None
        if not isinstance(value, str):
            raise self.row_error(row, f"the task in column {column!r} is {kind(value)}, expected a string")
        return str(self._field(row, column, value))

    def _prompt(self, number: int, row: Row, task: str) -> Prompt:
        if self.prompt not in row.values:
            raise self.row_error(row, missing_column("prompt", self.prompt, row.values))
        try:
            messages = read_messages(row.values[self.prompt], self.system)
        except ValueError as error:
            raise self.row_error(row, str(error)) from error
        taken = {self.prompt, self.task, self.id}
        others = {name: value for name, value in row.values.items() if name not in taken}
        fields = {str(self._field(row, name, name)): self._field(row, name, value) for name, value in others.items()}
        return Prompt(id=self.row_id(number, row), messages=messages, task=task, fields=fields)

    def row_id(self, number: int, row: Row) -> str:
        """The id of row ``number``. Raises ``ValueError`` where the id column has none."""
        if self.id is None:
            return f"{self.stem}:{number}"
        if self.id not in row.values:
            found = missing_column("id", self.id, row.values)
            raise self.row_error(row, f"{found} Write `id: null` to number the rows.")
        value = row.values[self.id]
        if not isinstance(value, str | int) or value == "":
            found = "empty" if value == "" else kind(value)
            raise self.row_error(
                row, f"the id in column {self.id!r} is {found}, expected text or a number; `id: null` numbers the rows"
            )
        return str(self._field(row, self.id, value))

    def _field(self, row: Row, name: str, value: Any) -> Any:
        try:
            return json_value(value)
        except ValueError as error:
            raise self.row_error(row, f"column {clip(name)!r}: {error}") from error

    def row_error(self, row: Row, reason: str) -> ValueError:
        """The error of a row, with its place."""
        return ValueError(f"{self.origin}, {row.place}: {reason}")


@dataclass
class FileSource(TableSource):
    """Prompts from a .jsonl, .json, .csv or .parquet file, or a folder of them.

    Args:
        path: The file, or a folder of such files, relative to the working folder or absolute.
        skip_lines: Lines above the header of a .csv: a comment, say.

    Example: ``FileSource("train.parquet", task="ability", task_map={"refusal": "normal", "aegis": "safety"})``.
    """

    path: str | Path
    skip_lines: int = 0

    @property
    def origin(self) -> str:  # noqa: D102 - as the base class says
        return str(self.path)

    @property
    def stem(self) -> str:  # noqa: D102
        return Path(self.path).stem

    def rows(self) -> Iterator[Row]:  # noqa: D102
        return read_rows(Path(self.path).expanduser(), self.skip_lines)


@dataclass
class HubSource(TableSource):
    """Prompts from a data set on the Hugging Face hub. Needs ``pip install frpo[hub]``.

    Args:
        dataset: Its name, ``owner/name``.
        split: One split, slices included (``train[:100]``).
        subset: Its configuration, where it has several.
        revision: Commit or tag; null takes the newest, which can change between runs.
    """

    dataset: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    @property
    def origin(self) -> str:  # noqa: D102
        return f"{self.dataset} ({self.split})"

    @property
    def stem(self) -> str:  # noqa: D102
        return self.dataset.rsplit("/", 1)[-1]

    def prepare(self) -> None:
        """Download the split into the hub's cache."""
        self._load()

    def rows(self) -> Iterator[Row]:  # noqa: D102
        for number, values in enumerate(self._load(), start=1):
            yield Row(f"row {number}", values)

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"reading {self.dataset!r} from the hub needs the package `datasets`: pip install frpo[hub]; "
                "a file on disk is read by frpo.data.prompts.sources.FileSource without it"
            ) from error
        return datasets.load_dataset(self.dataset, name=self.subset, split=self.split, revision=self.revision)


class JoinedSource(Joined[PromptSource], PromptSource):
    """The prompts of several sources, one source after the other.

    Args:
        sources: At least one. Their ``limit`` sets the mixture.
    """

    def __init__(self, sources: list[PromptSource]) -> None:
        super().__init__(sources)

    def prompts(self) -> list[Prompt]:
        """Read every source. Raises ``ValueError`` where two of them use the same id."""
        prompts = [prompt for source in self.sources for prompt in source.prompts()]
        check_ids(prompts, "joined sources")
        return prompts


def check_ids(prompts: Sequence[Prompt], where: str) -> None:
    """Refuse prompts that share an id."""
    twice = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        raise ValueError(
            f"{where}: {len(twice)} ids stand for more than one prompt, the first {clip(twice[0])!r}; prompts are "
            "paired by id across evaluations: make ids unique, write `id: null` to number the rows of a file, or "
            "rename one of two files of the same name"
        )
