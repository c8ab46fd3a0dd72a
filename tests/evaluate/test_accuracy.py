"""What integer arithmetic costs, measured on small random models whose exact path is known."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet.errors import UsageError
from bitnet.evaluate.accuracy import GROUPS, head_cost, losses
from bitnet.models import open_checkpoint
from bitnet.source import EMBEDDED_MODEL, resolve
from bitnet.weights import load_engine

random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
IDS = np.random.default_rng(0).integers(0, 200, 90).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A qwen3 one of whose channels is 300 times as large as the others, as real models have them."""
    model = random_models.qwen3(seed=1)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[7] *= 300
    return open_checkpoint(random_models.save(model, tmp_path_factory.mktemp("m")))


def test_every_way_to_run_a_model_is_measured(checkpoint) -> None:  # type: ignore[no-untyped-def]
    seen: list[tuple[int, int]] = []
    exact, *others = losses(checkpoint, IDS, threads=1, progress=lambda done, total: seen.append((done, total)))
    assert (exact.weights, exact.activations, exact.kl, exact.top1, exact.default) == ("f16", "float32", 0.0, 1.0, True)
    assert [loss.activations for loss in others] == [f"int8 per {f'{g} inputs' if g else 'token'}" for g in GROUPS]
    assert all(loss.weights == "int8" and 0 < loss.kl < 1 and not loss.default for loss in others)
    assert others[0].kl > 2 * others[-1].kl, "an outlier costs one step per token more than one step per 32 inputs"
    assert seen[-1] == (len(IDS) - 1, len(IDS) - 1)


def test_perplexity_and_kl_by_hand(checkpoint) -> None:  # type: ignore[no-untyped-def]
    exact, per_token, *_ = losses(checkpoint, IDS, threads=2)

    def log_softmax(**options: object) -> np.ndarray:
        engine = load_engine(checkpoint, threads=1, **options)  # type: ignore[arg-type]
        z = engine.forward([(engine.sequence(), IDS[:-1])], all_logits=True).astype(np.float64)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    p, q = log_softmax(weights="f16"), log_softmax(weights="int8", activation_group=0)
    assert exact.perplexity == pytest.approx(np.exp(-p[np.arange(len(p)), IDS[1:]].mean()))
    assert per_token.perplexity == pytest.approx(np.exp(-q[np.arange(len(q)), IDS[1:]].mean()))
    assert per_token.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert per_token.top1 == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_a_bitnet_model_has_one_way_to_run() -> None:
    embedded = open_checkpoint(resolve(EMBEDDED_MODEL))
    with pytest.raises(UsageError, match="there is no other path to compare"):
        losses(embedded, [1, 2, 3])
    for options in ({"weights": "f16"}, {"activation_group": 32}):
        with pytest.raises(UsageError, match="runs as trained only"):
            load_engine(embedded, **options)  # type: ignore[arg-type]


def test_what_a_quantized_head_costs() -> None:
    embedded = open_checkpoint(resolve(EMBEDDED_MODEL))
    stored, int8 = (load_engine(embedded, threads=1, head=head) for head in ("stored", "int8"))
    same = head_cost(stored, stored, IDS)
    assert (same.top1_agreement, same.kl_nats, same.tokens) == (1.0, 0.0, len(IDS))
    cost = head_cost(stored, int8, IDS * 18)
    assert 0.9 < cost.top1_agreement < 1 and 0 < cost.kl_nats < 0.1 and cost.tokens == 1024  # the context
    p, q = (e.forward([(e.sequence(), IDS)], all_logits=True).astype(np.float64) for e in (stored, int8))
    p, q = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)) for z in (p, q))
    by_hand = head_cost(stored, int8, IDS)
    assert by_hand.kl_nats == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert by_hand.top1_agreement == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
