"""The comparison with llama.cpp (benchmarks/), as far as it runs without llama.cpp: its files, its arithmetic, its report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import comparison_report as report
import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed; it writes the files to compare with")

import compare  # noqa: E402
import random_gguf  # noqa: E402

from bitnet.errors import BitNetError  # noqa: E402
from bitnet.files.gguf import read  # noqa: E402
from bitnet.shapes import Shape  # noqa: E402

TINY = Shape(layers=1, width=256, ffn=512, heads=4, kv_heads=2, vocab=64, head_dim=64)
TERNARY = ("TQ1_0", "TQ2_0")


@pytest.mark.parametrize("kind", random_gguf.BLOCKS)
def test_blocks_are_finite_and_use_every_code(kind: str) -> None:
    blocks = random_gguf.BLOCKS[kind](np.random.default_rng(0), 64)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(values).all() and np.abs(values).max() < 1
    if kind in TERNARY:
        assert set(np.unique(values / np.float32(np.float16(0.02)))) == {-1.0, 0.0, 1.0}
    elif kind in ("Q4_0", "Q8_0"):
        assert len(np.unique(values)) == {"Q4_0": 16, "Q8_0": 256}[kind]


@pytest.mark.parametrize("kind", TERNARY)
def test_ternary_bytes_are_those_that_ggml_writes(kind: str) -> None:
    """What is read and written again is the same: no byte that means a weight and is not the one for it."""
    blocks = random_gguf.BLOCKS[kind](np.random.default_rng(1), 256)
    dtype = gguf.GGMLQuantizationType[kind]
    assert np.array_equal(gguf.quants.quantize(gguf.quants.dequantize(blocks, dtype), dtype), blocks)


@pytest.mark.parametrize(
    "shape", [TINY, Shape(1, 256, 512, 4, 2, 64, 64, bitnet=True), Shape(1, 256, 512, 4, 2, 64, 64, tied=False, qk_norms=True)]
)
@pytest.mark.parametrize("kind", random_gguf.HEADS)
def test_a_file(tmp_path: Path, shape: Shape, kind: str) -> None:
    path = random_gguf.make(tmp_path, "tiny", shape, kind)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing is left beside it"
    file = read(path)
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {n: s for n, s, _ in random_gguf.tensors(shape, kind)}
    assert file.metadata["general.architecture"] == random_gguf.architecture(shape)
    down = file.tensors["blk.0.ffn_down.weight"]
    assert np.isfinite(down.dense()).all()
    if kind in TERNARY:
        assert set(np.unique(down.trits())) == {-1, 0, 1}
    separate = 0 if shape.tied else 64 * 256 * 210 // 256 if random_gguf.HEADS[kind] == "Q6_K" else 64 * 256 * 34 // 32
    stored = path.stat().st_size - separate
    assert 0 <= stored - random_gguf.bytes_per_token(shape, kind) < 2048, "the header is the rest"
    before = path.stat().st_mtime_ns
    assert random_gguf.make(tmp_path, "tiny", shape, kind).stat().st_mtime_ns == before, "written once"


def test_a_row_that_is_not_whole_blocks() -> None:
    with pytest.raises(ValueError, match="a row of 384 values is not whole blocks of 256, as TQ2_0 needs"):
        random_gguf.byte_shape((4, 384), "TQ2_0")


def result(engine: str, weights: str, nbytes: int, prefill: list[float], decode: list[float]) -> dict[str, Any]:
    return {
        "shape": "s", "engine": engine, "weights": weights, "head": "int8", "weight_bytes_per_token": nbytes, "prefill_tok_s": prefill,
        "decode_tok_s": decode, "other_programs_cores": [0.0, 0.25, 0.0],
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04+00:00", "command": "python benchmarks/compare.py", "read_gb_s": [9.0, 10.0, 12.0],
        "machine": {"cpu": "a CPU", "flags": ["avx2"], "cores": 2, "memory_gb": 8.0, "system": "Linux", "load_average": 0.1},
        "protocol": {"prompt_tokens": 4, "new_tokens": 2, "threads": 2, "repetitions": 3},
        "bitnet": {"version": "1", "commit": "abc", "isa": "avx2"},
        "llama_cpp": {"llama_cpp_python": "0.3", "commit": "def", "system_info": "CPU : AVX2 = 1", "note": "built here"},
        "results": [
            result("bitnet", "t2", 1_000_000, [10.0, 20.0, 40.0], [4000.0, 5000.0, 6000.0]),
            result("llama.cpp", "TQ2_0", 2_000_000, [20.0, 10.0, 20.0], [2000.0, 2000.0, 2000.0]),
            result("llama.cpp", "Q8_0", 4_000_000, [40.0, 80.0, 160.0], [1000.0, 1000.0, 1000.0]),
        ],
        "failed": [{"shape": "s", "engine": "llama.cpp", "what": "Q4_0", "reason": "llama.cpp crashed (signal 11)"}],
    }  # fmt: skip


def test_ratios_are_medians_of_the_rounds(record: dict[str, Any]) -> None:
    assert report.ratio([10.0, 20.0, 40.0], [20.0, 10.0, 20.0]) == 2.0  # of 0.5, 2 and 2; of the medians it would be 1
    summary = report.summarize(record)
    assert [(p["llama_cpp"], p["prefill"], p["decode"]) for p in summary["ratios"]] == [("TQ2_0", 2.0, 2.5), ("Q8_0", 0.25, 5.0)]
    assert summary["read_gb_s_median"] == 10.0
    assert [r["weights_gb_s"] for r in summary["results"]] == [5.0, 4.0, 4.0]
    assert [r["share_of_limit"] for r in summary["results"]] == [0.5, 0.4, 0.4]


def test_report(record: dict[str, Any]) -> None:
    text = report.markdown(report.summarize(record), ["picture.png"])
    assert "| bitnet two-bit, head int8 | 1.0 | 20.0 | 5,000 | 5.0 | 50% |  |  |" in text
    assert "| llama.cpp Q8_0, head int8 | 4.0 | 80.0 | 1,000 | 4.0 | 40% | 0.25 x | 5.00 x |" in text
    assert "llama.cpp is faster at prompts of s, Q8_0 against bitnet two-bit, head int8: 4.00 x." in text
    assert "- s, llama.cpp Q4_0: llama.cpp crashed (signal 11)" in text
    assert "](picture.png)" in text and "built here" in text
    assert report.summarize(report.summarize(record)) == report.summarize(record), "a report is made again from its JSON"
    assert "other programs used at most 0.2 cores during a turn" in text


@pytest.mark.parametrize(("codec", "words"), [("t2", "bitnet two-bit, head int4"), ("b3", "bitnet base-3, head int4")])
def test_our_side_is_measured(monkeypatch: pytest.MonkeyPatch, codec: str, words: str) -> None:
    monkeypatch.setitem(compare.SHAPES, "tiny", TINY)
    side = compare.Bitnet("tiny", codec, "int4", 1)
    turn = side.measure(list(range(20)), [1, 2, 3])
    assert set(turn) == {"prefill_s", "decode_s", "cpu_s"} and min(turn["prefill_s"], turn["decode_s"]) > 0
    assert report.label(side.result) == words and side.result["weight_bytes_per_token"] > 0
    side.close()


def test_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    args = compare.arguments()
    assert args.ours == ["b3:int8", "b3:int4", "t2:int8"] and "--ours b3:int8,b3:int4,t2:int8 --repetitions 5" in compare.command(args)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--ours", "t2"])
    with pytest.raises(SystemExit):
        compare.arguments()
    assert "no codec:head is called 't2'; there are t2:f16, t2:int8, t2:int4, t2:ternary, b3:f16" in capsys.readouterr().err


def test_reading_is_the_bandwidth_that_bench_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "REST_S", 0)
    monkeypatch.setattr(compare, "read_bandwidths", lambda threads: [1.0 * threads, 9.0, 7.0])
    assert compare.reading(2) == 7.0


@pytest.mark.parametrize(("disturbed", "turns"), [(0, 1), (2, 3), (9, compare.TRIES)])
def test_a_disturbed_turn_is_repeated(monkeypatch: pytest.MonkeyPatch, disturbed: int, turns: int) -> None:
    done = [0]

    def step() -> dict[str, float]:
        done[0] += 1
        time.sleep(0.01)
        return {"cpu_s": 1.0}

    clock = iter([t for turn in range(compare.TRIES) for t in (0.0, 2.0 if turn < disturbed else 1.0)])

    monkeypatch.setattr(compare, "REST_S", 0)
    monkeypatch.setattr(compare, "busy_s", lambda: next(clock))
    disturbed_to_the_end = compare.undisturbed(step)["others"] >= compare.DISTURBED_CORES
    assert done == [turns] and disturbed_to_the_end == (turns == compare.TRIES)


def test_busy_is_processor_time_of_all_programs() -> None:
    before, own = compare.busy_s(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert compare.busy_s() - before >= 0.15  # it counts in hundredths


def test_the_document_is_updated_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(document, "new")
    assert document.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="expected the markers"):
        report.update(document, "new")
    assert report.BEGIN in report.DOCUMENT.read_text()


def test_pictures(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it draws the pictures")
    assert [p.name for p in report.draw(report.summarize(record), tmp_path / "x") if p.stat().st_size] == ["x-roofline.png", "x-share.png"]


def test_a_peer_that_crashes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys\nprint('the reason', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(compare, "WORKER", worker)
    monkeypatch.setitem(compare.SHAPES, "tiny", TINY)
    with pytest.raises(BitNetError, match=r"llama.cpp crashed \(signal 6\); its last line: the reason"):
        compare.LlamaCpp("tiny", "TQ2_0", 1, 8, sys.executable, tmp_path)
