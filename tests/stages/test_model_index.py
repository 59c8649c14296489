"""The card's metadata say what was measured, as the hub reads it."""

from huggingface_hub import ModelCard

from crane_tasks.report.model_index import with_model_index

CARD = "---\nlicense: mit\ntags:\n- merge\n---\n\n# A merge\n\nText of mine with --- in it.\n"
EVALUATION = {
    "rows": {"reasoning": 64, "agent": 32},
    "models": {"base": {"tool_calls": 1.0}, "merged": {"tool_calls": 0.96875, "cost": 40.0}},
    "intervals": {"merged": {"tool_calls": [0.84, 0.99]}},
    "suites": {
        "merged": {
            "results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.5,
                                  "exact_match_stderr,strict": 0.1}}
        }
    },
}  # fmt: skip


def test_the_hub_reads_metrics_with_their_intervals_and_suites() -> None:
    card = ModelCard(with_model_index(CARD, "mine", EVALUATION))
    assert card.text.strip().endswith("Text of mine with --- in it.")
    assert card.data.license == "mit" and card.data.tags == ["merge"]
    assert card.data.model_name == "mine"
    found = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    calls = found["32 held-out agent rows", "tool_calls"]
    assert calls.metric_value == 0.96875
    assert calls.metric_args == {"low": 0.84, "high": 0.99, "level": 0.95}
    cost = found["64 held-out reasoning rows and 32 held-out agent rows", "cost"]
    assert cost.metric_value == 40.0
    assert found["gsm8k", "exact_match"].metric_value == 0.5 and len(found) == 3


def test_it_is_written_once_and_a_card_without_front_matter_stays() -> None:
    once = with_model_index(CARD, "mine", EVALUATION)
    assert with_model_index(once, "mine", EVALUATION) == once
    for card in ("# Mine\n", "---\nno end\n", "---\n[: broken\n---\nx\n"):
        assert with_model_index(card, "mine", EVALUATION) == card
