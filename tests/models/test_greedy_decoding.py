"""Greedy decoding: a batch padded on the left gives what each prompt gives alone."""

from typing import Any

import pytest
import torch
from conftest import TinyPair

from crane_tasks.errors import CheckpointError
from crane_tasks.models.decoding.greedy import decode_by_draws, decode_greedily, load_resident

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
    return decode_greedily(model, prompts, max_new_tokens=length, pad=0, eos=2)


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
    answers = decode_greedily(model, PROMPTS, max_new_tokens=12, pad=stop, eos=2)
    assert answers[1] == free[1][: free[1].index(stop) + 1]
    model.generation_config.eos_token_id = stop
    assert decode_greedily(model, PROMPTS, max_new_tokens=12, pad=None, eos=stop) == answers


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


def test_draws_are_those_of_their_seed(tiny_pair: TinyPair) -> None:
    model = load_resident(tiny_pair.base, CPU, torch.float32)

    def drawn(seed: int, top_k: int = 0) -> list[list[int]]:
        torch.manual_seed(99)  # what others draw must not matter, nor be disturbed
        answers = decode_by_draws(
            model, PROMPTS, seed=seed, temperature=2.0, top_p=1.0, top_k=top_k,
            max_new_tokens=12, pad=0, eos=2,
        )  # fmt: skip
        assert torch.initial_seed() == 99
        return answers

    assert drawn(1) == drawn(1) != drawn(2)
    greedy = decode_greedily(model, PROMPTS, max_new_tokens=12, pad=0, eos=2)
    assert drawn(1, top_k=1) == greedy
