"""A ternary language model as one Python object: load, generate, stream, logits."""

from __future__ import annotations

import math
import operator
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitnet.chat import ChatTemplate, Message, encode_chat, missing_template
from bitnet.errors import UsageError
from bitnet.generation import Generation, GenerationStream
from bitnet.kv import kv_format
from bitnet.machine import usable_cores
from bitnet.sampling import Sampling
from bitnet.source import EMBEDDED_MODEL, load_chat_template, load_tokenizer, resolve
from bitnet.speculation import Costs
from bitnet.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitnet.engine import Adapter, Engine
    from bitnet.models import ModelConfig
    from bitnet.prefix_cache import PrefixCache
    from bitnet.tuning import Choice
    from bitnet.zero_skip import ZeroSkip

DEFAULT_ADAPTER = "default"  # which runs wherever no other is named, if there is one
LOGITS_CHUNK = 256  # tokens whose logits are held at once


class TernaryTransformer:
    """A loaded model. Make one with `TernaryTransformer.from_pretrained()`.

    `engine`: token ids in, logits out; `tokenizer`; `load_s`: seconds it took to load; `chat_template`: None for a model without one;
    `head_tuned`: the choice of `bitnet bench --tune` by which the head is not the stored one, or None; `adapters`: by name;
    """

    head_tuned: Choice | None = None
    _same_bits = True  # in a token's logits, alone or beside others: not on devices of torch
    _zero_skip: ZeroSkip | None = None
    _zero_skip_open = False  # it is decided when the first text is asked for

    def __init__(self, engine: Engine, tokenizer: Tokenizer, load_s: float = 0.0, chat_template: ChatTemplate | None = None):
        self.engine = engine
        self.tokenizer = tokenizer
        self.load_s = load_s
        self.chat_template = chat_template
        self.adapters: dict[str, Adapter] = {}
        self._costs = Costs()
        self._deciding = threading.Lock()
        self.prefixes: PrefixCache | None = None  # of earlier generations

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = EMBEDDED_MODEL,
        *,
        kv_bits: int = 16,
        kv_group_size: int = 64,
        kv_bits_k: int | None = None,
        kv_bits_v: int | None = None,
        prefix_cache_bytes: int | None = None,
        max_context: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        zero_skip: bool | str = "auto",
        head: str | None = None,
        codec: str = "auto",
        weights: str = "stored",
        activation_group: int | None = None,
        i2_s: str = "x86",
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        file: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> TernaryTransformer:
        """Loads a model: the embedded one by its name, a folder in Hugging Face layout, one file, or "org/name" from the Hub.

        - kv_bits: bits per value of the KV cache: 16, 8 or 4 (kv_bits_k, kv_bits_v: of keys and values apart); kv_group_size: values of a
          head that share a scale in a quantized cache, a multiple of 16 that divides the head
        - prefix_cache_bytes: memory for keys and values of earlier calls, by which one that begins with the same tokens starts at once,
          with the same results, on the CPU; 0: none; None: 512 MiB
        - max_context: tokens that a sequence may hold, also more than the model was made for (docs/kv-cache.md); None: as many as that
        - device: "cpu", or "cuda", "cuda:N" or "mps" for torch (extra [train]) to compute the same in float32; logits agree, bits do not
        - threads: None for what `bitnet bench --tune` found fastest here, else one per core
        - zero_skip: rows and columns of the feed-forward that meet a zero are not read; True, False, or "auto" where it is measured to pay
        - weights: of the linear layers, "stored" (block formats of other programs become int8), "f16" with float32 activations, or "int8",
          "int4", "fp4", "binary" or "ternary": quantized while loading, as `bitnet.ternary` defines them. Embedding and head are `head`'s
        - activation_group: inputs that share an int8 step where weights are integers; 0: one step per token; None: what the weights want
        - i2_s: "arm" for a GGUF whose I2_S tensors a build of bitnet.cpp for Arm wrote; the file does not tell (`bitnet doctor` tries it)
        - head: "stored", or "int8" or "int4" (quantized while loading: faster, not exact); None for what tuning chose, else as stored
        - codec: of ternary layers in memory, "t2" or "b3", with the same results; "auto" for what tuning chose, else base-3 on AVX-512 VBMI
        - tokenizer: a tokenizer.json instead of the model's own
        - revision, file: of a model from the Hub, its branch, tag or commit ("main"), and one .gguf or .safetensors of it
        - adapter: a low-rank adapter (PEFT's folder, or llama.cpp's GGUF), which runs beside the weights; adapters: several, {name: path},
          of which each request names one; "default" is the name of the one that needs no naming

        Raises `UsageError` for arguments, `FormatError` for damaged files, `UnsupportedModelError` for what this build cannot run exactly.
        """
        from bitnet.engine import check_codec
        from bitnet.models import canonical, open_checkpoint
        from bitnet.models.config import with_context
        from bitnet.models.peft import read_adapter
        from bitnet.sample import center_keys
        from bitnet.tuning import Settings, settle
        from bitnet.weights import as_stored_if_ternary, check_weights, load_engine
        from bitnet.zero_skip import decide

        check_options(device=device, threads=threads, zero_skip=zero_skip)
        kv = kv_format(kv_bits, kv_bits_k, kv_bits_v, kv_group_size)
        context = None if max_context is None else _integer("max_context", max_context, at_least=1)
        budget = None if prefix_cache_bytes is None else _integer("prefix_cache_bytes", prefix_cache_bytes, at_least=0)
        check_weights(weights, activation_group, "stored" if head is None else head)
        check_codec(codec)
        if not isinstance(adapters, (Mapping, type(None))):
            raise UsageError(f"adapters is {adapters!r}; expected a name and a path for each: {{'style': 'adapters/style'}}")
        if adapter is not None and DEFAULT_ADAPTER in (adapters or {}):
            raise UsageError(f"adapters has {DEFAULT_ADAPTER!r}, and adapter={adapter!r} goes by that name too; leave one of them out")
        if device != "cpu" and (threads is not None or codec != "auto"):
            raise UsageError(f"{'threads' if threads is not None else 'codec'} is for device='cpu'; leave it out with device={device!r}")
        if device != "cpu" and budget:
            raise UsageError(f"prefix_cache_bytes is for device='cpu'; leave it out with device={device!r}")
        if device != "cpu" and kv.quantized:
            raise UsageError(f"kv_bits below 16 are for device='cpu'; leave them out with device={device!r}")
        elsewhere = None if device == "cpu" else model_on(device)
        path = resolve(source, revision, file)
        start = time.perf_counter()
        checkpoint = open_checkpoint(path, i2_s)
        found = canonical(checkpoint)
        kv.group(found.config.head_dim)
        if context is not None:
            found = replace(found, config=with_context(found.config, context))
        weights = as_stored_if_ternary(weights, checkpoint, found)
        as_tuned = weights == "stored" and activation_group is None and elsewhere is None  # what was measured
        use = settle(path, codec, head, threads) if as_tuned else Settings(codec, head or "stored", threads)
        loaded = load_tokenizer(checkpoint, found.config.vocab_size, tokenizer)  # first: the memory of its making is given back
        paths = dict(adapters or {}) | ({} if adapter is None else {DEFAULT_ADAPTER: adapter})
        parts = {name: read_adapter(folder, found.config).parts for name, folder in paths.items()}
        engine = load_engine(
            checkpoint, threads=use.threads, head=use.head, codec=use.codec, weights=weights, activation_group=activation_group,
            model=found, model_elsewhere=elsewhere,
        )  # fmt: skip
        engine.kv = kv
        if kv.key_bits < 16:
            center_keys(engine, loaded)
        prefixes = prefix_cache(engine, budget) if elsewhere is None else None
        model = cls(engine, loaded, time.perf_counter() - start, load_chat_template(checkpoint))
        model.prefixes = prefixes
        model.adapters = {name: engine.adapter(low_ranks) for name, low_ranks in parts.items()}
        model._same_bits = elsewhere is None
        if zero_skip == "auto" and engine.can_skip_zeros:
            model._zero_skip_open = True  # to look takes longer than to load
        else:
            model._zero_skip = decide(engine, zero_skip, [])
        if zero_skip is True and model._zero_skip is not None and not model._zero_skip.on:
            warnings.warn(f"nothing to skip: {model._zero_skip.why}; it runs dense, with the same result", stacklevel=2)
        model.head_tuned = use.tuned if use.head_tuned and use.head != "stored" else None
        return model

    @property
    def zero_skip(self) -> ZeroSkip | None:
        """What is decided about skipping zeros, "auto" by the first text that is asked for, or by this; None where nobody decides."""
        if self._zero_skip_open:
            from bitnet.zero_skip import TEXT, decide

            with self._deciding:
                if self._zero_skip_open:
                    self._zero_skip, self._zero_skip_open = decide(self.engine, "auto", self.tokenizer.encode(TEXT)), False
        return self._zero_skip

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """One more adapter, or another one by this name; running generations keep theirs. Raises as `from_pretrained` does."""
        from bitnet.models.peft import read_adapter

        made, old = self.engine.adapter(read_adapter(path, self.engine.config).parts), self.adapters.get(name)
        self.adapters[name] = made
        if old is not None and self.prefixes is not None:
            self.prefixes.forget(old)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        adapter: str | None = DEFAULT_ADAPTER,
        speculate: bool | str = "auto",
    ) -> Generation:
        """Continues `prompt`: a text, or the messages of a conversation ({"role": ..., "content": ...}) in the model's own chat template.

        The same seed gives the same text, for any number of threads; temperature 0 is greedy. `adapter`: the name of one of `adapters`, or
        None for the model alone. `speculate`: guess tokens by what followed the same ones before, and check several in one forward where
        that is measured to pay; the text is the same. "auto": on the CPU, where logits are the same to the bit; True: on any device.

        Ends with finish_reason "stop" at the end of the text or before a `stop` string, with "length" after `max_new_tokens` or at the
        end of the context. Raises `UsageError` for an empty prompt, one that fills the context, and values out of range.
        """
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            adapter=adapter,
            speculate=speculate,
        )
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        adapter: str | None = DEFAULT_ADAPTER,
        speculate: bool | str = "auto",
    ) -> GenerationStream:
        """As `generate`, but gives the text in pieces as it comes: `for piece in model.stream(...)`. Arguments are checked at once.

        A piece is never empty nor cut inside a character; text that may become a stop string is held back. `.generation` of the
        returned stream is the result so far.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
        )
        count = _integer("max_new_tokens", max_new_tokens, at_least=1)
        stops = _stop_strings(stop)
        ids = self._prompt_ids(prompt)
        _ = self.zero_skip
        return GenerationStream(
            self.engine,
            self.tokenizer,
            ids,
            max_new_tokens=count,
            sampling=sampling,
            stops=stops,
            load_s=self.load_s,
            adapter=self._adapter(adapter),
            costs=self._costs if self._speculates(speculate) else None,
            prefixes=self.prefixes,
        )

    def logits(self, token_ids: Sequence[int] | NDArray[np.integer[Any]], *, adapter: str | None = DEFAULT_ADAPTER) -> NDArray[np.float32]:
        """Teacher-forced logits: float32 [tokens, vocab]; row i scores what follows token_ids[: i + 1].

        Raises `UsageError` for no tokens, more than the context holds, or ids outside the vocabulary.
        """
        rows = list(self.iter_logits(token_ids, adapter=adapter))
        return rows[0].copy() if len(rows) == 1 else np.concatenate(rows)

    def iter_logits(
        self, token_ids: Sequence[int] | NDArray[np.integer[Any]], *, adapter: str | None = DEFAULT_ADAPTER
    ) -> Iterator[NDArray[np.float32]]:
        """`logits` in blocks of at most 256 rows, so that a long text need not hold [tokens, vocab] at once."""
        ids = self._checked(token_ids)
        cache = self.engine.sequence(self._adapter(adapter))
        return (self.engine.forward([(cache, ids[at : at + LOGITS_CHUNK])], all_logits=True) for at in range(0, len(ids), LOGITS_CHUNK))

    def _speculates(self, speculate: bool | str) -> bool:
        if not (isinstance(speculate, bool) or speculate == "auto"):
            raise UsageError(f"speculate is {speculate!r}; expected True, False or 'auto'")
        return speculate if isinstance(speculate, bool) else self._same_bits

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None or (name == DEFAULT_ADAPTER and name not in self.adapters):
            return None
        if not isinstance(name, str) or name not in self.adapters:
            raise UsageError(
                f"no adapter is called {name!r}; there are: {', '.join(self.adapters) or 'none, for from_pretrained was given none'}"
            )
        return self.adapters[name]

    def _prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("prompt is empty; give the text to continue, for example --prompt 'Once upon a time'")
            ids = self.tokenizer.encode(prompt)
            if len(ids) <= len(self.tokenizer.prefix_ids):
                raise UsageError("prompt has no tokens in this model's vocabulary; give the text to continue")
        else:
            ids = self._chat_ids(prompt)
        context = self.engine.config.max_context
        if len(ids) >= context:
            raise UsageError(
                f"prompt has {len(ids)} tokens, the model's context holds {context} and one must be left to generate; "
                f"shorten it to at most {context - 1} tokens"
            )
        return ids

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(message, Mapping) for message in messages):
            raise UsageError(f"prompt is of type {type(messages).__name__}; expected text, or a list of messages with role and content")
        if self.chat_template is None:
            raise missing_template("this model")
        ids = encode_chat(self.tokenizer, self.chat_template, messages)
        if not ids:
            raise UsageError("the chat template gives an empty prompt for these messages; use a plain prompt")
        return ids

    def _checked(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[int]:
        try:
            ids = [operator.index(token) for token in token_ids]
        except TypeError:
            raise UsageError("token_ids are not whole numbers; expected a flat sequence of token ids") from None
        config = self.engine.config
        if not ids:
            raise UsageError("token_ids is empty; expected at least one token id")
        if len(ids) > config.max_context:
            raise UsageError(f"token_ids has {len(ids)} tokens, the model's context holds {config.max_context}")
        bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary of {config.vocab_size} tokens (0 to {config.vocab_size - 1})")
        return ids


def check_options(
    *,
    device: str = "cpu",
    threads: int | None = None,
    zero_skip: bool | str = "auto",
) -> None:
    """Raises `UsageError` for an option that is wrong or that this build does not have; warns about one that has no effect."""
    if not (isinstance(device, str) and re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device)):
        raise UsageError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if not (isinstance(zero_skip, bool) or zero_skip == "auto"):
        raise UsageError(f"zero_skip is {zero_skip!r}; expected True, False or 'auto'")
    if threads is not None:
        from bitnet.engine import MOST_THREADS

        count, cores = _integer("threads", threads, at_least=1), usable_cores()
        if count > MOST_THREADS:
            raise UsageError(f"threads is {count}; expected 1 to {MOST_THREADS} (this machine has {cores} cores)")
        if count > cores:
            warnings.warn(f"{count} threads on {cores} cores: more threads than cores are slower, not faster", stacklevel=3)


def prefix_cache(engine: Engine, budget_bytes: int | None) -> PrefixCache | None:
    """None for a budget of 0. Raises `UsageError` for one below a page; the default budget is then none."""
    from bitnet.prefix_cache import DEFAULT_BYTES, PAGE_TOKENS, PrefixCache

    if budget_bytes is None:
        budget_bytes = DEFAULT_BYTES if engine.kv_bytes_per_token * PAGE_TOKENS <= DEFAULT_BYTES else 0
    return PrefixCache(engine, budget_bytes) if budget_bytes else None


def model_on(device: str) -> Callable[[ModelConfig, int], Any]:
    """What makes a model on a torch device, for `load_engine`. Raises `UsageError` where torch or the device is missing."""
    try:
        from bitnet.train.device import TorchModel, torch_device
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(f"device is {device!r}, which needs torch: pip install 'bitnet-ternary[train]'; 'cpu' does without") from None
    place = torch_device(device)
    return lambda config, activation_group: TorchModel(config, place, activation_group)


def _stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    if not isinstance(stop, (str, Sequence, type(None))):
        raise UsageError(f"stop is {stop!r}; expected a text, or a list of texts")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        what = "an empty string" if "" in stops else "something that is no text"
        raise UsageError(f"stop has {what}; every stop string needs at least one character")
    return stops


def _integer(name: str, value: Any, *, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -math.inf  # type: ignore[assignment]
    if isinstance(value, bool) or number < at_least:
        raise UsageError(f"{name} is {value!r}; expected a whole number >= {at_least}")
    return number
