"""The group, and eval, inspect, doctor and bench on a tiny random model."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import Result

from bitnet import __version__, machine
from bitnet.cli import COMMANDS
from bitnet.cli.bench.choices import (
    CODEC_NAMES,
    MODEL_HEADS,
    MODEL_WEIGHTS,
    SHAPE_ALIASES,
    SHAPE_HEADS,
    SHAPE_NAMES,
    SHAPE_WEIGHTS,
)
from bitnet.cli.eval import repeat_option
from bitnet.cli.options import EMBEDDED_MODEL
from bitnet.cli.run import command as run
from bitnet.engine import CODECS
from bitnet.errors import BitNetError, UsageError
from bitnet.machine import require_memory
from bitnet.shapes import HEADS as HEADS_OF_SHAPES
from bitnet.shapes import SHAPES
from bitnet.shapes import WEIGHTS as WEIGHTS_OF_SHAPES
from bitnet.source import EMBEDDED_MODEL as MODEL_OF_THE_LIBRARY
from bitnet.weights import HEADS, WEIGHTS

Bitnet = Callable[..., Result]


def test_what_is_written_twice_to_keep_help_quick_agrees() -> None:
    for name, line in COMMANDS.items():
        command = importlib.import_module(f"bitnet.cli.{name}").command
        assert command.name == name and command.short_help == line
    assert EMBEDDED_MODEL == MODEL_OF_THE_LIBRARY
    assert tuple(SHAPES) == SHAPE_NAMES
    assert (tuple(HEADS_OF_SHAPES), HEADS, ("auto", *CODECS)) == (SHAPE_HEADS, MODEL_HEADS, CODEC_NAMES)
    assert (WEIGHTS_OF_SHAPES, WEIGHTS) == (SHAPE_WEIGHTS, MODEL_WEIGHTS) and set(SHAPE_ALIASES.values()) <= set(SHAPES)
    weights = next(option for option in run.params if option.name == "weights")
    assert isinstance(weights.type, click.Choice) and tuple(weights.type.choices) == WEIGHTS


def test_help_version_and_wrong_commands(bitnet: Bitnet) -> None:
    done = bitnet("--help")
    assert done.exit_code == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    assert bitnet("--version").stdout == f"bitnet, version {__version__}\n"
    done = bitnet()
    assert done.exit_code == 2 and done.stderr.startswith("Usage: ") and done.stdout == ""
    done = bitnet("rnu")
    assert done.exit_code == 2 and done.stderr.startswith("error: No such command 'rnu'.") and done.stderr.count("\n") == 1
    for name in COMMANDS:
        assert bitnet(name, "--help").exit_code == 0


def test_data_takes_several_files() -> None:
    assert repeat_option(["M", "--data", "a", "b", "--json", "--data", "c"], "--data") == (
        ["M", "--data", "a", "--data", "b", "--json", "--data", "c"]
    )
    assert repeat_option(["--data=a", "-x", "1"], "--data") == ["--data=a", "-x", "1"]


def test_eval(bitnet: Bitnet, model_folder: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("Once upon a time there was a fox. " * 20)
    b.write_text("caf\u00e9")
    done = bitnet("eval", model_folder, "--data", a, b, "--json", "--max-bytes", 100)
    assert done.exit_code == 0
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [set(r) for r in results] == [{"model", "data", "tokens", "bytes", "perplexity", "bits_per_byte", "next_token_accuracy"}] * 2
    assert [(r["model"], r["data"], r["tokens"], r["bytes"]) for r in results] == [
        (str(model_folder), str(a), 100, 100), (str(model_folder), str(b), 5, 5),
    ]  # fmt: skip
    assert done.stdout.splitlines()[0].startswith(f"{a}: {results[0]['bits_per_byte']:.4f} bits per byte, perplexity ")


@pytest.mark.parametrize(
    ("args", "expected", "code"),
    [
        ((), "error: Missing option '--data'. (see 'bitnet eval --help')", 2),
        (("--data", "/no/such.txt"), "error: /no/such.txt: cannot be read as text: No such file or directory; --data takes text files", 2),
        (("--data", "/dev/null"), "error: /dev/null: no text in it; expected a UTF-8 text file", 1),
    ],
)
def test_eval_errors(bitnet: Bitnet, model_folder: Path, args: tuple[str, ...], expected: str, code: int) -> None:
    done = bitnet("eval", model_folder, *args)
    assert (done.stderr, done.exit_code) == (expected + "\n", code)


def test_inspect(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("inspect", model_folder, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["config"]["max_context"] == 1 << 16 and found["tokenizer_tokens"] == 257 and found["runs"] == "yes"
    assert found["parameters"] == 257 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * (3 * 64 + 128) + 64
    kinds = {(g["kind"], g["scheme"]): g for g in found["tensors"]}
    assert kinds["attention", "ternary"] == {"kind": "attention", "scheme": "ternary", "tensors": 8, "parameters": 32768, "bytes": 8192}
    assert kinds["embedding", "f16"]["bytes"] == 257 * 64 * 2
    assert 0.30 < found["ternary_zero_share"] < 0.37  # a third, over 80,000 random trits
    assert "zeros among the ternary weights: 33" in done.stdout and "tokenizer: 257 tokens" in done.stdout


def test_inspect_takes_nothing_that_it_does_not_use(bitnet: Bitnet, model_folder: Path, tmp_path: Path) -> None:
    for option, value in (("--data", tmp_path / "none.txt"), ("--threads", 1)):
        done = bitnet("inspect", model_folder, option, value)
        assert done.exit_code == 2 and done.stderr.startswith(f"error: {option} is for --accuracy and --zeros") and not done.stdout
    (tmp_path / "quoted.txt").write_text("\u201cOnce.\u201d", encoding="utf-8")
    assert bitnet("inspect", model_folder, "--zeros", "--data", tmp_path / "quoted.txt").exit_code == 0
    done = bitnet("inspect", model_folder, "--zeros", "--data", tmp_path / "none.txt")
    assert done.exit_code == 2 and "none.txt: cannot be read as text" in done.stderr and not done.stdout


def test_a_short_text(bitnet: Bitnet, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which more bytes may be asked for than memory holds; what is wrong with it is said of it."""
    (tmp_path / "a.txt").write_text("a few words")
    whole, many = (bitnet("eval", model_folder, "--data", tmp_path / "a.txt", *words) for words in ((), ("--max-bytes", 10**20)))
    assert many.exit_code == 0 and many.stdout == whole.stdout

    def refuse(*_: object) -> None:
        raise UsageError("leaves nothing to predict")

    monkeypatch.setattr("bitnet.evaluate.perplexity.score_text", refuse)
    done = bitnet("eval", model_folder, "--data", tmp_path / "a.txt")
    assert done.exit_code == 2 and done.stderr == f"error: {tmp_path / 'a.txt'}: leaves nothing to predict\n"


def test_inspect_describes_what_it_cannot_run(bitnet: Bitnet, model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    done = bitnet("inspect", copy, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and found["runs"].startswith("no: ") and found["config"] == {"architecture": "mamba"}
    assert bitnet("run", copy, "-p", "a").exit_code == 1


def test_doctor_on_a_sound_machine(bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.source.EMBEDDED_MODEL", str(model_folder))
    done = bitnet("doctor", "--json")
    assert done.exit_code == 0, done.stdout
    *_, last, record = done.stdout.splitlines()
    assert last == "everything works" and json.loads(record)["ok"] is True
    assert "kernel scalar    ok" in done.stdout


def test_doctor_on_broken_kernels(bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.source.EMBEDDED_MODEL", str(model_folder))
    broken = SimpleNamespace(self_test=lambda: {"avx2": "FAILED in t2", "avx512vnni": "not supported by this CPU", "scalar": "ok"})
    monkeypatch.setattr("bitnet._native", broken)
    done = bitnet("doctor")
    assert done.exit_code == 1
    assert "FAILED  kernel avx2      FAILED in t2; set BITNET_ISA=scalar, and report this machine" in done.stdout
    assert "ok      kernel avx512vnni not supported by this CPU" in done.stdout
    assert done.stdout.endswith("broken: kernel avx2\n")
    monkeypatch.setattr("bitnet._native", SimpleNamespace())
    done = bitnet("doctor")
    assert done.exit_code == 1 and "FAILED  kernels          the native module has no self-test; it is of another version: " in done.stdout


def test_doctor_reports_a_missing_model(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.source.EMBEDDED_MODEL", "no-such-model")
    done = bitnet("doctor")
    assert done.exit_code == 1 and done.stdout.endswith("broken: model\n")
    assert "FAILED  model            the embedded model no-such-model is missing from this installation; reinstall" in done.stdout


BENCH_KEYS = {
    "model", "token_ids", "finish_reason", "isa", "codec", "threads", "load_s", "prompt_tokens", "prefill_tok_s", "time_to_first_token_s",
    "generated_tokens", "decode_tok_s", "ms_per_token", "weight_bytes_per_token", "bandwidth_gb_s", "peak_rss_bytes", "shape", "head",
    "batch", "roofline_gb_s", "depth", "kv_bytes_per_token", "outside_matmul_share", "head_cost", "weights", "adapter", "zero_skip",
    "kv_cache", "kv_memory_bytes_per_token", "attention_ms",
}  # fmt: skip
QUICK = ("--prompt-tokens", 8, "--new-tokens", 4, "--repetitions", 1, "--threads", 1)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read bandwidth of 20 GB/s and no other load, without reading 2 GiB."""
    monkeypatch.setattr("bitnet.bench.speed.read_bandwidths", lambda threads: [19.0, 20.0, 20.5])
    monkeypatch.setattr(machine, "load_average", lambda: 0.0)


@pytest.mark.usefixtures("known_machine")
def test_bench_of_a_model_and_a_shape(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("bench", model_folder, *QUICK, "--batch", 3, "--json")
    assert done.exit_code == 0 and done.stderr == ""
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == BENCH_KEYS
    assert (found["model"], found["shape"], found["head"], found["batch"]) == (str(model_folder), None, "stored", 3)
    assert len(found["token_ids"]) == found["generated_tokens"] == 4 and found["roofline_gb_s"] == 20.0
    assert found["bandwidth_gb_s"] == pytest.approx(found["weight_bytes_per_token"] * found["decode_tok_s"] / 3 / 1e9)
    assert "of the 20.0 GB/s that reading alone reaches" in done.stdout and "with KV" not in done.stdout
    assert found["depth"] == 0 and found["head_cost"] is None and 0 <= found["outside_matmul_share"] <= 1
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * (1 + 2 + 3 + 4) / 4  # K and V, f16, layers, width
    done = bitnet("bench", "--shape", "article-12x512", *QUICK, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["model"], found["shape"], found["head"]) == (None, "article-12x512", "int8")
    assert found["head_cost"]["model"] == EMBEDDED_MODEL and found["head_cost"]["head"] == "int8"
    assert f"head cost  {EMBEDDED_MODEL}, as random weights cannot tell, int8 against stored: same top-1 9" in done.stdout


@pytest.mark.usefixtures("known_machine")
def test_bench_of_a_quantized_cache(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("bench", model_folder, *QUICK, "--depth", 2, "--kv-bits", 4, "--kv-bits-k", 8, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    token = 2 * 2 * (32 + 2 + 16 + 2)  # layers, heads of 32 values, a scale each
    assert (found["kv_cache"], found["kv_memory_bytes_per_token"]) == ("K8V4", token) and found["attention_ms"] > 0
    assert found["kv_bytes_per_token"] == token * (3 + 4 + 5 + 6) / 4 and f"KV cache   K8V4, {token} bytes a token" in done.stdout
    done = bitnet("bench", "--shape", "article-12x512", *QUICK, "--depth", 4100, "--max-context", 4200, "--kv-bits", 4, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and (found["depth"], found["kv_memory_bytes_per_token"]) == (4100, 12 * 8 * 2 * (32 + 2))


@pytest.mark.usefixtures("known_machine")
def test_bench_of_quantized_layers(bitnet: Bitnet, tmp_path: Path) -> None:
    found = json.loads(bitnet("bench", "--shape", "article-12x512", "--weights", "fp4", *QUICK, "--json").stdout.splitlines()[-1])
    assert (found["weights"], found["codec"], found["head"]) == ("fp4", "fp4", "int8")


@pytest.mark.usefixtures("known_machine")
def test_bench_compares_schemes(bitnet: Bitnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it draws the picture")
    picture, args = tmp_path / "six.png", ("--shape", "article-12x512", *QUICK, "--json")
    done = bitnet("bench", "--compare", "fp16,int4,ternary", "--picture", picture, *args)
    assert done.exit_code == 0 and done.stderr == ""
    table, found = done.stdout.splitlines(), json.loads(done.stdout.splitlines()[-1])
    assert [line.split()[0] for line in table[:4]] == ["scheme", "fp16", "int4", "ternary"]
    assert table[0].endswith("article: MB  ms/token") and table[1].split()[-2:] == ["192", "-"] and table[3].split()[-2:] == ["-", "8.4"]
    assert table[2].split()[-2:] == ["-", "-"] and "in turns" in done.stdout and f"picture: {picture}" in table
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [picture]
    assert (found["shape"], found["together"], found["roofline_gb_s"]) == ("article-12x512", True, 20.0)
    fp16, int4, ternary = found["rows"]
    assert [row["head"] for row in found["rows"]] == ["f16", "int8", "int8"] and int4["codec"] == "int4"
    assert fp16["weight_bytes"] > int4["weight_bytes"] > ternary["weight_bytes"] == ternary["weight_bytes_per_token"]
    for row in found["rows"]:
        assert row["bandwidth_gb_s"] == pytest.approx(row["weight_bytes_per_token"] / row["ms_per_token"] / 1e6)
        assert row["roofline_share"] == pytest.approx(row["bandwidth_gb_s"] / 20.0)
    monkeypatch.setattr("bitnet.bench.compare.available_memory_bytes", lambda: 10**8)
    monkeypatch.setattr("bitnet.bench.compare.ROOFLINE_BYTES", 0)
    done = bitnet("bench", "--compare", "int4,binary", *args, "--head", "int4")
    alone = json.loads(done.stdout.splitlines()[-1])
    assert "192" not in done.stdout.splitlines()[1].split() and "in turns" in done.stdout and alone["together"]
    monkeypatch.setattr("bitnet.bench.compare.available_memory_bytes", lambda: 10**7)
    monkeypatch.setattr("bitnet.bench.compare.require_memory", lambda what, needed: None)
    done = bitnet("bench", "--compare", "int4,binary", *args)
    assert not json.loads(done.stdout.splitlines()[-1])["together"] and "one after the other, for together they do not fit" in done.stdout


@pytest.mark.usefixtures("known_machine")
def test_a_picture_that_cannot_be_written(bitnet: Bitnet, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it draws the picture")
    args = ("--compare", "binary", "--shape", "article-12x512", *QUICK)
    for name, reason in (("none/a.png", "No such file or directory"), ("a.txt", "Format 'txt' is not supported")):
        done = bitnet("bench", *args, "--picture", tmp_path / name)
        assert done.exit_code == 1 and done.stderr.startswith(f"error: {tmp_path / name}: the picture cannot be written ({reason}")
        assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("known_machine")
def test_bench_at_a_depth_with_a_quantized_head(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("bench", model_folder, *QUICK, "--depth", 20, "--head", "int4", "--codec", "b3", "--json")
    assert done.exit_code == 0 and done.stderr == ""
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["depth"], found["head"], found["codec"]) == (20, "int4", "b3")
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * (21 + 22 + 23 + 24) / 4
    assert set(found["head_cost"]) == {"model", "head", "top1_agreement", "kl_nats", "tokens"}
    assert found["head_cost"]["model"] == str(model_folder) and 0 < found["head_cost"]["top1_agreement"] < 1
    assert "(4 tokens each after 20 tokens, " in done.stdout and "\nwith KV    " in done.stdout
    assert "\nhead cost  int4 against stored: same top-1 " in done.stdout
    other = bitnet("bench", model_folder, *QUICK, "--kv-bits", "4", "--max-context", "64", "--head", "int4", "--json")
    assert json.loads(other.stdout.splitlines()[-1])["head_cost"] == found["head_cost"]  # the head's alone


@pytest.mark.usefixtures("known_machine")
def test_bench_replays_texts_with_guesses_and_without(bitnet: Bitnet, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "replay.txt"
    file.write_text("one two three four five\n=====\none two three four five six\n" + "one two three four five " * 4)
    done = bitnet("bench", model_folder, "--speculate", "--replay", file, "--repetitions", 2, "--json")
    assert done.exit_code == 0 and done.stderr == ""
    head, names, row, record = done.stdout.splitlines()
    found = json.loads(record)
    assert set(found) == {"model", "shape", "head", "isa", "codec", "threads", "replays"} and "medians of 2 rounds, in turns" in head
    (gain,) = found["replays"]
    assert names.split()[:2] == ["text", "prompt"] and row.split()[0] == gain["name"] == str(file)
    assert gain["prompt_tokens"] > 0 and gain["tokens"] > 60 and len(gain["speedups"]) == 2 and gain["tokens_a_forward"] >= 1
    assert gain["speedup"] == pytest.approx(sum(gain["speedups"]) / 2) and gain["first_speedup"] == gain["speedups"][0]
    file.write_text("no divider")
    done = bitnet("bench", model_folder, "--speculate", "--replay", file)
    assert done.exit_code == 2
    assert done.stderr == f"error: {file}: expected a prompt, a line =====, and the text that follows the prompt\n"
    assert "--replay is for --speculate" in bitnet("bench", "--replay", file).stderr
    assert "--speculate takes no --depth; it goes with MODEL, --shape, " in bitnet("bench", "--speculate", "--depth", 3).stderr
    done = bitnet("bench", "--shape", "article-12x512", "--speculate", "--repetitions", 1)  # whose context holds all three
    assert done.exit_code == 0 and [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["summary", "edit", "story"]


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for choices, and no time to measure them."""
    monkeypatch.setattr("bitnet.tuning.tuning_file", lambda: tmp_path / "cache" / "tuning.json")
    monkeypatch.setattr("bitnet.bench.tune.MEASURE_S", 0.0)
    return tmp_path / "cache" / "tuning.json"


@pytest.mark.usefixtures("known_machine")
def test_bench_tune_decides_later_runs(bitnet: Bitnet, model_folder: Path, choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.bench.tune.LEAST_AGREEMENT", 0.0)
    rates = iter([1.0, 2.0, 3.0, 1.0, 5.0, 4.0, *[0.5] * 99])  # t2: stored, int8, int4; b3; fewer threads
    monkeypatch.setattr("bitnet.bench.tune.decode_rate", lambda engine: next(rates))
    assert "tuning           none on this machine: models run as stored" in bitnet("doctor").stdout
    done = bitnet("bench", model_folder, "--tune", "--json")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["model"], found["saved"], found["choice"]["codec"], found["choice"]["head"]) == (
        str(model_folder), str(choices), "b3", "int8",
    )  # fmt: skip
    assert (
        "(chosen)" in done.stdout and "rule:   the fastest decoding whose head agrees with the stored one on at least 99% " in done.stdout
    )
    ran = bitnet("run", model_folder, "-p", "a", "-n", 3, "--json")
    assert "head: int8, as tuned (same top-1 " in ran.stderr and "; --head stored undoes it" in ran.stderr
    assert (json.loads(ran.stdout)["head"], json.loads(ran.stdout)["codec"]) == ("int8", "b3")
    ran = bitnet("run", model_folder, "-p", "a", "-n", 3, "--json", "--head", "stored")
    assert "tuned" not in ran.stderr and json.loads(ran.stdout)["head"] == "stored"
    assert json.loads(bitnet("run", model_folder, "-p", "a", "-n", 3, "--json", "--weights", "int8").stdout)["head"] == "stored"
    text = choices.parent / "text"
    text.write_text("Once upon a time")
    assert bitnet("eval", model_folder, "--data", text).stderr.startswith("head: int8, as tuned (same top-1 ")
    benched = bitnet("bench", model_folder, *QUICK, "--json")
    assert "head int8 (as tuned)" in benched.stdout and json.loads(benched.stdout.splitlines()[-1])["head"] == "int8"
    told = bitnet("doctor").stdout
    assert f"ok      tuning           {model_folder} (" in told and "codec b3, head int8 (same top-1 " in told


def test_doctor_on_damaged_choices(bitnet: Bitnet, choices: Path) -> None:
    choices.parent.mkdir()
    choices.write_text("{}")
    done = bitnet("doctor")
    assert done.exit_code == 0 and done.stderr == ""
    assert f"warning tuning           {choices}: holds no choices of bench --tune (its format is not 'bitnet tuning 1')" in done.stdout


@pytest.mark.usefixtures("known_machine", "choices")
def test_bench_tune_keeps_heads_out_that_change_too_much(bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, *[0.5] * 99])
    monkeypatch.setattr("bitnet.bench.tune.decode_rate", lambda engine: next(rates))
    monkeypatch.setattr("bitnet.bench.tune.LEAST_AGREEMENT", 1.0)
    done = bitnet("bench", model_folder, "--tune", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["choice"]["head"] == "stored" and "(not allowed)" in done.stdout


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--shape", "article-12x512", "M"), "error: MODEL and --shape exclude each other"),
        (("--shape", "article-12x512", "--head", "stored"), "error: --head stored is for a MODEL; a --shape takes f16, int8, int4"),
        (("--head", "ternary"), "error: --head ternary is for a --shape; a MODEL takes stored, int8, int4"),
        (("--head", "f16"), "error: --head f16 is for a --shape; a MODEL takes stored, int8, int4"),
        (("--tune", "--shape", "article-12x512"), "error: --tune takes no --shape; it goes with MODEL"),
        (("--tune", "--head", "int8", "--no-zero-skip"), "error: --tune takes no --head, --zero-skip; it goes with MODEL"),
        (("--tune", "--max-context", "100", "--kv-bits", "16"), "error: --tune takes no --kv-bits, --max-context; it goes with MODEL"),
        (("--compare", "fp16"), "error: --compare takes a --shape"),
        (
            ("--shape", "article-12x512", "--compare", "fp16", "--prompt-tokens", "0"),
            "error: prompt-tokens is 0; expected a whole number >= 1",
        ),
        (("--compare", "fp16", "M"), "error: --compare takes no MODEL; it goes with --shape, --head, --threads, "),
        (("--compare", "fp16", "--shape", "2b-4t", "--depth", "1"), "error: --compare takes no --depth; it goes with --shape, "),
        (("--compare", "fp16", "--shape", "2b-4t", "--gate-zeros", ".5"), "error: --compare takes no --gate-zeros; it goes with --shape, "),
        (("--speculate", "--gate-zeros", ".5", "--shape", "2b-4t"), "error: --speculate takes no --gate-zeros; it goes with MODEL, "),
        (("--compare", "fp16,int5", "--shape", "article-12x512"), "error: no scheme is called 'int5'; compare some of fp16,int8,int4,fp4,"),
        (("--compare", "fp4,fp4", "--shape", "article-12x512"), "error: 'fp4,fp4' names a scheme twice; expected each once"),
        (
            ("--compare", "fp4", "--shape", "article-12x512", "--head", "stored"),
            "error: --head stored is for a MODEL; a --shape takes f16,",
        ),
        (("--compare", "fp4", "--shape", "article-12x512", "--repetitions", "0"), "error: repetitions is 0; expected a whole number >= 1"),
        (("--picture", "a.png"), "error: --picture is for --compare"),
        (("--weights", "bf16"), "error: --weights bf16 is for a --shape; a MODEL takes stored, f16, int8, int4, fp4, binary, ternary"),
        (("--shape", "article-12x512", "--weights", "stored"), "error: --weights stored is for a MODEL; a --shape takes f16, bf16, int8,"),
        (("--tune", "--weights", "int8"), "error: --tune takes no --weights; it goes with MODEL"),
        (("--codec", "tl2"), "error: Invalid value for '--codec': 'tl2' is not one of 'auto', 't2', 'b3'"),
        (("--shape", "gpt-9"), "error: Invalid value for '--shape': 'gpt-9' is not one of"),
        (
            ("--shape", "article-12x512", "--depth", "4090", "--threads", "1"),
            "error: a depth of 4090 tokens and 64 new ones are 4154; the model's context holds 4096",
        ),
        (
            ("--shape", "article-12x512", "--prompt-tokens", "5000", "--threads", "1"),
            "error: 5000 prompt tokens; the model's context holds 4096",
        ),
        (("--shape", "article-12x512", "--depth", "-1", "--threads", "1"), "error: depth is -1; expected a whole number >= 0"),
        (("--shape", "article-12x512", "--repetitions", "0", "--threads", "1"), "error: repetitions is 0; expected a whole number >= 1"),
        (("--threads", "-1"), "error: threads is -1; expected a whole number >= 1"),
    ],
)
def test_bench_usage(bitnet: Bitnet, args: tuple[str, ...], expected: str) -> None:
    done = bitnet("bench", *args)
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1 and done.exit_code == 2


def test_bench_refuses_what_does_not_fit(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(machine, "load_average", lambda: 0.0)
    done = bitnet("bench", "--shape", "llama3-8b", "--head", "f16")
    assert done.exit_code == 1
    assert done.stderr == ("error: shape llama3-8b with head f16 needs 3.8 GB of memory, 1.0 GB are available; choose less, or free some\n")
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: None)  # unknown: not refused
    require_memory("anything", 1 << 60)
    with pytest.raises(BitNetError, match="needs"):
        monkeypatch.setattr(machine, "available_memory_bytes", lambda: 0)
        require_memory("anything", 1)


def test_bench_warns_of_other_load(bitnet: Bitnet, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.bench.speed.read_bandwidths", lambda threads: [19.0, 20.0, 20.5])
    monkeypatch.setattr(machine, "load_average", lambda: 99.0)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    done = bitnet("bench", model_folder, *QUICK)
    assert done.stderr == "warning: load average 99.0 on 2 cores: something else runs, and it slows this\n"
