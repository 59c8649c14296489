"""How steady S is: one walk stands for a scoring of every half of the items."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair
from tiny_merge import asked

from artifacts.ref import Ref
from artifacts.store import Artifact
from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import AGENT, REASONING
from crane_tasks.delta import DELTA
from crane_tasks.errors import RecipeError
from crane_tasks.method import STAGES, keys_of
from crane_tasks.scores.agreement import agreement, read_unions
from crane_tasks.scores.reading import Scores
from crane_tasks.scores.stability import STABILITY, Draws, deal, stability, walk_unions
from crane_tasks.session import Session, open_context
from crane_tasks.stage import Keys
from flows.merge import compute_scores
from flows.stability import Steadiness, compute_stability

DRAWS = Draws(groups=4, draws=5, seed=2)
COUNTS = {"reasoning": 7, "agent": 6}  # in groups of two, and of one


def write_rows(pair: TinyPair, kind: str, rows: list[dict[str, Any]]) -> None:
    (pair.folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(pair: TinyPair, kind: str) -> list[dict[str, Any]]:
    lines = (pair.folder / f"{kind}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def wide_pair(moe_pair: TinyPair, tmp_path: Path) -> TinyPair:
    """The random pair with some more rows, none like another."""
    pair = moe_pair.copy(tmp_path / "pair")
    for kind, count in COUNTS.items():
        rows = read_rows(pair, kind)
        for i in range(len(rows), count):
            row = json.loads(json.dumps(rows[i % 3]))
            row["messages"][0]["content"] += f" again {i}" * i
            row["completion"] = f"{i}{i} {row['completion']}"
            rows.append(row)
        write_rows(pair, kind, rows)
    return pair


def artifact_of(session: Session, draws: Draws) -> Artifact:
    """The finished artifact of a session's recipe."""
    ctx, stage = open_context(session), stability(draws)
    return session.store.open(stage.ref(ctx, keys_of(ctx)))


def unions_of(session: Session, draws: Draws) -> list[Scores]:
    base = open_context(session).pair().base
    return read_unions(artifact_of(session, draws), base.layout, "auto")


def assert_like(ours: Scores, theirs: Scores) -> None:
    """But for the rounding to bfloat16: of each group's gradients here, of their mean there."""
    assert ours.per_layer.keys() == theirs.per_layer.keys()
    for layer, row in ours.per_layer.items():
        assert row == pytest.approx(theirs.per_layer[layer], rel=3e-3)
    assert ours.per_component == pytest.approx(theirs.per_component, rel=3e-3)


def numbers(found: Steadiness) -> Mapping[str, Any]:
    return found.agreement.as_json()


def test_all_groups_together_give_the_scores_of_the_pair(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    session = asked(tiny_pair, tmp_path / "store")
    found = compute_stability(session, Draws(groups=2, draws=1))
    assert_like(found.agreement.scores, compute_scores(session).scores)


def test_a_half_has_the_scores_of_a_pair_with_its_items_alone(
    wide_pair: TinyPair, tmp_path: Path
) -> None:
    session = asked(wide_pair, tmp_path / "store")
    compute_stability(session, DRAWS)
    unions = unions_of(session, DRAWS)
    assert len(unions) == 11
    for union in (1, 2, 9):
        alone = wide_pair.copy(tmp_path / f"alone-{union}")
        for kind, count in COUNTS.items():
            hand, rows = deal(DRAWS, count, kind), read_rows(wide_pair, kind)
            groups = hand.masks[union].nonzero().flatten().tolist()
            write_rows(alone, kind, [rows[i] for k in groups for i in hand.groups[k]])
        fresh = compute_scores(asked(alone, tmp_path / f"store-{union}")).scores
        assert_like(unions[union], fresh)
    assert unions[1].per_layer[0] != pytest.approx(unions[2].per_layer[0], rel=3e-3)


def test_halves_of_the_same_items_agree_wholly(wide_pair: TinyPair, tmp_path: Path) -> None:
    session = asked(wide_pair, tmp_path / "store")
    compute_stability(session, DRAWS)
    ctx = open_context(session)
    keys = keys_of(ctx)
    sets = {"reasoning": keys[REASONING], "agent": keys[AGENT]}
    tokens = {name: read_set(session.store.open(key)) for name, key in sets.items()}
    hands = {name: deal(DRAWS, count, name) for name, count in COUNTS.items()}
    hands = {n: replace(h, masks=torch.ones_like(h.masks)) for n, h in hands.items()}
    ref = Ref("stability", 1, {}, {})
    assert STABILITY.schema is not None
    session.store.build(
        ref,
        STABILITY.schema,
        lambda draft: walk_unions(ctx, session.store.open(keys[DELTA]), tokens, hands, draft),
    )
    layout = ctx.pair().base.layout
    found = agreement(read_unions(session.store.open(ref), layout, "auto"))
    assert (found.overall.mean, found.overall.low) == pytest.approx((1, 1))
    for told in (*found.per_layer.values(), found.per_component["attention"]):
        assert (told.mean, told.low) == pytest.approx((1, 1))
    assert list(found.variation.values()) == pytest.approx([0] * len(found.variation), abs=1e-12)


def test_a_seed_gives_the_same_numbers_anywhere_and_another_seed_others(
    wide_pair: TinyPair, tmp_path: Path
) -> None:
    one = compute_stability(asked(wide_pair, tmp_path / "one"), DRAWS)
    two = compute_stability(asked(wide_pair, tmp_path / "two"), DRAWS)
    assert repr(numbers(one)) == repr(numbers(two))  # NaN is not equal to itself
    again = compute_stability(asked(wide_pair, tmp_path / "one"), DRAWS)
    assert [built.status for built in again.stages] == ["reused"] * 3
    assert repr(numbers(again)) == repr(numbers(one))
    for draws in (replace(DRAWS, seed=3), replace(DRAWS, draws=6), replace(DRAWS, groups=2)):
        other = compute_stability(asked(wide_pair, tmp_path / "one"), draws)
        assert other.stages[-1].status == "computed"
        # Few pairs have few possible correlations; the spread tells the halves apart.
        assert other.agreement.variation != one.agreement.variation


def test_a_walk_that_was_stopped_goes_on_to_the_same_bits(
    wide_pair: TinyPair, tmp_path: Path
) -> None:
    compute_stability(asked(wide_pair, tmp_path / "whole"), DRAWS)

    def stop(stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        if stage == "stability" and what.startswith("backward 1/"):
            raise KeyboardInterrupt

    said: list[str] = []

    def listen(stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        said.append(what if stage == "stability" else "")

    with pytest.raises(KeyboardInterrupt):
        compute_stability(asked(wide_pair, tmp_path / "store", progress=stop), DRAWS)
    session = asked(wide_pair, tmp_path / "store", progress=listen)
    assert compute_stability(session, DRAWS).stages[-1].status == "resumed"
    assert not [what for what in said if what.startswith(("forward", "backward 2/"))]
    whole = artifact_of(asked(wide_pair, tmp_path / "whole"), DRAWS)
    resumed = artifact_of(session, DRAWS)
    assert set(whole.units()) == set(resumed.units()) == {"outside", "layer.0", "layer.1"}
    for layer in ("layer.0", "layer.1"):
        for name in ("gains", "base2"):
            assert torch.equal(whole.read(layer, name), resumed.read(layer, name))


def test_it_is_no_stage_of_a_merge_and_in_no_other_key(wide_pair: TinyPair, tmp_path: Path) -> None:
    session = asked(wide_pair, tmp_path / "store")
    session.store.prepare()
    ctx = open_context(session)
    keys = keys_of(ctx)
    assert STABILITY not in STAGES and STABILITY not in keys
    refs = {stability(Draws(seed=seed)).ref(ctx, keys).key for seed in range(3)}
    assert len(refs) == 3
    assert STABILITY.ref(ctx, keys) == stability(Draws()).ref(ctx, Keys(keys.refs))


@pytest.mark.parametrize(
    ("groups", "draws", "said"),
    [(3, 1, "--groups: 3"), (0, 1, "--groups: 0"), (2, 0, "--draws: 0")],
)
def test_halves_that_cannot_be_drawn_are_refused(groups: int, draws: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Draws(groups, draws)


def test_too_few_rows_are_refused_before_anything_is_computed(
    wide_pair: TinyPair, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"agent\.data: .* 6 rows, too few for 8 .* --groups 6"):
        compute_stability(asked(wide_pair, tmp_path / "store"), Draws(8, 1))
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))
    with pytest.raises(RecipeError, match="no gate"):
        compute_stability(asked(wide_pair, tmp_path / "store", "merge.method=linear"), DRAWS)
