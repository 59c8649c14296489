"""Pairs that are not twins to the letter: what is merged, what stays, what a person hears."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors, write_fp8
from tiny_merge import asked, merged, reported, same_bits

from crane_tasks.errors import CheckpointError, RecipeError, ScoreError
from crane_tasks.evaluate.stage import EVALUATE, read_comparison
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.safetensors_io import DTYPES, byte_view, read_span
from crane_tasks.scores.stability import Draws
from crane_tasks.scores.stage import scores_of
from flows.stability import compute_stability
from flows.sweep import sweep

Pairs = Callable[[str], TinyPair]


@pytest.fixture
def dense(pairs: Pairs, tmp_path: Path) -> TinyPair:
    """A copy of the dense pair, to be changed."""
    return pairs("qwen3").copy(tmp_path / "pair")


def change_config(folder: Path, **changes: Any) -> None:
    """Set some keys of a config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# Configs


def test_an_allowed_difference_is_named_wherever_the_merge_is_described(
    dense: TinyPair, tmp_path: Path
) -> None:
    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    change_config(dense.donor, rope_parameters=rotary, unsloth_version="1")
    with pytest.raises(CheckpointError, match=r"rope_theta: 10000\.0 against 500000\.0"):
        merged(dense, tmp_path / "store", tmp_path / "out")
    heard: list[str] = []
    allowed = "pair.allow=[rope_theta]"
    reported(dense, tmp_path / "store", tmp_path / "out", allowed, notice=heard.append)
    card = (tmp_path / "out" / "README.md").read_text()
    report = (tmp_path / "out-report" / "report.md").read_text()
    for text in ("\n".join(heard), card, report):
        assert "rope_theta: 10000.0 against 500000.0" in text
        assert "does not know: unsloth_version" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    # What was allowed once is not allowed for good: the delta is in the store by now.
    with pytest.raises(CheckpointError, match="rope_theta"):
        merged(dense, tmp_path / "store", tmp_path / "again")


def test_keys_that_no_class_knows_change_no_bit(dense: TinyPair, tmp_path: Path) -> None:
    merged(dense, tmp_path / "store", tmp_path / "out")
    change_config(dense.donor, use_mrope=False, mlp_bias=False)
    merged(dense, tmp_path / "store", tmp_path / "other")
    assert same_bits(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "other"))


def test_a_field_that_does_not_differ_cannot_be_allowed(dense: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pair\.allow: .*rope_theta; leave it out"):
        merged(dense, tmp_path / "store", tmp_path / "out", "pair.allow=[rope_theta]")


# Equal weights


def freeze(pair: TinyPair, *parts: str) -> None:
    """Give the donor the base's tensors wherever a name has one of these in it."""
    base, donor = load_tensors(pair.base), load_tensors(pair.donor)
    same = {n: base[n] for n in donor if any(part in n for part in parts)}
    assert same
    save_tensors(pair.donor, donor | same, shards=3)


def test_a_donor_equal_to_the_base_is_refused_before_anything_is_made(
    dense: TinyPair, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="there is nothing to merge"):
        merged(dense, tmp_path / "store", tmp_path / "out", "donor=base")
    assert not list((tmp_path / "store").glob("*/*/crane.json")) and not (tmp_path / "out").exists()


def test_equal_weights_in_other_files_are_refused_before_any_scoring(
    dense: TinyPair, tmp_path: Path
) -> None:
    freeze(dense, "")
    with pytest.raises(CheckpointError, match=r"has the weights of the base .* Name another donor"):
        merged(dense, tmp_path / "store", tmp_path / "out")
    assert (tmp_path / "store" / "delta").exists()
    assert not any((tmp_path / "store" / name).exists() for name in ("calibration", "scores"))


def test_a_frozen_layer_has_no_score_and_no_say(dense: TinyPair, tmp_path: Path) -> None:
    """S(c) is that of the other layer alone, as it would be without the frozen one."""
    freeze(dense, "layers.0.")
    scores = merged(dense, tmp_path / "store", tmp_path / "out")
    found = scores_of(scores.ctx, scores.keys)
    assert set(found.per_layer[0].values()) == {0.0}
    assert found.per_layer[1]["ffn"] == 1.0 and found.baseline == {1: "ffn"}
    assert found.per_component == pytest.approx(found.per_layer[1])
    base, merged_ = load_tensors(dense.base), load_tensors(tmp_path / "out")
    frozen = [n for n in base if "layers.0." in n]
    assert same_bits({n: base[n] for n in frozen}, {n: merged_[n] for n in frozen})
    assert any(not torch.equal(base[n], merged_[n]) for n in base if "layers.1." in n)


def test_where_all_layers_are_frozen_nothing_is_scored(dense: TinyPair, tmp_path: Path) -> None:
    """Embeddings alone differ: they move by their own fractions, which no gate rules."""
    freeze(dense, "layers.", "norm")
    rows = 'merge.embedding={rows: {"<think>": 0.8}}'
    result = merged(dense, tmp_path / "store", tmp_path / "out", rows)
    found = scores_of(result.ctx, result.keys)
    assert {s for row in found.per_layer.values() for s in row.values()} == {0.0}
    assert set(found.per_component.values()) == {0.0}
    base, merged_ = load_tensors(dense.base), load_tensors(tmp_path / "out")
    changed = {n for n in base if not torch.equal(base[n], merged_[n])}
    assert changed == {"model.embed_tokens.weight"}


def test_a_baseline_that_is_frozen_in_a_layer_that_moves_is_named(
    dense: TinyPair, tmp_path: Path
) -> None:
    freeze(dense, "mlp.")
    with pytest.raises(
        ScoreError, match=r"layer 0: .*'ffn'.*same weights there: .*\(attention, norm"
    ):
        merged(dense, tmp_path / "store", tmp_path / "out")
    merged(dense, tmp_path / "store", tmp_path / "out", "gate.baseline=attention")


def test_frozen_layers_have_no_part_in_how_steady_scores_are(
    dense: TinyPair, tmp_path: Path
) -> None:
    freeze(dense, "layers.0.")
    session = asked(dense, tmp_path / "store")
    found = compute_stability(session, Draws(groups=2, draws=4)).agreement
    assert set(found.per_layer) == {1} and set(found.scores.per_layer[0].values()) == {0.0}
    assert found.scores.per_layer[1]["ffn"] == 1.0


# Rows of the vocabulary, and heads

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def cut_rows(folder: Path, rows: int) -> None:
    """Leave the first rows of a checkpoint's vocabulary."""
    tensors = load_tensors(folder)
    short = {n: tensors[n][:rows].clone() for n in (EMBEDDING, HEAD) if n in tensors}
    save_tensors(folder, tensors | short, shards=2)
    change_config(folder, vocab_size=rows)


def test_rows_that_the_donor_lacks_stay_the_bases(moe_pair: TinyPair, tmp_path: Path) -> None:
    """All else is, bit for bit, the merge with a donor that has them."""
    changes = ("merge.embedding.scale=0.5", "merge.lm_head.scale=0.5")
    merged(moe_pair, tmp_path / "twins", tmp_path / "whole", *changes)
    pair = moe_pair.copy(tmp_path / "pair")
    cut_rows(pair.donor, 300)
    heard: list[str] = []
    merged(pair, tmp_path / "store", tmp_path / "out", *changes, notice=heard.append)
    told = "base's embedding has 320 rows, the donor's 300: the first 300 are merged"
    assert told in "".join(heard) and told in (tmp_path / "out" / "README.md").read_text()
    base, found, whole = (
        load_tensors(folder) for folder in (pair.base, tmp_path / "out", tmp_path / "whole")
    )
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name][300:], base[name][300:])
        assert not torch.equal(whole[name][300:], base[name][300:])
        for tensors in (found, whole):
            tensors[name] = tensors[name][:300]
    assert same_bits(found, whole)


def test_models_of_unlike_vocabularies_are_compared_over_what_both_have(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    """The base's own rows again, and five more in the donor."""
    pair = moe_pair.copy(tmp_path / "pair")
    twins = merged(pair, tmp_path / "twins", tmp_path / "whole")
    donor = load_tensors(pair.donor)
    wider = {n: torch.cat([donor[n], donor[n][:5] * 0 - 9]) for n in (EMBEDDING, HEAD)}
    save_tensors(pair.donor, donor | wider)
    change_config(pair.donor, vocab_size=325)
    found = merged(pair, tmp_path / "store", tmp_path / "out")
    ours, theirs = (
        read_comparison(r.ctx.store.open(r.keys[EVALUATE]))["models"] for r in (found, twins)
    )
    kl, wanted = (one["donor"]["format_divergence"] for one in (ours, theirs))
    assert kl == pytest.approx(wanted, rel=1e-4)  # what float32 sums of other widths leave
    assert ours["merged"] == theirs["merged"]


def test_rows_that_the_base_lacks_are_left_out(moe_pair: TinyPair, tmp_path: Path) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    cut_rows(pair.base, 300)
    merged(pair, tmp_path / "store", tmp_path / "out", "merge.lm_head.scale=0.5")
    base, donor, found = map(load_tensors, (pair.base, pair.donor, tmp_path / "out"))
    assert found[HEAD].shape == (300, 32)
    wanted = base[HEAD].float() + 0.5 * (donor[HEAD][:300].float() - base[HEAD].float())
    assert torch.equal(found[HEAD][9:], wanted.bfloat16()[9:])  # the first are added tokens


def test_a_donor_with_fewer_rows_than_the_tokenizer_has_tokens_is_refused(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    cut_rows(pair.donor, 200)
    with pytest.raises(CheckpointError, match=r"donor: its embedding has 200 rows, the tokenizer"):
        merged(pair, tmp_path / "store", tmp_path / "out")


def test_a_tied_base_takes_an_untied_donors_embedding_and_leaves_its_head(
    dense: TinyPair, tmp_path: Path
) -> None:
    changes = ("merge.embedding.scale=0.5",)
    merged(dense, tmp_path / "twins", tmp_path / "whole", *changes)
    donor = load_tensors(dense.donor)
    save_tensors(dense.donor, donor | {HEAD: donor[EMBEDDING] * 2})
    change_config(dense.donor, tie_word_embeddings=False)
    heard: list[str] = []
    merged(dense, tmp_path / "store", tmp_path / "out", *changes, notice=heard.append)
    assert "the donor's `lm_head.weight` is left" in "".join(heard)
    assert same_bits(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "whole"))


def test_an_untied_base_takes_a_tied_donors_embedding_for_its_head(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    donor = load_tensors(pair.donor)
    del donor[HEAD]
    save_tensors(pair.donor, donor)
    change_config(pair.donor, tie_word_embeddings=True)
    heard: list[str] = []
    merged(pair, tmp_path / "store", tmp_path / "out", notice=heard.append)
    assert "the donor's embedding stands for its head, too" in "".join(heard)
    base, found = load_tensors(pair.base), load_tensors(tmp_path / "out")
    wanted = base[HEAD].float() + 0.03 * (donor[EMBEDDING].float() - base[HEAD].float())
    assert torch.equal(found[HEAD][9:], wanted.bfloat16()[9:])


def test_a_section_for_a_head_that_is_the_embedding_is_refused(
    dense: TinyPair, tmp_path: Path
) -> None:
    """It did nothing, and had everything after it made anew."""
    for change in ("scale=0.5", 'rows={"<think>": 0.8}', "keep_special=false"):
        with pytest.raises(RecipeError, match=r"merge\.lm_head: .*Set merge\.embedding"):
            merged(dense, tmp_path / "store", tmp_path / "out", f"merge.lm_head.{change}")
    merged(dense, tmp_path / "store", tmp_path / "out", "merge.lm_head.scale=0.03")


# FP8


@pytest.mark.parametrize("sides", [("base",), ("donor",), ("base", "donor")])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_an_fp8_side_merges_as_the_bfloat16_that_it_stands_for(
    architecture: str, sides: tuple[str, ...], pairs: Pairs, tmp_path: Path
) -> None:
    plain, packed = (pairs(architecture).copy(tmp_path / name) for name in ("plain", "packed"))
    for side in sides:
        meant = write_fp8(packed.folder / side)
        save_tensors(plain.folder / side, meant, shards=2)
    for side in {"base", "donor"} - set(sides):
        save_tensors(plain.folder / side, load_tensors(packed.folder / side), shards=2)
    wanted = merged(plain, tmp_path / "store", tmp_path / "wanted")
    heard: list[str] = []
    found = merged(packed, tmp_path / "store", tmp_path / "out", notice=heard.append)
    assert same_bits(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "wanted"))
    metrics = [
        read_comparison(r.ctx.store.open(r.keys[EVALUATE]))["models"] for r in (found, wanted)
    ]
    assert metrics[0] == metrics[1]
    card = (tmp_path / "out" / "README.md").read_text()
    for side in sides:
        assert f"the {side}'s weights are stored in FP8 and read as bfloat16" in "".join(heard)
        assert f"the {side}'s weights are stored in FP8" in card
    assert ("and so the merge is written" in card) == ("base" in sides)


def test_the_merge_of_an_fp8_base_is_a_plain_bfloat16_checkpoint(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    pair = moe_pair.copy(tmp_path / "pair")
    meant = write_fp8(pair.base)
    result = merged(pair, tmp_path / "store", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((pair.base / "config.json").read_text())
    assert config == {k: v for k, v in theirs.items() if k != "quantization_config"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = load_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == found.keys() == meant.keys()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    again = merged(pair, tmp_path / "store", tmp_path / "out")
    assert {b.status for b in again.stages} == {"reused"}
    # A sweep measures what was written.
    swept = sweep(asked(pair, tmp_path / "sweeps"), [0.5], folder=tmp_path / "grid").points[0]
    written = read_comparison(result.ctx.store.open(result.keys[EVALUATE]))["models"]["merged"]
    assert swept.metrics == written


def test_a_merge_in_the_bases_own_fp8_changes_the_blocks_that_moved_alone(
    pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3_moe").copy(tmp_path / "pair")
    meant = write_fp8(pair.base)
    fp8 = "merge.output_dtype=fp8"
    # Nothing moves: the base's tensors, bit for bit.
    still = ("alpha=0", "merge.lm_head.scale=0")
    merged(pair, tmp_path / "store", tmp_path / "same", fp8, *still)
    assert same_bits(load_tensors(tmp_path / "same"), load_tensors(pair.base))
    assert (tmp_path / "same" / "config.json").read_bytes() == (
        pair.base / "config.json"
    ).read_bytes()
    small = "run.shard_size=40KB"
    result = merged(pair, tmp_path / "store", tmp_path / "out", fp8, small)
    merged(pair, tmp_path / "store", tmp_path / "wide")
    assert result.evaluation["models"]["merged"] != result.evaluation["models"]["base"]
    wide = load_tensors(tmp_path / "wide")
    stored, before = load_tensors(tmp_path / "out"), load_tensors(pair.base)
    found = Checkpoint.open(tmp_path / "out")
    assert found.packed and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert stored.keys() == before.keys()
    moved = 0
    for name, entry in found.entries.items():
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        read_span(entry.span(), byte_view(tensor))
        if f"{name}_scale_inv" not in stored:
            assert torch.equal(tensor, wide[name]), name
            continue
        for rows in range(0, tensor.shape[0], 8):
            for columns in range(0, tensor.shape[1], 8):
                block = (slice(rows, rows + 8), slice(columns, columns + 8))
                if torch.equal(wide[name][block], meant[name][block]):
                    assert torch.equal(stored[name][block].float(), before[name][block].float())
                    continue
                moved += 1
                # A step of FP8 is an eighth of the weight, and no less than 2^-9 of the scale.
                scale = stored[f"{name}_scale_inv"][rows // 8, columns // 8]
                step = wide[name][block].abs().float() / 16 + scale * 2.0**-9
                assert ((tensor[block] - wide[name][block]).abs() <= 1.02 * step).all()
                assert stored[name][block].float().abs().max() == 448
    assert moved > 100
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the merge is written in FP8" in card
    with pytest.raises(RecipeError, match=r"merge\.output_dtype: points are measured in memory"):
        sweep(asked(pair, tmp_path / "store", fp8), [0.1, 0.2])
    with pytest.raises(RecipeError, match="the base is not stored in FP8"):
        merged(pairs("qwen3_moe"), tmp_path / "store", tmp_path / "none", fp8)


def test_what_is_carried_of_an_fp8_base_is_read_as_well(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3_next").copy(tmp_path / "pair")
    torch.manual_seed(7)
    mtp = {"mtp.fc.weight": torch.randn(24, 16).bfloat16()}
    save_tensors(pair.base, load_tensors(pair.base) | mtp)
    meant = write_fp8(pair.base)
    merged(pair, tmp_path / "store", tmp_path / "out")
    assert torch.equal(load_tensors(tmp_path / "out")["mtp.fc.weight"], meant["mtp.fc.weight"])
