"""What was asked: the whole configuration of a run as frozen dataclasses (standard library only).

Every field has one meaning and one unit, said beside it. YAML files in ``configs/`` are parsed into these types by
``config.parse``; rules that concern more than one field live in ``config.check``. Each component receives its own
slice of a ``RunConfig``, never the whole.
"""

from dataclasses import dataclass, field
from typing import Literal

from deepseek_train.config.cluster import ClusterConfig
from deepseek_train.config.guard import GuardConfig

# Activations that the backward pass can compute once more instead of keeping them (V3 report section 3.2.3):
# results of RMSNorms; queries, keys, values; results of SwiGLU; or all inside a block but what enters its phases.
Forgettable = Literal["norm", "mla_up", "swiglu", "block"]

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipe", "dualpipe_v", "auto"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (V3 report section 4.3). ``factor`` 1 means plain RoPE."""

    factor: float = 1.0  # new context length / original context length (V3: 40)
    original_length: int = 4096  # tokens
    beta_fast: float = 32.0  # rotations above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which a frequency is divided by factor
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a DeepSeek-V3 style model (V3 report section 2 and 4.2)."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int  # transformer layers, the leading dense ones included, MTP modules not
    num_dense_layers: int  # leading layers with a dense FFN
    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None  # None: queries are projected directly (V2-Lite)
    kv_lora_rank: int
    dense_ffn_size: int
    num_routed_experts: int
    num_shared_experts: int
    expert_ffn_size: int
    experts_per_token: int  # top-k
    num_expert_groups: int  # V3: 8, one per node
    expert_groups_per_token: (
        int  # node limit M (V3: 4). K / M = 2 as in V3 if transformers is to route alike: it is fixed there
    )
    routed_scale: float  # factor on the normalised routing weights (V3: 2.5)
    mtp_depth: int = 0  # multi-token-prediction modules (V3: 1)
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    init_std: float = 0.006
    embed_init_std: float | None = None  # of the embedding; None: init_std, as in V3
    # The head uses the tensor of the embedding, initial values included (V3: no): leave embed_init_std at null then.
    tie_embeddings: bool = False


@dataclass(frozen=True)
class FallbackConfig:
    """Another layout of the same run, for another number of ranks; fields as in ``ParallelConfig``."""

    pp: int
    dp: int
    ep: int
    ep_across_mirrors: bool = False
    layers: str | None = None
    schedule: ScheduleName | None = None  # None: that of the run


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of ranks: world = pp x dp, expert-parallel groups are ep consecutive data-parallel ranks (or, across
    mirrors, ep / 2 of two pipeline ranks)."""

    pp: int = 1  # pipeline ranks
    dp: int | None = None  # data-parallel ranks; None: world / pp under torchrun, else ep
    ep: int = 1  # expert-parallel ranks; divides dp
    # DualPipe alone: pipeline ranks p and pp-1-p hold the same stages. true: they share the experts of these, half on
    # each, instead of holding all of them twice. Every exchange of a layer then couples the two directions. ep divides
    # 2 dp then, and dp is ep / 2 where it was ep.
    ep_across_mirrors: bool = False
    # Transformer layers of each pipeline stage, "3|4*14|2" (4*14: fourteen stages of 4). None: stages of even cost.
    layers: str | None = None
    # How tokens get to experts: flat, one all-to-all; two_hop, once across to each node, then inside it; deep_ep,
    # DeepSeek's library. auto: two_hop where an expert group spans nodes and lies evenly on them, else flat.
    dispatcher: Literal["auto", "flat", "two_hop", "deep_ep"] = "auto"
    # Layouts for when torchrun comes with another number of ranks, after a loss: the first that fits is taken.
    fallbacks: tuple[FallbackConfig, ...] = ()
    check_splits: bool = (
        False  # exchange and compare all-to-all split sizes (gloo returns garbage when they disagree)
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """Order of work in the pipeline."""

    name: ScheduleName = "dualpipe"
    stages_per_rank: int = 2  # of interleaved_1f1b; the others have their own number
    # auto: what each stage takes, a run's report/durations.json. None: estimated from its operations.
    durations: str | None = None
    # auto: most live activations of a rank, queued weight gradients counted with them. None: stages + 1, DualPipe's.
    max_activations: int | None = None


@dataclass(frozen=True)
class TilesConfig:
    """How tensors of one class become FP8: what shares a scale, and what a scale may be."""

    # Elements along the contraction that share a scale, or a square of both axes, or all of the tensor.
    tile: Literal["1x128", "128x128", "tensor"] = "1x128"
    scale: Literal["fp32", "pow2"] = "fp32"  # amax / 448 as it is, or rounded up to a power of two


@dataclass(frozen=True)
class Fp8Config:
    """What is FP8 (E4M3) in training, and how (V3 report section 3.3); the defaults are V3's. All else is
    ``PrecisionConfig.params``."""

    activations: TilesConfig = TilesConfig()  # inputs of linears
    gradients: TilesConfig = TilesConfig()  # of their results, for input gradients
    weights: TilesConfig = TilesConfig("128x128")  # 128x128 or tensor
    weight_gradients: TilesConfig = (
        TilesConfig()
    )  # both operands of weight gradients: the contraction is tokens
    expert_inputs: TilesConfig = TilesConfig(
        scale="pow2"
    )  # what is dispatched, and the shared expert's input
    expert_gradients: TilesConfig = TilesConfig(scale="pow2")  # of routed experts' results
    attention_output: Literal["e5m6", "fp8", "params"] = "e5m6"  # as it waits for its weight gradient
    swiglu_inputs: Literal["fp8", "params"] = "fp8"  # as they wait for the backward pass
    # promoted: tiles are added in FP32. hopper, unpromoted: as tensor cores alone add, inside tiles or all along (the
    # reference alone can; slow).
    accumulate: Literal["promoted", "hopper", "unpromoted"] = "promoted"


@dataclass(frozen=True)
class PrecisionConfig:
    """Formats of what is stored. Master weights and gradient accumulation are always FP32."""

    params: Literal["fp32", "bf16"] = "fp32"  # weights and activations
    moments: Literal["fp32", "bf16"] = "fp32"  # AdamW's two moments (V3: bf16)
    # On the wire: tokens on their way to experts, and gradients of results (V3: fp8); all on the way home (V3: bf16).
    # With ep 1 nothing travels, and nothing is rounded.
    dispatch: Literal["params", "bf16", "fp8"] = "params"
    combine: Literal["params", "bf16"] = "params"
    fp8: Fp8Config | None = None  # linears and experts from FP8 operands; None: in ``params``


@dataclass(frozen=True)
class KernelConfig:
    """The backend of each family of kernels, by name; what auto comes to: ``configs/kernels/auto.yaml``. A backend that
    is named and cannot run is an error."""

    quant: str = "auto"
    gemm: str = "auto"
    grouped_gemm: str = "auto"
    norm: str = "auto"
    swiglu: str = "auto"
    moe: str = "auto"
    attention: str = "auto"
    rope: str = "auto"
    loss: str = "auto"
    optim: str = "auto"
    wgrad: str = "auto"  # of linears outside FP8


@dataclass(frozen=True)
class Segment:
    """One piece of a curve over tokens: from where the last piece ended to ``to``, reached at ``until`` tokens."""

    until: int  # consumed tokens at which this piece ends
    to: float | None = None  # value at the end; None: stays as it is
    shape: Literal["constant", "linear", "cosine", "step"] = "constant"  # step: jumps to ``to`` at its start


@dataclass(frozen=True)
class CurveConfig:
    """A scalar as a function of consumed tokens; after the last segment it stays constant."""

    start: float
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and everything that changes over training (V3 report section 4.2)."""

    lr: CurveConfig
    batch_size: CurveConfig  # sequences per step, all ranks together; rounded to what the layout can run
    balance_speed: CurveConfig  # gamma: step of the router-bias update
    mtp_weight: CurveConfig  # lambda: weight of the MTP loss
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled, on matrices only (norm gains are not decayed)
    clip_norm: float = 1.0  # global gradient norm; 0: never clip
    sequence_balance_weight: float = 1e-4  # alpha: sequence-wise balance loss
    # sign (V3): a router bias moves by gamma; magnitude: by gamma times (mean load - load) / mean load.
    balance_rule: Literal["sign", "magnitude"] = "sign"
    # Averaged weights in CPU memory beside the trained ones (V3 report section 3.2.3), validated with them: so much of
    # the average stays at each step. None: no average.
    ema_decay: float | None = None


@dataclass(frozen=True)
class DataConfig:
    """Token shards, as ``deepseek-data prepare`` writes them."""

    path: str  # folder with manifest.json
    # Text that ``prepare`` reads: "builtin", "builtin:numpy+torch", a file or a folder. null: whatever lies in path.
    source: str | None = "builtin"
    tokenizer: str = "builtin"  # "builtin" (4k, shipped) or the path of a tokenizer.json
    sequence_length: int = 4096  # tokens the loss is computed on, per sequence
    max_megabytes: int | None = None  # prepare at most this much text; None: all
    fim_rate: float = 0.1  # share of documents rearranged as prefix-suffix-middle
    validation_percent: int = 5  # share of documents (by file hash) held out
    allow_change: bool = False  # go on with other data than the checkpoint's, from its first sequence


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and size of its pieces."""

    total_tokens: int
    microbatch_size: int = 1  # sequences per micro-batch
    recompute: tuple[Forgettable, ...] = ()  # changes memory and time, not a bit of the result
    # torch.compile for what is left of plain torch around the kernels, the balance loss: one kernel instead of ten
    # small ones, some seconds at the start, sums in another order.
    compile: bool = False
    eval_every: int = 0  # steps; 0: only at the end
    eval_microbatches: int = 8  # micro-batches per data-parallel rank in one evaluation
    sample_prompt: str = ""  # continuation printed at the end; empty: none
    sample_tokens: int = 64
    stop_after_seconds: float | None = None  # save and stop cleanly after this much wall time
    guard: GuardConfig = GuardConfig()
    # Steps between two comparisons of all replicas of all weights (``train/replicas.py``); 0: never.
    check_replicas_every: int = 100


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, where, and how much to keep."""

    every: int = 0  # steps; 0: only at the end and on a signal
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # steps: checkpoints of their multiples are kept for good; 0: none
    keep_best: int = 0  # by validation loss, of steps that were evaluated
    path: str | None = (
        None  # a folder or an fsspec URL (s3://bucket/run), no keys in it; null: the run folder's own
    )
    max_failures: int = 10  # saves that fail in a row before the run stops


@dataclass(frozen=True)
class MonitorConfig:
    """Where the numbers go. metrics.jsonl is always written."""

    log_every: int = 10  # steps
    wandb: Literal["auto", "offline", "online", "off"] = "off"  # auto: online with a key, else offline
    wandb_project: str = "deepseek_train"
    progress_bar: bool = True  # only on a terminal


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    monitor: MonitorConfig
    cluster: ClusterConfig
    kernels: KernelConfig = KernelConfig()
    run_dir: str = "runs/${name}"
    seed: int = 0
    init_from: str | None = None  # a checkpoint (folder or URL) whose weights a new run begins with
    resume: Literal["auto", "never", "must"] = "auto"  # auto: go on from the run folder's newest checkpoint
