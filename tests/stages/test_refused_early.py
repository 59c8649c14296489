"""What is wrong shows before the delta is read, and what the store kept is not trusted blindly."""

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NAMES, TinyPair, load_tensors, save_tensors
from tiny_merge import merged, statuses, weight_bytes

from artifacts.schema import Schema
from artifacts.store import Draft, Store
from artifacts.tensors import chunk_files
from crane_tasks.errors import BadInput, CheckpointError, OutputError, RecipeError
from crane_tasks.report.sweep import check_sweep_folder
from crane_tasks.session import Session
from flows.merge import compute_scores


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _both_configs(**changes: Any) -> Callable[[TinyPair], None]:
    def spoil(pair: TinyPair) -> None:
        _edit_config(pair.base, **changes)
        _edit_config(pair.donor, **changes)

    return spoil


def _both_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[TinyPair], None]:
    def spoil(pair: TinyPair) -> None:
        for folder in (pair.base, pair.donor):
            tensors = load_tensors(folder)
            change(tensors)
            save_tensors(folder, tensors)

    return spoil


def _stray_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)


def _stored_twice(tensors: dict[str, torch.Tensor]) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(4)]
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.stack([tensors[n] for n in names])


SPOILED = {
    "quantised": (_both_configs(quantization_config={"bits": 4}), "quantised"),
    "too many experts": (_both_configs(num_experts_per_tok=99), "99 experts per token"),
    "no heads": (_both_configs(num_attention_heads=0), "num_attention_heads is 0"),
    "a bias that the model lacks": (_both_tensors(_stray_bias), "no parameter of this model"),
    "stored twice": (_both_tensors(_stored_twice), "hold the same weights"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_pair_that_makes_no_sense_is_refused_before_its_weights_are_read(
    what: str, moe_pair: TinyPair, tmp_path: Path
) -> None:
    spoil, message = SPOILED[what]
    pair = moe_pair.copy(tmp_path / "pair")
    spoil(pair)
    with pytest.raises(CheckpointError, match=message):
        merged(pair, tmp_path / "store", tmp_path / "out")
    assert not (tmp_path / "store" / "delta").exists()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("gate.baseline=ffn", "has no 'ffn'"),
        ("calibration.format.max_length=3", "no row holds any"),
        ("calibration.format.patterns=['']", "at least 1 character"),
        ("calibration.agent.data=absent.jsonl", "no such data file"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_weights_are_hashed(
    assignment: str, message: str, moe_pair: TinyPair, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        patterns = "calibration.format.patterns=['<tool_call>']"
        merged(moe_pair, tmp_path / "store", tmp_path / "out", patterns, assignment)
    assert not (tmp_path / "store" / "delta").exists()


def test_an_edit_that_the_dtype_cannot_hold_is_no_merge(moe_pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="too large"):
        merged(moe_pair, tmp_path / "store", tmp_path / "out", "alpha=1e38")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(
    pairs: Callable[[str], TinyPair], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyPair, Path]:
    """A merged pair and the folder of its `store` and `out`."""
    folder = tmp_path_factory.mktemp("finished")
    merged(pairs("qwen3_moe"), folder / "store", folder / "out")
    return pairs("qwen3_moe"), folder


def test_a_second_output_of_the_same_merge_is_written_and_the_first_stays(
    finished: tuple[TinyPair, Path], tmp_path: Path
) -> None:
    pair, folder = finished
    again = merged(pair, folder / "store", tmp_path / "other")
    assert statuses(again)["apply"] == "computed"
    assert weight_bytes(tmp_path / "other") == weight_bytes(folder / "out")
    assert statuses(merged(pair, folder / "store", folder / "out"))["apply"] == "reused"


def test_an_output_that_the_store_has_not_heard_of_is_not_written_again(
    finished: tuple[TinyPair, Path],
) -> None:
    pair, folder = finished
    before = weight_bytes(folder / "out")
    made = {file.name: file.stat().st_mtime_ns for file in (folder / "out").iterdir()}
    # As a kill leaves it between the output's appearance and the artifact's manifest.
    artifact = Store(folder / "store").artifacts("apply")[0]
    draft = artifact.rename(artifact.with_name(f".draft-{artifact.name}"))
    units = json.loads((draft / "manifest.json").read_text())["units"]
    (draft / "manifest.json").unlink()
    log = Draft(draft, Schema(arrays={}))
    for name, record in units.items():
        log.adopt({"unit": name, **record})
    again = merged(pair, folder / "store", folder / "out")
    assert statuses(again)["apply"] == "resumed"
    assert weight_bytes(folder / "out") == before
    assert {f.name: f.stat().st_mtime_ns for f in (folder / "out").iterdir()} == made
    assert not list(folder.glob(".out.draft-*"))


def test_an_output_that_lost_a_side_file_is_written_again(
    finished: tuple[TinyPair, Path],
) -> None:
    pair, folder = finished
    (folder / "out" / "config.json").unlink()
    assert statuses(merged(pair, folder / "store", folder / "out"))["apply"] == "computed"
    assert (folder / "out" / "config.json").read_bytes() == (pair.base / "config.json").read_bytes()


def test_an_output_whose_weights_were_changed_is_written_again(
    finished: tuple[TinyPair, Path],
) -> None:
    pair, folder = finished
    before = weight_bytes(folder / "out")
    file = next((folder / "out").glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"XXXX")
    assert weight_bytes(folder / "out") != before
    assert statuses(merged(pair, folder / "store", folder / "out"))["apply"] == "computed"
    assert weight_bytes(folder / "out") == before
    file.touch()  # changed in name only: read, and found sound
    assert statuses(merged(pair, folder / "store", folder / "out"))["apply"] == "reused"


@pytest.mark.parametrize("way", ["merge", "sweep"])
def test_a_place_where_no_output_can_be_is_refused_before_anything(
    way: str, pairs: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    pair, output = pairs("qwen3_moe"), tmp_path / "file" / "deep" / "out"
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path / 'file'} is a file")):
        if way == "merge":
            merged(pair, tmp_path / "store", output)
        else:
            check_sweep_folder(output, {})
    made = {p.parent.name for p in (tmp_path / "store").glob("*/*")}
    assert made <= {".running", "checked"}


def test_names_and_manifests_that_were_changed_are_damage(
    finished: tuple[TinyPair, Path], tmp_path: Path
) -> None:
    _, folder = finished
    shutil.copytree(folder / "store", tmp_path / "store")
    store = Store(tmp_path / "store")
    scores, threshold = store.artifacts("scores")[0], store.artifacts("threshold")[0]
    for file in (scores / "data.zarr/layer.0/tensors/zarr.json", threshold / "manifest.json"):
        file.write_text(file.read_text().replace("attention", "expert").replace("delta", "other"))
    assert any("metadata" in problem for problem in store.verify(scores))
    assert any("manifest" in problem for problem in store.verify(threshold))


def test_scores_that_only_the_report_reads_are_mended(
    finished: tuple[TinyPair, Path],
) -> None:
    pair, folder = finished
    store = Store(folder / "store")
    chunk = chunk_files(store.artifacts("scores")[0] / "data.zarr/layer.0/tensors")[0]
    chunk.write_bytes(chunk.read_bytes()[:-9])
    notices: list[str] = []
    scored = compute_scores(Session(pair.recipe(), store, notice=notices.append))
    assert [b.status for b in scored.stages if b.ref.stage == "scores"] == ["computed"]
    assert len(notices) == 1 and scored.scores.per_layer.keys() == {0, 1}
    assert set(statuses(merged(pair, folder / "store", folder / "out"))) == set(NAMES)


def test_a_package_that_was_never_installed_is_told_of_before_the_work(
    moe_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's record names versions; a merge ended for it when all was written."""
    known = metadata.version

    def version(name: str) -> str:
        if name == "crane-merge":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(OutputError, match="crane-merge is not installed"):
        merged(moe_pair, tmp_path / "store", tmp_path / "out")
    assert not (tmp_path / "store" / "delta").exists() and not (tmp_path / "out").exists()
