"""The data of tamper resistance: attacks to simulate, what should hold against them, and what should be kept."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from frpo.data.demonstrations.batch import EncodedDemonstration, encode_demonstrations
from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.data.module import RowsDataModule
from frpo.data.preferences.sources import JudgedSource
from frpo.foundation import require
from frpo.tar.attacks import Attack, EncodedPair, OrderedPairs, TamperLoader
from frpo.types import Demonstration, Stage


class TamperDataModule(RowsDataModule):
    """Attacks, safeguard and rows to keep for :class:`~frpo.tar.module.TamperResistance`.

    Args:
        attacks: the attacks that are simulated, by name.
        safeguard: pairs of the answer that should stay and the one an attacker wants, which no attack should contain.
        train: what the policy should keep doing.
        val: pairs of the validation loop, on which the unattacked policy is measured.
        attacks_per_step: attacks of an outer step, each from the weights at its start.
        batch_size: rows per rank of a batch to keep, of each step of an attack, and of the pairs held against it.
        val_batch_size: pairs of validation per rank and batch; null takes ``batch_size``.
        max_length: tokens that prompt and answer may have together; longer rows are left out.
        seed: of the attacks, and of the order of the rows.
    """

    training = TamperLoader
    ordered = OrderedPairs
    example = "frpo.data.demonstrations.sources.FileDemonstrations"
    module_class = "frpo.tar.module.TamperResistance"

    def __init__(
        self,
        attacks: dict[str, Attack],
        safeguard: JudgedSource,
        train: DemonstrationSource | None = None,
        val: JudgedSource | None = None,
        attacks_per_step: int = 1,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_length: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__({"train": train, "val": val}, batch_size=batch_size, val_batch_size=val_batch_size, seed=seed)
        require.non_empty("TamperDataModule.attacks", attacks, "write name: {source, learning_rates}")
        for name, source in (("safeguard", safeguard), ("val", val)):
            if source is not None and source.responses != 2:
                raise ValueError(
                    f"TamperDataModule.{name}: {type(source).__name__} gives labelled responses, expected pairs such "
                    "as frpo.data.preferences.sources.Preferences gives: the refusal chosen, the harmful answer "
                    "rejected"
                )
        self.attacks, self.safeguard = attacks, safeguard
        self.attacks_per_step = require.number("TamperDataModule.attacks_per_step", attacks_per_step, at_least=1)
        self.max_length = require.number("TamperDataModule.max_length", max_length, at_least=1)
        self._attacks: dict[str, tuple[Attack, list[EncodedDemonstration]]] = {}
        self._pairs: list[EncodedPair] = []

    def prepare_data(self) -> None:
        """Let all sources fetch what they read, on one process of each machine."""
        super().prepare_data()
        self.safeguard.prepare()
        for attack in self.attacks.values():
            attack.source.prepare()

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """Read and tokenize the rows to keep, with attacks and safeguard, or the pairs of ``val``."""
        source = self.sources[stage]
        if isinstance(source, JudgedSource):
            return self._encoded_pairs(source, stage, tokenizer)
        assert isinstance(source, DemonstrationSource)
        for name, attack in self.attacks.items():
            self._attacks[name] = attack, self._encoded(attack.source, f"attack {name}", tokenizer)
        self._pairs = self._encoded_pairs(self.safeguard, "safeguard", tokenizer)
        return self._encoded(source, stage, tokenizer)

    def _encoded(
        self, source: DemonstrationSource, name: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[EncodedDemonstration]:
        rows = encode_demonstrations(source.demonstrations(), tokenizer)
        lengths = [len(row.ids) for row in rows]
        return self.short(name, rows, lengths, limit=self.max_length, option="max_length", noun="rows")

    def _encoded_pairs(self, source: JudgedSource, name: str, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
        examples = source.examples()
        chosen, rejected = (
            encode_demonstrations([Demonstration(e.prompt, e.responses[k]) for e in examples], tokenizer)
            for k in range(2)
        )
        pairs = [EncodedPair(*pair) for pair in zip(chosen, rejected, strict=True)]
        lengths = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
        return self.short(name, pairs, lengths, limit=self.max_length, option="max_length", noun="pairs")

    def stream(self) -> dict[str, Any]:
        """See :class:`~frpo.tar.attacks.TamperLoader`."""
        return {"attacks": self._attacks, "pairs": self._pairs, "attacks_per_step": self.attacks_per_step}
