"""The table of weights."""

from dataclasses import replace

import pytest
from hypothesis import given

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.weights import (
    all_weights,
    count_active_parameters,
    count_parameters,
    head,
    layer,
    mtp,
)
from tests.paper.models import models, shipped


def main_model(m: ModelConfig) -> int:
    return count_parameters(tuple(w for w in all_weights(m) if not w.name.startswith("mtp.")))


def test_v3_has_the_published_number_of_parameters() -> None:
    """671,026,419,200: the sum over the published tensors without MTP (V3_SPEC A.1)."""
    m = shipped("deepseek_v3")
    assert main_model(m) == 671_026_419_200
    assert round(count_active_parameters(m) / 1e9, 2) == 37.55
    unique_to_mtp = count_parameters(mtp(m, 0))
    assert 11.5e9 < unique_to_mtp < 11.7e9


def test_v3_by_hand() -> None:
    """The parts of V3_SPEC A.1, from the sizes in the report rather than from the table."""
    m = shipped("deepseek_v3")
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    gains = 2 * 7168 + 1536 + 512
    assert count_parameters(layer(m, 0)) == attention + gains + 3 * 7168 * 18432
    assert count_parameters(layer(m, 3)) == attention + gains + 257 * 3 * 7168 * 2048 + 256 * 7168 + 256
    assert count_parameters(head(m)) == 7168 + 129280 * 7168
    assert count_parameters(mtp(m, 0)) - count_parameters(layer(m, 60)) == 3 * 7168 + 2 * 7168**2


def test_16b_is_the_size_of_v2_lite() -> None:
    """V2-Lite: 15.7B total, 2.4B active without embedding and head (V2 report appendix B). The sigmoid router
    adds one bias per expert and layer to its 15,706,484,224."""
    m = shipped("deepseek_16b")
    assert main_model(m) == 15_706_484_224 + 26 * 64
    embedding_and_head = 2 * 102400 * 2048
    assert (count_active_parameters(m) - embedding_and_head) / 1e9 == pytest.approx(2.4, abs=0.2)


@given(models())
def test_published_slices_cover_every_weight_exactly_once(m: ModelConfig) -> None:
    names: set[str] = set()
    published: set[str] = set()
    for spec in all_weights(m):
        assert spec.name not in names
        names.add(spec.name)
        rows = spec.shape[1] if spec.expert else spec.shape[0]
        ends = [0, *(piece.stop for piece in spec.hf)]
        assert [piece.start for piece in spec.hf] == ends[:-1]
        assert ends[-1] == rows
        for piece in spec.hf:
            assert ("{expert}" in piece.name) == spec.expert
            assert piece.name not in published
            published.add(piece.name)


def test_kinds_of_weights() -> None:
    weights = {w.name: w for w in all_weights(shipped("deepseek_v3"))}
    assert not weights["layers.3.router.bias"].trained
    assert [w.name for w in weights.values() if not w.trained and not w.name.endswith("router.bias")] == []
    assert not weights["layers.0.attention_norm"].decayed
    assert weights["layers.0.attention.q_a"].decayed
    experts = {w.name.rsplit(".", 2)[-2] for w in weights.values() if w.expert}
    assert experts == {"experts"}


@given(models())
def test_a_tied_head_has_no_matrix_of_its_own(m: ModelConfig) -> None:
    tied, untied = (all_weights(replace(m, tie_embeddings=tie)) for tie in (True, False))
    assert {w.name for w in untied} - {w.name for w in tied} == {"head"}
    assert len(untied) == len(tied) + 1
    assert {piece.name for w in untied for piece in w.hf} - {piece.name for w in tied for piece in w.hf} == {
        "lm_head.weight"
    }
    assert count_parameters(untied) - count_parameters(tied) == m.vocab_size * m.hidden_size
