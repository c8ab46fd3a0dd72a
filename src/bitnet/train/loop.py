"""The training loop: fixed number of steps, warm-up, constant, then linear decay to zero, resumable at any checkpoint.

Matrices are optimized by Muon (momentum, orthogonalized; K. Jordan 2024), which `torch.optim` carries; the embedding and the norms by
AdamW. Both share one schedule. During the decay the texts are mixed by a second set of weights: what a model sees last shapes it most.
"""

from __future__ import annotations

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bitnet.train.data import Source, sample_windows


@dataclass
class Schedule:
    """What the loop needs to know; every field comes from the recipe."""

    steps: int
    batch_tokens: int  # per step
    context: int  # tokens per window, until the decay
    decay_context: int  # tokens per window while the rate decays
    seed: int
    matrix_lr: float
    vector_lr: float  # embedding and norms
    weight_decay: float
    warmup_steps: int
    decay_steps: int  # linear to zero at the end
    mixture: dict[str, float]  # text file -> weight
    decay_mixture: dict[str, float]  # the same, while the rate decays
    snap: float = 0.5
    checkpoint_every: int = 250
    gate_l1: float = 0.0  # weight of L1 on the gates (gate_l1.py)

    def rate(self, step: int) -> float:
        """Factor on both learning rates at `step`, in (0, 1]."""
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps)

    def windows(self, step: int, sources: list[Source]) -> np.ndarray:
        """int64 [batch, context + 1]; depends on seed and step alone, so that a resumed run sees the same text."""
        decaying = step >= self.steps - self.decay_steps
        mixture, context = (self.decay_mixture, self.decay_context) if decaying else (self.mixture, self.context)
        weights = np.array([float(mixture[s.name]) for s in sources])
        rng = np.random.default_rng((self.seed, step))
        return sample_windows(sources, weights / weights.sum(), self.batch_tokens // context, context + 1, self.snap, rng)


def optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    vectors = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=schedule.matrix_lr, weight_decay=schedule.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(vectors, lr=schedule.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model: nn.Module, sources: list[Source], schedule: Schedule, out: Path, compile_model: bool = True) -> None:
    """Train `model` (a causal LM of transformers) in place; write `out/log.csv` and `out/checkpoint.pt`, resume from the latter."""
    out.mkdir(parents=True, exist_ok=True)
    optims = optimizers(model, schedule)
    first, spent_s, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(optims, state["optimizers"], strict=True):
            o.load_state_dict(s)
        first, spent_s = state["step"], state["seconds"]
        print(f"resuming at step {first}", flush=True)
    run = torch.compile(_loss, dynamic=False) if compile_model else _loss
    log_path = out / "log.csv"
    rows = list(csv.DictReader(log_path.open())) if log_path.exists() else []
    with log_path.open("w", newline="") as f:
        log = csv.DictWriter(f, ["step", "loss", "rate", "tokens", "seconds"])
        log.writeheader()
        log.writerows(r for r in rows if int(r["step"]) <= first)
        mean, started = [], time.perf_counter() - spent_s
        for step in range(first, schedule.steps):
            rate = schedule.rate(step)
            for o, base in zip(optims, (schedule.matrix_lr, schedule.vector_lr), strict=True):
                for group in o.param_groups:
                    group["lr"] = base * rate
            batch = torch.from_numpy(schedule.windows(step, sources))
            loss = run(model, batch[:, :-1], batch[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for o in optims:
                o.step()
            model.zero_grad(set_to_none=True)
            mean.append(loss.item())
            done = step + 1
            if done % 10 == 0 or done == schedule.steps:
                seconds = time.perf_counter() - started
                row = {"step": done, "loss": f"{np.mean(mean):.4f}", "rate": f"{rate:.4f}", "seconds": f"{seconds:.1f}"}
                log.writerow(row | {"tokens": done * schedule.batch_tokens})
                f.flush()
                print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                mean = []
            if done % schedule.checkpoint_every == 0 or done == schedule.steps:
                _save(checkpoint, model, optims, done, time.perf_counter() - started)


def _loss(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits  # [batch, context, vocab]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _save(path: Path, model: nn.Module, optims: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    beside = path.with_suffix(".writing")
    with beside.open("wb") as f:
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optims], "step": step, "seconds": seconds}, f)
        f.flush()
        os.fsync(f.fileno())
    beside.replace(path)
