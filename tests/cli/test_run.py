"""`bitnet run` and `bitnet-cli` on a tiny random model: the text, the JSON, the errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import packed_models
import pytest
from click.testing import CliRunner, Result

from bitnet.cli.article import cli as article
from bitnet.cli.run import summary
from bitnet.source import embedded_models
from bitnet.transformer import TernaryTransformer

Bitnet = Callable[..., Result]
KEYS = {
    "kv", "reused_tokens", "speculation", "zero_skip",
    "model", "text", "token_ids", "finish_reason", "isa", "codec", "head", "threads", "load_s", "prompt_tokens", "prefill_tok_s",
    "time_to_first_token_s", "generated_tokens", "decode_tok_s", "ms_per_token", "weight_bytes_per_token", "bandwidth_gb_s",
    "peak_rss_bytes",
}  # fmt: skip


def test_the_prompt_and_its_continuation_are_on_stdout_and_the_summary_on_stderr(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("run", model_folder, "--prompt", "Once upon a time", "-n", 12, "--seed", 3)
    assert done.exit_code == 0
    assert done.stdout.startswith("Once upon a time") and done.stdout.endswith("\n") and len(done.stdout) > 18
    assert "prompt: 17 tokens, " in done.stderr and "decode: 12 tokens, " in done.stderr
    assert "first token: " in done.stderr and "load: " in done.stderr
    assert re.search(r"^zero skipping off: \d.* stay in the cache$", done.stderr, re.M)  # what "auto" decided


def test_json_is_one_object_with_exactly_the_contract_s_keys(bitnet: Bitnet, model_folder: Path) -> None:
    args = ("run", model_folder, "-p", "Once", "-n", 12, "--seed", 3, "--json")
    done = bitnet(*args)
    found = json.loads(done.stdout)  # nothing else is on stdout
    assert set(found) == KEYS
    assert found["model"] == str(model_folder) and found["prompt_tokens"] == 5
    assert found["generated_tokens"] == len(found["token_ids"]) == 12 and found["finish_reason"] == "length"
    assert found["bandwidth_gb_s"] == pytest.approx(found["weight_bytes_per_token"] * found["decode_tok_s"] / 1e9)
    assert found["kv"] == {"key_bits": 16, "value_bits": 16, "bytes_per_token": 512} and found["reused_tokens"] == 0
    assert found["peak_rss_bytes"] > 1 << 20 and found["time_to_first_token_s"] > 0
    assert json.loads(bitnet(*args, "--threads", 3).stdout)["text"] == found["text"]
    assert bitnet(*args[:-1]).stdout.rstrip("\n") == ("Once" + found["text"]).rstrip("\n")


def test_guesses_change_nothing_but_the_summary(bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_speculation import Free

    monkeypatch.setattr("bitnet.transformer.Costs", Free)
    args = ("run", model_folder, "-p", "one two one two one two", "-n", 60, "--temperature", 0)
    done = [bitnet(*args, *flag) for flag in ((), ("--speculate",), ("--no-speculate",))]
    assert [d.exit_code for d in done] == [0, 0, 0] and len({d.stdout for d in done}) == 1
    for guessing in done[:2]:
        assert re.search(r"\nspeculation: \d+ of \d+ guesses right, \d+\.\d\d tokens a forward\n$", guessing.stderr)
    assert "speculation" not in done[2].stderr
    guessed, alone = (json.loads(bitnet(*args, *flag, "--json").stdout) for flag in ((), ("--no-speculate",)))
    assert guessed["text"] == alone["text"] and alone["speculation"] is None
    assert guessed["speculation"]["drafted"] >= guessed["speculation"]["accepted"] > 0


def test_one_token_has_no_decoding_rate(bitnet: Bitnet, model_folder: Path) -> None:
    found = json.loads(bitnet("run", model_folder, "-p", "a", "-n", 1, "--json").stdout)
    assert found["decode_tok_s"] is found["ms_per_token"] is found["bandwidth_gb_s"] is None


def test_stop_is_repeatable(bitnet: Bitnet, model_folder: Path) -> None:
    args = ("run", model_folder, "-p", "Once", "-n", 30, "--seed", 3, "--json")
    text = json.loads(bitnet(*args).stdout)["text"]
    found = json.loads(bitnet(*args, "--stop", "no such text", "--stop", text[4:6]).stdout)
    assert text[4:6] not in found["text"] and text.startswith(found["text"]) and found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("args", "expected", "code"),
    [
        (("-p", ""), "error: prompt is empty; give the text to continue, for example --prompt 'Once upon a time'", 2),
        ((), "error: Missing option '--prompt' / '-p'. (see 'bitnet run --help')", 2),
        (("-p", "a", "--temperature", "-1"), "error: temperature is -1.0; expected a number >= 0 (0 is greedy)", 2),
        (("-p", "a", "--temperature", "nan"), "error: temperature is nan; expected a number >= 0 (0 is greedy)", 2),
        (("-p", "a", "--top-p", "0"), "error: top_p is 0.0; expected a number above 0, at most 1 (1 is off)", 2),
        (("-p", "a", "--seed", "-4"), "error: seed is -4; expected an integer >= 0, or none for a fresh one", 2),
        (("-p", "a", "-n", "0"), "error: max_new_tokens is 0; expected a whole number >= 1", 2),
        (("-p", "a", "--threads", "0"), "error: threads is 0; expected a whole number >= 1", 2),
        (("-p", "a", "--kv-bits", "5"), "error: kv_bits is 5; expected 16, 8 or 4", 2),
        (("-p", "a", "--stop", ""), "error: stop has an empty string; every stop string needs at least one character", 2),
        (
            ("-p", "a" * 70000),
            "error: prompt has 70001 tokens, the model's context holds 65536 and one must be left to generate; "
            "shorten it to at most 65535 tokens",
            2,
        ),
    ],
)
def test_bad_usage_is_one_line(bitnet: Bitnet, model_folder: Path, args: tuple[str, ...], expected: str, code: int) -> None:
    done = bitnet("run", model_folder, *args)
    assert (done.stderr, done.stdout, done.exit_code) == (expected + "\n", "", code)


def test_an_unknown_option(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("run", model_folder, "-p", "a", "--nonsense")
    assert done.exit_code == 2 and done.stderr.startswith("error: No such option") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("(see 'bitnet run --help')\n")


def test_the_embedded_model_is_the_default(bitnet: Bitnet) -> None:
    if not embedded_models():
        pytest.skip("no embedded model in this tree yet: it is written by `bitnet train`")
    done = bitnet("run", "-p", "Once upon a time", "-n", 20, "--seed", 1, "--json")
    found = json.loads(done.stdout)
    assert found["model"] == "tinyllm-ternary-v2" and found["codec"] in ("t2", "b3") and found["generated_tokens"] > 0


def test_damaged_models_are_one_line(bitnet: Bitnet, model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    (copy / "tokenizer.json").write_text("{")
    done = bitnet("run", copy, "-p", "a")
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "tokenizer.json" in done.stderr
    (copy / "tokenizer.json").unlink()
    done = bitnet("run", copy, "-p", "a")
    assert done.stderr == f"error: {copy}: no tokenizer.json, neither beside the weights nor in their metadata; name one (--tokenizer)\n"
    (tmp_path / "text.txt").write_text("a text " * 20)
    for words in (["run", copy, "-p", "a", "-n", "2"], ["eval", copy, "--data", tmp_path / "text.txt"]):
        assert bitnet(*words, "--tokenizer", model_folder / "tokenizer.json").exit_code == 0
    done = bitnet("run", tmp_path / "missing", "-p", "a")
    assert done.exit_code == 2 and done.stderr.startswith(f"error: no folder or file named '{tmp_path}/missing'; the embedded models are: ")
    done = bitnet("run", "", "-p", "a")
    assert done.stderr == "error: model is ''; expected a folder, a file, or an embedded model: tinyllm-ternary-v2\n"


def test_warnings_are_one_line(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("run", model_folder, "-p", "a", "-n", 2, "--threads", 999)
    assert done.exit_code == 0
    warning, then = done.stderr.split("\n")[:2]
    assert warning.startswith("warning: 999 threads on ") and then.startswith("prompt: ")


def test_undecodable_arguments_are_no_traceback(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("run", model_folder, "-p", "a\udcff", "-n", 2)
    assert done.exit_code == 0 and done.stdout.startswith("a\ufffd")


def test_an_internal_error_is_one_line_and_debug_shows_its_traceback(
    bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **also: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("bitnet.transformer.TernaryTransformer.from_pretrained", broken)
    done = bitnet("run", model_folder, "-p", "a")
    assert (done.stderr, done.exit_code) == ("internal error: RuntimeError: two lines (run again with --debug)\n", 1)
    done = bitnet("run", model_folder, "-p", "a", "--debug")
    assert "Traceback" in done.stderr and done.stderr.endswith("internal error: RuntimeError: two lines (run again with --debug)\n")


def test_out_of_memory_is_one_line(bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **also: object) -> None:
        raise MemoryError

    monkeypatch.setattr("bitnet.transformer.TernaryTransformer.from_pretrained", full)
    done = bitnet("run", model_folder, "-p", "a")
    assert (done.stderr, done.exit_code) == ("error: out of memory; use a smaller model, a shorter prompt or a smaller batch\n", 1)


def test_the_article_s_command_line(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    shutil.copy(model_folder / "tokenizer.json", tokenizer)
    args = ["--model", str(model_folder), "--tokenizer", str(tokenizer), "--prompt", "Once", "--zero-skip", "-n", "5", "--seed", "1"]
    done = CliRunner().invoke(article, args)
    assert done.exit_code == 0 and done.stdout.startswith("Once") and done.stderr.startswith("prompt: ")
    done = CliRunner().invoke(article, [*args, "--quantization", "ternary", "--ternary", "--json"])
    assert set(json.loads(done.stdout)) == KEYS
    tokenizer.unlink()
    done = CliRunner().invoke(article, args)
    assert done.stderr.splitlines()[-1] == f"error: tokenizer '{tokenizer}' cannot be read: No such file or directory"
    done = CliRunner().invoke(article, ["--prompt", "a", "--quantization", "fp4"])
    assert done.exit_code == 2 and done.stderr.startswith("error: Invalid value for '--quantization'")


def test_summary() -> None:
    timings = {"load_s": 0.056, "prompt_tokens": 5, "prefill_tok_s": 1234.56, "time_to_first_token_s": 0.314, "generated_tokens": 64}
    assert summary({**timings, "decode_tok_s": 250.0, "ms_per_token": 4.0}) == (  # type: ignore[typeddict-item]
        "prompt: 5 tokens, 1,234.6 tokens/s; decode: 64 tokens, 250.0 tokens/s (4.00 ms each)\n"
        "first token: 0.31 s after the start; load: 0.06 s"
    )
    nothing = {
        **timings,
        "generated_tokens": 0,
        "prefill_tok_s": None,
        "time_to_first_token_s": None,
        "decode_tok_s": None,
        "ms_per_token": None,
    }
    assert summary(nothing) == "prompt: 5 tokens, -; decode: 0 tokens, -\nfirst token: -; load: 0.06 s"  # type: ignore[arg-type]


def test_chat_answers_in_the_models_own_template_or_in_one_that_is_named(bitnet: Bitnet, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    args = ("run", tmp_path / "m", "-p", "Hi", "-n", 3, "--seed", 1, "--json", "--chat")
    done = bitnet(*args)
    assert done.exit_code == 2 and "the model has no chat template" in done.stderr
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    named = json.loads(bitnet(*args, "--system", "Be brief.", "--chat-template", tmp_path / "own.jinja").stdout)
    shutil.copy(tmp_path / "own.jinja", tmp_path / "m" / "chat_template.jinja")
    own = json.loads(bitnet(*args, "--system", "Be brief.").stdout)
    assert own["token_ids"] == named["token_ids"] and own["prompt_tokens"] == named["prompt_tokens"] > 20
    assert bitnet("run", tmp_path / "m", "-p", "Hi", "--system", "x").exit_code == 2
    assert "no such file" in bitnet(*args, "--chat-template", tmp_path / "none").stderr


@pytest.mark.parametrize("flags", [["--ternary"], ["--quantization", "ternary"], ["--weights", "ternary"]])
def test_ternary_is_what_weights_ternary_is(bitnet: Bitnet, tmp_path: Path, flags: list[str]) -> None:
    """Of a dense model, which is ternarized while it is loaded; a ternary one stays what it is, and other weights are another wish."""
    dense = packed_models.write(tmp_path / "dense", "llama", trits=False)
    expected = TernaryTransformer.from_pretrained(dense, weights="ternary").generate("the", max_new_tokens=5, temperature=0)
    for tool, where in ((bitnet, ["run", str(dense)]), (lambda *a: CliRunner().invoke(article, a), ["--model", str(dense)])):
        done = tool(*where, "-p", "the", "-n", "5", "--temperature", "0", *flags, "--json")
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["token_ids"] == expected.token_ids and found["codec"] in ("t2", "b3")
    measured = bitnet("bench", str(dense), "--new-tokens", "2", "--prompt-tokens", "2", "--repetitions", "1", *flags, "--json")
    assert json.loads(measured.stdout.splitlines()[-1])["codec"] in ("t2", "b3")
    if "--weights" not in flags:
        done = bitnet("run", dense, "-p", "a", "--weights", "int8", *flags)
        assert (done.stderr, done.exit_code) == ("error: --ternary and --weights int8 exclude each other (see 'bitnet run --help')\n", 2)
    assert bitnet("run", "-p", "a", "-n", "1", *flags).exit_code == 0
