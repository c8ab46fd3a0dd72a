"""`bitnet doctor MODEL` on sound models, and on sound ones spoilt in the ways that the field knows: it has to name the mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from bitnet.files import safetensors
from bitnet.source import EMBEDDED_MODEL, resolve

Bitnet = Callable[..., Result]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded model, to be spoilt."""
    folder = tmp_path / "model"
    shutil.copytree(resolve(EMBEDDED_MODEL), folder)
    return folder


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """The weights with each stored array (bf16 as its bits) changed; all but packed weights and scales as f32 of the same value."""
    file = safetensors.read_stored(folder / "model.safetensors")
    arrays = {name: tensor.raw().copy() if tensor.dtype == "U8" else tensor.dense().copy() for name, tensor in file.tensors.items()}
    arrays = {name: change(name, array) for name, array in arrays.items()}
    (folder / "model.safetensors").unlink()
    safetensors.write(folder / "model.safetensors", arrays)


def diagnosed(done: Result) -> dict[str, Any]:
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["model"]
    assert f"verdict: {found['verdict']}\nnext:    {found['next']}\n" in done.stdout
    return found


def failures(found: dict[str, Any]) -> list[str]:
    return [finding["what"] for finding in found["findings"] if finding["status"] == "FAILED"]


def detail(found: dict[str, Any], what: str) -> str:
    return next(f"{f['status']}: {f['detail']}; {f['advice']}" for f in found["findings"] if f["what"] == what)


def test_a_sound_model_is_ok_throughout(bitnet: Bitnet) -> None:
    done = bitnet("doctor", EMBEDDED_MODEL, "--json")
    found = diagnosed(done)
    assert done.exit_code == 0 and found["ok"] and found["cause"] is None
    assert {finding["status"] for finding in found["findings"]} == {"ok"}
    assert found["verdict"].startswith("sound: ")
    assert found["score"]["bits_per_byte"] == pytest.approx(1.244, abs=0.02)
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) < 160
    assert "  down       ternary" in done.stdout and "relu2 (config.json: hidden_act 'relu2')" in done.stdout


def test_a_random_model_is_noise(bitnet: Bitnet, model_folder: Path) -> None:
    done = bitnet("doctor", model_folder, "--json")
    found = diagnosed(done)
    assert done.exit_code == 1 and "reading" in failures(found) and found["cause"] is None
    assert found["verdict"].startswith("what it writes is noise, and no known mistake explains it")


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
def test_a_wrong_activation_is_named(bitnet: Bitnet, copy: Path, unknown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits per byte do not tell, in this model; the probability of the right tokens does."""
    if unknown:
        monkeypatch.setattr("bitnet.evaluate.trials.KNOWN", {})
    configure(copy, hidden_act="silu")
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert found["cause"] == "the model was trained with relu2" and 'set "hidden_act" to "relu2" in config.json' in found["next"]
    assert "known mistakes" in failures(found) and not found["ok"]


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
def test_an_inverted_linear_class_is_named(bitnet: Bitnet, copy: Path, unknown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if unknown:
        monkeypatch.setattr("bitnet.evaluate.trials.KNOWN", {})
    configure(copy, quantization_config={"quant_method": "bitnet", "quantization_mode": "offline", "linear_class": "bitlinear"})
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert found["cause"] == "weight_scale multiplies" and 'set "linear_class" to "autobitlinear"' in found["next"]
    assert detail(found, "weight scales").startswith("warning: ") and "linear_class" in detail(found, "weight scales")


def permuted(name: str, array: np.ndarray) -> np.ndarray:
    """The rows of q and k as llama's GGUF has them."""
    from bitnet.packing import pack_hf, unpack_hf

    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    trits = unpack_hf(array)
    return pack_hf(np.ascontiguousarray(trits.reshape(-1, 2, 32, trits.shape[1]).swapaxes(1, 2).reshape(trits.shape)))


def test_permuted_rows_are_named(bitnet: Bitnet, copy: Path) -> None:
    rewrite(copy, permuted)
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert found["cause"] == "the rows of q and k are permuted as GGUF's llama has them"


def test_norms_kept_as_w_are_named(bitnet: Bitnet, copy: Path) -> None:
    rewrite(copy, lambda name, array: array - 1 if "norm" in name else array)
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert found["cause"] == "the norm weights are kept as w, to be used as 1 + w"
    assert detail(found, "norms").startswith("warning: ")


def test_exchanged_names_are_named(bitnet: Bitnet, copy: Path) -> None:
    file = safetensors.read_stored(copy / "model.safetensors")
    exchanged = {name: name.replace("gate", "#").replace("up_proj", "gate_proj").replace("#", "up") for name in file.tensors}
    arrays = {exchanged[name]: t.raw().copy() if t.dtype == "U8" else t.dense().copy() for name, t in file.tensors.items()}
    (copy / "model.safetensors").unlink()
    safetensors.write(copy / "model.safetensors", arrays)
    assert diagnosed(bitnet("doctor", copy, "--json"))["cause"] == "the names of gate_proj and up_proj are exchanged"


def test_several_scales_in_a_tensor(bitnet: Bitnet, copy: Path) -> None:
    rewrite(copy, lambda name, array: np.repeat(array, 2) if name == "model.layers.1.mlp.up_proj.weight_scale" else array)
    done = bitnet("doctor", copy, "--json")
    found = diagnosed(done)
    assert done.exit_code == 1 and {"up weights", "reading"} <= set(failures(found))
    assert "'model.layers.1.mlp.up_proj.weight_scale': has shape [2]" in detail(found, "up weights")
    assert "training in shards" in detail(found, "up weights") and found["verdict"] == "it cannot be run"


@pytest.mark.parametrize(("value", "words"), [(0.0, "its scale is 0"), (float("nan"), "NaN or infinity")])
def test_a_scale_that_is_none(bitnet: Bitnet, copy: Path, value: float, words: str) -> None:
    rewrite(copy, lambda name, array: np.float32([value]) if name.endswith("layers.2.self_attn.k_proj.weight_scale") else array)
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert words in detail(found, "k weights") and "k weights" in failures(found)


def test_a_scale_far_from_the_others(bitnet: Bitnet, copy: Path) -> None:
    rewrite(copy, lambda name, array: array * 500 if name.endswith("layers.2.self_attn.k_proj.weight_scale") else array)
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert any("over the layers" in finding["detail"] for finding in found["findings"] if finding["what"] == "k scale")


def test_the_tokenizer_of_another_model(bitnet: Bitnet, copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"extra{i}": 4096 + i for i in range(10)}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = bitnet("doctor", copy, "--json")
    found = diagnosed(done)
    assert done.exit_code == 1 and failures(found) == ["tokenizer"]
    assert "its largest token id is 4105" in detail(found, "tokenizer") and "no tokenizer that fits" in found["verdict"]


def test_no_tokenizer(bitnet: Bitnet, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert failures(found) == ["tokenizer"] and "no tokenizer.json" in detail(found, "tokenizer")


def test_a_truncated_file(bitnet: Bitnet, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = bitnet("doctor", copy, "--json")
    found = diagnosed(done)
    assert done.exit_code == 1 and failures(found) == ["file"] and found["verdict"] == "the file is damaged or incomplete"


def test_a_model_that_is_refused(bitnet: Bitnet, copy: Path) -> None:
    configure(copy, model_type="mamba")
    found = diagnosed(bitnet("doctor", copy, "--json"))
    assert failures(found) == ["architecture"] and "model_type is 'mamba'; this build runs" in detail(found, "architecture")
    assert "does not run this model" in found["verdict"]


def test_what_is_no_model_is_bad_usage(bitnet: Bitnet) -> None:
    done = bitnet("doctor", "no-such-model")
    assert done.exit_code == 2 and "no folder, file or embedded model named 'no-such-model'" in done.stderr


def test_chat_templates(bitnet: Bitnet, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "renders 'Hello' as" in detail(diagnosed(bitnet("doctor", copy, "--json")), "chat template")
    (copy / "chat_template.jinja").write_text("{% for m in messages %}")
    assert detail(diagnosed(bitnet("doctor", copy, "--json")), "chat template").startswith("warning: ")


def test_data(bitnet: Bitnet, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\u201cOnce upon a time there was a dog.\u201d " * 5, encoding="utf-8")
    assert "bits per byte of text.txt" in detail(diagnosed(bitnet("doctor", EMBEDDED_MODEL, "--data", text, "--json")), "data")
    done = bitnet("doctor", EMBEDDED_MODEL, "--data", tmp_path / "none.txt")
    assert done.exit_code == 2 and "none.txt: cannot be read as text" in done.stderr and not done.stdout
    for option in ("--data", "--revision", "--file"):
        done = bitnet("doctor", option, text)
        assert done.exit_code == 2 and done.stderr.startswith(
            f"error: {option} is for a MODEL; name one, or leave it out to check this machine"
        )


def test_another_package_called_bitnet(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch) -> None:
    script = EntryPoint("bitnet", "other:main", "console_scripts")

    def distribution(name: str, top: str, scripts: list[EntryPoint]) -> SimpleNamespace:
        return SimpleNamespace(metadata={"Name": name}, read_text=lambda _: top, entry_points=scripts, files=[])

    others = [distribution("bitnet", "bitnet", []), distribution("other", "other", [script]), distribution("innocent", "innocent", [])]
    ours = distribution("bitnet_ternary", "bitnet", [script])
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [ours, *others])
    done = bitnet("doctor")
    assert done.exit_code == 0
    assert (
        "warning namesakes        bitnet, other also installs a module or command called bitnet; pip uninstall bitnet other" in done.stdout
    )
