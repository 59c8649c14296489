"""What every section of a recipe is, and the section that names a server."""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

LONGEST = "tokens of a decoded target, at most"
LONGEST_PROMPT = "tokens of a prompt, at most; a row with a longer one is refused"
# What float32, in which the edit is computed, can hold.
LARGEST = 3.4e38


def _no_switch(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, which would pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"a number, not {value}")
    return value


def _in_float32(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"beyond {LARGEST:g}, the largest number that float32 holds")
    return value


Number = Annotated[
    float,
    Field(allow_inf_nan=False),
    BeforeValidator(_no_switch),
    AfterValidator(_in_float32),
]
Count = Annotated[int, BeforeValidator(_no_switch)]


class Section(BaseModel):
    """Base of all sections: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_max_length(cls, value: Any) -> Any:
        """The old name bounded prompt and target together: it must not pass for the new one."""
        named = isinstance(value, Mapping) and "max_length" in value
        if named and "max_prompt_length" in cls.model_fields:
            raise ValueError(
                "max_length is now max_prompt_length, which bounds the prompt alone; a target may "
                "have max_new_tokens tokens besides, and a given `completion` is never cut"
            )
        return value


class Rows(Section):
    """Which rows of a file or of a hub dataset; where nothing else is said, a path stands alone."""

    path: str = Field(description="JSONL, JSON or Parquet file, or hub id[@revision] of a dataset")
    subset: str | None = Field(default=None, description="of a hub dataset")
    split: str = Field(default="train", description="of a hub dataset, also a part: train[:10%]")
    limit: Count | None = Field(default=None, gt=0, description="rows at most")
    seed: Count | None = Field(
        default=None, ge=0, description="draw `limit` rows by it; default: the first ones"
    )

    def __str__(self) -> str:
        said = self.model_dump(exclude_defaults=True, exclude={"path"})
        more = ", ".join(f"{name} {value}" for name, value in said.items())
        return f"{self.path} ({more})" if more else self.path


def rows_of(data: str | Rows) -> Rows:
    """What a path alone stands for."""
    return Rows(path=data) if isinstance(data, str) else data


def _kind_of_data(value: Any) -> str:
    return "rows" if isinstance(value, Mapping | Rows) else "path"


DATA_KINDS = ("path", "rows")
# Told apart before they are read, so that a message is about the one that was meant.
Data = Annotated[
    Annotated[str, Tag("path")] | Annotated[Rows, Tag("rows")], Discriminator(_kind_of_data)
]


class Endpoint(Section):
    """A running OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...) that decodes targets.

    Its key, where it asks for one, is read from the environment: OPENAI_API_KEY.
    """

    endpoint: str = Field(description="where /completions lies, e.g. http://localhost:8000/v1")
    model: str = Field(min_length=1, description="the name the server gives it; part of the key")

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        _ = parts.port  # a ValueError if it is no number
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an http or https URL, such as http://localhost:8000/v1")
        # The recipe is written into the output, the report and the store.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("a URL without user, password or query: keys go in OPENAI_API_KEY")
        return value
