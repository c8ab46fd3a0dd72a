"""Imports point one way, and nothing heavy comes in where it is not needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bitnet

ROOT = Path(bitnet.__file__).parent
# module -> what it may import of bitnet, besides itself and `errors`
LAYERS = {
    "errors": set(),
    "machine": {"_native"},
    "ternary": set(),
    "packing": set(),
    "files": {"packing"},
    "models": {"files", "packing", "ternary"},
    "kv": {"ternary"},
    "engine": {"_native", "kv", "models", "machine"},
    "prefix_cache": {"_native", "engine", "kv"},
    "weights": {"_native", "engine", "files", "machine", "models", "packing", "ternary"},
    "shapes": {"engine", "models", "weights"},
    "zero_skip": {"engine"},
    "tuning": {"_native", "engine", "machine", "weights"},
    "sampling": set(),
    "speculation": set(),
    "tokenizer": set(),
    "sample": {"engine", "tokenizer"},
    "generation": {"engine", "prefix_cache", "sampling", "speculation", "tokenizer"},
    "chat": {"tokenizer"},
    "convert": {"chat", "files", "models", "packing", "ternary", "tokenizer"},
    "hub": {"machine"},
    "source": {"chat", "files", "hub", "tokenizer"},
    "transformer": {
        "chat",
        "engine",
        "generation",
        "kv",
        "machine",
        "models",
        "prefix_cache",
        "sample",
        "sampling",
        "source",
        "speculation",
        "tokenizer",
        "train",  # for another device than the CPU, and then only
        "tuning",
        "weights",
        "zero_skip",
    },
    "evaluate": {"chat", "engine", "files", "kv", "models", "sample", "source", "tokenizer", "transformer", "weights", "zero_skip"},
    "bench": {
        "_native",
        "engine",
        "evaluate",
        "generation",
        "machine",
        "models",
        "sample",
        "sampling",
        "shapes",
        "speculation",
        "tokenizer",
        "transformer",
        "tuning",
        "weights",
        "zero_skip",
    },
    # evaluate and transformer score what was exported; convert reads what training starts from
    "train": {"chat", "convert", "evaluate", "files", "machine", "models", "packing", "source", "ternary", "tokenizer", "transformer"},
    "cli": {"*"},
    "__init__": {"machine", "ternary", "transformer", "cli"},
    "__main__": {"cli"},
}


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Second components of the bitnet modules that the file imports anywhere in it."""
    package = ["bitnet", *path.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {n.name for n in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{n.name}" for n in node.names} if name == "bitnet" else {name}
    return {n.split(".")[1] for n in found if n.startswith("bitnet.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in LAYERS, f"{own} has no place in the layers"
    if "*" in LAYERS[own]:
        return
    allowed = LAYERS[own] | {own, "errors"} | ({"__version__"} if own != "errors" else set())
    assert imported(path) <= allowed, f"{path.name} imports {imported(path) - allowed}"


def test_only_train_imports_torch() -> None:
    for path in modules():
        if path.relative_to(ROOT).parts[0] == "train":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {n for n in names if n.split(".")[0] in ("torch", "transformers")}, path
