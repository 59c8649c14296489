"""The section `evaluate` of a recipe: held-out rows, who answers them and how, benchmarks."""

from typing import Literal

from pydantic import Field

from crane_tasks.section import LONGEST, LONGEST_PROMPT, Count, Data, Number, Section

CALLS = Literal["auto", "hermes", "qwen3_coder", "glm4", "mistral", "harmony", "deepseek", "llama3"]


class Command(Section):
    """A benchmark that is a program, run against a served checkpoint."""

    name: str = Field(min_length=1, description="in tables")
    command: str = Field(
        min_length=1,
        description="with {endpoint}, {model}, {checkpoint}, and {output}, a JSON file it writes",
    )
    metric: str = Field(min_length=1, description="dotted path of its number in that file")


class Suite(Section):
    """A task or group of the lm-evaluation-harness."""

    lm_eval: str = Field(min_length=1, description="its name in the harness, as gsm8k")
    path: str | None = Field(default=None, description="folder of own tasks' YAML files")
    limit: Count | None = Field(default=None, gt=0, description="rows; default all")
    num_fewshot: Count | None = Field(default=None, ge=0, description="default: the task's")
    chat: bool = Field(default=True, description="by the chat template, where there is one")
    max_gen_toks: Count | None = Field(default=None, gt=0, description="default: the task's")


class Engine(Section):
    """What answers held-out prompts in place of transformers."""

    serve: str = Field(
        description="command that serves {checkpoint} at {port} by OpenAI's completions protocol"
    )


class Sampling(Section):
    """How answers are drawn; without it they are decoded greedily."""

    temperature: Number = Field(default=0.6, gt=0, description="of the softmax")
    top_p: Number = Field(default=1.0, gt=0, le=1, description="share of the likeliest tokens")
    top_k: Count = Field(default=0, ge=0, description="so many likeliest tokens; 0: all")
    samples: Count = Field(default=1, gt=0, description="answers to each prompt")
    seed: Count = Field(default=0, ge=0, description="of the draws")


class Evaluate(Section):
    reasoning: Data | None = Field(default=None, description="held-out rows, as `calibration`")
    agent: Data | None = Field(default=None, description="held-out rows, as `calibration`")
    generate: Count = Field(default=0, ge=0, description="answer this many held-out prompts")
    calls: CALLS = Field(
        default="auto", description="syntax of tool calls; auto: the rows', or the chat template's"
    )
    max_new_tokens: Count = Field(default=2048, gt=0, description=LONGEST)
    max_prompt_length: Count = Field(default=2048, gt=0, description=LONGEST_PROMPT)
    engine: Engine | None = Field(
        default=None,
        description='{serve: "vllm serve {checkpoint} --port {port}"}: a server that answers; '
        "default: transformers, in this process",
    )
    sampling: Sampling | None = Field(
        default=None,
        description="temperature, top_p, top_k, samples, seed of answers; default: greedy",
    )
    suites: tuple[Suite | Command, ...] = Field(
        default=(),
        description="benchmarks of base, donor and merge: tasks of the lm-evaluation-harness, "
        "commands",
    )
    run_code: bool = Field(
        default=False, description="rows' `python-tests` may run what a model wrote, in bubblewrap"
    )
