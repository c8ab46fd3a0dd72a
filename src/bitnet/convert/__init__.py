"""Any model in, any ternary format out: exactly, or refused in one line with the numbers, or with an error that was asked for.

read (source.py) -> quantize (quantize.py) -> fit to the format (fit.py) -> write (hf.py, gguf.py, beside.py) -> read back (verify.py).
A weight is read, changed and written in runs of rows, so memory does not grow with the model. Nothing is written before every weight fits.
The new file or folder takes the place of the target in one step, after it has been read back (files/replacing.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.convert import adapters, beside, gguf, hf, merging, weights_alone
from bitnet.convert.choice import check, dequantized, stand_ins, with_latent_weights
from bitnet.convert.choice import choose as choose_weights
from bitnet.convert.fit import InexactError, Loss, fit, rebased, shared
from bitnet.convert.formats import FORMATS, Format, choose
from bitnet.convert.quantize import Ternarization, check_asked
from bitnet.convert.report import LAYER_BYTES, REPORT_BYTES, Layer, measure
from bitnet.convert.source import Model, Weight, read
from bitnet.convert.target import check_target, keep_others, named, require_disk
from bitnet.convert.verify import NotTheSameError, Progress, verify
from bitnet.convert.weights_alone import tensors_alone
from bitnet.errors import UsageError
from bitnet.files import PathLike, gguf_write, safetensors, shown
from bitnet.files.hf import TEXTS
from bitnet.files.replacing import new_file, new_folder, write_synced
from bitnet.files.tensor import Tensor
from bitnet.models import LINEARS, latent_weights, open_checkpoint
from bitnet.models.low_rank import LowRank
from bitnet.packing import INTEGERS

__all__ = ["FORMATS", "InexactError", "NotTheSameError", "Report", "Ternarization", "convert"]

_Chunks = Iterable[tuple[Iterable[NDArray[Any]], int]]  # (a tensor's bytes in pieces, zero bytes after it)


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str
    target: str
    format: str
    bytes: int
    tensors: int
    verified: bool
    losses: list[Loss] = field(default_factory=list)  # of weights that were requantized
    notes: list[str] = field(default_factory=list)
    merged: list[merging.Merged] = field(default_factory=list)  # what survived of an adapter, matrix by matrix
    quantization: str | None = None
    layers: list[Layer] = field(default_factory=list)  # what quantizing did to every weight
    vocab_size: int = 0  # of the model, 0 where no configuration says it


def convert(
    source: PathLike,
    target: PathLike,
    *,
    format: str | None = None,
    quantization: str | None = None,
    ternarization: Ternarization | None = None,
    calibration: NDArray[np.int32] | None = None,
    tokenizer_json: PathLike | None = None,
    allow_requantize: bool = False,
    verify_written: bool = True,
    i2_s: str = "x86",
    merge_adapter: PathLike | None = None,
    progress: Progress = lambda what, done, total: None,
    ready: Callable[[], None] = lambda: None,
) -> Report:
    """Write the model at `source` (a folder or file of any format that is read) to `target`.

    format: one of FORMATS, or None for what the target's name asks for: .gguf, .safetensors and .bin (one file), else a folder.
    quantization: None to write what is there; "ternary" by `ternarization`, else another of SCHEMES.
    calibration: tokens, int32 [sequences, tokens] (layerwise.sequences makes them of a text), from which outputs' errors are known.
    tokenizer_json: a file to be used instead of the model's own tokenizer.
    allow_requantize: accept scales or values that the format holds only approximately; the report has the errors.
    merge_adapter: a low-rank adapter (PEFT's folder, or llama.cpp's GGUF) to add to the weights; ternary ones return to their grid.
    verify_written: read the file back and compare everything, before it takes the target's place.
    ready: called once, when all that can be refused beforehand has been and nothing is computed yet.

    Raises InexactError for a conversion that would change the model, UsageError for arguments and targets, NotTheSameError where what was
    written is not what was meant, and what the readers raise.
    """
    target = named(target)
    check_asked(quantization, ternarization, calibration is not None)
    how = ternarization or Ternarization()
    alone = tensors_alone(source) if quantization is not None and merge_adapter is None else None
    if alone is not None:
        weights_alone.check(source, alone, str(quantization), how.calibrated or calibration is not None, tokenizer_json, i2_s)
        form = choose(format, target, quantization, 0)
        return _convert_alone(alone, Path(source), target, form, how, allow_requantize, verify_written, progress, ready)
    if how.calibrated and calibration is None:
        raise UsageError(f"{'gptq' if how.method == 'gptq' else 'alpha auto'} needs calibration text; none was given")

    notes: list[str] = []
    checkpoint = open_checkpoint(source, i2_s)
    if quantization not in (None, "fp16"):
        checkpoint = with_latent_weights(checkpoint, notes)
    elif latent := latent_weights(checkpoint):
        notes.append(f"the latent weights of {len(latent)} layers are not written, only those that the checkpoint runs")
    model = read(checkpoint)
    parts: dict[str, LowRank] = {}
    plain = dequantized(model, quantization).weights
    if merge_adapter is not None:
        model, parts = merging.merged(model, Path(merge_adapter))
    model = dequantized(model, quantization)
    form = _format(format, target, quantization, model, how)
    check_target(target, [checkpoint.path, *{Path(tensor.path) for tensor in checkpoint.tensors.values()}], form)
    kept, for_llama_cpp = list[adapters.Kept](), dict[Path, Path]()
    if merge_adapter is None:
        kept = adapters.places(checkpoint.path, target, form.folder)
        if form.container == "gguf":
            for_llama_cpp = adapters.gguf_places(checkpoint.path, target, gguf.architecture(model.config, form), model.config)
        if not form.folder:
            adapters.refuse_collisions(target, kept, for_llama_cpp)
    elif form.folder:
        adapters.refuse_others(target, {})

    # All that can be refused is, and the disk is looked at, before anything is computed: weights to be computed have stand-ins for that.
    check(model, form, quantization, how, notes)
    later = stand_ins(model, form, quantization, how)
    requantize, some_kept = allow_requantize or quantization == "fp16", any(a == "keep" for _, a in how.alphas)
    fitted = _fitted(model, model.weights | later, model.weights, form, requantize, some_kept)
    texts = beside.texts_of(checkpoint, model.config, form, tokenizer_json, notes)
    copied = beside.copies(checkpoint, form, tokenizer_json)
    nbytes = _parts(model, {name: weight for name, (weight, _) in fitted.items()}, form, texts)[2]
    report_bytes = REPORT_BYTES + len(later) * LAYER_BYTES if quantization is not None else 0
    text_bytes = sum(len(text.encode()) for text in texts.values()) if form.folder else 0  # of one file they are in its header
    others = adapters.file_bytes(kept, for_llama_cpp) + sum(map(len, copied.values())) + text_bytes
    require_disk(target, nbytes + others + report_bytes)
    ready()

    wanted, choices = choose_weights(model, form, quantization, how, calibration, notes, progress)
    fitted |= _fitted(model, wanted, later, form, requantize, some_kept)
    weights, losses = {name: weight for name, (weight, _) in fitted.items()}, [loss for _, loss in fitted.values() if loss is not None]
    survived: list[merging.Merged] = []
    if parts:
        before, _ = choose_weights(replace(model, weights=plain), form, quantization, how, calibration, [], progress)
        survived = merging.survival(before, wanted, parts)
        if adapters.beside(checkpoint.path):
            notes.append("adapters beside the source are not copied: they were not trained beside the merged weights")
    elif (kept or for_llama_cpp) and any(wanted[name] is not weight for name, weight in model.weights.items()):
        notes.append("the adapters were trained beside other weights than those written; what base + adapter give is no longer the same")
    head, chunks, nbytes, count, texts = _parts(model, weights, form, texts)
    notes += gguf.notes(model.config, form) if form.container == "gguf" else hf.notes(model.config, form)
    if quantization is None:
        _note_activations(model, weights, form, notes)

    def checked(path: Path) -> None:
        if verify_written:
            verify(path, model, weights, progress, texts, copied)

    def keep_adapters(root: Path) -> None:
        name = str(target) if form.container == "hf" else None
        for one in kept:
            notes.append(adapters.keep(one, root / one.to, name, model.config, verify_written))
        for path, to in for_llama_cpp.items():
            notes.extend(filter(None, [adapters.write_gguf(path, to, gguf.architecture(model.config, form), model.config)]))

    if form.folder:
        with new_folder(target) as folder:
            for key, text in texts.items():
                write_synced(folder / beside.FILES.get(key, f"{key}.json"), text.encode())
            for name, content in copied.items():
                write_synced(folder / name, content)
            keep_others(target, folder)
            with open(folder / "model.safetensors", "xb") as weights_file:
                _write(weights_file, head, chunks, nbytes, progress)
                os.fsync(weights_file.fileno())
            checked(folder)
            keep_adapters(folder)
    else:
        adapters.tidy(target, kept)
        with new_file(target) as file:
            _write(file, head, chunks, nbytes, progress)
            file.flush()
            checked(Path(file.name))
            keep_adapters(target.absolute().parent)  # before the target takes its place: what fails here leaves the old one
    layers, size = measure(model.weights, weights, choices, form), model.config.vocab_size
    return Report(str(source), str(target), form.name, nbytes, count, verify_written, losses, notes, survived, quantization, layers, size)


def _format(name: str | None, target: Path, quantization: str | None, model: Model, how: Ternarization) -> Format:
    """The format that is asked for, or that fits what is to be written. Raises UsageError where the two contradict each other."""
    linears = [w for w in model.weights.values() if w.kind in LINEARS]
    groups = [shared(w) for w in linears if quantization is None or w.codes is not None]
    groups += [64 for w in linears if w.shape[1] % 256]  # which no block of 256 takes
    groups += [how.scale] if quantization == "ternary" and isinstance(how.scale, int) else []
    own = linears[0].scheme if linears[0].scheme in INTEGERS and len({w.scheme for w in linears}) == 1 else None
    form = choose(name, target, quantization or own, min((g for g in groups if g), default=0), bool(model.config.biases))
    if quantization == "fp16" and form.weights != "f16":
        raise UsageError(f"{form.name} does not hold fp16; choose gguf-f16, hf-dense-f16 or safetensors-dense-f16")
    if form.integer and quantization != form.integer and not all(w.scheme in (form.weights, form.integer) for w in linears):
        raise UsageError(f"{form.name} holds {form.integer}; add --quantization {form.integer}")
    return form


def _convert_alone(
    tensors: Mapping[str, Tensor],
    source: Path,
    target: Path,
    form: Format,
    how: Ternarization,
    requantize: bool,
    check: bool,
    progress: Progress,
    ready: Callable[[], None],
) -> Report:
    """Of a file without a configuration (weights_alone.py)."""
    check_target(target, [source], form)
    notes: list[str] = []
    before, weights, choices, losses = weights_alone.made_ternary(tensors, form, how, requantize, str(source), notes)
    head, order = weights_alone.items(tensors, weights, form)
    nbytes = len(head) + sum(item.nbytes for item in order)
    require_disk(target, nbytes + REPORT_BYTES + len(choices) * LAYER_BYTES)
    ready()
    adapters.tidy(target)
    with new_file(target) as file:
        _write(file, head, ((item.chunks(), 0) for item in order), nbytes, progress)
        if check:
            weights_alone.verify(Path(file.name), tensors, weights, progress)
    layers = measure(before, weights, choices, form)
    notes.append(weights_alone.note(str(source), target))
    if (found := adapters.beside(source)) and target.absolute().parent.resolve() != source.absolute().parent.resolve():
        names = ", ".join(map(shown, found.values()))
        notes.append(f"adapters beside the source are not copied, for without its config.json nobody knows what they fit: {names}")
    return Report(str(source), str(target), form.name, nbytes, len(order), check, losses, notes, [], "ternary", layers)


def _fitted(
    model: Model, wanted: Mapping[str, Weight], names: Iterable[str], form: Format, requantize: bool, some_kept: bool
) -> dict[str, tuple[Weight, Loss | None]]:
    """Those of `names`, as the format holds them among all that are wanted."""
    main = model.weights["embedding"].scheme
    dtypes = [*dict.fromkeys([*([main] if main in ("f16", "bf16", "f32") else []), "bf16", "f16", "f32"])]
    beside = form.container == "gguf" and gguf.keeps_scale_beside(model.config)
    mixed = some_kept or (model.canonical.quantization is not None and model.config.architecture != "bitnet") or form.container != "gguf"
    plain = mixed and any(weight.codes is not None for weight in wanted.values() if weight.kind in LINEARS)
    offset = 1.0 if model.config.architecture == "gemma3_text" and form.container != "gguf" else 0.0
    based = {name: rebased(wanted[name], offset) if wanted[name].kind.endswith("norm") else wanted[name] for name in names}
    return {name: fit(weight, form, requantize, dtypes, beside, plain) for name, weight in based.items()}


def _parts(
    model: Model, weights: Mapping[str, Weight], form: Format, texts: dict[str, Any]
) -> tuple[bytes, _Chunks, int, int, dict[str, Any]]:
    """(what begins the file, its tensors' bytes, its length, their number, the texts with config.json where there is one)."""
    if form.container == "gguf":
        start, order = gguf_write.layout(gguf.items(model, weights.values(), form), gguf.metadata_of(model, form, texts))
        filled: list[tuple[Any, int]] = list(order)
    else:
        config = hf.config_of(model, form, weights)
        names = hf.names_of(model, config, str(model.checkpoint.path))
        texts = hf.documents(config, texts)
        metadata = {"format": "mlx" if form.container == "mlx" else "pt"} | ({} if form.folder else dict.fromkeys(TEXTS, "") | texts)
        start, items = safetensors.layout(hf.items(weights.values(), names, form), metadata, str(model.checkpoint.path))
        filled = [(item, 0) for item in items]
    nbytes = len(start) + sum(item.nbytes + fill for item, fill in filled)
    return start, ((item.chunks(), fill) for item, fill in filled), nbytes, len(filled), texts


def _write(file: Any, head: bytes, tensors: _Chunks, nbytes: int, progress: Progress) -> None:
    file.write(head)
    done = len(head)
    for chunks, fill in tensors:
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk).data)
            done += chunk.nbytes
            progress("writing", done, nbytes)
        file.write(bytes(fill))
        done += fill
    file.flush()
    assert done == nbytes, f"{done} bytes instead of {nbytes}"


def _note_activations(model: Model, weights: Mapping[str, Weight], form: Format, notes: list[str]) -> None:
    """Packed weights meet int8 activations, plain numbers do not."""
    asks = form.container == "gguf" and model.config.architecture == "bitnet"  # whose masters are ternarized at load
    head = ("embedding" if model.config.tied else "head",)
    for kinds, run, those in ((LINEARS, "layers run", "ones"), (head, "head runs", "one")):
        before, after = (_scheme(found, kinds) for found in (model.weights, weights))
        if before and not after and not (asks and kinds == LINEARS):
            how = "in groups" if before in INTEGERS else "per token"
            notes.append(f"dense {run} with float32 activations, the {before} {those} of the source with int8 activations {how}")
        elif after and not before:
            notes.append(f"{after} {run} with int8 activations, the dense {those} of the source with float32 activations")


def _scheme(weights: Mapping[str, Weight], kinds: Collection[str]) -> str | None:
    """Of the first weight of these kinds that has codes; None where none has."""
    return next((w.scheme for w in weights.values() if w.kind in kinds and w.codes is not None), None)
