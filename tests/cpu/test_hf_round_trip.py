"""Out, in, and out again: the same to the last bit, in every type; and what is published under which name and type."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.hf_export import HfType, export, export_bytes
from deepseek_train.checkpoint.hf_folder import INDEX, HfFolder
from deepseek_train.checkpoint.hf_fp8 import SCALE, dequantise, quantise
from deepseek_train.checkpoint.hf_import import import_bytes, import_hf
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.checkpoint.weight_source import CheckpointWeights, checkpoint_names, open_weights
from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec.published import Published
from deepseek_train.spec.weights import all_weights
from tests.helpers.hf import published
from tests.helpers.hf_folders import assert_same, exported, random_weights, store, tensors_of
from tests.helpers.models import YARN, tiny
from tests.paper.models import models

# Axes beyond a block of 128, and no multiples of it.
WIDE = tiny(hidden_size=136, dense_ffn_size=150, expert_ffn_size=130, num_routed_experts=4, experts_per_token=2,
            num_expert_groups=2, expert_groups_per_token=1, num_layers=2)  # fmt: skip
DTYPES: list[HfType] = ["bf16", "fp32", "fp8"]


def again(folder: Path, root: Path, dtype: HfType, file_bytes: int = 10**6) -> Path:
    """Import ``folder``, export what came of it."""
    checkpoint = import_hf(HfFolder.open(folder), root / "checkpoints", {}, file_bytes=file_bytes)
    assert isinstance(checkpoint, Path)
    source = CheckpointWeights(StoredCheckpoint.open(checkpoint))
    export(source, root / "hf", dtype, extras={}, tokens={}, shard_bytes=10**6)
    return root / "hf"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m", [WIDE, tiny(tie_embeddings=True, mtp_depth=2, q_lora_rank=None)], ids=["wide", "tied"]
)
def test_out_in_out(tmp_path: Path, m: ModelConfig, dtype: HfType) -> None:
    first = exported(tmp_path, m, random_weights(m), dtype)
    second = again(first, tmp_path / "again", dtype)
    assert_same(tensors_of(first), tensors_of(second))
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


@settings(deadline=None, max_examples=8)
@given(models())
def test_any_shape_of_model(tmp_path_factory: pytest.TempPathFactory, m: ModelConfig) -> None:
    folder = tmp_path_factory.mktemp("any")
    first = exported(folder, m, random_weights(m), "fp8", shard_bytes=4000)
    second = again(first, folder / "again", "fp8", file_bytes=6000)
    assert HfFolder.open(first).model == m
    assert_same(tensors_of(first), tensors_of(second))


def test_fp32_is_the_checkpoint_itself(tmp_path: Path) -> None:
    """Every name and row is where the table says, and an import brings back the masters."""
    weights = random_weights(WIDE)
    folder = exported(tmp_path, WIDE, weights, "fp32", shard_bytes=10**5)
    found = tensors_of(folder)
    layer = f"model.layers.{WIDE.num_layers}"
    copies = {
        f"{layer}.embed_tokens.weight": weights["embed"],
        f"{layer}.shared_head.head.weight": weights["head"],
    }
    assert_same(found, published(weights, WIDE) | copies)
    stored = StoredCheckpoint.open(import_hf(HfFolder.open(folder), tmp_path / "in", {"note": 7}))
    assert stored.facts["note"] == 7
    assert stored.step == 0
    for name, where in checkpoint_names(WIDE).items():
        assert torch.equal(stored.read(where), weights[name].flatten())
    assert import_bytes(WIDE) == sum(4 * t.numel() for t in weights.values())


def test_bf16_rounds_all_but_router_biases(tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    for name, tensor in tensors_of(exported(tmp_path, WIDE, weights, "bf16")).items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
    folder = HfFolder.open(tmp_path / "hf")
    for name, weight in weights.items():
        exact = name.endswith("router.bias")
        assert torch.equal(folder.read(name), weight if exact else weight.bfloat16())


def test_fp8_is_what_deepseek_v3_has_in_fp8(tmp_path: Path) -> None:
    """Linears of attention, feed-forward networks and experts; not embedding, head, norms, router, eh_proj."""
    weights = random_weights(WIDE)
    found = tensors_of(exported(tmp_path, WIDE, weights, "fp8"))
    linear = ("_proj.weight", "kv_a_proj_with_mqa.weight")
    names = {n for n in found if n.endswith(linear) and not n.endswith("eh_proj.weight")}
    assert {n for n, t in found.items() if t.dtype is torch.float8_e4m3fn} == names
    assert {n for n in found if n.endswith(SCALE)} == {n + SCALE for n in names}
    whole = published(weights, WIDE)
    for name in names:
        values, scales = quantise(whole[name])
        assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(found[name + SCALE], scales)
    assert {
        t.dtype for n, t in found.items() if n not in names and not n.endswith(SCALE) and "bias" not in n
    } == {torch.bfloat16}
    name = "layers.1.experts.gate_up"
    rows = [
        torch.cat([dequantise(*quantise(half)) for half in expert.split(WIDE.expert_ffn_size)])
        for expert in weights[name]
    ]
    assert torch.equal(HfFolder.open(tmp_path / "hf").read(name), torch.stack(rows))


def test_a_folder_in_another_type(tmp_path: Path) -> None:
    """An FP8 folder as FP32: what FP8 means, without a checkpoint between."""
    fp8 = exported(tmp_path, WIDE, random_weights(WIDE), "fp8")
    source = open_weights(fp8)
    export(source, tmp_path / "wide", "fp32", extras={}, tokens={}, shard_bytes=10**9)
    wide = HfFolder.open(tmp_path / "wide")
    assert "quantization_config" not in (tmp_path / "wide" / "config.json").read_text()
    for weight in all_weights(WIDE):
        assert torch.equal(wide.read(weight.name), source.read(weight.name).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_foretold_and_files_bounded(tmp_path: Path, dtype: HfType) -> None:
    told: list[int] = []
    source = CheckpointWeights(StoredCheckpoint.open(store(tmp_path / "s", WIDE, random_weights(WIDE))))
    export(
        source, tmp_path / "hf", dtype, extras={"more": b"x"}, tokens={"bos_token_id": 3}, shard_bytes=200_000,
        done=told.append,
    )  # fmt: skip
    found = tensors_of(tmp_path / "hf")
    assert sum(told) == export_bytes(WIDE, dtype) == sum(t.numel() * t.itemsize for t in found.values())
    sizes = [path.stat().st_size for path in (tmp_path / "hf").glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 200_000 + 20_000  # its header besides
    assert f'"total_size": {sum(told)}' in (tmp_path / "hf" / INDEX).read_text()
    assert (tmp_path / "hf" / "more").read_bytes() == b"x"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is(tmp_path: Path, dtype: HfType) -> None:
    weights = random_weights(WIDE)
    weights["layers.1.experts.down"][2, 5, 7] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.2.down_proj.weight holds .* not finite"):
        exported(tmp_path, WIDE, weights, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["stored"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        exported(tmp_path, WIDE, random_weights(WIDE))


def test_a_model_that_config_json_cannot_describe(tmp_path: Path) -> None:
    m = tiny(yarn=replace(YARN, mscale=0.5, mscale_all_dim=0.0))
    with pytest.raises(CheckpointError, match=r"yarn.mscale: is 0.5 without mscale_all_dim"):
        exported(tmp_path, m, random_weights(m))


class Watched:
    """A source that counts which of the tensors it gave are still there when it is asked for one more."""

    def __init__(self, source: HfFolder) -> None:
        self.model = source.model
        self.most = self.asked = 0
        self._source = source
        self._given: list[weakref.ref[Tensor]] = []

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"all of {name} at once")

    def piece(self, published: Published) -> Tensor:
        self.asked += 1
        self._given = [given for given in self._given if given() is not None]
        self.most = max(self.most, len(self._given))
        tensor = self._source.piece(published)
        self._given.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tensor_at_a_time(tmp_path: Path, dtype: HfType) -> None:
    source = Watched(HfFolder.open(exported(tmp_path, WIDE, random_weights(WIDE))))
    export(source, tmp_path / "again", dtype, extras={}, tokens={}, shard_bytes=10**9)
    assert source.asked == len(published(random_weights(WIDE), WIDE)) + 2  # the MTP module's copies
    assert source.most <= 1


def test_one_tensor_at_a_time_on_the_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = HfFolder.open(exported(tmp_path, WIDE, random_weights(WIDE), "bf16"))
    monkeypatch.setattr(folder, "check_copies", lambda: None)
    watched = Watched(HfFolder.open(tmp_path / "hf"))
    monkeypatch.setattr(folder, "piece", watched.piece)
    monkeypatch.setattr(folder, "read", watched.read)
    import_hf(folder, tmp_path / "in", {})
    assert watched.asked == len(published(random_weights(WIDE), WIDE))
    assert watched.most <= 1
