"""A curve over consumed tokens: learning rate, batch size, gamma of the balance bias, lambda of MTP."""

import math

from deepseek_train.config.schema import CurveConfig


def value_at(curve: CurveConfig, tokens: int) -> float:
    """The curve's value when ``tokens`` have been consumed."""
    start, since = curve.start, 0
    for segment in curve.segments:
        end = start if segment.to is None else segment.to
        if tokens < segment.until:
            done = (tokens - since) / (segment.until - since)
            match segment.shape:
                case "linear":
                    return start + (end - start) * done
                case "cosine":
                    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
                case "step":
                    return end
                case "constant":
                    return start
        # A constant piece may still name a value: it is jumped to at its end.
        start, since = end, segment.until
    return start
