"""The model card of a merged checkpoint: a pure function of the facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crane_tasks.edit import Edit
from crane_tasks.recipe import Recipe

CITATION = """@misc{zhu2026crane,
  title         = {{CRANE}: Constrained Reasoning Injection for Code Agents via Nullspace Editing},
  author        = {Zhu, Mingzhi and Merler, Michele and Pavuluri, Raju and Patterson, Stacy},
  year          = {2026},
  eprint        = {2605.14084},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2605.14084},
}"""
ALIKE = "Tensor names, dtypes, config and tokenizer"
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
class CardFacts:
    """What a card is made from.

    Attributes:
        shown: the recipe as others may read it.
        unlike: which tokens base and donor do not share; empty for none.
        notes: in what the pair is none of twins.
        packed: whether the base is stored in FP8, and the merge is not.
        wrapper: the model type of a multimodal base; empty for a plain one.
    """

    recipe: Recipe
    shown: Mapping[str, Any]
    edit: Edit
    base: str
    donor: str
    notes: Sequence[str]
    packed: bool
    wrapper: str
    base_folder: Path
    config: Mapping[str, Any]
    parameters: int
    transformers: str
    unlike: str = ""


def _front_matter(facts: CardFacts) -> str:
    base_card = facts.base_folder / "README.md"
    license_name = "other"
    if base_card.is_file():
        _, _, rest = base_card.read_text(errors="replace").partition("---\n")
        head, _, _ = rest.partition("\n---")
        try:
            matter = yaml.safe_load(head)
        except yaml.YAMLError:
            matter = None
        if isinstance(matter, dict) and isinstance(matter.get("license"), str):
            license_name = matter["license"]
    of_hub = [name for name in (facts.base, facts.donor) if "/" in name]
    front = {
        "license": license_name,
        # Of the hub alone: it looks these up, and a folder's name leads nowhere.
        **({"base_model": of_hub, "base_model_relation": "merge"} if of_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if facts.wrapper else "text-generation",
        "tags": ["merge", "model-merging", "crane", "tool-use", "reasoning", "code"],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _told(recipe: Recipe, edit: Edit) -> str:
    """What the formula's letters are, as far as the edit has them."""
    numbers = [f"alpha = {recipe.alpha:g}"]
    if "tau" in edit.fields:
        numbers.append(f"tau = {recipe.tau:g}")
    return "\n".join([f"with {' and '.join(numbers)}.", *(part.words for part in edit.parts)])


def _only_set(shown: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's values those that were set, without all the defaults."""
    return {
        key: _only_set(shown[key], value)
        if isinstance(value, dict) and isinstance(shown[key], dict)
        else shown[key]
        for key, value in given.items()
        if key in shown
    }


RESULTS, RESULTS_END = "<!-- crane: results -->\n", "<!-- end -->\n"


def with_results(card: str, table: str) -> str:
    """A card with the evaluation in its place; a card that lost the place stays as it is."""
    before, begin, rest = card.partition(RESULTS)
    _, end, after = rest.partition(RESULTS_END)
    if not (begin and end):
        return card
    return f"{before}{RESULTS}{table}{RESULTS_END}{after}"


CARD = """{front}
# {name}

{base} with reasoning taken over from {donor} by {title} ({cite}): a merge of the
weights, without training.

## How it was made

    {formula}

{told}

```yaml
{recipe}
```

The full recipe and the digests of all inputs are in `crane.json`; `crane rebuild` makes the merge
again from it.
{notes}
{results}
## Architecture

| | |
| --- | --- |
{table}
| Parameters | {parameters:,} |

{alike} are those of the base. Written with transformers
{transformers}.{unlike}

## Usage

```python
from transformers import {loader}, AutoTokenizer

path = "PATH_OR_ID_OF_THIS_MODEL"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {loader}.from_pretrained(path, dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "Which files changed since yesterday?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=512)[0]))
```

## Citation

```bibtex
{citation}
```
"""


def model_card(facts: CardFacts) -> str:
    """The card: front matter, how it was made, recipe, architecture, usage, citation."""
    recipe, edit = facts.recipe, facts.edit
    config = {**facts.config, "model_type": facts.wrapper or facts.config.get("model_type")}
    rows = {title: config[key] for key, title in ROWS.items() if config.get(key)}
    shown = _only_set(facts.shown, recipe.published())
    return CARD.format(
        front=_front_matter(facts),
        name=recipe.name,
        base=facts.base,
        donor=facts.donor,
        title=edit.title,
        cite=edit.cite,
        formula=edit.formula,
        told=_told(recipe, edit),
        loader="AutoModelForImageTextToText" if facts.wrapper else "AutoModelForCausalLM",
        alike="Tensor names and tokenizer" if facts.packed else ALIKE,
        results=RESULTS + RESULTS_END,
        notes="".join(f"\n- {note}" for note in facts.notes) + "\n" if facts.notes else "",
        recipe=yaml.safe_dump(shown, sort_keys=False).rstrip(),
        table="\n".join(f"| {title} | {value} |" for title, value in rows.items()),
        parameters=facts.parameters,
        transformers=facts.transformers,
        unlike=f"\n\n{facts.unlike}" if facts.unlike else "",
        citation=CITATION,
    )
