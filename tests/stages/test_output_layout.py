"""The output is the base's layout: names, dtypes, shards and side files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ARCHITECTURES, TinyPair, load_tensors, save_tensors
from safetensors import safe_open
from tiny_merge import bits, merged, reported

from crane_tasks.models.files.folder import side_files
from crane_tasks.models.files.safetensors_io import read_header
from crane_tasks.recipe_file import load_recipe
from crane_tasks.session import Session
from flows.merge import merge

Pairs = Callable[[str], TinyPair]
STRAYS = (
    ".hidden", "pytorch_model.bin", "model.onnx_data", "config.json.bak", "weights.incomplete",
    "runs/events.json", "global_step10/config.json", "pytorch_model.bin.index.json",
)  # fmt: skip


class Done:
    """A pair with more side files than usual, and its merge."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair = pair.copy(folder / "pair")
        base = self.pair.base
        (base / "config_1m.json").write_text('{"rope_scaling": "1m"}\n')
        (base / "modeling_own.py").write_text("# a model's code\n")
        (base / "LICENSE").write_text("Apache License")
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
        for stray in STRAYS:
            (base / stray).parent.mkdir(exist_ok=True)
            (base / stray).write_text("left behind")
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nthe base's card")
        self.output = folder / "out"
        self.result = reported(self.pair, folder / "store", self.output)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def done(
    request: pytest.FixtureRequest, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """A merge of each architecture in turn."""
    return Done(pairs(request.param), tmp_path_factory.mktemp("layout"))


def test_names_dtypes_shapes_and_shards_are_the_bases(done: Done) -> None:
    files = sorted(p.name for p in done.pair.base.glob("*.safetensors*"))
    assert sorted(p.name for p in done.output.glob("*.safetensors*")) == files
    for name in (n for n in files if n.endswith(".safetensors")):
        ours, metadata = read_header(done.output / name)
        theirs, wanted = read_header(done.pair.base / name)
        assert [(e.name, e.dtype, e.shape) for e in ours] == [
            (e.name, e.dtype, e.shape) for e in theirs
        ]
        assert metadata == wanted == {"format": "pt"}
        with safe_open(done.output / name, "pt") as stream:
            assert len(stream.keys()) == len(ours)


def test_every_side_file_is_carried_over_byte_for_byte(done: Done) -> None:
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "generation_config.json", "config_1m.json", "modeling_own.py", "LICENSE",
             "additional_chat_templates/rag.jinja",
             "model.safetensors.index.json"]  # fmt: skip
    for name in names:
        assert (done.output / name).read_bytes() == (done.pair.base / name).read_bytes(), name
    for name in STRAYS:
        assert not (done.output / name).exists()


def test_links_out_of_the_checkpoint_are_not_followed_to_what_is_not_its_own(
    tmp_path: Path,
) -> None:
    """But those of a hub cache are, and those to a config or tokenizer that lies elsewhere."""
    secret, shared = tmp_path / "secret.txt", tmp_path / "tokenizer.json"
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / "c"
    blob = snapshot.parent.parent / "blobs" / "0"
    for file in (secret, shared, blob, snapshot / "own.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (snapshot / "notes.txt").symlink_to(secret)
    (snapshot / "again.txt").symlink_to("own.txt")
    (snapshot / "config.json").symlink_to(blob)
    (snapshot / "merges.json").symlink_to(blob)
    (snapshot / "tokenizer.json").symlink_to(shared)
    wanted = ["again.txt", "config.json", "merges.json", "own.txt", "tokenizer.json"]
    assert side_files(snapshot) == wanted


def test_the_card_the_recipe_and_the_provenance_are_ours(done: Done) -> None:
    card = (done.output / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["license"] == "apache-2.0"
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert "2605.14084" in card and "the base's card" not in card
    loss = done.result.evaluation["models"]["merged"]["reasoning_loss"]
    (row,) = [line for line in card.splitlines() if line.startswith("| reasoning loss |")]
    assert "## Results" in card and f" {loss:.4f} (" in row
    (index,) = matter["model-index"]
    values = {m["type"]: m["value"] for r in index["results"] for m in r["metrics"]}
    assert values["reasoning_loss"] == pytest.approx(loss)
    recipe = yaml.safe_load((done.output / "crane_recipe.yaml").read_text())
    assert (recipe["alpha"], recipe["tau"], recipe["name"]) == (0.5, 0.03, "tiny-random")
    assert "run" not in recipe
    record = json.loads((done.output / "crane.json").read_text())
    assert record["apply"] == done.result.keys.refs["apply"].key
    assert record["files"].keys() == {p.name for p in done.output.glob("*.safetensors")}


def test_it_loads_and_generates(done: Done) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(done.output, dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(done.output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of generation settings, the library's own
        out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    loaded: dict[str, Any] = model.state_dict()
    stored = load_tensors(done.output)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert bits(loaded[name]) == bits(stored[name])


def test_no_half_finished_folder_is_left(done: Done) -> None:
    assert sorted(p.name for p in done.output.parent.iterdir()) == [
        "out", "out-report", "pair", "store",
    ]  # fmt: skip


def with_strays(pair: TinyPair, folder: Path) -> TinyPair:
    """A Qwen3-Next pair with float32 strays, and multi-token prediction in the base alone."""
    other = pair.copy(folder)
    for side in (other.base, other.donor):
        tensors = load_tensors(side)
        for name in list(tensors):
            if name.endswith(("A_log", "dt_bias")):
                tensors[name] = tensors[name].float() + 0.001
        if side == other.base:
            torch.manual_seed(5)
            tensors["mtp.fc.weight"] = torch.randn(8, 4).bfloat16()
            tensors["mtp.layers.0.mlp.experts.0.up_proj.weight"] = torch.randn(3)
        save_tensors(side, tensors, shards=2)
    return other


def test_float32_strays_keep_their_dtype_and_mtp_is_carried_over(
    pairs: Pairs, tmp_path: Path
) -> None:
    pair = with_strays(pairs("qwen3_next"), tmp_path / "pair")
    result = merged(pair, tmp_path / "store", tmp_path / "out", "alpha=2")
    base, found = load_tensors(pair.base), load_tensors(tmp_path / "out")
    donor = load_tensors(pair.donor)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in base.items()}
    carried = [n for n in base if n.startswith("mtp.")]
    assert len(carried) == 2
    assert all(bits(found[n]) == bits(base[n]) for n in carried)
    assert sorted(result.ctx.pair().base.carried) == sorted(carried)
    name = "model.layers.0.linear_attn.A_log"
    moved = found[name] - base[name]
    assert found[name].dtype == torch.float32
    assert 0 < int((moved != 0).sum()) < moved.numel()  # T drops half of it
    delta = donor[name] - base[name]
    assert bool((moved * delta >= 0).all())


def test_unlike_dtypes_of_base_and_donor_give_the_bases(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    save_tensors(pair.donor, {n: t.float() for n, t in load_tensors(pair.donor).items()})
    merged(pair, tmp_path / "store", tmp_path / "out")
    merged(pairs("qwen3"), tmp_path / "store", tmp_path / "same")
    found, wanted = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "same")
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in wanted.items()}


def test_the_recipe_in_the_output_runs_from_there_and_the_record_tells_of_no_machine(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done.output)
    recipe = load_recipe(done.output / "crane_recipe.yaml", assignments=["run.output=."])
    again = merge(Session(recipe, done.result.ctx.store), report=False)
    assert {built.status for built in again.stages} == {"reused"}
    for name in ("crane.json", "README.md"):
        assert str(done.pair.folder) not in (done.output / name).read_text()
