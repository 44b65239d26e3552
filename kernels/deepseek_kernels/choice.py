"""Which backend each family of ops uses: chosen once, for the caller to pass on and to print."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec

from deepseek_kernels.machine import BackendUnavailable, gpu_there, interpreting, on_hopper, why_not

AUTO = "auto"


@dataclass(frozen=True)
class Kernels:
    """The backend of each family, by name."""

    quant: str = "reference"
    gemm: str = "reference"
    grouped_gemm: str = "reference"
    norm: str = "reference"
    swiglu: str = "reference"
    moe: str = "reference"
    attention: str = "reference"
    rope: str = "reference"
    loss: str = "reference"
    optim: str = "reference"
    wgrad: str = "reference"  # of linears outside FP8

    def __str__(self) -> str:
        """One phrase: "reference", or "triton, but attention torch"."""
        names = list(asdict(self).values())
        most = max(sorted(set(names)), key=names.count)
        others = [f"{family} {name}" for family, name in asdict(self).items() if name != most]
        return most + (f", but {', '.join(others)}" if others else "")


FAMILIES = tuple(field.name for field in fields(Kernels))
# References are plain torch; where torch itself has something faster than that, it computes.
ON_CPU = Kernels(moe="torch", attention="torch", rope="torch", optim="torch")
_BACKENDS = (
    dict.fromkeys(FAMILIES, ("reference", "triton"))
    | dict.fromkeys(("quant", "swiglu"), ("reference", "triton", "cuda"))
    | {
        "gemm": ("reference", "triton", "torch", "cuda", "ext"),
        "grouped_gemm": ("reference", "triton", "cuda", "ext"),  # cuBLAS has no groups
        "attention": ("reference", "triton", "torch", "ext"),
        "norm": ("reference", "triton", "ext"),
        "wgrad": ("reference", "torch", "ext"),
    }
    | dict.fromkeys(("moe", "rope", "optim"), ("reference", "triton", "torch"))
)
# The fastest first, as measured (benchmarks/results/kernels.md); the first that can run is taken.
_ON_GPU = dict.fromkeys(FAMILIES, ("triton",)) | {
    **dict.fromkeys(("quant", "swiglu"), ("cuda", "triton")),
    "gemm": ("cuda", "torch", "triton"),
    "grouped_gemm": ("cuda", "triton"),
    "attention": ("torch",),
    "wgrad": ("torch",),
}
_EXTENSIONS = {
    **dict.fromkeys(("gemm", "grouped_gemm"), "deep_gemm"),
    "attention": "flash_attn",
    "norm": "fused_layer_norm_cuda",
    "wgrad": "fused_weight_gradient_mlp_cuda",
}
_GPU_ALONE = {(family, name) for family in ("gemm", "grouped_gemm") for name in ("torch", "cuda", "ext")} | {
    (family, "cuda") for family in ("quant", "swiglu")
}


def choose(device_type: str, asked: Mapping[str, str]) -> Kernels:
    """The backends for ``device_type`` ("cpu" or "cuda"). ``asked``: a name, or "auto", by family; a family that is
    not named is "auto": ``ON_CPU``, or Triton on GPUs (products, quant and swiglu: our CUDA kernels where they can be
    compiled; attention: torch's). Raises BackendUnavailable where a name cannot be had; nothing takes its place."""
    names = {family: asked.get(family, AUTO) for family in FAMILIES}
    for family, name in names.items():
        reason = problem(device_type, family, name)
        if reason is not None:
            raise BackendUnavailable(f"{family}: {reason}. Use {' or '.join(available(device_type, family))}")
    usual = _ON_GPU if device_type == "cuda" else {family: (name,) for family, name in asdict(ON_CPU).items()}
    chosen = {
        family: _first(device_type, family, usual[family]) if name == AUTO else name
        for family, name in names.items()
    }
    return Kernels(**chosen)


def _first(device_type: str, family: str, names: tuple[str, ...]) -> str:
    return next((name for name in names if problem(device_type, family, name) is None), names[-1])


def problem(device_type: str, family: str, name: str) -> str | None:
    """Why ``family`` cannot use the backend ``name`` on ``device_type``; None: it can."""
    if name == AUTO:
        return None
    if name not in _BACKENDS[family]:
        return f"there is no backend {name!r} for {family}"
    if device_type == "cpu" and (family, name) in _GPU_ALONE:
        return f"backend {name!r} runs on a GPU, tensors are on the CPU"
    if device_type == "cpu" and name == "triton" and not interpreting():
        return "backend 'triton' runs on a GPU, tensors are on the CPU (TRITON_INTERPRET=1 runs it there, slowly)"
    if name == "ext" and find_spec(_EXTENSIONS[family]) is None:
        return f"backend 'ext' is the module {_EXTENSIONS[family]}, which is not installed"
    if (family, name) == ("gemm", "torch") and gpu_there():
        return None if on_hopper() else "cuBLAS has these products on Hopper alone"
    return why_not(name)


def available(device_type: str, family: str) -> list[str]:
    """The backends that ``family`` can use."""
    return [name for name in _BACKENDS[family] if problem(device_type, family, name) is None]
