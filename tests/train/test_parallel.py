"""Two processes against one: the same batch cut in two, checkpoints that any number of processes reads."""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")
yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (extra [train])")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

from mini_recipe import MINI  # noqa: E402

from bitnet.train import checkpoint  # noqa: E402

# In float32, AdamW: gradients are sums of the same terms in another order, off by about 1e-6 of their size. AdamW divides by their root
# mean square, so an element moves by at most the rate (0.002) a step, and where a gradient is all rounding the two may move apart by twice
# that; elsewhere by 1e-6 of it. So the norms of the weights agree far below 1e-3, and single ones to 2 * 6 steps * 0.002.
RATE, STEPS = 0.002, 6
CLOSE = 1e-3


def config_at(folder: Path, **training: Any) -> Path:
    path = folder / "mini.yaml"
    settings = {"steps": STEPS, "batch_tokens": 256, "optimizer": "adamw", "matrix_lr": RATE, "vector_lr": RATE, "bf16": False}
    path.write_text(yaml.safe_dump({**MINI, "scheme": "fp16", "training": {**MINI["training"], **settings, **training}}))
    return path


def train(count: int, config: Path, corpus: Path, out: Path, environment: dict[str, str], *more: str) -> dict[str, Any]:
    """The newest checkpoint of a run by `count` processes."""
    words = ["-m", "bitnet", "train", "--config", str(config), "--data", str(corpus), "--out", str(out), *more]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-addr", "127.0.0.1", "--master-port", port]
    done = subprocess.run(
        [sys.executable, *launcher, *words] if count > 1 else [sys.executable, *words],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": pretrain, ") == 1 and done.stderr.count("loss ") <= 1  # one process speaks for all
    state = checkpoint.newest(out)
    assert state is not None and (out / "model" / "model.safetensors").is_file()
    return state


def losses(out: Path) -> list[float]:
    return [float(r["loss"]) for r in csv.DictReader((out / "log.csv").open())]


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest norm of a parameter's difference, by its norm."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_match_one_with_twice_the_batch(corpus: Path, tmp_path: Path, process_environment: dict[str, str], how: str) -> None:
    config = config_at(tmp_path)
    one = train(1, config, corpus, tmp_path / "one", process_environment)
    two = train(2, config, corpus, tmp_path / "two", process_environment, "--parallel", how)
    assert distance(two["model"], one["model"]) < CLOSE
    assert max(float((two["model"][n] - p).abs().max()) for n, p in one["model"].items()) <= 2 * STEPS * RATE
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    # a checkpoint of two, taken up by one, and the other way round
    for out in (tmp_path / "one", tmp_path / "two"):
        (out / f"checkpoint-{STEPS}.pt").unlink()
    assert distance(train(1, config, corpus, tmp_path / "two", process_environment)["model"], one["model"]) < CLOSE
    again = train(2, config, corpus, tmp_path / "one", process_environment, "--parallel", how)
    assert distance(again["model"], one["model"]) < CLOSE


def test_muon_and_ternary_layers_under_fsdp(corpus: Path, tmp_path: Path, process_environment: dict[str, str]) -> None:
    """Muon orthogonalizes in bfloat16, and trits flip: the curve agrees, not every weight."""
    config = config_at(tmp_path, optimizer="muon", matrix_lr=0.01)
    config.write_text(config.read_text().replace("scheme: fp16", "scheme: ternary"))
    train(1, config, corpus, tmp_path / "one", process_environment)
    train(2, config, corpus, tmp_path / "two", process_environment, "--parallel", "fsdp")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.01)


def test_a_batch_that_cannot_be_cut_is_refused(corpus: Path, tmp_path: Path, process_environment: dict[str, str]) -> None:
    config = config_at(tmp_path, batch_tokens=96)
    with pytest.raises(AssertionError, match=r"a step has 3 windows of 32 tokens for 2 processes; expected a multiple of them"):
        train(2, config, corpus, tmp_path / "two", process_environment)
