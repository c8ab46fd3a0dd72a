"""L1 on the gates: its gradient, and nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")
pytest.importorskip("yaml", reason="pyyaml is not installed (extra [train])")
from mini_recipe import MINI  # noqa: E402
from torch import nn  # noqa: E402

from bitnet.train.gate_l1 import penalize_gates  # noqa: E402
from bitnet.train.recipe import Recipe  # noqa: E402
from bitnet.train.run import run  # noqa: E402


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return (torch.relu(self.gate_proj(x)) ** 2 * self.up_proj(x)).sum()


def test_the_gradient_is_that_of_the_mean_of_relu() -> None:
    torch.manual_seed(1)
    plain, penalized, x = FeedForward(), FeedForward(), torch.randn(7, 6)
    penalized.load_state_dict(plain.state_dict())
    assert penalize_gates(plain, 0.0) == 0 and penalize_gates(penalized, 0.5) == 1
    loss = penalized(x)
    loss.backward()
    without = plain(x)
    (without + 0.5 * torch.relu(plain.gate_proj(x)).mean()).backward()
    assert torch.equal(loss, without)
    torch.testing.assert_close(penalized.gate_proj.weight.grad, plain.gate_proj.weight.grad)
    torch.testing.assert_close(penalized.up_proj.weight.grad, plain.up_proj.weight.grad)


def test_parts_of_a_batch_add_up_to_it(corpus: Path, tmp_path: Path) -> None:
    norms = []
    for micro_batch in (0, 1):
        out = tmp_path / str(micro_batch)
        settings = {**MINI["training"], "gate_l1": 100.0, "micro_batch": micro_batch, "bf16": False, "steps": 1}
        run(Recipe.parse({**MINI, "training": settings}, "mini"), corpus, out)
        norms.append(float(next(csv.DictReader((out / "log.csv").open()))["gradient_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
