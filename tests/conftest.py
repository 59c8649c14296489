"""Tiny random pairs of all architectures, and the reference pairs where they are."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: small matrices lose more to thread barriers than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import load_recipe

ONE_BY_ONE = 1  # a limit of tokens that puts every item into a batch of its own
# The libraries' million objects stay: to look through all of them 25 times takes 10 s.
gc.set_threshold(700, 10, 1000)
# The stages of a merge by the method's own edit, in order.
NAMES = ("calibration", "delta", "threshold", "scores", "projector", "apply", "evaluate")
# All tests of the walk, the stages and the commands run on these.
ARCHITECTURES = ("qwen3", "qwen3_moe", "qwen3_next")
REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST = {folder: place for place, folder in enumerate(("flows", "stages", "benchmarks", "models"))}
SHARED = {"test_browser.py": "site", "test_prefect_site.py": "site",
          "test_fan_out.py": "server", "test_prefect_flow.py": "server",
          "test_prefect_tasks.py": "server"}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>",
         "</think>")  # fmt: skip
COMMON = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    rope_theta=10000.0, eos_token_id=2, pad_token_id=0, bos_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
               norm_topk_prob=True, decoder_sparse_step=1)  # fmt: skip
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# These are tested where they differ: gradients, activations, tables, and a merge of three.
# Whatever an architecture can have is switched on: windows shorter than the items, unlike
# rotary bases, biases, soft-capping, groups of experts.
MORE: dict[str, dict[str, Any]] = {
    "llama": dict(
        attention_bias=True, mlp_bias=True, head_dim=8,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    ),
    "mistral": dict(sliding_window=8),
    "qwen2": dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=8,
                  max_window_layers=2),
    "gemma3_text": dict(
        sliding_window=8, query_pre_attn_scalar=16, final_logit_softcapping=4.0,
        attn_logit_softcapping=20.0, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"sliding_attention": ROTARY,
                         "full_attention": {"rope_type": "linear", "rope_theta": 1e6,
                                            "factor": 8.0}},
    ),
    "olmo2": dict(),
    "olmo3": dict(
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"sliding_attention": ROTARY,
                         "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0,
                                            "factor": 4.0,
                                            "original_max_position_embeddings": 64}},
    ),
    "glm4_moe": dict(
        num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=2,
        n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=24,
        routed_scaling_factor=1.5, norm_topk_prob=True, use_qk_norm=True, attention_bias=True,
        rope_parameters=ROTARY | {"partial_rotary_factor": 0.5},
    ),
}  # fmt: skip


def tiny_config(architecture: str, **changes: Any) -> Any:
    """A small transformers config of an architecture."""
    from transformers import AutoConfig, Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig

    if architecture in MORE:
        four = {"num_hidden_layers": 4}
        options: Any = COMMON | four | MORE[architecture] | changes
        if "rope_parameters" in options:
            del options["rope_theta"]
        return AutoConfig.for_model(architecture, **options)
    if architecture == "qwen3":
        return Qwen3Config(**{**COMMON, "tie_word_embeddings": True, **changes})
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(**{**COMMON, **EXPERTS, "tie_word_embeddings": False, **changes})
    linear = dict(
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"], partial_rotary_factor=0.5,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3NextConfig(**{**COMMON, **EXPERTS, **linear, **changes})


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 265 tokens with Qwen's markers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *ADDED, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found


def save_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write a checkpoint's tensors in so many files, replacing those that are there."""
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix in float8_e4m3fn and the float32 scale of each of its blocks."""
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    packed, scales = torch.empty(weight.shape), torch.ones(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[part].float().abs().max().clamp_min(1e-12) / 448
            packed[part] = weight[part].float() / scales[i, j]
    return packed.to(torch.float8_e4m3fn), scales


def write_fp8(folder: Path, block: tuple[int, int] = (8, 8), shards: int = 2) -> dict[str, Tensor]:
    """Store a checkpoint's matrices as Qwen does; returns the weights that these stand for."""
    stored, meant = {}, {}
    for name, tensor in load_tensors(folder).items():
        stored[name] = meant[name] = tensor
        if tensor.dim() == 2 and "embed" not in name and "lm_head" not in name:
            packed, scales = fp8_blocks(tensor, block)
            stored[name], stored[f"{name}_scale_inv"] = packed, scales
            wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            product = packed.float() * wide[: tensor.shape[0], : tensor.shape[1]]
            meant[name] = product.bfloat16()
    save_tensors(folder, stored, shards=shards)
    file = folder / "config.json"
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
           "weight_block_size": list(block), "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    return meant


def write_checkpoint(folder: Path, config: Any, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A random checkpoint in the published form: one tensor per expert; returns its tensors."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        # As published: GLM's correction of the router stays in float32.
        stored = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
        kept = {n: b + 0.1 * torch.randn_like(b) for n, b in stored.items()}
        model.to(dtype)
        for name, buffer in model.named_buffers():
            buffer.data = kept.get(name, buffer)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return load_tensors(folder)


@dataclass(frozen=True)
class TinyPair:
    """A random base and donor, and a recipe folder with data for them."""

    architecture: str
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def donor(self) -> Path:
        return self.folder / "donor"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    def recipe(self, *assignments: str) -> Recipe:
        """The pair's recipe, with `--set` changes."""
        return load_recipe(self.recipe_file, assignments=assignments)

    def copy(self, folder: Path) -> "TinyPair":
        """The same pair elsewhere, to be changed freely."""
        shutil.copytree(self.folder, folder)
        return TinyPair(self.architecture, folder)


def _rows(kind: str, count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        user = {"role": "user", "content": f"{kind} {i}: what is {i} + {i * 3}?" + " now" * (i % 3)}
        answer = f"<think>{i}+{i * 3}</think>{i * 4}"
        if kind != "reasoning":
            answer = f'<tool_call>{{"name": "f{i}", "arguments": {{"x": {i}}}}}</tool_call>'
        if kind == "format":
            rows.append({"messages": [user, {"role": "assistant", "content": answer}]})
        else:
            rows.append({"messages": [user], "completion": answer})
    return rows


def write_data(folder: Path) -> None:
    """Calibration and held-out rows, all with targets."""
    counts = {"reasoning": 4, "agent": 3, "format": 5}
    for kind, count in counts.items():
        lines = [json.dumps(row) for row in _rows(kind, count)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    for kind in ("reasoning", "agent"):
        lines = [json.dumps(row) for row in _rows(kind, 6)[4:]]
        (folder / f"heldout_{kind}.jsonl").write_text("\n".join(lines) + "\n")


def write_recipe(folder: Path, **changes: Any) -> None:
    """A recipe beside `base`, `donor` and the data."""
    recipe = {
        "name": "tiny-random",
        "base": "base",
        "donor": "donor",
        "alpha": 0.5,
        "tau": 0.03,
        "calibration": {k: {"data": f"{k}.jsonl"} for k in ("reasoning", "agent", "format")},
        "evaluate": {
            "reasoning": "heldout_reasoning.jsonl",
            "agent": "heldout_agent.jsonl",
            "calls": "hermes",
        },
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def build_pair(folder: Path, architecture: str, **changes: Any) -> TinyPair:
    """A pair whose sides are sharded differently on purpose; `changes` to its config."""
    folder.mkdir(parents=True)
    config = tiny_config(architecture, **changes)
    base = write_checkpoint(folder / "base", config, seed=1, dtype=torch.bfloat16)
    write_checkpoint(folder / "donor", config, seed=1, dtype=torch.bfloat16)
    torch.manual_seed(2)
    donor = {n: (t.float() + 0.02 * torch.randn(t.shape)).to(t.dtype) for n, t in base.items()}
    save_tensors(folder / "base", base, shards=2)
    save_tensors(folder / "donor", donor, shards=3)
    write_data(folder)
    write_recipe(folder)
    return TinyPair(architecture, folder)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyPair]:
    """The random pair of an architecture; shared and read-only: `copy` it to change it."""
    built: dict[str, TinyPair] = {}

    def get(architecture: str) -> TinyPair:
        if architecture not in built:
            place = tmp_path_factory.mktemp("pair") / architecture
            built[architecture] = build_pair(place, architecture)
        return built[architecture]

    return get


@pytest.fixture(params=ARCHITECTURES)
def tiny_pair(request: pytest.FixtureRequest, pairs: Callable[[str], TinyPair]) -> TinyPair:
    """The random pair of each architecture in turn."""
    return pairs(request.param)


@pytest.fixture
def moe_pair(pairs: Callable[[str], TinyPair]) -> TinyPair:
    """The random mixture-of-experts pair."""
    return pairs("qwen3_moe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: else one process works on it when the others are done."""
    items.sort(key=lambda item: FIRST.get(item.path.parent.name, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n`: a file's tests share a process, and so do files that share a server."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return SHARED.get(Path(file).name, file)

    config.option.loadscopereorder = False  # by their number: ours is by their length
    return Together(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="folder for pictures of Prefect's page, for the docs")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Prefect server with worker and deployments, one per test process."""
    from prefect_site import running

    with running(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture(params=["dense", "moe"])
def reference(request: pytest.FixtureRequest) -> Path:
    """A trained reference pair with the official code's results, where it is at hand."""
    folder = REFERENCE / request.param
    if not folder.exists():
        pytest.skip(f"the reference results are not at hand ({folder} is absent)")
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    """A Prefect server of its own with a database of its own, one per test process."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
