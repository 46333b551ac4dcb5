"""What the server of :mod:`forks` imports once, so that its forks need not."""

import mlflow.tracking  # noqa: F401
import peft  # noqa: F401
import sharded_runs  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import frpo.cli.evaluate
import frpo.cli.parsing
import frpo.cli.training
import frpo.models.export
import frpo.run.end_together
import frpo.tiny.policy  # noqa: F401
