"""Adapters by command and in Python: one for each request, in one line what is wrong."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft_adapters as made
import pytest
from click.testing import Result

from bitnet.errors import BitNetError, UsageError
from bitnet.models import canonical, open_checkpoint
from bitnet.shapes import SHAPES, random_adapter, random_engine
from bitnet.transformer import TernaryTransformer

Bitnet = Callable[..., Result]


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, config = tmp_path_factory.mktemp("adapters"), canonical(open_checkpoint(model_folder)).config
    return {
        name: made.write(folder / name, made.config_of(8, lora_alpha=200), made.matrices(config, 8, seed=seed))
        for seed, name in enumerate(("one", "two"))
    }


def test_what_caches_cost_is_measured_with_the_adapter(
    bitnet: Bitnet, model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The little dog ran after the ball. " * 40)

    def perplexity(*args: object) -> float:
        found = json.loads(bitnet("eval", model_folder, *args, text, "--json", "--adapter", adapters["one"]).stdout.splitlines()[-1])[
            "results"
        ]
        return float(found[0]["perplexity"])  # of the report, with f16 keys and values

    report = perplexity("--kv-report")
    plain = json.loads(bitnet("eval", model_folder, "--kv-report", text, "--json").stdout.splitlines()[-1])["results"][0]["perplexity"]
    assert report != pytest.approx(plain, rel=0.01) and report == pytest.approx(perplexity("--data"), rel=0.2)


def test_each_request_names_its_adapter(model_folder: Path, adapters: dict[str, Path]) -> None:
    model = TernaryTransformer.from_pretrained(model_folder, adapters=adapters, threads=2)
    plain = TernaryTransformer.from_pretrained(model_folder, threads=2)
    default = TernaryTransformer.from_pretrained(model_folder, adapter=adapters["two"], threads=2)

    def text(of: TernaryTransformer, **adapter: str | None) -> str:
        return of.generate("Once", max_new_tokens=12, temperature=0, **adapter).text  # type: ignore[arg-type]

    assert text(model) == text(model, adapter=None) == text(plain) == text(default, adapter=None)
    assert text(model, adapter="two") == text(default) == text(default, adapter="default") != text(plain)
    assert text(model, adapter="one") not in (text(plain), text(default))
    assert np.array_equal(model.logits([1, 2], adapter="two"), default.logits([1, 2]))
    model.load_adapter("three", adapters["one"])
    assert text(model, adapter="three") == text(model, adapter="one")
    assert model.prefixes is not None
    pages, weights = len(model.prefixes), weakref.ref(model.adapters["three"])
    model.load_adapter("three", adapters["two"])
    assert len(model.prefixes) == pages - 1 and weights() is None
    assert text(model, adapter="three") == text(model, adapter="two")
    with pytest.raises(UsageError, match=r"^no adapter is called 'four'; there are: one, two, three$"):
        model.generate("Once", adapter="four")
    with pytest.raises(UsageError, match=r"^no adapter is called 'one'; there are: none, for from_pretrained was given none$"):
        plain.stream("Once", adapter="one")
    sequence = model.engine.sequence(model.adapters["one"])
    assert sequence.adapter is model.adapters["one"] and plain.engine.sequence().adapter is None


def test_an_adapter_of_another_model(model_folder: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(BitNetError, match=r"one: layers.0.q has A \[8, 64\] and B \[64, 8\], but that matrix of the base is"):
        TernaryTransformer.from_pretrained(adapter=adapters["one"])
    with pytest.raises(BitNetError, match=r"holds no adapter_config.json"):
        TernaryTransformer.from_pretrained(model_folder, adapter=model_folder)
    other = TernaryTransformer.from_pretrained()
    here = TernaryTransformer.from_pretrained(model_folder, adapter=adapters["one"])
    with pytest.raises(UsageError, match="the adapter was made for another model"):
        other.engine.sequence(here.adapters["default"])


def test_run_eval_and_bench_take_one(bitnet: Bitnet, model_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    ask = ("run", model_folder, "-p", "Once", "-n", 12, "--temperature", 0)
    plain, done = bitnet(*ask), bitnet(*ask, "--adapter", adapters["one"])
    expected = TernaryTransformer.from_pretrained(model_folder, adapter=adapters["one"]).generate("Once", max_new_tokens=12, temperature=0)
    assert done.exit_code == 0 and expected.text in done.stdout and plain.stdout != done.stdout
    (tmp_path / "text").write_text("Once upon a time there was a fox. " * 4)
    scores = [
        json.loads(bitnet("eval", model_folder, "--data", tmp_path / "text", "--json", *extra).stdout.splitlines()[-1])["results"][0]
        for extra in ((), ("--adapter", adapters["one"]))
    ]
    assert scores[0]["perplexity"] != scores[1]["perplexity"]
    wrong = bitnet("run", "tinyllm-ternary-v2", "-p", "x", "--adapter", adapters["one"])
    assert wrong.exit_code == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    sizes = ("--new-tokens", 2, "--prompt-tokens", 2, "--repetitions", 1, "--json")
    for extra, name in (("--adapter", str(adapters["one"])), ("--lora", 4)):
        bench = bitnet("bench", model_folder, *sizes, extra, name)
        found = json.loads(bench.stdout.splitlines()[-1])["adapter"]
        assert bench.exit_code == 0 and found["bytes_per_token"] > 0
        assert found["share"] == found["decode_tok_s"] / found["decode_tok_s_alone"]
        assert "adapter    " in bench.stdout and "of the" in bench.stdout
    ranks, both = "lora is 0; expected a rank from 1 to 256", "exclude each other"
    for extra, message in ((("--lora", 0), ranks), (("--lora", 4, "--adapter", "x"), both)):
        wrong = bitnet("bench", model_folder, *sizes, *extra)
        assert wrong.exit_code == 2 and message in wrong.stderr


def test_convert_merges_when_asked(bitnet: Bitnet, model_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    done = bitnet("convert", model_folder, "-o", tmp_path / "out", "--merge-adapter", adapters["one"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("merged", "layers.", "in all"))]
    assert [row[0] for row in rows] == ["merged", "layers.0", "layers.1", "in"]
    found = json.loads(bitnet("convert", model_folder, "-o", tmp_path / "out", "--merge-adapter", adapters["one"], "--json").stdout)
    assert len(found["merged"]) == 14 and set(found["merged"][0]) == {"weight", "delta_kept", "error", "trits_changed"}
    merged, plain = (TernaryTransformer.from_pretrained(path).logits([1, 2, 3]) for path in (tmp_path / "out", model_folder))
    assert not np.array_equal(merged, plain)


def test_a_random_adapter_is_beside_every_layer() -> None:
    engine = random_engine("article-12x512", threads=1)
    shape = SHAPES["article-12x512"]
    inputs, outputs = 6 * shape.width + shape.ffn, 3 * shape.heads * shape.head_dim + 2 * shape.ffn + 2 * shape.width  # of the seven
    assert random_adapter(engine, 8).nbytes == shape.layers * (8 * 2 * (inputs + outputs) + 7 * 8 * 4)
