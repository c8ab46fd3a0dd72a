"""The trainable layers are what ternary.py and convert/quantize.py define, and their gradients go straight through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")

from bitnet import ternary  # noqa: E402
from bitnet.errors import UnsupportedModelError, UsageError  # noqa: E402
from bitnet.train.export import export_model  # noqa: E402
from bitnet.train.layers import (  # noqa: E402
    ARTICLE_ALPHAS,
    BinaryLinear,
    FrozenTernaryLinear,
    PlainTernarySTE,
    Quantization,
    TernaryEmbedding,
    TernaryLinear,
    TernarySTE,
    dequantized,
    set_blend,
    ternarize_model,
)

W = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))


def reference(how: Quantization, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes [out, in], scales [out, groups]) by ternary.py, run by run; threshold's scale by convert/quantize.py's words."""
    size = {"tensor": weight.size, "row": weight.shape[1]}.get(how.scale, how.scale)
    codes, scales = [], []
    for run in weight.reshape(-1, size):
        if how.rule == "absmean":
            trits, scale = ternary.absmean(run)
        elif how.rule == "binary":
            (trits,), ((scale,),) = ternary.quantize_binary(run[None])
        else:
            trits = ternary.ternarize(run, how.alpha)
            scale = np.abs(run[trits != 0]).mean()
        codes.append(trits)
        scales.append(scale)
    found = np.array(scales, np.float32).reshape(-1, 1) if how.scale == "tensor" else np.array(scales, np.float32).reshape(len(weight), -1)
    return np.concatenate(codes).reshape(weight.shape), np.broadcast_to(found, (len(weight), found.shape[1]))


@pytest.mark.parametrize("scale", ["tensor", "row", 16])
@pytest.mark.parametrize("rule", ["absmean", "threshold", "binary"])
def test_the_layer_computes_what_ternary_py_defines(rule: str, scale: str | int) -> None:
    how = Quantization(rule, alpha=0.7, scale=scale)
    layer = TernaryLinear(48, 20, bias=False, quantization=how)
    layer.weight.data.copy_(W)
    codes, scales = reference(how, W.numpy())
    found_codes, found_scales = how.of(layer.weight)
    assert np.array_equal(found_codes.numpy(), codes)
    assert np.allclose(np.broadcast_to(found_scales.numpy(), scales.shape), scales, rtol=2e-6)  # sums in another order
    q, step = ternary.quantize_activations(X.reshape(-1, 48).numpy())
    expected = ternary.matmul_integer(codes.astype(np.int8), scales, q, step)
    # one rounding of each group's sum and product, and a scale off by 2e-6: of the largest output, far below 1e-5
    assert np.abs(layer(X).detach().reshape(-1, 20).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    whole = replace(how, activations="none")
    layer.quantization = whole
    assert torch.allclose(layer(X), X @ dequantized(*whole.of(W)).t(), atol=1e-5)


def test_binary_linear_is_quantize_binary() -> None:
    layer = BinaryLinear(48, 20)
    layer.weight.data.copy_(W)
    codes, scales = ternary.quantize_binary(W.numpy())
    found = layer.quantization.of(layer.weight)
    assert np.array_equal(found[0].numpy(), codes) and np.allclose(found[1].numpy(), scales, rtol=1e-6)


def test_bfloat16_products_differ_by_two_roundings() -> None:
    layer = TernaryLinear(48, 20, bias=False)
    layer.weight.data.copy_(W)
    exact = layer(X).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(X).detach()
    # the operands are integers, exact in bfloat16; its product is rounded, and once more after the scales, by 2^-8 of itself at most
    assert not torch.equal(exact, rounded) and torch.all((exact - rounded).abs() <= exact.abs() * (2**-7 + 2**-16) + 1e-7)


@pytest.mark.parametrize("scale", ["tensor", "row", 16])
@pytest.mark.parametrize("rule", ["absmean", "threshold", "binary"])
def test_gradients_go_straight_through(rule: str, scale: str | int) -> None:
    how = Quantization(rule, scale=scale, alpha=0.5)
    layer = TernaryLinear(48, 20, quantization=how)
    x = X[0].clone().requires_grad_()
    upstream = torch.randn(7, 20)
    layer(x).backward(upstream)
    q, step = ternary.quantize_activations(x.detach().numpy())
    w, xq = dequantized(*how.of(layer.weight)), torch.tensor(q * step[:, None])
    assert torch.allclose(x.grad, upstream @ w, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.weight.grad, upstream.T @ xq, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.bias.grad, upstream.sum(0), rtol=1e-5)
    clipped = TernaryLinear(48, 20, quantization=replace(how, clip=0.05))
    clipped.weight.data.copy_(layer.weight.data)
    clipped(X[0]).backward(upstream)
    assert torch.allclose(clipped.weight.grad, layer.weight.grad * (layer.weight.abs() <= 0.05), rtol=1e-4, atol=1e-5)


def test_the_articles_estimator_and_the_plain_one() -> None:
    x = torch.tensor([-0.5, -0.3, -0.11, -0.1, 0.0, 0.1, 0.2, 0.3, 0.31], requires_grad=True)
    values = torch.tensor([-1.0, -1, -1, 0, 0, 0, 1, 1, 1])
    for estimator, passes in ((TernarySTE, [0.0, 1, 1, 1, 1, 1, 1, 1, 0]), (PlainTernarySTE, [1.0] * 9)):
        x.grad = None
        y = estimator.apply(x)
        assert torch.equal(y, values)
        y.backward(torch.full((9,), 2.0))
        assert torch.equal(x.grad, 2 * torch.tensor(passes))
    assert torch.equal(TernarySTE.apply(x, 0.4, 1.0), torch.tensor([-1.0] + [0] * 8))


def test_lambda_leads_from_full_precision_to_the_layer_itself() -> None:
    layer = TernaryLinear(48, 20)
    plain = torch.nn.functional.linear(X, layer.weight, layer.bias)
    quantized = layer(X)
    outputs = []
    for share in (0.0, 0.5, 1.0):
        set_blend(layer, torch.tensor(share))
        outputs.append(layer(X))
    assert torch.equal(outputs[0], plain) and torch.allclose(outputs[2], quantized, atol=1e-5)
    assert not torch.allclose(outputs[1], plain, atol=1e-3) and not torch.allclose(outputs[1], quantized, atol=1e-3)
    outputs[1].sum().backward()
    assert layer.weight.grad is not None and torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layer", [TernaryLinear, BinaryLinear])
def test_lambda_in_other_floats(dtype: torch.dtype, layer: type[TernaryLinear]) -> None:
    made = layer(48, 20, dtype=dtype)
    set_blend(made, torch.tensor(0.5))
    y = made(X.to(dtype))
    y.sum().backward()
    assert y.dtype == dtype and made.weight.grad is not None and torch.isfinite(made.weight.grad).all()


def test_a_bias_leaves_autocasts_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in (
            TernaryLinear(48, 20),
            BinaryLinear(48, 20),
            FrozenTernaryLinear(W.sign().to(torch.int8), torch.ones(1, 1), torch.ones(20)),
        ):
            assert layer(X).dtype == torch.nn.Linear(48, 20)(X).dtype == torch.bfloat16


def test_clip_holds_while_lambda_rises() -> None:
    layer = TernaryLinear(48, 20, bias=False, quantization=Quantization(clip=0.05))
    gradients = []
    for share in (torch.tensor(1.0), None):
        layer.weight.grad = None
        set_blend(layer, share)
        layer(X).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4) and not gradients[0][layer.weight.abs() > 0.05].any()


def test_sub_norm_and_embedding() -> None:
    layer = TernaryLinear(48, 20, sub_norm=True)
    plain = TernaryLinear(48, 20)
    plain.load_state_dict(layer.state_dict(), strict=False)
    normed = torch.nn.functional.rms_norm(X, (48,), eps=1e-5)
    assert torch.equal(layer(X), plain(normed)) and torch.equal(layer(X * 3), layer(X * 3))
    table = TernaryEmbedding(11, 48)
    ids = torch.tensor([[3, 0], [10, 3]])
    rows = dequantized(*Quantization(scale="row").of(table.weight))
    assert torch.allclose(table(ids), rows[ids], atol=1e-7)
    table(ids).sum().backward()
    assert torch.equal(table.weight.grad[3], torch.full((48,), 2.0)) and not table.weight.grad[1].any()
    whole = TernaryEmbedding(11, 48, quantization=Quantization())
    whole.weight.data.copy_(table.weight.data)
    assert torch.allclose(whole(ids), dequantized(*Quantization().of(table.weight))[ids], atol=1e-7)


def test_a_binary_layer_stays_binary_and_one_row_is_a_batch() -> None:
    layer = BinaryLinear(48, 20, quantization=Quantization(scale="tensor"))
    assert layer.quantization == Quantization("binary", scale="tensor") and set(
        layer.quantization.of(layer.weight)[0].unique().tolist()
    ) == {-1, 1}
    x = X[0, 0].clone().requires_grad_()
    layer(x).sum().backward()
    one = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(X[0, :1]).sum().backward()
    assert torch.allclose(one, layer.weight.grad) and x.grad.shape == (48,)
    table = TernaryEmbedding(11, 48)
    assert torch.equal(table(torch.tensor(3)), table(torch.tensor([3]))[0])


def test_float16_holds_the_sums_of_integers() -> None:
    layer = TernaryLinear(2048, 8, bias=False)
    layer.weight.data.abs_().add_(0.01)
    x = torch.ones(3, 2048)
    exact = layer(x).detach()
    half = layer.half()
    y = half(x.half().requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.float16 and torch.allclose(y.float(), exact, rtol=2e-3) and torch.isfinite(half.weight.grad).all()


def tiny(kind: str = "Llama", **changes: object) -> torch.nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, **changes)
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)


def test_ternarize_model_swaps_by_pattern_and_shares_parameters() -> None:
    model = tiny()
    before = dict(model.named_parameters())
    names = ternarize_model(model)
    assert len(names) == 14 and type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding
    assert all(p is before[n] for n, p in model.named_parameters())
    some = tiny()
    assert ternarize_model(some, "*.mlp.*_proj", quantization=Quantization("binary", scale="row")) == [
        f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")
    ]
    assert isinstance(some.model.layers[0].mlp.up_proj, BinaryLinear)
    with pytest.raises(UsageError, match=r"no layer of LlamaForCausalLM matches \*nothing"):
        ternarize_model(tiny(), "*nothing")


def test_what_ternarize_model_takes() -> None:
    """A layer of two names stays one; what is no model and no quantization costs one line."""
    shared = tiny()
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj
    assert len(ternarize_model(shared, keep=None)) == 15  # type: ignore[arg-type]
    assert (
        isinstance(shared.model.layers[1].mlp.up_proj, TernaryLinear)
        and shared.model.layers[1].mlp.up_proj is shared.model.layers[0].mlp.up_proj
    )
    with pytest.raises(UsageError, match="model is itself a Linear; expected one that holds layers"):
        ternarize_model(torch.nn.Linear(4, 4))
    with pytest.raises(UsageError, match="quantization is 'ternary'; expected a Quantization"):
        ternarize_model(tiny(), quantization="ternary")  # type: ignore[arg-type]


def test_biases_are_exported_as_transformers_computes_them(tmp_path: Path) -> None:
    """In linear class autobitlinear it multiplies them by the scale, too."""
    torch.manual_seed(0)
    model = tiny("Qwen2")
    ternarize_model(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
            p.copy_(p.bfloat16().float())  # as it is stored
    export_model(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 3, 7]])
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits
    assert (
        ours - theirs
    ).norm() < 0.047 * ours.norm()  # derived in tests/models/test_against_transformers.py; the other class: 0.5 and more


def test_what_ternarize_model_leaves_out_is_said() -> None:
    model = tiny()
    assert "lm_head" not in ternarize_model(model, keep="lm_head")
    with pytest.raises(UsageError, match="layers is list; expected one pattern"):
        ternarize_model(tiny(), ["*.mlp.*"])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"no layer of LlamaForCausalLM matches \*nothing; 6 others became ternary"):
        ternarize_model(tiny(), {"*.mlp.*": 0.05, "*nothing": 0.05})
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    assert len(ternarize_model(falcon)) == 4  # its own class of linear layers computes the same
    assert torch.isfinite(falcon(input_ids=torch.tensor([[1, 2]])).logits).all()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    assert ternarize_model(gpt2, {"*wte": 0.05}) == ["transformer.wte"]  # a table by its own name
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=50, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2
        )
    )
    assert ternarize_model(opt, {"*embed*": 0.05}) == ["model.decoder.embed_tokens"]  # places are looked up with an offset
    assert torch.isfinite(opt(input_ids=torch.tensor([[1, 2]])).logits).all()
    experts = tiny("Mixtral", num_local_experts=2)
    with pytest.warns(UserWarning, match=r"tensors of MixtralForCausalLM that hold all experts stay as they are"):
        ternarize_model(experts)


@pytest.mark.parametrize("scheme", ["absmean", "binary"])
def test_a_layer_whose_weight_is_transposed(scheme: str, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    state = {name: values.clone() for name, values in gpt2.state_dict().items()}
    how = Quantization(scheme, scale="row")
    names = ternarize_model(gpt2, quantization=how)
    assert names == [f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert all(torch.equal(values, state[name]) for name, values in gpt2.state_dict().items())  # [in, out], as it was
    layer = gpt2.transformer.h[0].mlp.c_fc
    same = TernaryLinear(32, 128, quantization=how)
    same.load_state_dict({"weight": layer.weight.t(), "bias": layer.bias})
    x = torch.randn(3, 5, 32)
    assert torch.allclose(layer(x), same(x), rtol=1e-5, atol=1e-6)  # mean|W| is summed in another order
    layer(x).square().sum().backward()
    same(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, same.weight.grad.t(), rtol=1e-5, atol=1e-4)
    layer.blend = same.blend = torch.tensor(0.5)
    assert torch.allclose(layer(x), same(x), rtol=1e-5, atol=1e-6)
    layer.blend = None
    assert torch.isfinite(gpt2(input_ids=torch.tensor([[1, 2]])).logits).all()
    with pytest.raises(UnsupportedModelError, match=r"attn.c_attn: was Conv1D, which no packed format has"):
        export_model(gpt2, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3Text"])
def test_the_articles_alphas(kind: str) -> None:
    model = tiny(kind, tie_word_embeddings=True, head_dim=16)
    ids = torch.tensor([[1, 2, 3]])
    ternarize_model(model, "article")
    assert isinstance(model.model.embed_tokens, TernaryEmbedding) and isinstance(model.lm_head, TernaryLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, module in model.named_modules():
        if isinstance(module, (TernaryLinear, TernaryEmbedding)):
            alpha = next(a for pattern, a in ARTICLE_ALPHAS.items() if name.endswith(pattern[1:]))
            assert module.quantization.rule == "threshold" and module.quantization.alpha == alpha
    assert {model.model.layers[0].self_attn.q_proj.quantization.alpha, model.lm_head.quantization.alpha} == {0.08, 0.05}
    logits = model(input_ids=ids).logits
    logits.sum().backward()
    assert torch.isfinite(logits).all() and model.model.layers[1].mlp.down_proj.weight.grad.abs().sum() > 0


def test_a_frozen_layer_is_the_same_product_and_passes_gradients() -> None:
    layer = TernaryLinear(48, 20)
    codes, scales = layer.quantization.of(layer.weight)
    frozen = FrozenTernaryLinear(codes.to(torch.int8), scales, layer.bias.detach())
    x = X.clone().requires_grad_()
    y = frozen(x)
    assert torch.equal(y, layer(X)) and not [p for p in frozen.parameters() if p.requires_grad]
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rule": "mean"}, "rule is 'mean'"), ({"scale": 5}, "scale is 5"), ({"alpha": -1}, "alpha is -1"),
     ({"activations": "int4"}, "activations"), ({"clip": 0}, "clip is 0")],
)  # fmt: skip
def test_what_is_no_quantization(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Quantization(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="scale is 32, which does not divide"):
        Quantization(scale=32).of(W)
