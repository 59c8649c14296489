"""Greedy decoding: a batch padded on the left gives what each prompt gives alone."""

from typing import Any

import pytest
import torch
from conftest import TinyPair

from crane_tasks.errors import CheckpointError
from crane_tasks.models.decoding.greedy import ROWS, Draws, decode, load_resident

PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [200], [40, 41, 42], [9, 9, 300, 7, 9]]
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_pair: TinyPair) -> Any:
    """The whole base, with the stop tokens of its generation config."""
    return load_resident(tiny_pair.base, CPU, torch.float32)


def decoded(
    model: Any, prompts: list[list[int]], stop: int | list[int], length: int = 12
) -> list[list[int]]:
    model.generation_config.eos_token_id = stop
    return decode(model, prompts, max_new_tokens=length, pad=0, eos=2)


def greedy_by_hand(model: Any, prompt: list[int], stops: set[int], length: int) -> list[int]:
    """The most likely next token, again and again, without cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any) -> None:
    together = decoded(model, PROMPTS, 2)
    assert together == [decoded(model, [prompt], 2)[0] for prompt in PROMPTS]


def test_the_most_likely_token_is_taken_each_time(model: Any) -> None:
    wanted = [greedy_by_hand(model, prompt, {2}, 8) for prompt in PROMPTS]
    assert decoded(model, PROMPTS, 2, length=8) == wanted


def test_an_answer_ends_with_its_end_token_and_others_go_on(model: Any) -> None:
    free = decoded(model, PROMPTS, 319)
    stop = free[0][2]  # a token that the first answer comes to
    answers = decoded(model, PROMPTS, stop)
    for answer, unstopped in zip(answers, free, strict=True):
        if stop in unstopped:
            assert answer == unstopped[: unstopped.index(stop) + 1]
            assert answer[-1] == stop
        else:
            assert answer == unstopped
    assert len(answers[0]) <= 3


def test_every_end_token_of_the_checkpoint_ends_an_answer(model: Any) -> None:
    free = decoded(model, PROMPTS, 319)
    stops = [free[0][4], free[2][1]]
    for answer, prompt in zip(decoded(model, PROMPTS, stops), PROMPTS, strict=True):
        assert answer == greedy_by_hand(model, prompt, set(stops), 12)


def test_an_end_token_that_is_also_the_padding_is_kept_once(model: Any) -> None:
    free = decoded(model, PROMPTS, 319)
    stop = free[1][1]
    model.generation_config.eos_token_id = stop
    answers = decode(model, PROMPTS, max_new_tokens=12, pad=stop, eos=2)
    assert answers[1] == free[1][: free[1].index(stop) + 1]
    model.generation_config.eos_token_id = stop
    assert decode(model, PROMPTS, max_new_tokens=12, pad=None, eos=stop) == answers


def test_token_zero_can_be_the_end_token(model: Any) -> None:
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        # Some prompts now end at once.
        weight[0] = 3 * weight[decoded(model, PROMPTS, 319)[0][0]]
    answers = decoded(model, PROMPTS, 0)
    assert answers[0] == [0]
    assert answers == [greedy_by_hand(model, prompt, {0}, 12) for prompt in PROMPTS]


def test_sampling_settings_of_the_checkpoint_are_set_aside(moe_pair: TinyPair) -> None:
    model = load_resident(moe_pair.base, CPU, torch.float32)
    plain = decoded(model, PROMPTS, 2)
    model = load_resident(moe_pair.base, CPU, torch.float32)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 3.0
    assert decoded(model, PROMPTS, 2) == plain


def test_a_checkpoint_without_weights_is_refused_by_name(
    moe_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = moe_pair.copy(tmp_path_factory.mktemp("broken") / "pair").base
    for file in [*broken.glob("*.safetensors"), *broken.glob("*.index.json")]:
        file.unlink()
    with pytest.raises(CheckpointError, match="holds neither") as caught:
        load_resident(broken, CPU, torch.float32)
    assert str(broken) in str(caught.value)


def test_draws_are_those_of_their_seed_and_the_answers_number(tiny_pair: TinyPair) -> None:
    model = load_resident(tiny_pair.base, CPU, torch.float32)
    length = 12

    def drawn(seed: int, count: int = len(PROMPTS), **how: float) -> list[list[int]]:
        torch.manual_seed(99)  # what others draw must not matter, nor be disturbed
        settings: Any = {"temperature": 2.0, "top_p": 1.0, "top_k": 0, **how}
        draws = Draws(seed=seed, **settings)
        answers = decode(model, PROMPTS[:count], max_new_tokens=length, pad=0, eos=2, draws=draws)
        assert torch.initial_seed() == 99
        return answers

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, count=2) == drawn(1)[:2], "in whatever company"
    greedy = decode(model, PROMPTS, max_new_tokens=length, pad=0, eos=2)
    assert drawn(1, top_k=1) == drawn(1, top_p=1e-6) == greedy


def test_draws_come_as_often_as_the_model_says(tiny_pair: TinyPair) -> None:
    model = load_resident(tiny_pair.base, CPU, torch.float32)
    draws = Draws(temperature=1.5, top_p=1.0, top_k=3, seed=5)
    said = decode(model, [PROMPTS[0]] * 2000, max_new_tokens=1, pad=0, eos=2, draws=draws)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    top = logits.topk(3)
    chances = (top.values / 1.5).softmax(-1)
    counted = torch.tensor([[i] for [i] in said]).eq(top.indices).float().mean(0)
    assert counted.sum() == 1, "none but the likeliest three"
    torch.testing.assert_close(counted, chances, atol=0.04, rtol=0)


def test_rows_leave_and_others_follow(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_resident(tiny_pair.base, CPU, torch.float32)
    prompts = [prompt[:length] for prompt in PROMPTS for length in range(1, len(prompt) + 1)]
    free = decoded(model, prompts, 319, length=16)
    stops = [free[0][3], free[1][7], free[2][1]]  # so that they end at unlike places
    alone = [decoded(model, [prompt], stops, length=16)[0] for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 2
    assert decoded(model, prompts, stops, length=16) == alone
    monkeypatch.setitem(ROWS, "cpu", 3)
    model.generation_config.eos_token_id = stops
    seen: list[tuple[int, int]] = []
    said = decode(
        model, prompts, max_new_tokens=16, pad=0, eos=2,
        on_step=lambda done, tokens: seen.append((done, tokens)),
    )  # fmt: skip
    assert said == alone
    assert seen[-1] == (len(prompts), sum(map(len, alone)))
    assert len(seen) == -(-len(prompts) // 3)
