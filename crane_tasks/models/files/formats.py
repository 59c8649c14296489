"""Forms of a model that are not read: what each is, and how it becomes a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crane_tasks.json_file import read_json

# `quant_method` of a config: what people call it.
METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8 without blocks",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
}
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth")


def quantised_words(config: Mapping[str, Any]) -> str:
    """What a quantised checkpoint is whose weights are not read, and what to name instead."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    name = METHODS.get(str(method), str(method) if method else "an unknown method")
    return (
        f"quantised by {name}, which is not read: name the checkpoint that it was made from "
        "(`base_model` on its card), or its FP8 form with `weight_block_size`"
    )


def other_form(path: Path) -> str | None:
    """What lies at a path that has no safetensors weights of a model, as a sentence; or None."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    if (path / ADAPTER).is_file():
        return (
            f"a LoRA adapter{_made_for(path / ADAPTER)}, not a checkpoint: merge it into its model "
            "first (peft's `merge_and_unload`, then `save_pretrained`)"
        )
    if ggufs := [f.name for f in files if f.suffix == ".gguf"]:
        return (
            f"a GGUF model ({ggufs[0]}), which is not read: name the checkpoint that it was made "
            "from, or convert it (`AutoModelForCausalLM.from_pretrained(..., gguf_file=...)`, then "
            "`save_pretrained`)"
        )
    if pickles := [f.name for f in files if f.suffix in PICKLES]:
        return (
            f"a checkpoint in PyTorch's pickles ({pickles[0]}), which are not opened: load it with "
            "transformers and store it as safetensors (`save_pretrained`)"
        )
    return None


def _made_for(file: Path) -> str:
    try:
        return f" for {read_json(file)['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
