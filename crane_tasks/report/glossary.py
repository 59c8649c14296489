"""What the columns of the report's tables mean."""

from collections.abc import Iterable

from crane_tasks.evaluate.metrics import METRICS

WORDS = {
    "S": "the gate's score, by which a component's edit is scaled; the baseline component has 1",
    "agreed gain": "the sum over coordinates of what both sets gain by the step, in nats",
    "slope R": "minus the first-order change of the reasoning loss along the whole delta",
    "slope A": "the same of the agent loss",
    "norm R": "the norm of what slope R is the sum of; far above it: coordinates disagree",
    "norm A": "the same of slope A",
    "delta / base": "norm of donor minus base, relative to that of the base's weights",
    "donor / base": "norm of the donor's weights, relative to that of the base's",
    "edit / base": "norm of what is added to the weights, relative to that of the base's",
    "largest": "the largest single difference between donor and base",
    "kept by T": "the share of the delta's coordinates that the threshold keeps",
    "norm of T / delta": "norm of what T makes of the delta (doubling included) over the delta's",
    "survived": "norm of the stored edit over that of the edit before rounding to the dtype",
    "cosine": "between the stored edit and the edit before rounding",
    "changed": "the share of stored values that are not the base's",
    "tokens": "of prompts and targets",
    "target tokens": "of the targets alone: the loss is theirs",
    "mean target": "tokens of a target",
    "longest": "tokens of the longest target",
    "with `</think>`": "the share of targets that end a thinking block",
    "ended by itself": "the share of decoded targets that came to their end token",
    "cut": "how many did not",
    "metric": "with its interval at 95 %, given the rows: Wilson's of a share, else a bootstrap's",
    "task": "of the lm-evaluation-harness, with its metric; ± the standard error",
    "against base": "the merge, or the checkpoint, on the rows that the base was asked as well",
    "difference": "of the mean over the same rows",
    "at 95 %": "where the difference lies, by a paired bootstrap over the rows",
    "lost": "rows on which the base is right and the other is not",
    "gained": "the other way round",
    "McNemar p": "the chance of such a split between lost and gained if both were as good",
    "predicted": "by the gate, to first order, for the edit as it is projected",
    "realised": "merged minus base, measured",
} | {metric.title: metric.meaning for metric in METRICS}


def glossary(heads: Iterable[str]) -> list[str]:
    """A line for every column that is explained, in the order given, each once."""
    return [f"**{head}**: {WORDS[head]}" for head in dict.fromkeys(heads) if head in WORDS]
