"""What each class of tensors is in FP8: the configuration's recipe as rules that can be followed."""

from dataclasses import dataclass

from deepseek_kernels.choice import Kernels
from deepseek_train.config.schema import Fp8Config, TilesConfig
from deepseek_train.fp8.rounding import Rounding
from deepseek_train.fp8.storage import AsIs, InE5M6, InFp8, Storage

_STORAGE: dict[str, type[InFp8] | type[InE5M6] | type[AsIs]] = {
    "e5m6": InE5M6,
    "fp8": InFp8,
    "params": AsIs,
}


@dataclass(frozen=True)
class Recipe:
    """``Storage`` of what waits for its weight gradient, ``Rounding`` of all that is used at once."""

    weights: Rounding
    inputs: InFp8  # of linears
    attention_output: Storage  # input of the linear after attention
    expert_inputs: InFp8  # of routed and shared experts
    swiglu_inputs: Storage
    activations: Rounding  # results of SwiGLU
    gradients: Rounding  # of linears' results
    expert_gradients: Rounding  # of routed experts' results
    weight_gradients: Rounding  # transposed: both operands
    accumulate: str

    @staticmethod
    def of(config: Fp8Config, kernels: Kernels) -> "Recipe":
        def rounding(tiles: TilesConfig) -> Rounding:
            return Rounding(tiles.tile, tiles.scale == "pow2", kernels.quant)

        activations, transposed = rounding(config.activations), rounding(config.weight_gradients)
        return Recipe(
            weights=rounding(config.weights),
            inputs=InFp8(activations, transposed),
            attention_output=_STORAGE[config.attention_output](activations, transposed),
            expert_inputs=InFp8(rounding(config.expert_inputs), transposed),
            swiglu_inputs=_STORAGE[config.swiglu_inputs](activations, transposed),
            activations=activations,
            gradients=rounding(config.gradients),
            expert_gradients=rounding(config.expert_gradients),
            weight_gradients=transposed,
            accumulate=config.accumulate,
        )
