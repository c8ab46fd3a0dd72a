"""Does a model run right, and if not, why not: from the file over its configuration, tokenizer and weights to what it makes of English.

Every step says what it found and goes on as far as it can, because the first thing that is wrong is seldom the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet import sample
from bitnet.errors import BitNetError, UnsupportedModelError
from bitnet.evaluate import statistics, trials
from bitnet.evaluate.finding import FAILED, OK, WARNING, Finding
from bitnet.evaluate.perplexity import Score, read_text, score_text
from bitnet.models import Canonical, Checkpoint, canonical, open_checkpoint
from bitnet.source import load_chat_template, load_tokenizer
from bitnet.tokenizer import Tokenizer
from bitnet.transformer import TernaryTransformer
from bitnet.weights import load_engine

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 7:30, and 3.5% of 1,200 is 42.",
    "Größe, naïve café, año",
    "def f(x):\n    return x  # ok",
    "日本語 and 😀",
)
CONVERSATION = [{"role": "user", "content": "Hello"}]
MUCH_UNUSED = 0.1  # share of the embedding's rows beyond the tokenizer's tokens
MANY_NEGATIVE, FEW_NEGATIVE = 0.15, 0.015  # shares of norm weights; as stored: w of 1 + w has many, w by itself hardly any

Bar = Callable[[str], Any]  # title -> a context manager that gives a Progress


@dataclass
class Diagnosis:
    """What is known so far."""

    path: Path
    where: str = ""  # the model as the user names it
    checkpoint: Checkpoint | None = None
    model: Canonical | None = None
    tokenizer: Tokenizer | None = None
    matrices: list[statistics.Matrix] = field(default_factory=list)
    score: Score | None = None
    known: trials.Known | None = None
    cause: str | None = None
    fix: str = ""
    refused: BitNetError | None = None  # why the model cannot be opened or run at all

    def of_file(self) -> Iterator[Finding]:
        """The file, what it holds, and whether this build runs it."""
        try:
            self.checkpoint = open_checkpoint(self.path)
        except BitNetError as error:
            yield self._refused("file", error)
            return
        tensors = self.checkpoint.tensors.values()
        gb = sum(tensor.nbytes for tensor in tensors) / 1e9
        size = f"{gb:.2f} GB" if gb >= 0.1 else f"{1000 * gb:.1f} MB"
        layout = {"hf": "Hugging Face", "gguf": "GGUF"}[self.checkpoint.layout]
        yield Finding("file", OK, f"{layout} layout, {len(tensors)} tensors, {size}")
        try:
            self.model = canonical(self.checkpoint)
        except BitNetError as error:
            yield self._refused("architecture", error)

    def _refused(self, what: str, error: BitNetError) -> Finding:
        self.refused = error
        needs = "nothing in the file needs repair: this build has no code for it"
        advice = needs if isinstance(error, UnsupportedModelError) else "download it again, or convert the original again"
        return Finding(what, FAILED, str(error), advice)

    def of_configuration(self) -> Iterator[Finding]:
        """What the forward pass will compute, and who says so."""
        if self.checkpoint is None or self.model is None:
            return
        c, hf, gguf = self.model.config, self.checkpoint.config, self.checkpoint.layout == "gguf"
        heads = f"{c.n_heads} heads of {c.head_dim}" + (f" ({c.n_kv_heads} for k and v)" if c.n_kv_heads != c.n_heads else "")
        yield Finding("architecture", OK, f"{c.architecture}: {c.n_layers} layers of {c.hidden_size}, feed-forward {c.ffn_size}, {heads}")
        yield Finding("vocabulary", OK, f"{c.vocab_size:,} tokens, {'tied' if c.tied else 'own'} head; context {c.max_context:,}")
        yield self._activation()
        q = self.model.quantization
        if q is not None:
            classes = {t.linear_class for t in self.checkpoint.tensors.values() if t.linear_class}
            how = "masters, ternarized at load" if q.online and not gguf else "ternary"
            scale = "".join(f"; the scale {'multiplies' if name == 'autobitlinear' else 'divides'} ({name})" for name in classes)
            yield Finding("quantization", OK, f"BitNet: {how}, int8 activations per token{scale}")
        yield self._norms()
        pairs = "neighbours (2i, 2i + 1), as GGUF's llama has its q and k rows" if c.rope_interleaved else "halves (i, i + n/2)"
        local = f", {c.rope_local.theta:g} in windowed layers" if c.rope_local else ""
        scaling = f", {c.rope.kind} scaling by {c.rope.factor:g}" if c.rope.kind != "default" else ""
        scaling += ", frequencies divided as the file says" if c.rope.divisors else ""
        yield Finding("rope", OK, f"theta {c.rope.theta:g}{local}{scaling}; pairs are {pairs}")
        seen = f"{sum(c.windowed)} of {c.n_layers} layers see {c.sliding_window} positions" if any(c.windowed) else "full"
        yield Finding("attention", OK, f"{seen}; biases: {', '.join(c.biases) or 'none'}")
        if gguf:
            yield Finding("rotation", OK, "none (no prism.hadamard keys)")
        if (
            not gguf
            and hf.get("model_type") == "bitnet"
            and c.activation == "silu"
            and "BitnetForCausalLM" not in str(hf.get("architectures"))
        ):
            yield Finding(
                "activation", WARNING, "silu is unusual: BitNet b1.58 2B-4T and later have relu2", "compare with the original's hidden_act"
            )

    def _activation(self) -> Finding:
        assert self.checkpoint is not None and self.model is not None
        activation, hf = self.model.config.activation, self.checkpoint.config
        key = next((key for key in ("hidden_act", "hidden_activation") if hf.get(key)), None)
        if self.checkpoint.layout == "hf":
            source = f"config.json: {key} {hf[key]!r}" if key else "config.json does not say: the family's default"
        elif self.model.config.architecture == "bitnet":
            source = "by the rule for BitNet GGUFs, which do not say; llama.cpp computes SiLU for all of them, as noise"
        else:
            source = "the architecture's; a GGUF file does not say"
        return Finding("activation", OK, f"{activation} ({source})")

    def _norms(self) -> Finding:
        assert self.checkpoint is not None and self.model is not None
        c = self.model.config
        named = {"sub-norms": c.sub_norms, "post-norms": c.post_norms, "q and k norms": c.qk_norms}
        kinds = "".join(f", {name}" for name, there in named.items() if there)
        detail = f"RMSNorm, eps {c.norm_eps:.3g}, weights as {'1 + w' if c.norm_offset else 'stored'}{kinds}"
        names = [theirs for ours, theirs in self.model.names.items() if ours.endswith("norm")]
        weights = [self.checkpoint.tensors[name] for name in names]
        values = np.concatenate([t.dense().reshape(-1) for t in weights if t.scheme in ("f32", "f16", "bf16")] or [np.ones(1, np.float32)])
        if not np.isfinite(values).all():
            return Finding("norms", FAILED, f"{detail}; a weight is not finite", "download it again; or training diverged")
        negative = float((values < 0).mean())
        if c.norm_offset == 0 and negative > MANY_NEGATIVE:
            return Finding("norms", WARNING, f"{detail}; {negative:.0%} of them are negative, as of w where 1 + w is meant", "see below")
        if c.norm_offset and negative < FEW_NEGATIVE and values.mean() > 0.5:
            return Finding(
                "norms", WARNING, f"{detail}; mean {values.mean():.2g}, hardly one negative: they may be 1 + w already", "see below"
            )
        return Finding("norms", OK, detail)

    def of_tokenizer(self) -> Iterator[Finding]:
        """Whether there is one, whether it is this model's, and whether text comes back as it went in."""
        if self.checkpoint is None:
            return
        vocab = self.model.config.vocab_size if self.model else 1 << 22
        try:
            self.tokenizer = tokenizer = load_tokenizer(self.checkpoint, vocab)
        except BitNetError as error:
            yield Finding("tokenizer", FAILED, str(error), "take the file from the original model")
            return
        unused = 1 - len(tokenizer) / vocab
        if self.model and unused > MUCH_UNUSED:
            detail = f"{len(tokenizer):,} tokens, the embedding has {vocab:,}: {unused:.0%} are out of reach"
            yield Finding("tokenizer", WARNING, detail, "it may be another model's")
        else:
            yield Finding("tokenizer", OK, f"{len(tokenizer):,} tokens" + (f" for {vocab:,} rows of the embedding" if self.model else ""))
        bos = ", ".join(map(str, tokenizer.prefix_ids)) or "none"
        eos = ", ".join(map(str, sorted(tokenizer.eos_ids))) or "none"
        advice = "text goes on to the limit; set eos_token_id in generation_config.json"
        yield Finding("special tokens", OK if tokenizer.eos_ids else WARNING, f"begins with {bos}; ends at {eos}", advice)
        yield self._round_trip(tokenizer)
        yield self._template(tokenizer)

    def _round_trip(self, tokenizer: Tokenizer) -> Finding:
        for sentence in SENTENCES:
            back = tokenizer.decode(tokenizer.encode(sentence, add_special=False))
            if back.strip() != sentence:
                english = sentence == SENTENCES[0]
                advice = "it belongs to another model, or is damaged" if english else "such text is not what the model will read"
                return Finding("round trip", FAILED if english else WARNING, f"{sentence!r} comes back as {back[:60]!r}", advice)
        return Finding("round trip", OK, f"{len(SENTENCES)} sentences come back as they went in")

    def _template(self, tokenizer: Tokenizer) -> Finding:
        assert self.checkpoint is not None
        try:
            template = load_chat_template(self.checkpoint)
            if template is None:
                return Finding("chat template", OK, "none: use plain prompts (a template is never guessed)")
            text = template.render(CONVERSATION)
        except BitNetError as error:
            return Finding("chat template", WARNING, str(error), "plain prompts still work; take the template from the original")
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        return Finding("chat template", OK, f"renders {CONVERSATION[0]['content']!r} as {len(ids)} tokens")

    def of_weights(self, bar: Bar) -> Iterator[Finding]:
        """Statistics of every matrix."""
        if self.checkpoint is None or self.model is None:
            return
        with bar("weights") as progress:
            found = list(statistics.matrices(self.checkpoint, self.model, progress))
        self.matrices = [item for item in found if isinstance(item, statistics.Matrix)]
        broken = [item for item in found if isinstance(item, Finding)]
        yield from statistics.grouped(broken)
        if self.matrices:
            yield from statistics.findings(self.matrices, quiet=bool(broken))

    def of_text(self, bar: Bar, data: str | None = None) -> Iterator[Finding]:
        """What it makes of plain English, and if that is doubtful, which known mistake explains it."""
        if self.checkpoint is None or self.model is None or self.tokenizer is None:
            return
        text = trials.beginning(sample.text(), self.tokenizer, self.model.config.max_context)
        self.known = trials.KNOWN.get(trials.fingerprint(self.checkpoint, self.model))
        try:
            with bar("reading") as progress:
                engine = load_engine(self.checkpoint, model=self.model)
                loaded = TernaryTransformer(engine, self.tokenizer)
                self.score = score_text(loaded, text, progress)
        except BitNetError as error:
            status = FAILED
            yield Finding("reading", status, str(error), "see the findings above")
            if isinstance(error, UnsupportedModelError):
                self.refused = error
                return
        if self.score is not None:
            yield self._reading(self.score)
            if data is not None:
                yield from self._data(loaded, data, bar)
            if self.known.agrees(self.score) if self.known else self.score.bits_per_byte < trials.BEYOND_DOUBT:
                return
        yield from self._trials(text, bar)

    def _reading(self, score: Score) -> Finding:
        bits = score.bits_per_byte
        detail = f"{bits:.2f} bits per byte of English, {score.next_token_accuracy:.0%} of {score.tokens} tokens right"
        if self.known is not None:
            known = f"{self.known.name} has {self.known.bits_per_byte:.2f} and {self.known.accuracy:.0%}"
            return Finding("reading", OK if self.known.agrees(score) else FAILED, f"{detail}; {known}", "something is read wrongly")
        if bits >= trials.NOISE:
            return Finding("reading", FAILED, detail, f"that is noise: trained models are below {trials.WEAK:g}")
        if bits >= trials.WEAK:
            return Finding("reading", WARNING, detail, f"trained models are below {trials.WEAK:g}: hardly trained, or computed wrongly")
        return Finding("reading", OK, f"{detail}; trained models are below {trials.WEAK:g}, noise is above {trials.NOISE:g}")

    def _data(self, loaded: TernaryTransformer, data: str, bar: Bar) -> Iterator[Finding]:
        assert self.model is not None
        with bar(Path(data).name) as progress:
            score = score_text(loaded, read_text(Path(data)), progress)
        detail = f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte of {Path(data).name}"
        c = self.model.config
        published = trials.PUBLISHED.get((c.architecture, c.n_layers, c.hidden_size, c.vocab_size))
        if published is None:
            yield Finding("data", OK, detail)
            return
        figure, name = published
        near = figure / 1.2 <= score.perplexity <= figure * 1.2
        advice = "if the file is WikiText-2's test set, it is computed wrongly; windows of another length explain a few per cent"
        yield Finding("data", OK if near else WARNING, f"{detail}; {name} is quoted with {figure} on WikiText-2", advice)

    def _trials(self, text: str, bar: Bar) -> Iterator[Finding]:
        assert self.checkpoint is not None and self.model is not None and self.tokenizer is not None
        candidates = trials.trials(self.checkpoint, self.model)
        with bar("known mistakes") as progress:
            scores = trials.tried(candidates, self.tokenizer, text, progress)
        found = trials.cause(self.score, scores, self.known)
        if found is None:
            ok = self.score is not None and self.score.bits_per_byte < trials.WEAK and self.known is None
            yield Finding("known mistakes", OK if ok else WARNING, f"{len(scores)} tried, none {'reads better' if ok else 'explains it'}")
            return
        trial, score = found
        self.cause, self.fix = trial.cause, trial.advice
        before = "no finite numbers"
        if self.score is not None:
            before = f"{self.score.bits_per_byte:.2f} bits per byte and {self.score.next_token_accuracy:.0%} right"
        after = f"{score.bits_per_byte:.2f} and {score.next_token_accuracy:.0%}"
        yield Finding("known mistakes", FAILED, f"with {trial.what}: {after}, not {before}", trial.advice)

    def verdict(self, broken: list[str]) -> tuple[str, str]:
        """(in plain words, what to do next). `broken`: what FAILED."""
        if isinstance(self.refused, UnsupportedModelError):
            return "this build does not run this model, and says so rather than write noise", "take a file that it runs (bitnet inspect)"
        if self.refused is not None:
            return "the file is damaged or incomplete", "compare its size with the original's, and download or convert it again"
        if self.cause is not None:
            return f"it runs, but not as it was trained: {self.cause}", self.fix
        if self.tokenizer is None:
            return (
                "there is no tokenizer that fits, so no text can go in or come out",
                "put the original's tokenizer.json beside the weights",
            )
        if self.score is None:
            return "it cannot be run", f"mend what failed: {', '.join(dict.fromkeys(broken))}"
        if self.score.bits_per_byte >= trials.WEAK:
            noise = "what it writes is noise" if self.score.bits_per_byte >= trials.NOISE else "it hardly knows English"
            why = "no known mistake explains it: untrained, damaged, or of another layout"
            return f"{noise}, and {why}", "compare the file's checksum with the original's; if they agree, report the model"
        if broken:
            return "it does not run as it should", f"mend what failed: {', '.join(dict.fromkeys(broken))}"
        return (
            f"sound: it runs, and predicts English as {'it is known to' if self.known else 'a trained model does'}",
            f"bitnet run {self.where} -p 'Once upon a time'",
        )
