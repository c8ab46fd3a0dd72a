"""A recipe: one YAML file that says which model is trained on which texts, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from transformers import BitNetConfig, BitNetForCausalLM

from bitnet.errors import BitNetError
from bitnet.train.data import Source, documents, encode, read_sources, train_tokenizer
from bitnet.train.gate_l1 import penalize_gates
from bitnet.train.layers import ternarize_linears
from bitnet.train.loop import Schedule


@dataclass(frozen=True)
class Recipe:
    """The parsed file; `model` holds fields of transformers' BitNetConfig, `training` those of `Schedule`."""

    name: str
    seed: int
    vocab_size: int
    context: int  # tokens; the longest the model is made for
    tokenizer_texts: dict[str, float]  # text file -> share of its documents that the tokenizer learns from; above 1 repeats them
    model: dict[str, Any]
    training: dict[str, Any]

    @staticmethod
    def load(path: Path) -> Recipe:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        expected = {f.name for f in fields(Recipe)}
        if not isinstance(values, dict) or set(values) != expected:
            raise BitNetError(f"{path}: a recipe has exactly the keys {', '.join(sorted(expected))}")
        return Recipe(**values)

    def schedule(self) -> Schedule:
        return Schedule(seed=self.seed, **self.training)

    def build_tokenizer(self, texts: dict[str, str]) -> Tokenizer:
        sample: list[str] = []
        for name, share in self.tokenizer_texts.items():
            docs = documents(texts[name])
            sample += docs * int(share) if share >= 1 else docs[:: round(1 / share)]
        return train_tokenizer(sample, self.vocab_size)

    def build_model(self) -> BitNetForCausalLM:
        """Initialized from the seed; every linear layer is a `TernaryLinear`, embedding and (tied) head stay float32."""
        torch.manual_seed(self.seed)
        sizes = dict(self.model)
        rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
        config = BitNetConfig(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            rope_parameters=rope,
            **sizes,
        )
        config._attn_implementation = "sdpa"
        model = BitNetForCausalLM(config)
        ternarize_linears(model)
        penalize_gates(model, float(self.training.get("gate_l1", 0.0)))
        return model

    def sources(self, folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, list[Source]]:
        """Tokenizer (learned here, unless given) and the encoded texts of the mixture."""
        texts = read_sources(folder, list(self.training["mixture"]))
        tokenizer = tokenizer or self.build_tokenizer(texts)
        return tokenizer, [encode(name, text, tokenizer) for name, text in texts.items()]
