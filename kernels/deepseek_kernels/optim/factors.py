"""The scalars of an update, worked out in double precision and rounded to FP32 where they are used."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Factors:
    kept: float  # of the weight, after decay
    grad1: float  # 1 - beta1
    beta2: float
    grad2: float  # 1 - beta2
    correction: float  # 1 / sqrt(1 - beta2^step), of the square root of v
    eps: float
    rate: float  # lr / (1 - beta1^step)

    @staticmethod
    def of(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> "Factors":
        return Factors(
            1.0 - lr * weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            (1.0 - beta2**step) ** -0.5,
            eps,
            lr / (1.0 - beta1**step),
        )
