"""``deepseek-placement``: where to put a model's experts, and copies of the busy ones, to serve it. Needs no GPU.

usage: deepseek-placement run=FOLDER gpus=N [key=value ...]

  run=runs/tiny           folder of a run: expert loads from its metrics.jsonl, groups from its config.yaml
  steps=100               of the run: the last so many (long runs keep the loads of some of them)
  load=FILE.json          instead of run: {"layer": [tokens of each expert], ...}
  groups=8                expert groups of the model (model.num_expert_groups); default: the run's, else 1
  gpus=32                 that hold the experts, equally many each
  nodes=1                 of equally many GPUs. Where groups divide evenly among them, each stays on one node.
  redundant=0             copies on top of the experts; experts + redundant divide evenly among GPUs
  output=text             text: what it brings, for each layer; json: the maps

A copy takes an equal share of its expert's tokens. Before: experts in their order, no copies. After: busy experts
copied, copies placed (DeepSeek-V3 report, section 3.4.1; greedy, as EPLB). max/mean of the GPUs' loads is how much
longer experts take than with perfect balance; 1 is perfect. Greedy is not best: two copies may share a GPU, and a lucky
order of experts may be better than what comes out.

output=json is one object: gpus, nodes, groups, redundant, grouped (each group on one node), and layers, a list of
layer, max_over_mean_before, max_over_mean_after, copies (of each expert), physical_to_logical (the expert in each
place; every GPU has equally many places, the first GPU the first of them) and logical_to_physical (each expert's
places, then -1).

examples:
  deepseek-placement run=runs/tiny gpus=4 nodes=2 redundant=4
  deepseek-placement load=load.json groups=8 gpus=32 nodes=4 redundant=32      V3's prefill: 256 experts, 9 on a GPU
  deepseek-placement load=load.json groups=8 gpus=320 nodes=40 redundant=64    V3's decoding: 1 on a GPU

exit codes: 0 done; 2 something is wrong with the arguments or the loads, and the message says what.
"""

import json
import sys
from collections.abc import Sequence

from deepseek_train.cli.answer import answer
from deepseek_train.cli.placement_request import Question, understand
from deepseek_train.parallel.expert.placement import Placement, place_experts


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code. ``arguments`` defaults to the command line."""
    return answer("deepseek-placement", __doc__, sys.argv[1:] if arguments is None else arguments, _say)


def _say(words: Sequence[str]) -> None:
    question = understand(words)
    placement = place_experts(
        list(question.loads.by_layer.values()),
        replicas=question.experts + question.redundant,
        groups=question.groups,
        nodes=question.nodes,
        gpus=question.gpus,
    )
    print(_json(question, placement) if question.output == "json" else _text(question, placement))


def _json(question: Question, placement: Placement) -> str:
    columns = {
        "layer": tuple(question.loads.by_layer),
        "max_over_mean_before": placement.max_over_mean_before(),
        "max_over_mean_after": placement.max_over_mean_after(),
        "copies": placement.copies_LE,
        "physical_to_logical": placement.physical_to_logical_LP,
        "logical_to_physical": placement.logical_to_physical_LEC,
    }
    layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    sizes = {key: getattr(question, key) for key in ("gpus", "nodes", "groups", "redundant")}
    return json.dumps({**sizes, "grouped": placement.grouped, "layers": layers})


def _text(question: Question, placement: Placement) -> str:
    replicas = question.experts + question.redundant
    where = "each on one node" if placement.grouped else f"spread: {question.nodes} nodes do not divide them"
    before, after = placement.max_over_mean_before(), placement.max_over_mean_after()
    rows = [
        f"{layer:>5}  {b:>6.3f}  {a:>6.3f}  {_copied(copies_E)}".rstrip()
        for layer, b, a, copies_E in zip(
            question.loads.by_layer, before, after, placement.copies_LE, strict=True
        )
    ]
    return "\n".join(
        [
            f"load: {question.loads.source}",
            f"{question.experts} experts + {question.redundant} redundant on {question.gpus} GPUs: "
            f"{replicas // question.gpus} on each. Nodes: {question.nodes}. Groups: {question.groups}, {where}.",
            "",
            "layer  before   after  copied experts",
            *rows,
            f"{'mean':>5}  {sum(before) / len(before):>6.3f}  {sum(after) / len(after):>6.3f}",
            f"{'worst':>5}  {max(before):>6.3f}  {max(after):>6.3f}",
            "",
            "before, after: the busiest GPU's load over the mean. copied: in 2 places, or as many as x says.",
        ]
    )


def _copied(copies_E: tuple[int, ...]) -> str:
    """The experts with more than one copy, the most copied first."""
    several = sorted((-n, expert) for expert, n in enumerate(copies_E) if n > 1)
    return ", ".join(f"{expert}" if n == -2 else f"{expert} x{-n}" for n, expert in several)


if __name__ == "__main__":
    sys.exit(main())
