"""The parts of a diagnosis: what statistics catch, which trial is believed, and what is said of GGUF files."""

from __future__ import annotations

import json
import mmap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitnet import sample
from bitnet.evaluate import statistics, trials
from bitnet.evaluate.diagnose import Diagnosis
from bitnet.evaluate.finding import FAILED, OK, Finding
from bitnet.evaluate.perplexity import Score
from bitnet.files.tensor import Tensor
from bitnet.models import canonical, open_checkpoint
from bitnet.source import EMBEDDED_MODEL, load_tokenizer, resolve

GGUF = Path(__file__).resolve().parent.parent / "golden" / "gguf"
RNG = np.random.default_rng(0)


def quiet(_: str) -> Any:
    return nullcontext(lambda done, total: None)


def tensor(values: np.ndarray) -> Tensor:
    values = values.astype(np.float32)
    data = mmap.mmap(-1, values.nbytes)
    data.write(values.tobytes())
    return Tensor("w", values.shape, "F32", "f32", "file", data, 0)


def looked_at(values: np.ndarray, kind: str = "q") -> list[Finding]:
    checkpoint: Any = SimpleNamespace(tensors={"w": tensor(values)})
    model: Any = SimpleNamespace(names={f"layers.0.{kind}": "w"})
    found = [item for item in statistics.matrices(checkpoint, model) if isinstance(item, statistics.Matrix)]
    return list(statistics.findings(found))


def test_the_built_in_text_is_plain_english() -> None:
    text = sample.text()
    assert text.isascii() and 2000 <= len(text) <= 3000 and text.startswith("Once upon a time")


def test_plausible_weights_are_ok() -> None:
    (finding,) = looked_at(0.05 * RNG.standard_normal((64, 256)))
    assert finding.status == OK


def test_ternary_values_are_ok_and_spoilt_ones_are_not() -> None:
    trits = 0.1 * RNG.integers(-1, 2, (64, 256)).astype(np.float32)
    assert [finding.status for finding in looked_at(trits)] == [OK]
    spoilt = np.where(RNG.random(trits.shape) < 0.1, 0.1 * RNG.standard_normal(trits.shape), trits)
    assert "mostly three values, but not only" in looked_at(spoilt)[0].detail


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((8, 16)), "all weights are 0"),
        (np.full((8, 16), np.nan), "NaN or infinity"),
        (100 * RNG.standard_normal((8, 16)), "rms * sqrt(inputs)"),
        (np.repeat(RNG.standard_normal((4, 16)), 2, axis=0), "50% of its rows are copies"),
    ],
)
def test_what_no_training_leaves_behind(values: np.ndarray, words: str) -> None:
    assert any(words in finding.detail for finding in looked_at(values)), looked_at(values)


def test_rows_of_the_embedding_that_were_never_trained() -> None:
    rows = RNG.standard_normal((100, 16))
    rows[90:] = 0
    (finding,) = looked_at(rows, "embedding")
    assert "10% of its rows are empty or copies" in finding.detail


def test_scales_far_apart_between_layers() -> None:
    one = statistics.Matrix("a", "q", "ternary", 0.3, 0.35, 0.35, 0.1, 1, 1.0, 1, 0, 0, False)
    (finding,) = statistics.findings([one, replace(one, scale=20.0)])
    assert "from 0.1 to 20" in finding.detail
    (finding,) = statistics.findings([replace(one, most=2)])
    assert "holds +2" in finding.detail


def score(bits: float, accuracy: float, probability: float = 0.25) -> Score:
    return Score(400, 1500, 2**bits, bits, accuracy, probability)


@pytest.mark.parametrize(
    ("first", "others", "best"),
    [
        ((3.5, 0.02), [(3.2, 0.04), (1.2, 0.4)], 1),
        ((3.5, 0.02), [(3.2, 0.04), (2.9, 0.05)], None),  # less bad, and still noise
        ((1.3, 0.35), [(1.29, 0.36), (1.5, 0.3)], None),  # no more than chance
        ((1.3, 0.35), [(1.5, 0.3), (1.1, 0.4)], 1),
        ((1.25, 0.34, 0.246), [(1.256, 0.37, 0.274), (1.24, 0.37, 0.25)], 0),  # no better by bits per byte, clearly by its confidence
        ((1.25, 0.34, 0.246), [(1.256, 0.38, 0.264)], None),  # hits are too coarse to tell
        ((1.25, 0.34, 0.246), [(1.5, 0.38, 0.3)], None),
        (None, [(9.0, 0.0), (1.2, 0.4)], 1),  # no finite logits before
        ((1.2, 0.4), [], None),
    ],
)
def test_which_trial_is_believed(first: Any, others: list[tuple[float, ...]], best: int | None) -> None:
    scores: Any = [(i, score(*other)) for i, other in enumerate(others)]
    found = trials.cause(score(*first) if first else None, scores, None)
    assert (None if found is None else found[0]) == best


def test_a_known_model_decides_by_what_is_known() -> None:
    known = trials.Known("m", 1.25, 0.38, 0.02, 0.015)
    scores: Any = [("near", score(1.26, 0.375)), ("lower", score(1.0, 0.5))]
    found = trials.cause(score(1.5, 0.3), scores, known)
    assert found is not None and found[0] == "near"


def test_every_trial_of_the_embedded_model_reads_worse() -> None:
    """The reason why the trials can be believed."""
    checkpoint = open_checkpoint(resolve(EMBEDDED_MODEL))
    model = canonical(checkpoint)
    tokenizer = load_tokenizer(checkpoint, model.config.vocab_size)
    text = trials.beginning(sample.text(), tokenizer, model.config.max_context)
    first = trials.measure(checkpoint, model, tokenizer, text)
    known = trials.KNOWN[trials.fingerprint(checkpoint, model)]
    assert known.agrees(first) and first.tokens == trials.TOKENS
    scores = trials.tried(trials.trials(checkpoint, model), tokenizer, text)
    assert len(scores) >= 9 and trials.cause(first, scores, None) is None
    assert not any(known.agrees(other) for _, other in scores)


@pytest.mark.parametrize("path", sorted(GGUF.glob("*.gguf")), ids=lambda path: path.stem)
def test_gguf_files_of_every_family(path: Path) -> None:
    diagnosis = Diagnosis(path, str(path))
    found = [*diagnosis.of_file(), *diagnosis.of_configuration(), *diagnosis.of_weights(quiet)]
    assert not [finding for finding in found if finding.status == FAILED]
    said = {finding.what: finding.detail for finding in found}
    assert said["file"].startswith("GGUF layout") and "none" in said["rotation"]
    assert ("neighbours" in said["rope"]) == path.stem.startswith("llama")
    assert ("do not say; llama.cpp computes SiLU" in said["activation"]) == path.stem.startswith("bitnet")
    assert ("q and k norms" in said["norms"]) == path.stem.startswith(("qwen3", "gemma3"))
    assert json.dumps([vars(matrix) for matrix in diagnosis.matrices])


@pytest.mark.full
def test_gemma_is_known(gemma_path: Path) -> None:
    diagnosis = Diagnosis(gemma_path, "gemma")
    for _ in (*diagnosis.of_file(), *diagnosis.of_tokenizer(), *diagnosis.of_text(quiet)):
        pass
    assert diagnosis.known is not None and diagnosis.cause is None and diagnosis.verdict([])[0].startswith("sound")
