"""The flags of every command that samples models."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from codi_jax.cli.flags import Flags, Topic
from codi_jax.models.kernels.attention import Implementation
from codi_jax.pipeline.loading import DType


@dataclass(frozen=True, kw_only=True)
class MachineFlags(Flags):
    """How images are computed."""

    topic: ClassVar[Topic] = Topic.MACHINES

    dtype: DType = "auto"
    """Precision of weights and computation. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    attention: Implementation = "auto"
    """Attention kernel. auto: the fastest one on the device."""
    ccache: Path = Path("~/.cache/codi_jax/xla")
    """Cache of compiled programs, which makes the next start faster."""
