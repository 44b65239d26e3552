"""Rules that concern more than one field of the configuration: every problem at once, each with its mend."""

import math
from collections.abc import Iterable, Iterator
from typing import get_type_hints

from deepseek_train.config.credentials import credential_problems
from deepseek_train.config.fallbacks import variants
from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import CurveConfig, ModelConfig, OptimConfig, RunConfig


def check(run: RunConfig) -> list[Problem]:
    """All problems of a parsed configuration that need no other room to be seen. Empty: it is sound."""
    first = [*model_problems(run.model), *_parallel(run), *_fallbacks(run), *_rest(run)]
    first += credential_problems(run)
    # Curves are often given as shares of the run: no point in speaking of them while its length is wrong.
    return first if run.train.total_tokens < 1 else [*first, *_curves(run.optim)]


def _positive(where: str, names: tuple[str, ...], group: object) -> Iterator[Problem]:
    for name in names:
        value = getattr(group, name)
        if value is not None and value < 1:
            yield Problem(
                f"{where}.{name}", f"must be at least 1, is {value}", "Give a positive whole number."
            )


def model_problems(m: ModelConfig) -> Iterator[Problem]:
    """What no model can be, whoever describes it."""
    counts = tuple(n for n, kind in get_type_hints(ModelConfig).items() if kind in (int, int | None))
    may_be_zero = ("num_dense_layers", "num_shared_experts", "mtp_depth")
    yield from _positive("model", tuple(n for n in counts if n not in may_be_zero), m)
    for name in may_be_zero:
        if getattr(m, name) < 0:
            yield Problem(f"model.{name}", f"is negative ({getattr(m, name)})", "Use 0 for none.")
    if m.num_dense_layers > m.num_layers:
        yield Problem(
            "model.num_dense_layers",
            f"{m.num_dense_layers} dense layers in a model of {m.num_layers} layers",
            f"Use at most num_layers = {m.num_layers}.",
        )
    # RoPE's pairs begin behind the latter two.
    for name in ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank"):
        if getattr(m, name) % 2:
            mend = "RoPE turns pairs, at even places: use an even size."
            yield Problem(f"model.{name}", f"{getattr(m, name)} is odd", mend)
    groups = m.num_expert_groups
    if min(groups, m.num_routed_experts, m.expert_groups_per_token) < 1:
        return  # said above
    if m.num_routed_experts % groups:
        yield Problem(
            "model.num_expert_groups",
            f"{groups} groups do not divide {m.num_routed_experts} routed experts",
            "Choose a divisor of num_routed_experts.",
        )
        return
    if m.expert_groups_per_token > groups:
        yield Problem(
            "model.expert_groups_per_token",
            f"a token may use {m.expert_groups_per_token} groups, there are {groups}",
            f"Use at most num_expert_groups = {groups}.",
        )
    reachable = m.num_routed_experts // groups * min(m.expert_groups_per_token, groups)
    if m.experts_per_token > reachable:
        yield Problem(
            "model.experts_per_token",
            f"top-{m.experts_per_token}, but only {reachable} experts are in the groups a token may use",
            "Lower it, or raise expert_groups_per_token.",
        )
    if m.experts_per_token % m.expert_groups_per_token:
        yield Problem(
            "model.experts_per_token",
            f"{m.experts_per_token} is not a multiple of expert_groups_per_token = {m.expert_groups_per_token}; "
            "a group's score is the sum of its best K/M experts",
            "Choose a multiple.",
        )
    elif m.experts_per_token // m.expert_groups_per_token > m.num_routed_experts // groups:
        yield Problem(
            "model.num_expert_groups",
            "a group holds fewer experts than K/M of its score",
            "Use fewer groups.",
        )


def _parallel(run: RunConfig) -> Iterator[Problem]:
    p, m = run.parallel, run.model
    yield from _positive("parallel", ("pp", "dp", "ep"), p)
    yield from _positive("schedule", ("stages_per_rank", "max_activations"), run.schedule)
    for name in ("durations", "max_activations"):
        if getattr(run.schedule, name) is not None and run.schedule.name != "auto":
            what = f"is for schedule=auto alone, the schedule is {run.schedule.name}"
            yield Problem(f"schedule.{name}", what, "Leave it null, or write schedule=auto.")
    if min(p.pp, p.ep, p.dp or 1) < 1:
        return
    if p.ep_across_mirrors:
        yield from _mirrors(run)
    elif p.dp is not None and p.dp % p.ep:
        yield Problem(
            "parallel.ep",
            f"expert-parallel size {p.ep} does not divide data-parallel size {p.dp}",
            "EP groups are consecutive data-parallel ranks: make dp a multiple of ep.",
        )
    if m.num_routed_experts % p.ep:
        yield Problem(
            "parallel.ep",
            f"{m.num_routed_experts} routed experts do not divide evenly over {p.ep} expert-parallel ranks",
            "Choose a divisor of model.num_routed_experts.",
        )


def of_fallback(index: int, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Problems of one of ``parallel.fallbacks``, in its name."""
    for problem in problems:
        yield Problem(f"parallel.fallbacks[{index}]", f"{problem.where} {problem.what}", problem.mend)


def _fallbacks(run: RunConfig) -> Iterator[Problem]:
    """The rules of layouts, for each that may be fallen back on."""
    own = list(_parallel(run))
    for index, variant in enumerate(variants(run)[1:]):
        yield from of_fallback(index, [problem for problem in _parallel(variant) if problem not in own])


def _mirrors(run: RunConfig) -> Iterator[Problem]:
    """What experts shared by mirrored pipeline ranks ask for."""
    p, where = run.parallel, "parallel.ep_across_mirrors"
    if run.schedule.name != "dualpipe":
        yield Problem(
            where,
            f"under schedule {run.schedule.name} no two pipeline ranks are sure to run the same stage at every step; "
            "sharing experts, they would wait for each other's exchanges for ever",
            "Write schedule=dualpipe, or parallel.ep_across_mirrors=false.",
        )
        return
    if p.pp % 2:
        what = f"rank p shares its experts with its mirror pp-1-p, and of {p.pp} pipeline ranks one has none"
        yield Problem(where, what, "Use an even parallel.pp.")
    if p.ep % 2:
        what = f"half of an expert group is on each of two mirrored ranks, but parallel.ep is {p.ep}"
        yield Problem(where, what, "Use an even parallel.ep, or parallel.ep_across_mirrors=false.")
    elif p.dp is not None and 2 * p.dp % p.ep:
        yield Problem(
            "parallel.ep",
            f"expert-parallel size {p.ep} does not divide the {2 * p.dp} ranks of two mirrored pipeline ranks",
            "EP groups are ep / 2 consecutive data-parallel ranks of both: make dp a multiple of ep / 2.",
        )


def _curves(o: OptimConfig) -> Iterator[Problem]:
    for name in ("lr", "batch_size", "balance_speed", "mtp_weight"):
        curve: CurveConfig = getattr(o, name)
        since = 0
        for i, segment in enumerate(curve.segments):
            where = f"optim.{name}.segments[{i}]"
            if segment.until <= since:
                yield Problem(
                    where, f"ends at {segment.until} tokens, where it begins", "Segments go forward."
                )
            if (segment.shape == "constant") != (segment.to is None):
                yield Problem(
                    where, f"shape {segment.shape} with to={segment.to}", "Only 'constant' has no 'to'."
                )
            since = segment.until
        values = [curve.start] + [s.to for s in curve.segments if s.to is not None]
        if not all(map(math.isfinite, values)):
            yield Problem(f"optim.{name}", f"is not finite: {values}", "Give finite numbers.")
        elif min(values) < (1 if name == "batch_size" else 0):
            yield Problem(f"optim.{name}", f"falls to {min(values)}", "Keep it positive.")
    for name in ("beta1", "beta2"):
        if not 0.0 <= getattr(o, name) < 1.0:
            yield Problem(f"optim.{name}", f"{getattr(o, name)} is not in [0, 1)", "V3 uses 0.9 and 0.95.")
    if not 0.0 < o.eps < math.inf:
        yield Problem("optim.eps", f"{o.eps} is not a positive number", "V3 uses 1e-8.")


def _watchdog(run: RunConfig) -> Iterator[Problem]:
    cluster, watchdog = run.cluster, run.cluster.watchdog
    if cluster.max_restarts < 0:
        what = f"is negative ({cluster.max_restarts})"
        yield Problem("cluster.max_restarts", what, "Use 0 for none.")
    if watchdog.straggler_every < 0:
        what = f"is negative ({watchdog.straggler_every})"
        yield Problem("cluster.watchdog.straggler_every", what, "Use 0 for 'never'.")
    if watchdog.enabled and not 0 < watchdog.hang_seconds < cluster.timeout_seconds:
        yield Problem(
            "cluster.watchdog.hang_seconds",
            f"{watchdog.hang_seconds:g} s is not between 0 and cluster.timeout_seconds = {cluster.timeout_seconds}: "
            "collectives would give up first, and name nobody",
            "Choose something between, or write cluster.watchdog.enabled=false.",
        )


def _fp8(run: RunConfig) -> Iterator[Problem]:
    fp8 = run.precision.fp8
    if fp8 is not None and fp8.weights.tile == "1x128":
        what = "1x128, but rows of a weight become columns of its transpose: one scale cannot serve both products"
        yield Problem("precision.fp8.weights.tile", what, "Write 128x128 (V3) or tensor.")


def _guard(run: RunConfig) -> Iterator[Problem]:
    guard, decay = run.train.guard, run.optim.ema_decay
    for name in ("loss_factor", "norm_factor"):
        factor = getattr(guard, name)
        if factor != 0.0 and not 1.0 < factor < math.inf:
            what = f"{factor}: a step would be a spike unless it is far below the mean"
            yield Problem(f"train.guard.{name}", what, "Use a factor above 1, or 0 to look for no spikes.")
    yield from _positive("train.guard", ("mean_steps",), guard)
    if decay is not None and not 0.0 <= decay < 1.0:
        what = f"{decay} is not in [0, 1)"
        yield Problem("optim.ema_decay", what, "0.9999 spans the last 10,000 steps; null keeps no average.")


def _rest(run: RunConfig) -> Iterator[Problem]:
    for where, text in (("name", run.name), ("run_dir", run.run_dir), ("data.path", run.data.path)):
        if not text or text == "???":
            yield Problem(where, "is not given", f"Write {where}=... on the command line.")
    if run.optim.clip_norm < 0:
        yield Problem("optim.clip_norm", f"is negative ({run.optim.clip_norm})", "Use 0 to never clip.")
    yield from _positive("train", ("total_tokens", "microbatch_size", "eval_microbatches"), run.train)
    yield from _positive("monitor", ("log_every",), run.monitor)
    yield from _positive("data", ("sequence_length", "max_megabytes"), run.data)
    yield from _positive("checkpoint", ("keep",), run.checkpoint)
    counts = ("gpus_per_node", "timeout_seconds", "rendezvous_seconds", "threads_per_rank")
    yield from _positive("cluster", counts, run.cluster)
    yield from _watchdog(run)
    peak = run.cluster.peak_tflops
    if peak is not None and not 0.0 < peak < math.inf:
        what = f"{peak} is not the TFLOP/s of a GPU"
        yield Problem("cluster.peak_tflops", what, "An H100 has 989; leave it null for what is known.")
    if "block" in run.train.recompute and set(run.train.recompute) != {"block"}:
        yield Problem(
            "train.recompute",
            f"'block' beside {', '.join(k for k in run.train.recompute if k != 'block')}: it already forgets those",
            "Write [block] alone, or leave it out.",
        )
    yield from _guard(run)
    for where, value in (
        ("checkpoint.every", run.checkpoint.every),
        ("train.eval_every", run.train.eval_every),
        ("train.check_replicas_every", run.train.check_replicas_every),
        ("train.guard.max_skips", run.train.guard.max_skips),
        ("train.guard.max_rollbacks", run.train.guard.max_rollbacks),
    ):
        if value < 0:
            zero = "only at the end" if where in ("checkpoint.every", "train.eval_every") else "never"
            yield Problem(where, f"is negative ({value})", f"Use 0 for '{zero}'.")
    if run.train.sample_tokens < 0:
        yield Problem("train.sample_tokens", f"is negative ({run.train.sample_tokens})", "Use 0 for none.")
    if not 1 <= run.data.validation_percent <= 99:
        yield Problem(
            "data.validation_percent",
            f"{run.data.validation_percent} leaves nothing to train on or nothing to evaluate on",
            "Use a whole number from 1 to 99.",
        )
    if not 0.0 <= run.data.fim_rate <= 1.0:
        yield Problem("data.fim_rate", f"{run.data.fim_rate} is not a share", "Use a number from 0 to 1.")
    yield from _fp8(run)
    if run.precision.moments == "bf16" and run.optim.beta2 > 0.996:
        yield Problem(
            "precision.moments",
            f"bf16 moments cannot follow beta2 = {run.optim.beta2}: its change is below one rounding step",
            "Lower optim.beta2 (V3: 0.95) or use fp32 moments.",
        )
