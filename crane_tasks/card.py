"""The model card of a merged checkpoint: a pure function of the facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crane_tasks.recipe import Recipe

CITATION = """@misc{zhu2026crane,
  title         = {{CRANE}: Constrained Reasoning Injection for Code Agents via Nullspace Editing},
  author        = {Zhu, Mingzhi and Merler, Michele and Pavuluri, Raju and Patterson, Stacy},
  year          = {2026},
  eprint        = {2605.14084},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2605.14084},
}"""
ROWS = {
    "model_type": "Architecture",
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden size",
    "num_attention_heads": "Query heads",
    "num_key_value_heads": "Key-value heads",
    "num_experts": "Experts",
    "num_local_experts": "Experts",
    "n_routed_experts": "Experts",
    "num_experts_per_tok": "Experts per token",
    "vocab_size": "Vocabulary",
    "max_position_embeddings": "Context length",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made from."""

    recipe: Recipe
    base: str
    donor: str
    base_folder: Path
    config: Mapping[str, Any]
    parameters: int
    transformers: str


def _front_matter(facts: Facts) -> str:
    base_card = facts.base_folder / "README.md"
    license_name = "other"
    if base_card.is_file():
        _, _, rest = base_card.read_text(errors="replace").partition("---\n")
        head, _, _ = rest.partition("\n---")
        try:
            found = yaml.safe_load(head)
        except yaml.YAMLError:
            found = None
        if isinstance(found, dict) and isinstance(found.get("license"), str):
            license_name = found["license"]
    matter = {
        "license": license_name,
        "base_model": [facts.base, facts.donor],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "crane", "tool-use", "reasoning"],
    }
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n"


def published_name(recipe: Recipe, value: str) -> str:
    """A hub id as it is; of a folder only its last name, which says nothing of a machine."""
    folder = recipe.locate(value)
    return folder.name if folder is not None else value.partition("@")[0]


def model_card(facts: Facts) -> str:
    """The card: front matter, how it was made, recipe, architecture, usage, citation."""
    recipe = facts.recipe
    base, donor = facts.base, facts.donor
    rows = {title: facts.config[key] for key, title in ROWS.items() if facts.config.get(key)}
    table = "\n".join(f"| {title} | {value} |" for title, value in rows.items())
    shown = recipe.published() | {"base": base, "donor": donor}
    return f"""{_front_matter(facts)}
# {recipe.name}

{base} with reasoning taken over from {donor} by CRANE: a merge of the weights, without
training, that keeps the format of tool calls and chat markers.

## How it was made

    theta = theta_base + P_tau( alpha * S(component, layer) * T(donor - base) )

with alpha = {recipe.alpha:g} and tau = {recipe.tau:g}. T keeps the larger half of each
tensor's delta, S weighs components and layers by what reasoning and agent calibration
sets agree on, and P_tau removes what lies in strong format directions.

```yaml
{yaml.safe_dump(shown, sort_keys=False).rstrip()}
```

The full recipe is in `crane_recipe.yaml`, digests of all inputs are in `crane.json`.

## Architecture

| | |
| --- | --- |
{table}
| Parameters | {facts.parameters:,} |

Tensor names, dtypes, config and tokenizer are those of the base. Written with transformers
{facts.transformers}.

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "PATH_OR_ID_OF_THIS_MODEL"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "Which files changed since yesterday?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=512)[0]))
```

## Citation

```bibtex
{CITATION}
```
"""
