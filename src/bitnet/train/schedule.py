"""What the loop needs to know of a recipe: how many steps of how many tokens, at which rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitnet.errors import UsageError


def _limits(least: float, most: float = float("inf"), above: bool = False) -> dict[str, Any]:
    return {"least": least, "most": most, "above": above}


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, then linear decay to zero. The section `training` of a recipe."""

    steps: int = field(default=300, metadata=_limits(1, 1_000_000_000))
    batch_tokens: int = field(default=4096, metadata=_limits(1, 1_000_000_000))  # per step, of all processes together
    batch_examples: int = field(default=16, metadata=_limits(1, 1_000_000))  # per step where examples are trained on
    micro_batch: int = field(default=0, metadata=_limits(0))  # windows or examples at once in a process; 0: as many as memory allows
    context: int | None = field(default=None, metadata=_limits(2))  # tokens per window, until the decay; None: the model's
    decay_context: int | None = field(default=None, metadata=_limits(2))  # tokens per window while the rate decays; None: as before
    optimizer: str = field(default="muon", metadata={"choices": ("muon", "adamw")})  # of the matrices
    matrix_lr: float = field(default=0.01, metadata=_limits(0, 10, above=True))
    vector_lr: float = field(default=0.005, metadata=_limits(0, 10, above=True))  # embedding and norms
    weight_decay: float = field(default=0.0, metadata=_limits(0, 10))  # of the matrices
    decay_weight_decay: float | None = field(default=None, metadata=_limits(0, 10))  # while the rate decays; None: as before
    warmup_steps: int = field(default=20, metadata=_limits(1))
    decay_steps: int = field(default=100, metadata=_limits(1))  # linear to zero at the end
    blend_steps: int = field(default=0, metadata=_limits(0))  # over which layers go from full precision to their integers
    gate_l1: float = field(default=0.0, metadata=_limits(0, 1e6))  # weight of L1 on the gates of relu^2 (gate_l1.py)
    max_grad_norm: float = field(default=1.0, metadata=_limits(0, above=True))
    mixture: dict[str, float] | None = None  # text file -> weight; None: every text by its tokens
    decay_mixture: dict[str, float] | None = None  # the same, while the rate decays; None: as before
    snap: float = field(default=0.5, metadata=_limits(0, 1))
    checkpoint_every: int = field(default=100, metadata=_limits(1))  # steps
    divergence: float = field(default=3.0, metadata=_limits(0, above=True))  # nats above the best mean of 10 steps, after which it stops
    bf16: bool = True  # products in bfloat16 (autocast); else in float32
    compile: bool = True

    def rate(self, step: int) -> float:
        """Factor on both learning rates at `step`, in (0, 1]."""
        return min(1.0, (step + 1) / min(self.warmup_steps, self.steps), (self.steps - step) / min(self.decay_steps, self.steps))

    def decaying(self, step: int) -> bool:
        return step >= self.steps - self.decay_steps

    def check(self, where: str, context: int | None, windows: bool) -> None:
        """Raises `UsageError` for values that do not go together. `context`: the model's; None: not known yet. `windows`: whether a step
        takes windows of text, not examples."""
        if self.blend_steps >= self.steps:
            raise UsageError(f"{where}: training.blend_steps is {self.blend_steps}; expected less than the {self.steps} steps")
        for key in ("context", "decay_context"):
            if (found := getattr(self, key)) is not None and context is not None and found > context:
                raise UsageError(f"{where}: training.{key} is {found}, above the model's context of {context}")
            if windows and found is not None and found > self.batch_tokens:
                raise UsageError(
                    f"{where}: training.{key} is {found}, above batch_tokens {self.batch_tokens}; a step has one window at least"
                )
        if self.decay_mixture is not None and (self.mixture is None or set(self.decay_mixture) - set(self.mixture)):
            other = sorted(set(self.decay_mixture) - set(self.mixture or {}))
            raise UsageError(f"{where}: training.decay_mixture names {other[0]}, which training.mixture does not")
        for key in ("mixture", "decay_mixture"):
            if (found := getattr(self, key)) is not None and not 0 < sum(found.values()) < float("inf"):
                raise UsageError(f"{where}: training.{key} sums to {sum(found.values()):g}; expected finite weights, at least one above 0")
