"""L1 on the gates: its gradient, and nothing else."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from bitnet.train.gate_l1 import penalize_gates  # noqa: E402


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
