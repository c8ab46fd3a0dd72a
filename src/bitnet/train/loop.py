"""The training loop: a fixed number of steps, resumable at any checkpoint, by one process or many.

Matrices are optimized by Muon (momentum, orthogonalized; K. Jordan 2024), which `torch.optim` carries, or AdamW; embedding, head and norms
by AdamW. All share one schedule. What a step does depends on the state before it, the seed and its number alone: batches and dropout are
drawn from the last two. So a run that goes on from a checkpoint is, on one CPU and as many threads, the uninterrupted one to the bit.

transformers' Trainer is not used: it resumes a data loader by skipping through it, saves the random state of each process, which ties a
checkpoint to their number, and has neither Muon nor two mixtures of texts; what is left of it would be this file.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitnet.errors import BitNetError, UsageError
from bitnet.files.replacing import write_text
from bitnet.train.checkpoint import before, newest, save, saved
from bitnet.train.data import IGNORED, Source, check_length, sample_examples, sample_windows
from bitnet.train.gate_l1 import weigh_gates
from bitnet.train.layers import set_blend
from bitnet.train.parallel import Processes, part_of, spread, whole
from bitnet.train.schedule import Schedule
from bitnet.train.speed import operations_per_token, peak_operations

Batches = Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]  # step -> (tokens, targets), [rows, length]
LOGGED = 10  # steps whose mean is one row of the log
LOGITS_BYTES = 4 << 30  # that the logits of what is taken at once may need, where the schedule does not say how much that is
COLUMNS = ("step", "loss", "rate", "gradient_norm", "tokens", "seconds", "cpu_seconds")


class TrainingStopped(BitNetError):
    """NaN, infinity or divergence."""


def windows(sources: list[Source], schedule: Schedule, context: int, seed: int, processes: int = 1) -> Batches:
    """Windows of texts by the schedule's mixtures; what a step sees depends on seed and step alone.

    Raises `UsageError` for a text that is shorter than the windows that are drawn from it, and for a step that `processes` cannot share.
    """
    by_tokens = {s.name: float(len(s.tokens)) for s in sources}

    def stage(step: int) -> tuple[NDArray[np.float64], int]:
        mixture, length = schedule.mixture or by_tokens, schedule.context or context
        if schedule.decaying(step):
            mixture, length = schedule.decay_mixture or mixture, schedule.decay_context or length
        return np.array([float(mixture.get(s.name, 0.0)) for s in sources]), length

    for weights, length in (stage(0), stage(schedule.steps - 1)):
        if length > schedule.batch_tokens:
            raise UsageError(f"training.batch_tokens is {schedule.batch_tokens}, less than one window of {length} tokens; raise it")
        _check_shares(schedule.batch_tokens // length, f"windows of {length} tokens", processes, "training.batch_tokens")
        for source, weight in zip(sources, weights, strict=True):
            if weight > 0:
                check_length(source, length + 1)

    def batch(step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        weights, length = stage(step)
        rng = np.random.default_rng((seed, step))
        count = schedule.batch_tokens // length
        found = sample_windows(sources, weights / weights.sum(), count, length + 1, schedule.snap, rng)
        return found[:, :-1], found[:, 1:]

    return batch


def examples(source: Source, schedule: Schedule, context: int, seed: int, processes: int = 1) -> Batches:
    """Whole examples, every one once in each pass. Raises `UsageError` for a step that `processes` cannot share."""
    _check_shares(schedule.batch_examples, "examples", processes, "training.batch_examples")
    return lambda step: sample_examples(source, schedule.batch_examples, step, context, seed)


def _check_shares(count: int, what: str, processes: int, key: str) -> None:
    if count % processes:
        raise UsageError(f"a step has {count} {what} for {processes} processes; expected a multiple of them: change {key}")


@dataclass(frozen=True)
class Teacher:
    """Whose logits are learned from, beside the text."""

    model: nn.Module
    share: float  # of the loss
    temperature: float


def at_once(model: nn.Module, rows: int, length: int, taught: bool) -> int:
    """How many of a step's rows to take together: all, or their number halved until the logits, their gradient and copies (12 bytes each;
    twice that beside a teacher's) fit into LOGITS_BYTES."""
    config: Any = model.config
    row = length * config.get_text_config().vocab_size * (24 if taught else 12)
    while rows > 1 and rows * row > LOGITS_BYTES:
        rows = (rows + 1) // 2
    return rows


def optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon or AdamW for the layers' matrices, AdamW for embedding, head and norms; of what trains at all."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for n, p in trained.items() if p.ndim == 2 and id(p) not in tables and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    vectors = [p for p in trained.values() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = []
    decay = schedule.weight_decay
    if matrices and schedule.optimizer == "muon":
        made.append(torch.optim.Muon(matrices, lr=schedule.matrix_lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    elif matrices:
        made.append(torch.optim.AdamW(matrices, lr=schedule.matrix_lr, betas=(0.9, 0.95), weight_decay=decay, fused=True))
    if vectors:
        made.append(torch.optim.AdamW(vectors, lr=schedule.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    for group in (g for o in made for g in o.param_groups):
        group["base_lr"], group["decays"] = group["lr"], id(group["params"][0]) in chosen
    if not made:
        raise UsageError("nothing in this model trains; expected layers that match the recipe")
    return made


def train(
    model: nn.Module,
    batches: Batches,
    schedule: Schedule,
    out: Path,
    seed: int = 0,
    *,
    teacher: Teacher | None = None,
    processes: Processes | None = None,
    parallel: str = "ddp",
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    compiled: bool = True,
    texts: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Train `model` (a causal LM of transformers) in place; write `out/log.csv`, TensorBoard's log and checkpoints, resume from the newest.

    `report`: called with every row of the log and its tokens_per_second (of all processes, padding included); the last one, of LOGGED steps
    and more, with the median of all and with share_of_peak (speed.py). `texts`: name -> SHA-256 of what `batches` draws from, `beside`: the
    same of models that stay as they are, both kept with the checkpoints: a run goes on with no others. Raises `TrainingStopped` for NaN,
    infinity and divergence, with step, layer and the last good checkpoint.
    """
    processes = processes or Processes()
    out.mkdir(parents=True, exist_ok=True)
    model.to(processes.device).train()
    if teacher is not None:
        teacher.model.to(processes.device).eval()
    wrapped = spread(model, parallel, processes)
    optims = optimizers(model, schedule)
    progress = _resume(out, model, optims, dict(texts or {}), dict(beside or {}))
    first = progress.step
    if before(out, progress.good_step) is None and not progress.diverged(schedule.divergence):
        progress.good_step = first  # that one is gone: none is better than the one that is taken up now
    also = () if teacher is None else (teacher,)
    objective: Any = _distil_loss if teacher is not None else _loss
    run = torch.compile(objective, dynamic=False) if compiled and schedule.compile else objective
    blend = torch.ones((), device=processes.device) if schedule.blend_steps > first else None
    set_blend(model, blend)
    started, cpu_started = time.perf_counter() - progress.seconds, time.process_time() - progress.cpu_seconds
    speeds: list[float] = []  # tokens/s, step by step
    with _logs(out, first, processes.first) as log:
        for step in range(first, schedule.steps):
            step_started = time.perf_counter()
            for group in (g for o in optims for g in o.param_groups):
                group["lr"] = group["base_lr"] * schedule.rate(step)
                if schedule.decay_weight_decay is not None and schedule.decaying(step) and group["decays"]:
                    group["weight_decay"] = schedule.decay_weight_decay
            if blend is not None:
                blend.fill_((step + 1) / schedule.blend_steps)
                if step >= schedule.blend_steps:
                    blend = None
                    set_blend(model, None)
            torch.manual_seed(int(np.random.SeedSequence((seed, step, processes.rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
            tokens, targets = (torch.from_numpy(a) for a in batches(step))
            count = int((targets != IGNORED).sum())
            rows = range(processes.rank, len(tokens), processes.count)
            loss = torch.zeros((), device=processes.device)
            size = schedule.micro_batch or at_once(model, len(rows), tokens.shape[1], teacher is not None)
            for at in range(0, len(rows), size):
                part = list(rows[at : at + size])
                if schedule.gate_l1:
                    weigh_gates(model, schedule.gate_l1 * len(part) / len(rows))
                mine, wanted = tokens[part].to(processes.device), targets[part].to(processes.device)
                share = run(wrapped, mine, wanted, count, schedule.bf16, *also)
                (share * processes.count).backward()  # the mean over processes is taken of gradients
                loss += share.detach()
            mean = float(processes.sum(loss))
            norm = nn.utils.clip_grad_norm_([p for o in optims for g in o.param_groups for p in g["params"]], schedule.max_grad_norm)
            norm_value = float(whole(norm))
            if not (math.isfinite(mean) and math.isfinite(norm_value)):
                what = "the loss" if not math.isfinite(mean) else "the norm of the gradients"
                where = _first_not_finite(model, tokens[list(rows)].to(processes.device))
                value = mean if what == "the loss" else norm_value
                good = before(out, progress.good_step if progress.diverged(schedule.divergence) else step)
                raise _stopped(out, step + 1, f"{what} is {value}; first not finite: {where}", good)
            for o in optims:
                o.step()
                o.zero_grad(set_to_none=True)
            progress.losses.append(mean)
            progress.norms.append(norm_value)
            progress.tokens += count
            speeds.append(tokens.numel() / (time.perf_counter() - step_started))
            if step == 0:
                progress.best = mean  # so that the first window may have diverged, too
            done = progress.step = step + 1
            if done % LOGGED == 0 or done == schedule.steps:
                average = float(np.mean(progress.losses))
                row = {
                    "step": done, "loss": f"{average:.4f}", "rate": f"{schedule.rate(step):.4f}",
                    "gradient_norm": f"{np.mean(progress.norms):.4f}", "tokens": progress.tokens,
                    "seconds": f"{time.perf_counter() - started:.1f}",
                    "cpu_seconds": f"{time.process_time() - cpu_started:.1f}",  # of all threads; a stopped process spends none
                }  # fmt: skip
                speed = float(np.median(speeds[-LOGGED:]))
                log(row, speed)
                if done == schedule.steps and len(speeds) >= LOGGED:
                    speed = float(np.median(speeds[1:]))  # the first one compiles
                    peak = processes.sum(torch.tensor(peak_operations(processes.device, schedule.bf16), device=processes.device))
                    operations = operations_per_token(model, tokens.shape[1])
                    operations += 0 if teacher is None else operations_per_token(teacher.model, tokens.shape[1], trains=False)
                    row |= {"share_of_peak": f"{speed * operations / float(peak):.4f}"}
                if processes.first:
                    report(row | {"tokens_per_second": f"{speed:.0f}"})
                if done > schedule.warmup_steps and progress.diverged(schedule.divergence):
                    what = f"the loss is {average:.2f}, {average - progress.best:.2f} above its best; {_largest(model)}"
                    raise _stopped(out, done, what, before(out, progress.good_step))
                if average < progress.best:
                    progress.best, progress.good_step = average, done - len(progress.losses)
                progress.losses, progress.norms = [], []
            if done % schedule.checkpoint_every == 0 or done == schedule.steps:
                progress.seconds, progress.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
                state = _state(model, optims) | vars(progress) | {"texts": dict(texts or {}), "beside": dict(beside or {})}
                if processes.first:
                    save(out, done, state, progress.good_step)
                processes.wait()


@dataclass
class _Progress:
    """Where a run is; part of its checkpoints."""

    step: int = 0  # steps done
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    best: float = math.inf  # mean loss of the best LOGGED steps; at first that of step 1
    good_step: int = 0  # steps done before those: what was then had not diverged
    losses: list[float] = field(default_factory=list)  # since the last row of the log
    norms: list[float] = field(default_factory=list)

    def diverged(self, by: float) -> bool:
        return bool(self.losses) and float(np.mean(self.losses)) > self.best + by


def _loss(model: nn.Module, tokens: Tensor, targets: Tensor, count: int, bf16: bool = True) -> Tensor:
    """The sum over these targets of the cross-entropy, by the number of all targets of the step."""
    return _cross_entropy(_logits(model, tokens, bf16), targets) / count


def _distil_loss(model: nn.Module, tokens: Tensor, targets: Tensor, count: int, bf16: bool, teacher: Teacher) -> Tensor:
    """share * KL(teacher || student) * temperature^2 + (1 - share) * cross-entropy (Hinton et al., arXiv:1503.02531), likewise."""
    logits, t = _logits(model, tokens, bf16), teacher.temperature
    with torch.no_grad():
        theirs = _logits(teacher.model, tokens, bf16)[..., : logits.shape[-1]]
    kl = nn.functional.kl_div((logits / t).log_softmax(-1), (theirs / t).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    kl = (kl * (targets != IGNORED)).sum() * t * t
    return (teacher.share * kl + (1 - teacher.share) * _cross_entropy(logits, targets)) / count


def _logits(model: nn.Module, tokens: Tensor, bf16: bool = True) -> Tensor:
    """float32 [rows, length, vocab]"""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _state(model: nn.Module, optims: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """What trains, and the optimizers' memory of it, whole and by name; all processes must ask."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    memory = {id(p): s for o in optims for p, s in o.state.items()}
    return {
        "model": {n: whole(p) for n, p in trained.items()},
        "optimizer": {n: {k: whole(v) for k, v in memory.get(id(p), {}).items()} for n, p in trained.items()},
    }


def _resume(out: Path, model: nn.Module, optims: list[torch.optim.Optimizer], texts: dict[str, str], beside: dict[str, str]) -> _Progress:
    """Bring the newest checkpoint back."""
    state = newest(out)
    if state is None:
        return _Progress()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in trained.items()} != {n: p.shape for n, p in state["model"].items()}:
        raise UsageError(f"{out}: holds checkpoints of another model; name another folder with --out, or remove them")
    for name in {**state["texts"], **texts}:
        if state["texts"].get(name) != texts.get(name):
            raise UsageError(f"{out}: {name} is not what this run was begun with; bring the text back, or name another folder with --out")
    for name, then in state.get("beside", {}).items():  # earlier versions kept none
        if beside.get(name) != then:
            raise UsageError(
                f"{out}: {name} is another model than this run was begun with; bring it back, or name another folder with --out"
            )
    of = {id(p): o for o in optims for g in o.param_groups for p in g["params"]}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(part_of(state["model"][name], p))
            memory = {k: part_of(v, p) if v.shape == state["model"][name].shape else v for k, v in state["optimizer"][name].items()}
            if memory:
                of[id(p)].state[p] = memory
    return _Progress(**{f.name: state[f.name] for f in fields(_Progress)})


def _stopped(out: Path, step: int, what: str, good: Path | None) -> TrainingStopped:
    if good is None:
        return TrainingStopped(f"step {step}: {what}; there is no good checkpoint. Lower the learning rates and begin with another --out")
    later = "" if good in saved(out)[:1] else "remove the later ones, "
    return TrainingStopped(
        f"step {step}: {what}; last good checkpoint: {good}; {later}lower training.matrix_lr and vector_lr, or look at the data, and resume"
    )


def _first_not_finite(model: nn.Module, tokens: Tensor) -> str:
    """The first layer, in the order of the forward pass, that gives NaN or infinity; else the last whose gradient does."""
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(whole(p)).all()):
            return f"{name} (its weights)"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    handles = [m.register_forward_hook(look(n)) for n, m in leaves]
    try:
        with torch.no_grad():
            _logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"{found[0]} (its output)"
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(whole(p.grad)).all())]
    return f"{bad[-1]} (its gradient)" if bad else "the loss itself"


def _largest(model: nn.Module) -> str:
    """The layer with the largest weights, which is where rates are too high first."""
    sizes = {n: float(whole(p).abs().max()) for n, p in model.named_parameters() if p.requires_grad}
    name = max(sizes, key=lambda n: sizes[n])
    return f"largest weight {sizes[name]:.3g} in {name}"


def read_log(out: Path) -> list[dict[str, str]]:
    """The rows of log.csv that are whole; none where there is no such file."""
    path = out / "log.csv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in (dict(zip(COLUMNS, line.split(","), strict=False)) for line in lines) if _whole_row(row)]


def _whole_row(row: dict[str, str]) -> bool:
    try:
        return int(row["step"]) > 0 and all(math.isfinite(float(row[name])) for name in COLUMNS)
    except (KeyError, TypeError, ValueError):
        return False


@contextmanager
def _logs(out: Path, first: int, writes: bool) -> Iterator[Callable[[dict[str, Any], float], None]]:
    """Writes rows to log.csv, without what came after the step `first`, and with their tokens/s to TensorBoard, where it is installed."""
    if not writes:
        yield lambda row, speed: None
        return
    path, kept = out / "log.csv", io.StringIO(newline="")
    whole_rows = csv.DictWriter(kept, COLUMNS, extrasaction="ignore")
    whole_rows.writeheader()
    whole_rows.writerows(row for row in read_log(out) if int(row["step"]) <= first)
    write_text(path, kept.getvalue())
    board: Any = None
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)
    except ImportError:
        pass
    with path.open("a", newline="") as file:
        log = csv.DictWriter(file, COLUMNS)

        def write(row: dict[str, Any], speed: float) -> None:
            log.writerow(row)
            file.flush()
            if board is not None:
                board.add_scalar("tokens_per_second", speed, row["step"])
                for key in ("loss", "rate", "gradient_norm"):
                    board.add_scalar(key, float(row[key]), row["step"])

        try:
            yield write
        finally:
            if board is not None:
                board.close()
