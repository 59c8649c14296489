"""What lies in a checkpoint folder besides tensors: config, index, and files to take along."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.json_file import read_json
from crane_tasks.models.files.formats import other_form, quantised_words
from crane_tasks.models.files.generation import GENERATION
from crane_tasks.models.files.packed import block_of
from crane_tasks.models.files.safetensors_io import Entry
from crane_tasks.models.files.wording import listed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
USUAL = ("config.json", GENERATION, *TOKENIZER_FILES)
CARD = "README.md"
# Sizes beyond which a config is a mistake, or made to harm.
MOST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "vocab_size": 100_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
}
OWN_FILES = ("crane.json", "crane_recipe.yaml")  # of an earlier merge: the new one has its own
# What a checkpoint has beside its weights: configs, tokenizers, templates, code, papers.
SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".vocab", ".tiktoken", ".py", ".md")
PAPERS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
TEMPLATES = "additional_chat_templates"  # the one folder that transformers reads


def is_side_file(name: str) -> bool:
    """Whether a merge takes along a file of the base, by its path in the folder.

    Left out: weights in any form, their index, the card, files of an earlier merge, and what
    training and transfers leave behind (`runs/`, `global_step10/`, `*.bak`, `*.incomplete`).
    """
    if name.startswith(f"{TEMPLATES}/"):
        return name.count("/") == 1 and name.endswith(".jinja")
    if "/" in name or name.startswith(".") or name in (CARD, *OWN_FILES):
        return False
    return name.startswith(PAPERS) or (
        name.endswith(SIDE_SUFFIXES) and not name.endswith(".index.json")
    )


def side_files(folder: Path) -> list[str]:
    """Config, tokenizer, chat template and every other file that a merge carries over.

    Links that lead out of the checkpoint are followed for the files that every checkpoint has, and
    within a hub cache; what else they lead to is none of the checkpoint's, and stays.
    """
    found = [p for p in (*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")) if p.is_file()]
    own = [p for p in found if p.name in USUAL or not _leads_out(p, folder)]
    return sorted(n for p in own if is_side_file(n := p.relative_to(folder).as_posix()))


def _leads_out(file: Path, folder: Path) -> bool:
    target, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"  # of a snapshot in a hub cache
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(blobs)
    return not (target.is_relative_to(home) or in_cache)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: the folder or the file is missing, or it is not a model's config.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    try:
        config = read_json(file)
    except FileNotFoundError as error:
        told = other_form(folder) or "has no config.json, so it is no checkpoint"
        raise CheckpointError(f"{folder}: {told}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict) or not (
        isinstance(config.get("num_hidden_layers"), int)
        or isinstance(config.get("text_config"), dict)
    ):
        raise CheckpointError(f"{file}: not the config of a decoder-only language model")
    _require_sizes(file, config)
    if config.get("quantization_config") and block_of(config) is None:
        raise CheckpointError(f"{file}: {quantised_words(config)}")
    return config


def _require_sizes(file: Path, config: Mapping[str, Any]) -> None:
    """A config whose numbers no model has would be built, tensor by tensor, until memory ends.

    Raises:
        CheckpointError: one is out of all range.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for name, value in section.items():
            if (most := MOST.get(name)) is None or value is None:
                continue
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(f"{file}: {name} is {value!r}, not 1 to {most:,}")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files, sorted, and the index's weight map if there is an index.

    Raises:
        CheckpointError: there are none, or the index is damaged or names what is not there.
    """
    index = folder / INDEX
    if index.exists():
        try:
            weight_map: dict[str, str] = read_json(index)["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files") from error
        if (folder / SINGLE).exists() and folder / SINGLE not in files:
            raise CheckpointError(
                f"{folder}: holds both {INDEX} and {SINGLE}, which loaders choose between "
                "differently. Remove the one that is left over."
            )
        astray = [f.name for f in files if f.parent != folder]
        if astray:
            raise CheckpointError(f"{index}: names files outside the folder: {listed(astray)}")
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise CheckpointError(
                f"{folder}: the index names files that are missing: {listed(missing)}. "
                "Finish the download."
            )
        return files, weight_map
    if (folder / SINGLE).exists():
        return [folder / SINGLE], None
    told = other_form(folder) or (
        f"holds neither {INDEX} nor {SINGLE}. Only safetensors checkpoints are read; convert "
        "others with transformers' save_pretrained."
    )
    raise CheckpointError(f"{folder}: {told}")


def check_index(folder: Path, weight_map: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    """The index and the files' headers list the same tensors in the same files.

    Raises:
        CheckpointError: with the names in which they differ.
    """
    absent = [
        f"{name} in {file}"
        for name, file in weight_map.items()
        if name not in entries or entries[name].file.name != file
    ]
    extra = [name for name in entries if name not in weight_map]
    if absent:
        raise CheckpointError(f"{folder}: the index promises what is not there: {listed(absent)}")
    if extra:
        raise CheckpointError(f"{folder}: tensors that the index does not list: {listed(extra)}")
