"""Saved choices: whose they are, what they decide, and what becomes of a file that holds none."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from bitnet import __version__, tuning
from bitnet.errors import BitNetError
from bitnet.source import EMBEDDED_MODEL, resolve
from bitnet.transformer import TernaryTransformer
from bitnet.tuning import Choice, Settings, save, saved_choice, saved_choices, settle

CHOICE = Choice("b3", "int8", 3, 123.4, 0.9951, 0.0012)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where choices are saved; its folder is not there yet."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setattr(tuning, "tuning_file", lambda: path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_a_choice_is_of_one_model_on_one_machine(file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_choice(model) is None and saved_choices() == []
    assert save(model, CHOICE) == file and os.listdir(file.parent) == [file.name]
    assert saved_choice(model) == CHOICE
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"")
    save(other, Choice("auto", "stored", 1, 1.0, 1.0, 0.0))
    assert saved_choice(model) == CHOICE and saved_choice(other) is not None
    again = Choice("t2", "stored", 2, 200.0, 1.0, 0.0)
    save(model, again)
    assert saved_choice(model) == again and len(saved_choices()) == 2
    (other / "config.json").write_text("{}")
    assert saved_choice(other) is None, "the model has changed"
    model.write_bytes(b"GGUF2")
    assert saved_choice(model) is None
    save(model, CHOICE)
    os.utime(model, ns=(1, 1))
    assert saved_choice(model) is None
    assert saved_choice(tmp_path / "gone") is None
    monkeypatch.setattr(tuning, "machine_key", lambda: "another machine")
    assert saved_choices() == []


def test_the_embedded_model_is_known_by_its_name_and_this_version() -> None:
    save(resolve(EMBEDDED_MODEL), CHOICE)
    assert saved_choices() == [(f"{EMBEDDED_MODEL} of bitnet {__version__}", CHOICE)]


def test_what_is_asked_for_wins(model: Path) -> None:
    assert settle(model) == Settings("auto", "stored", None)
    assert settle(model, "t2", "int4", 1) == Settings("t2", "int4", 1)
    save(model, CHOICE)
    assert settle(model) == Settings("b3", "int8", 3, CHOICE, True)
    assert settle(model, "t2", "stored", 1) == Settings("t2", "stored", 1)
    assert settle(model, head="stored") == Settings("b3", "stored", 3, CHOICE, False)
    assert settle(model, threads=1) == Settings("b3", "int8", 1, CHOICE, True)


def test_from_pretrained_runs_as_tuned() -> None:
    save(resolve(EMBEDDED_MODEL), Choice("t2", "int8", 1, 100.0, 0.995, 0.001))
    tuned = TernaryTransformer.from_pretrained()
    assert (tuned.engine.head, tuned.engine.threads, tuned.engine.codec) == ("int8", 1, "t2") and tuned.head_tuned is not None
    stored = TernaryTransformer.from_pretrained(head="stored", threads=2)
    assert (stored.engine.head, stored.engine.threads) == ("stored", 2) and stored.head_tuned is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "its format is not 'bitnet tuning 1'"),
        ('{"format": "bitnet tuning 9", "choices": []}', "its format is not"),
        ('{"format": "bitnet tuning 1"}', "choices"),
        ('{"format": "bitnet tuning 1", "choices": [3]}', "not iterable"),
        ('{"format": "bitnet tuning 1", "choices": [{"machine": 1, "model": "m"}]}', "a choice is for nothing"),
        (None, "codec 'b3', head 'int8', threads True"),
        (
            '{"format": "bitnet tuning 1", "choices": [{"machine": "", "model": "", "codec": "t2", "head": "int8", "threads": 5000, '
            '"decode_tok_s": 1, "top1_agreement": 1, "kl_nats": 0}]}',
            "threads 5000",
        ),
        (
            '{"format": "bitnet tuning 1", "choices": [{"machine": "", "model": "", "codec": "t2", "head": "int8", "threads": 1, '
            '"decode_tok_s": NaN, "top1_agreement": 1, "kl_nats": 0}]}',
            "figures that are not finite",
        ),
        ("[" * 100_000, "recursion"),
        ("\x00" * (1 << 21), "too large"),
    ],
)
def test_a_damaged_file_is_one_warning(file: Path, model: Path, text: str | None, reason: str) -> None:
    save(model, CHOICE)
    if text is None:
        text = file.read_text().replace('"threads": 3', '"threads": true')
    file.write_text(text)
    with pytest.warns(UserWarning) as told:
        assert settle(model) == Settings("auto", "stored", None)
    assert len(told) == 1 and reason in str(told[0].message) and "\n" not in str(told[0].message)
    assert str(told[0].message).startswith(f"{file}: holds no choices of bench --tune (")
    with pytest.warns(UserWarning):
        save(model, CHOICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved_choice(model) == CHOICE and json.loads(file.read_text())["format"] == tuning.FORMAT


def test_a_folder_that_cannot_be_written(file: Path, model: Path) -> None:
    file.parent.write_text("no folder")
    with pytest.warns(UserWarning, match="Not a directory"), pytest.raises(BitNetError, match="the choice cannot be saved"):
        save(model, CHOICE)


def test_a_user_without_a_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning, "tuning_file", homeless)
    assert settle(model) == Settings("auto", "stored", None)
    with pytest.raises(BitNetError, match="the choice cannot be saved: Could not determine home directory"):
        save(model, CHOICE)
