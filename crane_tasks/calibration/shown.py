"""The texts of a set, and what its rows say that the chat template does not show."""

from collections.abc import Callable
from typing import Any

from crane_tasks.errors import DataError
from crane_tasks.models.files.wording import listed
from crane_tasks.recipe import RowsSection
from crane_tasks.rendering import rendered
from crane_tasks.rows import RowSet


def texts_of(
    tokenizer: Any, section: RowsSection, rows: RowSet, prompt: bool, notice: Callable[[str], None]
) -> list[str]:
    """Every row by the chat template, as prompts or as complete conversations.

    Raises:
        DataError: the template refuses a row, or does not show all of it and the recipe has not
            said that this is well (`on_lost: notice`); then it is a notice.
    """
    texts, places, lost = [], [], dict[str, None]()
    for row in rows.rows:
        found = rendered(tokenizer, row, prompt=prompt, options=section.chat_template_kwargs)
        if found.lost and section.on_lost == "refuse":
            raise DataError(
                f"{row.place}: the base's chat template does not show {listed(found.lost)}: its "
                "tokens would be those of another conversation. Use a template that does, write "
                "it as the text of a turn, or accept it with `on_lost: notice`."
            )
        if found.lost:
            places.append(row.place)
            lost |= dict.fromkeys(found.lost)
        texts.append(found.text)
    if places:
        notice(
            f"{section.data}: the base's chat template does not show {listed(list(lost))} in "
            f"{len(places)} of {len(texts)} rows: {listed(places)}"
        )
    return texts
