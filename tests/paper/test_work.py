"""Operations per token: published totals, parts by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec import work
from deepseek_train.spec.stages import split_layers, stage_times, stage_work
from deepseek_train.spec.weights import count_active_parameters
from deepseek_train.spec.work import Work
from tests.paper.models import models, shipped


def test_v3_takes_the_published_operations_per_token() -> None:
    """250 GFLOP per token at a sequence length of 4096, forward and backward, without MTP (V3_SPEC A.1)."""
    assert work.model(shipped("deepseek_v3"), 4096).total / 1e9 == pytest.approx(250, rel=0.005)


def test_parts_of_v3_by_hand() -> None:
    """From the sizes in the report: 187.1M and 398M elements of attention and a MoE layer's active experts."""
    m, length = shipped("deepseek_v3"), 4096
    scores = 128 * (192 + 128) * (length + 1)  # 2 operations over (T + 1) / 2 positions
    attention = work.attention(m, 3, length)
    assert attention.backward_weight / 2 == pytest.approx(187.1e6, rel=1e-3)
    assert attention.forward == attention.backward_weight + scores
    assert attention.backward_input == attention.backward_weight + 2 * scores

    def matrix(elements: int) -> Work:
        return Work(2 * elements, 2 * elements, 2 * elements)

    assert work.feed_forward(m, 0) == matrix(3 * 7168 * 18432)
    assert work.feed_forward(m, 3) == matrix(9 * 3 * 7168 * 2048 + 256 * 7168)
    assert work.layer(m, 3, length) == attention + work.feed_forward(m, 3)
    assert work.head(m) == matrix(129280 * 7168)
    assert work.embedding(m) == Work(0, 0, 7168)
    join = matrix(2 * 7168**2)
    assert work.mtp(m, length) == work.embedding(m) + join + work.layer(m, 60, length) + work.head(m)


@settings(deadline=None)
@given(models(), st.integers(1, 64))
def test_without_attention_a_token_meets_each_active_matrix_once(m: ModelConfig, length: int) -> None:
    """Of the active parameters all do work but embedding, gains and biases; a tied embedding does the head's."""
    vectors = (2 * m.num_layers + 1) * m.hidden_size + m.num_layers * (m.kv_lora_rank + (m.q_lora_rank or 0))
    biases = (m.num_layers - m.num_dense_layers) * m.num_routed_experts
    lookup = 0 if m.tie_embeddings else m.vocab_size * m.hidden_size
    matrices = count_active_parameters(m) - vectors - biases - lookup
    found = work.model(m, length)
    assert found.backward_weight == 2 * matrices + m.hidden_size
    products = found.forward - 2 * matrices
    assert products == m.num_layers * m.num_heads * (6 + 2 + 5) * (length + 1)
    assert found.backward_input == 2 * matrices + 2 * products


@settings(deadline=None)
@given(models(), st.data())
def test_stages_share_the_work_of_the_whole(m: ModelConfig, data: st.DataObject) -> None:
    stages = split_layers(m, data.draw(st.integers(1, m.num_layers + 2)), 16)
    whole = work.model(m, 16)
    for _ in range(m.mtp_depth):
        whole += work.mtp(m, 16)
    assert sum((stage_work(m, stage, 16) for stage in stages), Work()) == whole
    times = stage_times(m, stages, 16)
    assert sum(times[0]) == pytest.approx(len(stages))
    for kind, total in zip(times, (whole.forward, whole.backward_input, whole.backward_weight), strict=True):
        assert sum(kind) == pytest.approx(len(stages) * total / whole.forward)


def test_tying_changes_no_work() -> None:
    m = shipped("deepseek_16b")
    assert work.model(m, 4096) == work.model(replace(m, tie_embeddings=True), 4096)
