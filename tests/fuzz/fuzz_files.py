"""Coverage-guided fuzzing of the parsers of untrusted files (atheris, which is libFuzzer's engine with Python's coverage).

    python tests/fuzz/fuzz_files.py gguf -runs=1000000        safetensors, vocabulary or json likewise

Whatever the bytes are, a parser returns or raises a BitNetError of one line. Anything else, or a second, or 512 MB, is kept as crash-*.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bitnet"]):
    from bitnet.errors import BitNetError
    from bitnet.files import gguf, json_object, safetensors
    from bitnet.models import canonical
    from bitnet.models import gguf as gguf_models
    from bitnet.tokenizer.gguf import tokenizer_from_gguf

sys.path.insert(0, str(Path(__file__).parents[1] / "files"))
from mutations import sound

FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None


def one_gguf(data: bytes) -> None:
    file = gguf.parse(data, "x.gguf")  # type: ignore[arg-type]
    for tensor in file.tensors.values():
        if tensor.nbytes < 1 << 16:
            try:
                tensor.dense()
            except BitNetError:
                continue
    canonical(gguf_models.checkpoint_of(file, "x.gguf"))


def one_vocabulary(data: bytes) -> None:
    tokenizer_from_gguf(gguf.parse(data, "x.gguf").metadata, 1 << 20, "x.gguf").encode("Hello, world")  # type: ignore[arg-type]


def one_json(data: bytes) -> None:
    json_object(data, "x.json")


def main() -> None:
    parser = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        path = Path(folder) / "x.safetensors"

        def one_safetensors(data: bytes) -> None:
            path.write_bytes(data)
            for tensor in safetensors.read(path).tensors.values():
                tensor.dense()

        one = {"gguf": one_gguf, "safetensors": one_safetensors, "vocabulary": one_vocabulary, "json": one_json}[parser]

        def run(data: bytes) -> None:
            try:
                one(data)
            except BitNetError as error:
                assert str(error).isprintable(), str(error)

        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        begin = [b'{"a": [1, {"b": "c"}], "d": null}'] if parser == "json" else sound("gguf" if parser == "vocabulary" else parser)
        for number, content in enumerate(begin):
            (corpus / str(number)).write_bytes(content)
        atheris.Setup([sys.argv[0], str(corpus), "-timeout=1", "-rss_limit_mb=512", "-max_len=40000", *sys.argv[1:]], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
