"""A module, data and parts small enough to run a whole command in a test; configurations name them by class_path."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Shape(ABC):
    """An abstract part."""

    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def __init__(self, side: float = 1.0, name: str = "square") -> None:
        self.side, self.name = side, name

    def area(self) -> float:
        return self.side**2


class Oblong(Shape):
    def __init__(self, width: float, height: float = 1.0, name: str = "oblong") -> None:
        if width <= 0:
            raise ValueError(f"Oblong.width: got {width}, expected > 0")
        self.width, self.height, self.name = width, height, name

    def area(self) -> float:
        return self.width * self.height


class Many(Shape):
    def __init__(self, parts: dict[str, Shape]) -> None:
        self.parts = parts

    def area(self) -> float:
        return sum(part.area() for part in self.parts.values())


class Labelled(Shape):
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def area(self) -> float:
        return 0.0


@dataclass
class Extra:
    rank: int = 4
    targets: list[str] | str = "all"


class Line(LightningModule):
    """Fits a line; keeps what it was built with in ``seen.json`` of the run's folder."""

    def __init__(
        self,
        shape: Shape | None = None,
        extra: Extra | None = None,
        lr: float = 0.01,
        mode: Literal["fast", "slow"] = "fast",
        label: str = "line",
        optimizer: OptimizerCallable = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["shape", "extra", "optimizer"])
        self.automatic_optimization = False
        self.shape, self.extra, self.lr, self.mode, self.label = shape, extra, lr, mode, label
        self.optimizer = optimizer
        self.layer = nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).pow(2).mean())
        optimizer.step()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/reward", self.layer(batch[0]).mean())

    def on_train_end(self) -> None:
        seen = {"lr": self.lr, "rate": self.optimizers().param_groups[0]["lr"], "steps": self.global_step}
        Path(self.trainer.default_root_dir, "seen.json").write_text(json.dumps(seen))


class Points(LightningDataModule):
    def __init__(self, count: int = 8, path: str = "points") -> None:
        super().__init__()
        self.count, self.path = count, path

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(self.count, 1)), batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()
