"""Texts and trained runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_recipe import mini, stories


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.txt, 300 small documents."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("<|endoftext|>\n".join(stories()))
    return folder


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 60 steps: scheme -> the run's folder, with model/ in it. The same tokens, order and start."""
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    from bitnet.train.recipe import Recipe
    from bitnet.train.run import run

    found = {}
    held_out = tmp_path_factory.mktemp("held-out") / "b.txt"
    held_out.write_text("One day a cat saw a dog. " * 9)
    for scheme in ("ternary", "binary", "fp16"):
        out = found[scheme] = tmp_path_factory.mktemp("runs") / scheme
        recipe = mini(scheme=scheme, steps=60, warmup_steps=5, decay_steps=20, batch_tokens=256)
        run(recipe, corpus, out, evaluation=[corpus, held_out, corpus / "a.txt"])
        assert isinstance(Recipe.load(out / "recipe.yaml"), Recipe)
    return found
