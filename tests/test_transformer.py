"""Generation over a fake engine that says a given text, so that every token and error is known."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

import bitnet
from bitnet.chat import ChatTemplate
from bitnet.errors import BitNetError, UsageError
from bitnet.generation import PREFILL_CHUNK, Generation, StopFilter
from bitnet.source import resolve
from bitnet.tokenizer import Tokenizer
from bitnet.transformer import LOGITS_CHUNK, TernaryTransformer, check_options

BOS, VOCAB = 0, 257


def byte_tokenizer() -> Tokenizer:
    """BOS (also the end of text) is 0; the other tokens are bytes."""
    library = Library(
        models.BPE(vocab={"<s>": BOS} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer.from_json(library.to_str().encode(), VOCAB, {BOS})


TOKENIZER = byte_tokenizer()


class FakeSequence(list[int]):
    def truncate(self, n: int) -> None:
        del self[n:]


class FakeEngine:
    """Continues whatever it is given with `script` (ids), over and over, by what stands `prompt_tokens` after the start."""

    isa, codec, threads, weight_bytes_per_token = "scalar", "t2", 1, 1000

    def __init__(self, script: Sequence[int], max_context: int = 512, sharpness: float = 50.0):
        self.config = SimpleNamespace(vocab_size=VOCAB, max_context=max_context)
        self.script, self.sharpness = list(script), sharpness
        self.calls: list[int] = []  # tokens of each forward
        self.interrupt_at: int | None = None  # call that Ctrl-C stops
        self.prompt_tokens: int | None = None

    def sequence(self, adapter: Any = None) -> FakeSequence:
        return FakeSequence()

    def forward(self, batch: list[tuple[FakeSequence, Sequence[int]]], all_logits: bool = False) -> np.ndarray:
        rows = []
        for sequence, ids in batch:
            if len(self.calls) == self.interrupt_at:
                raise KeyboardInterrupt
            self.calls.append(len(ids))
            for token in ids:
                sequence.append(int(token))
                row = np.zeros(VOCAB, np.float32)
                row[self.script[(len(sequence) - (self.prompt_tokens or 0)) % len(self.script)]] = self.sharpness
                rows.append(row)
        return np.stack(rows if all_logits else rows[-1:])


def model(text: str, prompt: str = "a", **engine: Any) -> TernaryTransformer:
    """A model that continues `prompt` with `text` and the end of text."""
    fake = FakeEngine([*TOKENIZER.encode(text, add_special=False), BOS], **engine)
    fake.prompt_tokens = len(TOKENIZER.encode(prompt))
    return TernaryTransformer(fake, TOKENIZER, load_s=0.5)  # type: ignore[arg-type]


def calls(m: TernaryTransformer) -> list[int]:
    return m.engine.calls  # type: ignore[attr-defined, no-any-return]


def test_generates_up_to_the_end_of_text() -> None:
    out = model("hello").generate("a", temperature=0)
    assert isinstance(out, Generation)
    assert (out.text, out.finish_reason) == ("hello", "stop")
    assert out.token_ids == TOKENIZER.encode("hello", add_special=False)
    assert out.timings["prompt_tokens"] == 2 and out.timings["generated_tokens"] == 5 and out.timings["load_s"] == 0.5
    assert set(out.timings) == {
        "load_s", "prompt_tokens", "prefill_tok_s", "time_to_first_token_s", "generated_tokens", "decode_tok_s", "ms_per_token",
    }  # fmt: skip


def test_length_by_count_and_by_context() -> None:
    out = model("hello").generate("a", temperature=0, max_new_tokens=3)
    assert (out.text, out.finish_reason) == ("hel", "length")
    out = model("hello", max_context=6).generate("a", temperature=0, max_new_tokens=100)
    assert (out.text, out.finish_reason, len(out.token_ids)) == ("hell", "length", 4)


def test_a_single_token_has_no_decoding_rate() -> None:
    timings = model("hello").generate("a", max_new_tokens=1).timings
    assert timings["decode_tok_s"] is None and timings["ms_per_token"] is None


def test_prompts_are_fed_in_chunks_and_the_last_token_is_not_fed() -> None:
    m = model("xy", prompt="a" * (2 * PREFILL_CHUNK + 88), max_context=4 * PREFILL_CHUNK)
    assert m.generate("a" * (2 * PREFILL_CHUNK + 88), temperature=0, max_new_tokens=2).text == "xy"
    assert calls(m) == [PREFILL_CHUNK, PREFILL_CHUNK, 89, 1]  # a BOS before the prompt


def test_an_emoji_streams_whole_and_an_unfinished_one_ends_the_text() -> None:
    assert list(model("a\U0001f98ab").stream("a", temperature=0)) == ["a", "\U0001f98a", "b"]
    assert list(model("a\U0001f98ab").stream("a", temperature=0, max_new_tokens=3)) == ["a", "\ufffd"]


def test_stop_strings_are_held_back_and_never_shown() -> None:
    m = model("one\n\ntwo")
    assert list(m.stream("a", temperature=0, stop="\n\n")) == ["o", "n", "e"]
    out = m.generate("a", temperature=0, stop=["zzz", "\n\nt", "two"])
    assert (out.text, out.finish_reason) == ("one", "stop")
    assert m.generate("a", temperature=0, stop="two!").text == "one\n\ntwo"


@settings(max_examples=300)
@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_filter_equals_a_search_in_the_whole(text: str, stops: list[str], data: st.DataObject) -> None:
    found = StopFilter(stops)
    out, rest = "", text
    while rest and not found.stopped:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + found.push(rest[:size]), rest[size:]
        assert not any(stop in out for stop in stops)
    out += found.flush()
    # The stop string that ends first wins; several that end in the same piece: the one that begins first.
    ends = [text.find(stop) for stop in stops if stop in text]
    assert found.stopped == bool(ends)
    assert text.startswith(out) and (bool(ends) or out == text)
    assert not any(stop in out for stop in stops)


def test_the_same_seed_gives_the_same_text() -> None:
    def tokens(seed: int) -> list[int]:
        return model("hello", sharpness=3.0).generate("a", seed=seed, max_new_tokens=40).token_ids

    assert tokens(1) == tokens(1) != tokens(2)


def test_what_there_is_so_far_survives_ctrl_c() -> None:
    m = model("hello")
    m.engine.interrupt_at = 3  # type: ignore[attr-defined]
    stream, pieces = m.stream("a", temperature=0), []
    with pytest.raises(KeyboardInterrupt):
        for piece in stream:
            pieces.append(piece)
    assert pieces == ["h", "e", "l"]
    assert (stream.generation.text, stream.generation.finish_reason) == ("hel", None)


def test_surrogates_in_a_prompt_are_no_traceback() -> None:
    assert model("x", prompt="a\ufffd").generate("a\udcff", temperature=0).text == "x"


def test_logits_are_teacher_forced_and_chunked() -> None:
    m = model("hello", max_context=1000)
    rows = m.logits(np.arange(600) % VOCAB)
    assert rows.shape == (600, VOCAB) and rows.dtype == np.float32
    assert calls(m) == [LOGITS_CHUNK, LOGITS_CHUNK, 600 - 2 * LOGITS_CHUNK]
    assert m.logits([1]).shape == (1, VOCAB)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m: m.generate(""), "prompt is empty; give the text to continue, for example --prompt 'Once upon a time'"),
        (lambda m: m.generate(3), "prompt is of type int; expected text, or a list of messages with role and content"),
        (
            lambda m: m.generate("a" * 511),
            "prompt has 512 tokens, the model's context holds 512 and one must be left to generate; shorten it to at most 511 tokens",
        ),
        (lambda m: m.generate("a", max_new_tokens=0), "max_new_tokens is 0; expected a whole number >= 1"),
        (lambda m: m.generate("a", max_new_tokens=1.5), "max_new_tokens is 1.5; expected a whole number >= 1"),
        (lambda m: m.stream("a", temperature=-1), "temperature is -1; expected a number >= 0 (0 is greedy)"),
        (lambda m: m.generate("a", stop=""), "stop has an empty string; every stop string needs at least one character"),
        (lambda m: m.generate("a", stop=["x", 3]), "stop has something that is no text; every stop string needs at least one character"),
        (lambda m: m.generate("a", stop=3), "stop is 3; expected a text, or a list of texts"),
        (lambda m: m.generate("a", adapter=[]), "no adapter is called []; there are: none, for from_pretrained was given none"),
        (lambda m: m.logits([]), "token_ids is empty; expected at least one token id"),
        (lambda m: m.logits([0, 257]), "token id 257 is outside the vocabulary of 257 tokens (0 to 256)"),
        (lambda m: m.logits([-1]), "token id -1 is outside the vocabulary of 257 tokens (0 to 256)"),
        (lambda m: m.logits([0] * 513), "token_ids has 513 tokens, the model's context holds 512"),
        (lambda m: m.logits([0.5]), "token_ids are not whole numbers; expected a flat sequence of token ids"),
    ],
)
def test_bad_arguments(call: Callable[[TernaryTransformer], Any], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        call(model("hello"))
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kv_bits": 5}, "kv_bits is 5; expected 16, 8 or 4"),
        ({"kv_bits": None}, "kv_bits is None; expected 16, 8 or 4"),
        ({"kv_bits": 4.0}, "kv_bits is 4.0; expected 16, 8 or 4"),
        ({"kv_bits": np.array([4])}, "kv_bits is array([4]); expected 16, 8 or 4"),
        ({"kv_bits_v": 8.0}, "kv_bits_v is 8.0; expected 16, 8 or 4"),
        ({"prefix_cache_bytes": True}, "prefix_cache_bytes is True; expected a whole number >= 0"),
        ({"max_context": True}, "max_context is True; expected a whole number >= 1"),
        ({"kv_bits_k": 3}, "kv_bits_k is 3; expected 16, 8 or 4"),
        ({"kv_bits_v": True}, "kv_bits_v is True; expected 16, 8 or 4"),
        ({"kv_group_size": 0}, "kv_group_size is 0; expected a whole number >= 1, a multiple of 16 that divides the model's heads"),
        ({"device": "gpu"}, "device is 'gpu'; expected 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        ({"device": "cuda", "threads": 1}, "threads is for device='cpu'; leave it out with device='cuda'"),
        ({"device": "mps", "codec": "t2"}, "codec is for device='cpu'; leave it out with device='mps'"),
        ({"device": "cuda", "prefix_cache_bytes": 1 << 30}, "prefix_cache_bytes is for device='cpu'; leave it out with device='cuda'"),
        (
            {"adapter": "a", "adapters": {"default": "b"}},
            "adapters has 'default', and adapter='a' goes by that name too; leave one of them out",
        ),
        ({"threads": 0}, "threads is 0; expected a whole number >= 1"),
        ({"threads": "2"}, "threads is '2'; expected a whole number >= 1"),
        ({"head": "int3"}, "head is 'int3'; expected one of stored, int8, int4"),
        ({"head": []}, "head is []; expected one of stored, int8, int4"),
        ({"codec": []}, "codec is []; expected one of auto, t2, b3"),
        ({"adapters": [1]}, "adapters is [1]; expected a name and a path for each: {'style': 'adapters/style'}"),
        ({"codec": "tl2"}, "codec is 'tl2'; expected one of auto, t2, b3"),
        ({"weights": "int5"}, "weights is 'int5'; expected one of stored, f16, int8, int4, fp4, binary, ternary"),
        ({"activation_group": 40}, "activation_group is 40; expected 0 (one step per token) or a multiple of 16, such as 32"),
        ({"weights": "f16", "activation_group": 32}, "activation_group has no meaning with weights='f16', whose activations stay float32"),
        ({"zero_skip": "yes"}, "zero_skip is 'yes'; expected True, False or 'auto'"),
    ],
)
def test_bad_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        TernaryTransformer.from_pretrained("nothing-is-read", **options)
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"source": None}, "model is None; expected a folder, a file, or an embedded model: tinyllm-ternary-v2"),
        ({"source": ["x"]}, "model is ['x']; expected a folder, a file, or an embedded model: tinyllm-ternary-v2"),
        ({"tokenizer": 3}, "tokenizer is 3; expected the path of a tokenizer.json"),
        ({"adapter": 3}, "adapter is 3; expected an adapter's folder as PEFT saves it, or llama.cpp's .gguf"),
        ({"adapter": ""}, "adapter is ''; expected an adapter's folder as PEFT saves it, or llama.cpp's .gguf"),
        ({"adapters": {"a": None}}, "adapter is None; expected an adapter's folder as PEFT saves it, or llama.cpp's .gguf"),
    ],
)
def test_paths_that_are_none(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        TernaryTransformer.from_pretrained(**options)
    assert str(error.value) == expected


def test_more_threads_than_cores_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"1000 threads on \d+ cores: more threads than cores are slower, not faster"):
        check_options(threads=1000)
    with pytest.raises(UsageError, match="threads is 5000; expected 1 to 1024"):
        check_options(threads=5000)


@pytest.mark.parametrize("source", ["no-such-model", "no/such/folder", "x.gguf", "", "a\0b", "x" * 5000])
def test_a_model_that_is_not_there(source: str) -> None:
    with pytest.raises(BitNetError) as error:
        resolve(source)
    assert "embedded model" in str(error.value) or "cannot be opened" in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_an_unknown_name_lists_the_embedded_models() -> None:
    with pytest.raises(UsageError, match=re.escape("no folder, file or embedded model named 'tinylm'; the embedded models are: ")):
        resolve("tinylm")


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, bitnet; print([m for m in ('numpy', 'torch', 'tokenizers', 'click') if m in sys.modules]); bitnet.TernaryTransformer;"
        "bitnet.ternarize; print('torch' in sys.modules, bitnet.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", f"False {bitnet.__version__}"]
    with pytest.raises(AttributeError, match="module 'bitnet' has no attribute 'nothing'"):
        _ = bitnet.nothing


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <s>"}]


def test_messages_are_rendered_by_the_models_own_template() -> None:
    model = TernaryTransformer(FakeEngine(TOKENIZER.encode("yes", add_special=False)), TOKENIZER)  # type: ignore[arg-type]
    model.chat_template = ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", bos_token="<s>")
    stream = model.stream(MESSAGES, max_new_tokens=3)
    assert stream.generation.timings["prompt_tokens"] == 1 + len("[system]Be brief.[user]Hi <s>"), "what a user typed is text"
    with pytest.raises(UsageError, match="expected text, or a list of messages with role and content"):
        model.stream(["hi"])  # type: ignore[list-item]


def test_a_missing_template_is_said_never_guessed() -> None:
    model = TernaryTransformer(FakeEngine([5]), TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="this model: the model has no chat template"):
        model.stream(MESSAGES)
