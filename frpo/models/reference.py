"""The frozen reference of the KL term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from frpo.models.policy import Policy, disable_dropout

REFERENCE_ADAPTER = "reference"


class Reference(ABC):
    """What the policy is held close to."""

    @abstractmethod
    def load(self, policy: Policy, model: Any) -> Any:
        """Build a frozen model beside the policy's ``model``; None where the policy's own weights serve."""

    @abstractmethod
    def active(self, model: Any, frozen: Any) -> AbstractContextManager[Any]:
        """A context that gives the model to run as the reference; ``frozen`` is what :meth:`load` returned."""

    @abstractmethod
    def starts_at_policy(self, policy: Policy) -> bool:
        """Whether policy and reference are one at step 0, so that their KL must be 0 there."""


class AdapterDisabled(Reference):
    """The policy with its adapter switched off: no second copy of the weights. Needs ``policy.adapter``."""

    def load(self, policy: Policy, model: Any) -> Any:
        """See :class:`Reference`."""
        _needs_adapter(self, policy)
        return None

    @contextmanager
    def active(self, model: Any, frozen: Any) -> Iterator[Any]:
        """See :class:`Reference`."""
        with model.disable_adapter():
            yield model

    def starts_at_policy(self, policy: Policy) -> bool:
        """True for a fresh adapter, which adds nothing until it is trained."""
        return policy.adapter is not None and policy.adapter.path is None


class FrozenCopy(Reference):
    """A second model that is never trained.

    Args:
        path: directory or hub id of the reference; null copies the policy's own starting weights (adapter off).
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def load(self, policy: Policy, model: Any) -> Any:
        """See :class:`Reference`."""
        return self.frozen(policy.load_base(self.path), model)

    def frozen(self, frozen: Any, model: Any) -> Any:
        """``frozen`` as the reference of ``model``; ``ValueError`` where their vocabularies differ."""
        size, expected = frozen.config.vocab_size, model.config.vocab_size
        if size != expected:
            raise ValueError(
                f"reference FrozenCopy.path: {self.path!r} has a vocabulary of {size}, the policy one of {expected}; "
                "their KL is defined over one vocabulary: choose a reference of the policy's family"
            )
        return frozen.requires_grad_(False).eval()

    def active(self, model: Any, frozen: Any) -> AbstractContextManager[Any]:
        """See :class:`Reference`."""
        assert frozen is not None, "FrozenCopy.active needs the model that load() built"
        return nullcontext(frozen)

    def starts_at_policy(self, policy: Policy) -> bool:
        """True for the policy's own weights without an adapter that was trained before."""
        return self.path in (None, policy.path) and (policy.adapter is None or policy.adapter.path is None)


class NamedAdapter(Reference):
    """The policy's base weights under another adapter, kept frozen beside the one that trains.

    Args:
        path: a PEFT adapter directory for the same base model.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, policy: Policy, model: Any) -> Any:
        """See :class:`Reference`."""
        self.check(policy)
        model.load_adapter(self.path, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        disable_dropout(model)
        return None

    def check(self, policy: Policy) -> None:
        """Raise ``ValueError`` for a policy without an adapter, ``FileNotFoundError`` where ``path`` holds none."""
        _needs_adapter(self, policy)
        if not (Path(self.path) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"reference NamedAdapter.path: got {self.path!r}, expected a PEFT adapter directory "
                "(adapter_config.json and adapter_model.safetensors)"
            )

    @contextmanager
    def active(self, model: Any, frozen: Any) -> Iterator[Any]:
        """See :class:`Reference`."""
        trained = model.active_adapter
        model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter(trained)

    def starts_at_policy(self, policy: Policy) -> bool:
        """True where the policy starts from the same adapter."""
        return policy.adapter is not None and policy.adapter.path == self.path


def _needs_adapter(reference: Reference, policy: Policy) -> None:
    if policy.adapter is None:
        raise ValueError(
            f"reference {type(reference).__name__}: the policy trains all its weights and has no adapter; write "
            "`reference: {class_path: frpo.models.reference.FrozenCopy}`, or give the policy an adapter"
        )
