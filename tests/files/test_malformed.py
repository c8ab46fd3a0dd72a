"""Files that lie. Each must end in one clear line of the right kind, within a second and 64 MB beyond its own size."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors as official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet.errors import BitNetError, FormatError
from bitnet.files import MEMORY_BYTES, safetensors
from bitnet.files.hf import open_checkpoint
from bitnet.packing import pack_hf

F32 = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
EIGHT = b"\0" * 8


def laid_out(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", data: bytes = EIGHT) -> bytes:
    return laid_out(f'{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}', data)


def two(first: tuple[int, int], second: tuple[int, int], data_bytes: int) -> bytes:
    entries = {n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in {"x": first, "y": second}.items()}
    return laid_out(json.dumps(entries), b"\0" * data_bytes)


def zipped() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return memory.getvalue()


VALID = one()
AGAIN = "the file is damaged, or no safetensors: download or save it again"

# name -> (bytes, what the line must say)
FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["is empty (0 bytes)"]),
    "five bytes": (b"\x05\0\0\0\0", ["holds 5 bytes; expected 8 bytes of header length"]),
    "length only": (struct.pack("<Q", 10), ["header of 10 bytes (offset 0), but only 0 bytes follow"]),
    "header of nothing": (struct.pack("<Q", 0), ["header begins with b'' (offset 8); expected {"]),
    "header cut off": (VALID[:40], ["header of 54 bytes (offset 0), but only 32 bytes follow", AGAIN]),
    "header of 2**63": (struct.pack("<Q", 1 << 63) + b"{}", ["header of 9,223,372,036,854,775,808 bytes", "only 2 bytes follow"]),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", ["header of 18,446,744,073,709,551,615 bytes"]),
    "not JSON": (laid_out("hello, world"), ["header begins with b'hello, w' (offset 8); expected {"]),
    "an array": (laid_out("[1, 2, 3]"), ["header begins with b'[1, 2, 3' (offset 8)"]),
    "not UTF-8": (laid_out(b'{"\xff\xfe":1}'), ["header is not UTF-8 (offset 10)"]),
    "overlong UTF-8": (laid_out(b'{"\xc0\xaf":1}'), ["header is not UTF-8 (offset 10)"]),
    "open brace": (laid_out("{"), ["expected a string in double quotes (header character 1"]),
    "open string": (laid_out('{"x'), ["a string does not end, or holds a bad escape or a control character (header character 1"]),
    "bad escape": (laid_out('{"\\x":1}'), ["holds a bad escape"]),
    "control character": (laid_out('{"a\nb":1}'), ["a control character"]),
    "half a surrogate pair": (laid_out('{"\\ud800":{' + F32 + "}}", EIGHT), ["holds half of a surrogate pair"]),
    "single quotes": (laid_out("{'x':1}"), ["expected a string in double quotes (header character 1, at \"'x':1}\")"]),
    "no colon": (laid_out('{"x" 1}'), ["expected :"]),
    "trailing comma": (laid_out('{"x":{' + F32 + "},}", EIGHT), ["expected a string in double quotes (header character 54"]),
    "something after": (laid_out('{"x":{' + F32 + "}} {}", EIGHT), ["something follows the header's closing brace"]),
    "zero bytes after": (laid_out('{"x":{' + F32 + "}}\0\0\0", EIGHT), ["something follows the header's closing brace", "\\x00"]),
    "tensor is a number": (laid_out('{"x":7}'), ["'x': expected {\"dtype\": \"...\", \"shape\": [...], \"data_offsets\": ["]),
    "tensor is null": (laid_out('{"x":null}'), ["tensor 'x': expected {"]),
    "no dtype": (laid_out('{"x":{"shape":[2],"data_offsets":[0,8]}}', EIGHT), ["tensor 'x': expected {"]),
    "dtype twice": (laid_out('{"x":{"dtype":"F32","dtype":"F32","shape":[2]}}', EIGHT), ["tensor 'x': expected {"]),
    "a field more": (laid_out('{"x":{' + F32 + ',"more":1}}', EIGHT), ["tensor 'x': expected {", "and no more"]),
    "dtype is a list": (laid_out('{"x":{"dtype":[F32],"shape":[2],"data_offsets":[0,8]}}', EIGHT), ["unknown dtype '[F32]'"]),
    "shape is a string": (laid_out('{"x":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}', EIGHT), ["tensor 'x': \"2\"; expected whole"]),
    "unknown dtype": (one(dtype="Q4"), ["tensor 'x': unknown dtype 'Q4'; expected one of F64, F32, F16, BF16"]),
    "small dtype": (one(dtype="f32"), ["unknown dtype 'f32'"]),
    "negative side": (one(shape="[-2]"), ["tensor 'x': [-2]; expected whole numbers, not negative, of at most 19 digits"]),
    "broken side": (one(shape="[2.0]"), ["tensor 'x': [2.0]; expected whole numbers"]),
    "side in exponent": (one(shape="[1e1]"), ["tensor 'x': [1e1]; expected whole numbers"]),
    "side with a zero before": (one(shape="[02]"), ["tensor 'x': [02]; expected whole numbers"]),
    "true as a side": (one(shape="[true]"), ["tensor 'x': [true]; expected whole numbers"]),
    "other digits": (one(shape="[\u0662]"), ["tensor 'x': [\u0662]; expected whole numbers"]),
    "a comma too many": (one(shape="[2,]"), ["tensor 'x': [2,]; expected whole numbers"]),
    "20 digits": (one(shape="[10000000000000000000]"), ["of at most 19 digits"]),
    "nested shape": (one(shape="[[2]]"), ["tensor 'x': expected {"]),
    "shape overflows": (one(shape="[4294967296,4294967296]"), ["shape [4294967296, 4294967296] overflows a size of 63 bits"]),
    "shape wraps to the size": (one(shape="[4611686018427387906]"), ["shape [4611686018427387906] overflows"]),
    "empty and enormous": (one(shape="[0,9999999999999999999,9999999999]", offsets="[0,0]", data=b""), ["overflows a size of 63 bits"]),
    "nine dimensions": (one(shape="[1,1,1,1,1,1,1,1,2]"), ["9 dimensions; expected at most 8"]),
    "endless dimensions": (one(shape="[" + "1," * 400 + "2]"), ["tensor 'x': expected {"]),
    "size too small": (one(shape="[1]"), ["shape [1] of F32 takes 4 bytes, but data_offsets [0, 8] hold 8"]),
    "size too large": (one(shape="[2,3]"), ["shape [2, 3] of F32 takes 24 bytes, but data_offsets [0, 8] hold 8"]),
    "one offset": (one(offsets="[8]"), ["tensor 'x': data_offsets [8]; expected a begin and an end no smaller"]),
    "three offsets": (one(offsets="[0,8,8]"), ["data_offsets [0, 8, 8]; expected a begin and an end"]),
    "reversed offsets": (one(offsets="[8,0]"), ["data_offsets [8, 0]; expected a begin and an end no smaller"]),
    "negative offset": (one(offsets="[-8,0]"), ["tensor 'x': [-8,0]; expected whole numbers, not negative"]),
    "past the end": (one(data=b"\0" * 7), ["tensor 'x' ends at 8, but the data section has 7 bytes"]),
    "far past the end": (one("U8", "[8]", "[9000000000000000000,9000000000000000008]"), ["'x' ends at 9,000,000,000,000,000,008"]),
    "hole at the begin": (one(offsets="[8,16]", data=EIGHT * 2), ["begins at 8, 8 bytes after 'the header'; expected 0"]),
    "hole between": (two((0, 4), (6, 8), 8), ["tensor 'y' begins at 6, 2 bytes after 'x'; expected 4"]),
    "overlap": (two((0, 6), (4, 8), 8), ["tensor 'y' begins at 4, an overlap of 2 bytes with 'x'; expected 6"]),
    "same bytes twice": (two((0, 8), (0, 8), 8), ["tensor 'y' begins at 0, an overlap of 8 bytes with 'x'"]),
    "empty inside another": (two((0, 8), (4, 4), 8), ["tensor 'y' begins at 4, an overlap of 4 bytes with 'x'"]),
    "bytes left over": (one(data=EIGHT + b"\0"), ["1 bytes after the last tensor (offset 8) belong to none"]),
    "tensor twice": (laid_out('{"x":{' + F32 + '},"x":{' + F32 + "}}", EIGHT), ["'x' appears twice"]),
    "tensor twice, once escaped": (laid_out('{"x":{' + F32 + '},"\\u0078":{' + F32 + "}}", EIGHT), ["'x' appears twice"]),
    "metadata twice": (laid_out('{"__metadata__":{},"__metadata__":{}}'), ["'__metadata__' appears twice"]),
    "metadata key twice": (laid_out('{"__metadata__":{"a":"1","a":"2"}}'), ["'a' appears twice"]),
    "metadata is a list": (laid_out('{"__metadata__":["a"]}'), ["expected { (header character 16"]),
    "metadata holds a number": (laid_out('{"__metadata__":{"a":1}}'), ["expected a string in double quotes (header character 21"]),
    "metadata holds an object": (laid_out('{"__metadata__":{"a":{"b":"c"}}}'), ["expected a string in double quotes"]),
    "name of many lines": (laid_out('{"a\\nb\\u001b[31m\\u2028":7}'), ["tensor 'a\\\\nb\\\\x1b[31m\\\\u2028': expected {"]),
    "name without end": (laid_out('{"' + "a" * 9999 + '":7}'), ["aaa...aaa"]),
    "pickle": (pickle.dumps({"weight": [1.0] * 100}, 2), ["is a Python pickle", "any code", "safetensors.torch.save_file"]),
    "newest pickle": (pickle.dumps({"weight": [1.0] * 100}, 5), ["is a Python pickle"]),
    "PyTorch archive": (zipped(), ["is a Python pickle or zip archive", "safetensors.torch.save_file"]),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", ["is a Git LFS pointer", "git lfs pull"]),
    "text": (b"<!doctype html>\n<html><title>404</title></html>", ["header of 8,104,636,974,849,335,612 bytes"]),
}  # fmt: skip


def refusal(read: Callable[[], object], kind: type[BitNetError] = FormatError) -> str:
    """The one line with which `read` fails, in time."""
    for _ in range(3):  # the fastest of three, and of this process: a busy machine is no fault of the reader
        started = time.process_time()
        with pytest.raises(BitNetError) as caught:
            read()
        if (seconds := time.process_time() - started) < 1:
            break
    assert seconds < 1
    line = str(caught.value)
    assert type(caught.value) is kind
    assert line.isprintable() and len(line) < 1000
    return line


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(FILES[name][0])
    for read in (safetensors.read, open_checkpoint):
        line = refusal(lambda read=read: read(path))
        assert line.startswith(f"{path}: ")
        for part in FILES[name][1]:
            assert part in line


def test_the_official_package_refuses_them_too() -> None:
    """But for what only we mind: names and fields that repeat or are unknown, and shapes that numpy could not hold."""
    ours = {"nine dimensions", "endless dimensions", "empty and enormous", "a field more"}
    ours |= {"tensor twice", "tensor twice, once escaped", "metadata key twice"}
    for name, (content, _) in FILES.items():
        if name not in ours:
            with pytest.raises(official.SafetensorError):
                official.deserialize(content)


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    for read in (safetensors.read, open_checkpoint):
        line = refusal(lambda read=read: read(tmp_path / "model.safetensors"), FormatError)
        assert line.endswith("model.safetensors: is a GGUF file; expected safetensors. Name that file itself to run it")
    assert "is a GGUF file" in refusal(lambda: open_checkpoint(tmp_path), FormatError)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    header = '{"x":{' + F32 + "}}"
    (tmp_path / "a").write_bytes(laid_out(header + " " * (0x0280 - len(header)), EIGHT))
    assert (tmp_path / "a").read_bytes()[:2] == b"\x80\x02"
    assert list(safetensors.read(tmp_path / "a").tensors) == ["x"]


# --- what is not a file -----------------------------------------------------------------------------------------------------------------


def test_no_file_at_all(tmp_path: Path) -> None:
    assert "none: no such file or folder; check the path" in refusal(lambda: open_checkpoint(tmp_path / "none"))
    assert "no such file or folder" in refusal(lambda: safetensors.read(tmp_path / "none"))
    assert "is a folder; expected a regular file" in refusal(lambda: safetensors.read(tmp_path))
    assert "embedded null byte" in refusal(lambda: open_checkpoint("a\0b"))
    assert "File name too long" in refusal(lambda: open_checkpoint("a" * 5000))
    (tmp_path / "file").write_bytes(VALID)
    assert "Not a directory" in refusal(lambda: open_checkpoint(tmp_path / "file" / "model"))
    assert "a\\nb: no such file" in refusal(lambda: open_checkpoint("a\nb"))


@pytest.mark.skipif(os.name != "posix", reason="pipes, devices and links as POSIX has them")
def test_pipes_devices_and_loops(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        assert f"{path}: is a pipe, socket or device; expected a regular file" in refusal(lambda path=path: open_checkpoint(path))
    assert "symbolic links" in refusal(lambda: open_checkpoint(tmp_path / "loop"))
    assert "no such file" in refusal(lambda: open_checkpoint(tmp_path / "dangling"))
    assert "holds no model" in refusal(lambda: open_checkpoint(tmp_path))
    (tmp_path / "pipe").rename(tmp_path / "model.safetensors")
    assert "is a pipe" in refusal(lambda: open_checkpoint(tmp_path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(VALID)
    (tmp_path / "a").chmod(0)
    assert "cannot be read (Permission denied)" in refusal(lambda: open_checkpoint(tmp_path / "a"))
    tmp_path.chmod(0)
    try:
        assert "cannot be read (Permission denied)" in refusal(lambda: open_checkpoint(tmp_path))
    finally:
        tmp_path.chmod(0o700)


# --- folders ----------------------------------------------------------------------------------------------------------------------------

CONFIG = {"config.json": b'{"model_type": "llama"}'}
MODEL = {**CONFIG, "model.safetensors": VALID}
INDEX = "model.safetensors.index.json"


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def sharded(shard: object) -> dict[str, bytes]:
    return {**CONFIG, INDEX: index({"x": shard})}


FOLDERS: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "nothing": ({}, ["holds no model; expected model.safetensors, or model.safetensors.index.json and its shards"]),
    "config only": (CONFIG, ["holds no model"]),
    "an empty file": ({**CONFIG, ".gitkeep": b""}, ["holds no model; expected model.safetensors"]),
    "pickle": ({**CONFIG, "pytorch_model.bin": zipped()}, ["pytorch_model.bin: is a Python pickle", "safetensors.torch.save_file"]),
    "old pickle": ({**CONFIG, "model.pt": pickle.dumps([1.0] * 100, 2)}, ["model.pt: is a Python pickle"]),
    "another name": ({**CONFIG, "weights.safetensors": VALID}, ["no model.safetensors", "but weights.safetensors: name that file"]),
    "no config": ({"model.safetensors": VALID}, ["has no config; expected ", "config.json, or \"config\" in the metadata"]),
    "no tensors": ({**CONFIG, "model.safetensors": laid_out("{}")}, ["holds no tensors"]),
    "empty config": ({**MODEL, "config.json": b""}, ["config.json: is empty (0 bytes)"]),
    "config is a list": ({**MODEL, "config.json": b"[1]"}, ["config.json: begins with b'[1]'; expected a JSON object"]),
    "config is binary": ({**MODEL, "config.json": b"\xff\xfe\0"}, ["config.json: begins with b'\\xff\\xfe\\x00'"]),
    "config cut off": ({**MODEL, "config.json": b'{"a": [1, 2'}, ["config.json: JSON breaks off or does not close (2 brackets open"]),
    "config in an open string": ({**MODEL, "config.json": b'{"a": "b}'}, ["config.json: JSON breaks off"]),
    "config closed too often": ({**MODEL, "config.json": b'{"a": 1}}'}, ["config.json: JSON breaks off or does not close (-1"]),
    "config not UTF-8": ({**MODEL, "config.json": b'{"a": "\xff"}'}, ["config.json: is not valid JSON", "can't decode byte 0xff"]),
    "config not JSON": ({**MODEL, "config.json": b"{a: 1}"}, ["config.json: is not valid JSON (Expecting property name"]),
    "config of many digits": ({**MODEL, "config.json": b'{"a": ' + b"9" * 5000 + b"}"}, ["is not valid JSON (a number of 5000 digits)"]),
    "config deep": ({**MODEL, "config.json": b'{"a":' * 90 + b"1" + b"}" * 90}, ["config.json: JSON nests more than 64 deep"]),
    "bad generation_config": ({**MODEL, "generation_config.json": b"x"}, ["generation_config.json: begins with b'x'"]),
    "tokenizer is a list": ({**MODEL, "tokenizer.json": b"[]"}, ["tokenizer.json: begins with b'[]'; expected a JSON object"]),
    "tokenizer cut off": ({**MODEL, "tokenizer.json": b'{"model": {"a": "\\"]}'}, ["tokenizer.json: JSON breaks off"]),
    "index is a list": ({**CONFIG, INDEX: b"[]"}, [f"{INDEX}: begins with b'[]'"]),
    "index of nothing": ({**CONFIG, INDEX: b"{}"}, ['"weight_map" is missing, empty or too long; expected an object']),
    "empty weight_map": ({**CONFIG, INDEX: index({})}, ['"weight_map" is missing, empty']),
    "weight_map is a list": ({**CONFIG, INDEX: index(["x"])}, ['"weight_map" is missing, empty']),
    "shard is a number": (sharded(7), ["tensor 'x' is in shard 7; expected a plain file name"]),
    "shard above": (sharded("../a.safetensors"), ["is in shard '../a.safetensors'; expected a plain file name"]),
    "shard at the root": (sharded("/etc/passwd"), ["is in shard '/etc/passwd'; expected a plain file name"]),
    "shard by backslashes": (sharded("..\\a"), ["expected a plain file name"]),
    "shard on a drive": (sharded("C:a"), ["is in shard 'C:a'; expected a plain file name"]),
    "shard with a null byte": (sharded("a\0b"), ["expected a plain file name"]),
    "shard is the folder": (sharded("."), ["is in shard '.'; expected a plain file name"]),
    "shard without a name": (sharded(""), ["is in shard ''; expected a plain file name"]),
    "shard of a broken name": (sharded("\ud800"), ["misses 1: \\ud800"]),
    "missing shards": ({**CONFIG, INDEX: index({str(i): f"{i}.safetensors" for i in range(7)})},
                       ["names 7 shards (at most 1000) and misses 7: 0.safetensors, 1.safetensors", "4.safetensors, ...;"]),
    "endless shards": ({**CONFIG, INDEX: index({str(i): f"{i}" for i in range(1001)})}, ["names 1001 shards (at most 1000)"]),
    "tensor not in its shard": ({**sharded("a"), "a": laid_out("{}")}, ["tensor 'x' is not in shard 'a' as the index says"]),
    "tensor in the other shard": ({**CONFIG, INDEX: index({"x": "b", "y": "a"}), "a": two((0, 4), (4, 8), 8), "b": laid_out("{}")},
                                  ["tensor 'x' is not in shard 'b' as the index says"]),
    "malformed shard": ({**sharded("a"), "a": VALID[:-1]}, ["/a: tensor 'x' ends at 8, but the data section has 7 bytes"]),
    "shard is a pickle": ({**sharded("a"), "a": zipped()}, ["/a: is a Python pickle"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_malformed_folder(tmp_path: Path, name: str) -> None:
    files, parts = FOLDERS[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    line = refusal(lambda: open_checkpoint(tmp_path))
    assert str(tmp_path) in line
    for part in parts:
        assert part in line


def test_one_file_under_two_shard_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(two((0, 4), (4, 8), 8))
    (tmp_path / "b").symlink_to("a")
    (tmp_path / INDEX).write_bytes(index({"x": "a", "y": "b"}))
    assert "shards 'a' and 'b' are one and the same file" in refusal(lambda: open_checkpoint(tmp_path))


def test_metadata_that_is_no_config(tmp_path: Path) -> None:
    for key, other, text in (("config", "a", "[]"), ("tokenizer", "config", "{"), ("generation_config", "config", "no")):
        safetensors.write(tmp_path / "a", {"x": np.ones(1)}, {other: "{}", key: text})
        assert f'a: metadata "{key}": ' in refusal(lambda: open_checkpoint(tmp_path / "a"))


# --- files that cost --------------------------------------------------------------------------------------------------------------------

MB = 1_000_000


def many_tensors(count: int) -> bytes:
    entries = (f'"layers.{i}.weight":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    return laid_out("{" + ",".join(entries) + "}", b"\0" * (count - 1))


def metadata(text: str, megabytes: int) -> bytes:
    return laid_out('{"__metadata__":{"a":"' + text * (megabytes * MB // len(text.encode())) + '"},7}')


HOSTILE_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "brackets": (lambda: laid_out('{"a":' + "[" * 20 * MB), "tensor 'a': expected {"),
    "braces": (lambda: laid_out('{"a":' * 4 * MB), "tensor 'a': expected {"),
    "spaces": (lambda: laid_out("{" + " " * 30 * MB), "expected a string"),
    "more than the cap": (lambda: laid_out("{" + " " * 100 * MB + "}"), "header of 100,000,002 bytes (offset 0); expected at most"),
    "less than the cap": (lambda: laid_out("{" + " " * 99 * MB + "}"), "header of 99,000,002 bytes; expected at most 55,"),
    "one long string": (lambda: metadata("a", 30), "expected a string"),
    "one long open string": (lambda: laid_out('{"' + "a" * 30 * MB), "a string does not end"),
    "escapes": (lambda: metadata("\\\\", 30), "expected a string"),
    "escapes of wide characters": (lambda: metadata("a" * 999 + "\\ud83d\\ude00", 9), "header of 8,9"),
    "wide characters": (lambda: metadata("a" * 999 + "\U0001f600", 7), "expected a string"),
    "wider than the file": (lambda: metadata("a" * 999 + "\U0001f600", 12), "header of 11,"),
    "metadata keys": (lambda: laid_out('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(MB))), "more than 10,000 names"),
    "tensors": (lambda: many_tensors(100_001), "more than 100,000 names"),
    "numbers": (lambda: one(shape="[" + "1" * 10 * MB + "]"), "tensor 'x': expected {"),
}  # fmt: skip

HOSTILE_JSON: dict[str, tuple[str, Callable[[], str], str]] = {
    "deep": ("config.json", lambda: '{"a":' * 2 * MB, "JSON nests more than 64 deep"),
    "deep tokenizer": ("tokenizer.json", lambda: '{"a":' + "[" * 50 * MB, "JSON nests more than 64 deep"),
    "open tokenizer": ("tokenizer.json", lambda: '{"a":' + "[]," * 10 * MB, "JSON breaks off"),
    "quoted tokenizer": ("tokenizer.json", lambda: '{"' + '\\"[' * 10 * MB, "JSON breaks off"),
    "large config": ("config.json", lambda: '{"a":"' + "a" * 17 * MB + '"}', "expected at most 16,777,216"),
    "large tokenizer": ("tokenizer.json", lambda: '{"a":"' + "a" * 68 * MB + '"}', "expected at most 67,108,864"),
    "small values": ("config.json", lambda: '{"a":[' + "[]," * 5 * MB + "0]}", "would take over 64 MB"),
    "wide config": ("config.json", lambda: '{"a":"\U0001f600' + "a" * 15 * MB + '"}', "would take over 64 MB"),
    "wide but small": ("config.json", lambda: '{"a":"\U0001f600' + "a" * 7 * MB + '",}', "is not valid JSON"),
    "digits": ("config.json", lambda: '{"a":' + "1" * 15 * MB + "}", "a number of 15000000 digits"),
}  # fmt: skip


def costs(read: Callable[[], object], file_bytes: int) -> str:
    line = refusal(read)
    tracemalloc.start()
    try:
        with pytest.raises(BitNetError, match=re.escape(line)):
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES + (file_bytes if "json" in line else 0)  # JSON texts are read, safetensors only mapped
    return line


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_file_that_costs(tmp_path: Path, name: str) -> None:
    make, part = HOSTILE_FILES[name]
    path = tmp_path / "a"
    path.write_bytes(make())
    assert part in costs(lambda: safetensors.read(path), path.stat().st_size)


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_json_that_costs(tmp_path: Path, name: str) -> None:
    file, make, part = HOSTILE_JSON[name]
    for other, content in MODEL.items():
        (tmp_path / other).write_bytes(content)
    (tmp_path / file).write_text(make(), encoding="utf-8")
    assert part in costs(lambda: open_checkpoint(tmp_path), (tmp_path / file).stat().st_size)


# --- mutations --------------------------------------------------------------------------------------------------------------------------

TOKENS = [
    b"-",
    b"0",
    b"9" * 19,
    b"9" * 20,
    b'"',
    b"\\",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"F64",
    b"U8",
    b"null",
    b"\\ud800",
    b"\xf0\x9f",
    b" ",
]
TOKENS += [b"1e3", b"__metadata__", b"data_offsets", b"0.weight_scale", b"18446744073709551615", b"\0", b"\n", b"../", b"autobitlinear"]
Step = tuple[str, float, bytes, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "replace", "truncate"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=9),
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, steps: list[Step], within: int) -> bytes:
    """`content` after the steps; most of them fall into its first `within` bytes, where the structure is."""
    for what, place, token, bit in steps:
        at = int(place * 1.1 * within)
        at = at if at < within else int(place * len(content))
        if what == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        elif what == "insert":
            content = content[:at] + token + content[at:]
        elif what == "delete":
            content = content[:at] + content[at + len(token) :]
        elif what == "replace":
            content = content[:at] + token + content[at + len(token) :]
        elif what == "truncate":
            content = content[:at]
    return content


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small folder with everything in it: packed weights, many dtypes, metadata, an empty tensor, shards."""
    folder = tmp_path_factory.mktemp("valid")
    tensors = {
        "0.weight": pack_hf(np.array([[1, 0, -1]] * 4, np.int8)),
        "0.weight_scale": ("BF16", np.array([0x4000], np.uint16)),
        "h": np.ones((2, 2), np.float16),
        "d": np.ones(1),
        "e": np.zeros((0, 3), np.int64),
        "b": np.array([True]),
        "q": ("F8_E4M3", np.ones(3, np.uint8)),
    }
    config = '{"model_type": "bitnet", "quantization_config": {"linear_class": "bitlinear"}}'
    safetensors.write(folder / "model.safetensors", tensors, {"config": config, "é": '"\\'})
    safetensors.write(folder / "shard", {"x": np.ones(2, np.float32)})
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "shard")}
    return {**files, "config.json": config.encode(), "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}', INDEX: index({"x": "shard"})}


def read_all(folder: Path) -> None:
    """Everything that a caller can ask, and no error but ours."""
    try:
        tensors = open_checkpoint(folder).tensors
    except BitNetError as error:
        assert str(error).isprintable()
        return
    for tensor in tensors.values():
        assert tensor.raw().shape == tensor.stored_shape
        for ask in (tensor.dense, tensor.trits, tensor.scales):
            try:
                ask()
            except BitNetError as error:
                assert str(error).isprintable()


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_new(folder: Path, files: dict[str, bytes]) -> None:
    """New files each time: to shorten one that is mapped would end the process."""
    for name in os.listdir(folder):
        (folder / name).unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@FUZZ
@given(STEPS)
def test_any_mutation_of_a_file_is_read_or_refused(tmp_path: Path, valid: dict[str, bytes], steps: list[Step]) -> None:
    model = valid["model.safetensors"]
    header = 8 + int.from_bytes(model[:8], "little")
    changed = mutated(model, steps, header)
    write_new(tmp_path, {"model.safetensors": changed})
    read_all(tmp_path)
    if len(changed) != len(model):  # the same with a header length that fits, so that more of it is looked at
        length = max(0, header - 8 + len(changed) - len(model))
        write_new(tmp_path, {"model.safetensors": length.to_bytes(8, "little") + changed[8:]})
        read_all(tmp_path)


@FUZZ
@given(STEPS, st.sampled_from(["config.json", "tokenizer.json", INDEX, "shard"]))
def test_any_mutation_of_a_folder_is_read_or_refused(tmp_path: Path, valid: dict[str, bytes], steps: list[Step], name: str) -> None:
    files = {file: content for file, content in valid.items() if file != "model.safetensors"}
    write_new(tmp_path, {**files, name: mutated(files[name], steps, len(files[name]))})
    read_all(tmp_path)
