"""A small ordinary model to convert: llama with float weights, of the embedded model's size, on a part of its texts.

    python benchmarks/train_fp16.py --data TEXTS --out RUN --steps 800 --export MODEL

Nothing in it is ternary: the linear layers are PyTorch's own, trained in float32 masters under bf16 autocast and saved in f16. It resumes
where RUN left off, so that it can be stopped at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet.train.data import documents, encode, read_sources, train_tokenizer
from bitnet.train.loop import Schedule, train

TEXTS = {"tinystories-head.txt": 0.15, "storybooks.txt": 0.15, "fairytales.txt": 0.2, "childrens-books-19c.txt": 0.5}  # shares of windows
VOCABULARY, CONTEXT, SEED = 4096, 512, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--export", type=Path, required=True, help="write the model here")
    parser.add_argument("--steps", type=int, default=800, help="of 4,096 tokens")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts, saved = read_sources(args.data, list(TEXTS)), args.out / "tokenizer.json"
    if saved.exists():
        tokenizer = Tokenizer.from_file(str(saved))
    else:
        tokenizer = train_tokenizer([d for text in texts.values() for d in documents(text)[::2]], VOCABULARY)
        tokenizer.save(str(saved))
    sources = [encode(name, text, tokenizer) for name, text in texts.items()]
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    schedule = Schedule(
        steps=args.steps, batch_tokens=4096, context=256, decay_context=256, seed=SEED, matrix_lr=0.015, vector_lr=0.006, weight_decay=0.02,
        warmup_steps=50, decay_steps=args.steps // 3, mixture=TEXTS, decay_mixture=TEXTS, checkpoint_every=50,
    )  # fmt: skip
    train(model, sources, schedule, args.out)
    model.half().save_pretrained(args.export)
    (args.export / "tokenizer.json").write_text(saved.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
