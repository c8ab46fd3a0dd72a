"""Is a model's output noise, and which of the known mistakes would explain it?

A model that is computed wrongly still writes words. What gives it away is how badly it predicts plain English, in bits per byte, which
compares models of any vocabulary. But a robust one bears a wrong activation, permuted rows or inverted scales without becoming noise:
measured here, gemma-3-270m goes from 0.90 to 1.24 with SiLU for GELU, the embedded model from 1.26 to 1.80 with its q and k rows read in
the other order. So unless a model is known, or beyond doubt, each known mistake is undone in turn and the text read again: the file was
written with the mistake whose undoing helps.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bitnet.errors import BitNetError
from bitnet.evaluate.perplexity import Progress, Score, score_text
from bitnet.models import LINEARS, Canonical, Checkpoint, ModelConfig, Quantization
from bitnet.models.gguf import as_written_on_arm
from bitnet.tokenizer import Tokenizer
from bitnet.transformer import TernaryTransformer
from bitnet.weights import load_engine

TOKENS = 400  # of the text that are read
BEYOND_DOUBT, WEAK, NOISE = 1.0, 2.2, 3.0  # bits per byte of plain English: below, from, from
CLEAR = 0.08  # bits per byte by which a trial has to be better
# Or the mean probability of the tokens, where bits per byte stay as they are: a wrong activation flattens the logits, which costs the right
# tokens probability and saves bits on the others. Three standard errors of the difference between relu2 and SiLU, 0.0067 over TOKENS tokens
# of the embedded model, token by token; it is 0.030. Hits are too coarse: 14 more of 400.
CLEAR_PROBABILITY = 0.02
THETAS = (10_000.0, 500_000.0, 1_000_000.0)


@dataclass(frozen=True)
class Known:
    """What a model makes of the first TOKENS tokens of the built-in text when it is computed right, as measured with this program."""

    name: str
    bits_per_byte: float
    accuracy: float
    bits_within: float  # what other kernels, or other quantizations of the same weights, may differ by
    accuracy_within: float

    def agrees(self, score: Score) -> bool:
        bits, hits = abs(score.bits_per_byte - self.bits_per_byte), abs(score.next_token_accuracy - self.accuracy)
        return bits <= self.bits_within and hits <= self.accuracy_within


KNOWN = {  # fingerprint() -> what to expect
    ("bitnet", 11, 256, 4096, 3316059451): Known("tinyllm-ternary-v2", 1.244, 0.368, 0.02, 0.015),
    ("gemma3_text", 18, 640, 262_144, 163486456): Known("gemma-3-270m (GGUF)", 0.897, 0.400, 0.06, 0.03),
}
# (architecture, layers, width, vocabulary) -> (WikiText-2 perplexity, of what). As quoted, without its protocol: within a fifth is alike.
PUBLISHED = {("bitnet", 30, 2560, 128_256): (17.11, "bitnet-b1.58-2B-4T")}


def fingerprint(checkpoint: Checkpoint, model: Canonical) -> tuple[str, int, int, int, int]:
    """Tells a model by its sizes and the bytes of its last norm, which every quantization leaves alone."""
    config, norm = model.config, checkpoint.tensors[model.names["final_norm"]]
    return config.architecture, config.n_layers, config.hidden_size, config.vocab_size, zlib.crc32(norm.raw().tobytes())


@dataclass(frozen=True)
class Trial:
    """The checkpoint read in one other way."""

    what: str  # "activation relu2 instead of silu"
    cause: str  # what the file's writer did, if it helps
    advice: str
    checkpoint: Checkpoint
    model: Canonical


def measure(checkpoint: Checkpoint, model: Canonical, tokenizer: Tokenizer, text: str, progress: Progress | None = None) -> Score:
    """What the model makes of `text`, read in the way that `model` says."""
    return score_text(TernaryTransformer(load_engine(checkpoint, model=model), tokenizer), text, progress)


def beginning(text: str, tokenizer: Tokenizer, context: int) -> str:
    """The text's first TOKENS tokens, or as many as one window of the model's context holds."""
    ends = tokenizer.encode_with_ends(text)[1]
    return text[: ends[min(TOKENS, context - len(tokenizer.prefix_ids), len(ends)) - 1]]


def trials(checkpoint: Checkpoint, model: Canonical) -> list[Trial]:
    """Every known mistake that this checkpoint could hold, undone."""
    configs = list(_other_configs(model.config, checkpoint.layout))
    found = [Trial(what, cause, advice, checkpoint, replace(model, config=config)) for what, cause, advice, config in configs]
    return found + list(_other_weights(checkpoint, model))


def _other_configs(c: ModelConfig, layout: str) -> Iterator[tuple[str, str, str, ModelConfig]]:
    place = "config.json" if layout == "hf" else "the metadata"
    act = {"gelu_tanh": "gelu_pytorch_tanh"}
    for activation in ("relu2", "silu", "gelu_tanh"):
        if activation != c.activation:
            what, cause = f"activation {activation} instead of {c.activation}", f"the model was trained with {activation}"
            advice = f'set "hidden_act" to "{act.get(activation, activation)}" in config.json'
            if layout == "gguf":
                advice = "a GGUF file cannot say so: take the original model's safetensors"
            yield what, cause, advice, replace(c, activation=activation)
    pairs = ("halves", "neighbours")
    yield (
        f"rope over {pairs[not c.rope_interleaved]} instead of {pairs[c.rope_interleaved]}",
        "the rows of q and k are "
        + ("not permuted as this architecture's are" if c.rope_interleaved else "permuted as GGUF's llama has them"),
        "convert the original model again with a converter that knows the architecture, or permute the rows back",
        replace(c, rope_interleaved=not c.rope_interleaved),
    )
    meant, stored = ("w", "1 + w") if c.norm_offset else ("1 + w", "w")
    yield (
        f"norm weights as {meant} instead of {stored}",
        f"the norm weights are kept as {'1 + w already' if c.norm_offset else 'w, to be used as 1 + w'}",
        f"{'subtract 1 from' if c.norm_offset else 'add 1 to'} every norm weight, or convert the original model again",
        replace(c, norm_offset=1.0 - c.norm_offset),
    )
    for theta in THETAS:
        if theta != c.rope.theta:
            yield (
                f"rope theta {theta:g} instead of {c.rope.theta:g}",
                f"the model was trained with a rope base of about {theta:g}",
                f"set the rope base to the original model's in {place}",
                replace(c, rope=replace(c.rope, theta=theta)),
            )
    scale = 1.0 if c.embedding_scale != 1 else c.hidden_size**0.5
    yield (
        f"embedding times {scale:.4g} instead of {c.embedding_scale:.4g}",
        f"the embedding is {'scaled already' if scale == 1 else 'to be scaled by sqrt(hidden_size)'}",
        "convert the original model again",
        replace(c, embedding_scale=scale),
    )


def _other_weights(checkpoint: Checkpoint, model: Canonical) -> Iterator[Trial]:
    tensors, names = checkpoint.tensors, model.names
    classes = {tensor.linear_class for tensor in tensors.values() if tensor.linear_class}
    if classes:
        turned = {"bitlinear": "autobitlinear", "autobitlinear": "bitlinear", "": ""}
        means = {"bitlinear": "divides", "autobitlinear": "multiplies"}
        now = next(iter(classes))
        other = {name: replace(tensor, linear_class=turned[tensor.linear_class]) for name, tensor in tensors.items()}
        yield Trial(
            f"linear_class {turned[now]} instead of {now}",
            f"weight_scale {means[turned[now]]}",
            f'set "linear_class" to "{turned[now]}" in config.json\'s quantization_config',
            replace(checkpoint, tensors=other),
            model,
        )
    if any(tensor.codec == "i2_s" for tensor in tensors.values()):
        yield Trial(
            "I2_S in stretches of 64 instead of 128 weights",
            "the file was written by a build of bitnet.cpp for Arm",
            "run it with --i2-s arm (from Python: i2_s='arm'), or convert the original model again",
            as_written_on_arm(checkpoint),
            model,
        )
    dense = [name for ours, name in names.items() if ours.rpartition(".")[2] in LINEARS and tensors[name].scheme in ("f32", "f16", "bf16")]
    if dense and (model.quantization is None or model.quantization.online):
        online = model.quantization is None
        yield Trial(
            "weights ternarized at load instead of as stored" if online else "weights as stored instead of ternarized at load",
            "the weights are a BitNet model's masters" if online else "the weights are no masters of ternary ones",
            "add the original model's quantization_config" if online else "remove quantization_config",
            checkpoint,
            replace(model, quantization=Quantization(online=True) if online else None),
        )
    swapped = {
        f"layers.{i}.{a}": names[f"layers.{i}.{b}"] for i in range(model.config.n_layers) for a, b in (("gate", "up"), ("up", "gate"))
    }
    yield Trial(
        "gate and up exchanged",
        "the names of gate_proj and up_proj are exchanged",
        "exchange the two names in every layer",
        checkpoint,
        replace(model, names=names | swapped),
    )


def tried(found: list[Trial], tokenizer: Tokenizer, text: str, progress: Progress | None = None) -> list[tuple[Trial, Score]]:
    """Each trial's score; a trial that cannot be computed is left out."""
    scores = []
    for done, trial in enumerate(found):
        try:
            scores.append((trial, measure(trial.checkpoint, trial.model, tokenizer, text)))
        except BitNetError:
            continue
        finally:
            if progress:
                progress(done + 1, len(found))
    return scores


def cause(first: Score | None, scores: list[tuple[Trial, Score]], known: Known | None) -> tuple[Trial, Score] | None:
    """The trial that explains `first` (None: no finite logits), or None. A known model's has to give what is known of it."""
    if known is not None:
        matching = [pair for pair in scores if known.agrees(pair[1])]
        if matching:
            return min(matching, key=lambda pair: abs(pair[1].next_token_accuracy - known.accuracy))
    if not scores:
        return None
    least = min(scores, key=lambda pair: pair[1].bits_per_byte)
    if least[1].bits_per_byte < WEAK and (first is None or least[1].bits_per_byte < first.bits_per_byte - CLEAR):
        return least
    if first is None or first.bits_per_byte >= WEAK:
        return None
    level = [pair for pair in scores if pair[1].bits_per_byte < first.bits_per_byte + CLEAR / 4]
    better = [pair for pair in level if pair[1].mean_probability > first.mean_probability + CLEAR_PROBABILITY]
    return max(better, key=lambda pair: pair[1].mean_probability, default=None)
