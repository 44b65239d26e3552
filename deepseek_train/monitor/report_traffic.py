"""The report's section on what ranks send to one another's experts."""

from collections.abc import Sequence

from deepseek_train.monitor.markdown import table
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.monitor.numbers import data_size


def traffic_section(steps: Sequence[StepMetrics]) -> list[str]:
    """Bytes of the last step by purpose and class of link; nothing where experts are not spread."""
    if not steps or steps[-1].expert_traffic is None:
        return []
    last = steps[-1]
    traffic = last.expert_traffic
    assert traffic is not None
    parts = (
        ("dispatch", traffic.dispatch),
        ("combine", traffic.combine),
        ("routing announced", traffic.plan),
    )
    rows = [
        (name, data_size(sent.local), data_size(sent.node), data_size(sent.cross)) for name, sent in parts
    ]
    words = (
        f"Counted in step {last.step}, all ranks together, forward and backward. A dispatch takes tokens to experts or "
        "gradients to results, a combine brings them home."
    )
    over_least = traffic.over_least()
    if over_least is not None:
        words += (
            f" Between nodes, dispatches and combines sent {over_least:.3f} times the least possible, one "
            f"row for each token and other node that has an expert of it ({data_size(traffic.least_cross)})."
        )
    return ["## Expert traffic", words, table(("", "same rank", "same node", "between nodes"), rows)]
