"""The command line: what it prints, how it ends, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench as Shared
from conftest import NAMES, TinyPair, load_tensors, save_tensors
from crane_process import INTERRUPT, crane, reached, script, stopped

Pairs = Callable[[str], TinyPair]
MERGE_KEYS = {"name", "output", "alpha", "tau", "stages", "scores", "edit", "evaluation"}
STAGE_KEYS = {"name", "status", "seconds", "key", "path"}


class Bench(Shared):
    """A pair, merged once by the command line."""

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def run(self, command: str, *args: object) -> Any:
        """A command on the pair's recipe and store, as JSON."""
        return self.crane(command, "--json", *args).json()


@pytest.fixture(scope="module")
def bench(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Shared by the tests that only look or add."""
    folder = tmp_path_factory.mktemp("bench")
    pair = pairs("qwen3").copy(folder / "pair")
    ended = crane(folder, "merge", pair.recipe_file, "--store", folder / "store",
                  "--output", folder / "out", "--json")  # fmt: skip
    return Bench(pair, folder, ended.json())


def test_merge_prints_one_json_object_with_the_promised_keys(bench: Bench) -> None:
    found = bench.result
    assert found.keys() >= MERGE_KEYS
    assert (found["name"], found["alpha"], found["tau"]) == ("tiny-random", 0.5, 0.03)
    assert found["output"] == str(bench.output)
    assert [s["name"] for s in found["stages"]] == list(NAMES)
    for stage in found["stages"]:
        assert stage.keys() == STAGE_KEYS
        assert stage["status"] == "computed"
        assert stage["seconds"] >= 0
        assert Path(stage["path"]).exists()
    assert found["scores"]["per_layer"].keys() == {"0", "1"}
    assert all(row["ffn"] == 1.0 for row in found["scores"]["per_layer"].values())
    assert found["scores"]["per_component"]["ffn"] == 1.0
    assert found["edit"].keys() == {"attention", "ffn", "norm", "embedding"}
    assert all(edit.keys() == {"survived", "cosine"} for edit in found["edit"].values())
    assert found["evaluation"]["models"].keys() == {"base", "donor", "merged"}


def test_a_repeated_merge_reuses_everything_and_a_new_alpha_only_the_rest(bench: Bench) -> None:
    again = bench.run("merge", "--output", bench.output)
    assert {s["status"] for s in again["stages"]} == {"reused"}
    for part in ("scores", "edit", "evaluation"):
        assert again[part] == bench.result[part]
    other = bench.run("merge", "--output", bench.folder / "other", "--alpha", "0.25")
    assert other["alpha"] == 0.25
    assert {s["name"] for s in other["stages"] if s["status"] != "reused"} == {"apply", "evaluate"}


def test_without_json_a_person_gets_a_summary_and_progress_goes_to_stderr(bench: Bench) -> None:
    ended = crane(bench.folder, "merge", bench.pair.recipe_file, "--store", bench.store,
                  "--output", bench.output)  # fmt: skip
    assert ended.code == 0
    assert str(bench.output) in ended.out and "Report" in ended.out
    assert all(stage in ended.err for stage in NAMES)
    assert "reused" not in ended.out


def test_plan_says_what_changed_and_writes_no_artifact(bench: Bench) -> None:
    before = bench.artifacts()
    plan = {s["name"]: s for s in bench.run("plan", "--output", bench.output)["stages"]}
    assert list(plan) == list(NAMES)
    assert {s["status"] for s in plan.values()} == {"reused"}
    found = bench.run("plan", "--output", bench.output, "--alpha", "0.111", "--set",
                      "projector.rank=5")  # fmt: skip
    plan = {s["name"]: s for s in found["stages"]}
    assert {n for n, s in plan.items() if s["status"] == "computed"} == {
        "projector", "apply", "evaluate",
    }  # fmt: skip
    assert "rank" in plan["projector"]["why"]
    assert "alpha" in plan["apply"]["why"] and "projector" in plan["apply"]["why"]
    weights = sum(t.nbytes for t in load_tensors(bench.output).values())
    assert plan["apply"]["disk"] >= weights
    assert bench.artifacts() == before


def test_plan_of_an_unknown_pair_computes_everything_and_makes_no_output(bench: Bench) -> None:
    place = bench.folder / "fresh"
    ended = crane(bench.folder, "plan", bench.pair.recipe_file, "--store", place / "store",
                  "--output", place / "out", "--json")  # fmt: skip
    assert {s["status"] for s in ended.json()["stages"]} == {"computed"}
    assert not (place / "out").exists()
    assert not list(place.glob("store/*/*/manifest.json")) and not (place / "store/delta").exists()


def test_scores_are_those_of_the_merge(bench: Bench) -> None:
    found = bench.run("scores")
    assert found["per_layer"] == bench.result["scores"]["per_layer"]
    assert found["per_component"] == bench.result["scores"]["per_component"]
    assert [s["name"] for s in found["stages"]] == ["calibration", "delta", "scores"]
    assert {s["status"] for s in found["stages"]} == {"reused"}


def test_stability_is_one_table_or_one_object(bench: Bench) -> None:
    """The same numbers as `crane scores` for all items, and what halves of them make of those."""
    found = bench.run("stability", "--groups", 2, "--draws", 3, "--seed", 5)
    assert (found["groups"], found["draws"], found["seed"]) == (2, 3, 5)
    assert [s["name"] for s in found["stages"]] == ["calibration", "delta", "stability"]
    assert found["per_layer"].keys() == {"0", "1"}
    assert found["per_component"].keys() == bench.result["scores"]["per_component"].keys()
    assert found["per_component"]["ffn"] == {"mean": None, "low": None, "variation": 0.0}
    assert -1 <= found["all"]["low"] <= found["all"]["mean"] <= 1
    for component, score in found["scores"]["per_component"].items():
        assert score == pytest.approx(bench.result["scores"]["per_component"][component], rel=3e-3)
    ended = bench.crane("stability", "--groups", 2, "--draws", 3, "--seed", 5)
    assert ended.code == 0 and ended.out.count("┏") == 1
    assert "reused" in ended.err and "reused" not in ended.out
    assert f"{found['all']['mean']:.4f}" in ended.out
    for args, said in ((("--groups", 3), "--groups: 3"), (("--groups", 4), "agent.jsonl has 3")):
        ended = bench.crane("stability", *args)
        assert (ended.code, ended.out) == (2, "") and said in ended.err


def test_any_checkpoint_can_be_evaluated(bench: Bench) -> None:
    ended = crane(bench.folder, "evaluate", bench.output, "--recipe", bench.pair.recipe_file,
                  "--store", bench.store, "--json")  # fmt: skip
    models = ended.json()["models"]
    wanted = bench.result["evaluation"]["models"]
    assert models["checkpoint"] == wanted["merged"]
    assert (models["base"], models["donor"]) == (wanted["base"], wanted["donor"])
    ended = crane(bench.folder, "evaluate", bench.folder / "nowhere", "--recipe",
                  bench.pair.recipe_file, "--store", bench.store)  # fmt: skip
    assert ended.code == 2 and "nowhere" in ended.err


def test_the_store_is_listed_shown_verified_and_cleaned(bench: Bench, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(bench.store, copy)

    def store(*args: object) -> Any:
        return crane(tmp_path, "store", *args, "--store", copy, "--json")

    listed = store("ls").json()
    assert {r["stage"] for r in listed} >= set(NAMES)
    key = next(r["key"] for r in listed if r["stage"] == "delta")
    shown = store("show", key[:8]).json()
    assert (shown["key"], shown["stage"]) == (key, "delta")
    assert shown["inputs"].keys() == {"base", "donor"}
    verified = store("verify").json()
    assert verified["checked"] == len(listed) and verified["damaged"] == {}
    (copy / "delta" / key / "data.zarr" / "layer.0" / "input_layernorm.weight" / "c" / "0").unlink()
    ended = store("verify", "--set-aside")
    assert ended.code == 1
    assert list(json.loads(ended.out)["damaged"]) == [f"delta/{key}"]
    found = store("gc").json()
    assert len(found["removed"]) == 1 and key in found["removed"][0]
    assert store("verify").json()["damaged"] == {}
    assert len(store("ls").json()) == len(listed) - 1
    for args in (["ls"], ["show", listed[0]["key"]], ["verify"], ["gc", "--dry-run"]):
        assert crane(tmp_path, "store", *args, "--store", copy).code == 0
    ended = crane(tmp_path, "store", "show", "zzz", "--store", copy)
    assert ended.code != 0 and "zzz" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(("number", "code"), [(INTERRUPT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_so_and_the_same_one_goes_on(
    number: int, code: int, bench: Bench, tmp_path: Path
) -> None:
    args = ["merge", bench.pair.recipe_file, "--store", tmp_path / "store", "--output",
            tmp_path / "out", "--json"]  # fmt: skip
    ended = stopped(tmp_path, args, reached(tmp_path / "store", "delta", 1), number)
    assert ended.code == code
    assert ended.out == "" and "Traceback" not in ended.err
    assert "Interrupted" in ended.err
    assert not (tmp_path / "out").exists()
    again = crane(tmp_path, *args).json()
    status = {s["name"]: s["status"] for s in again["stages"]}
    assert status["delta"] in ("resumed", "reused")
    for file in bench.output.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_store_that_cannot_be_is_bad_input(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = crane(tmp_path, "merge", bench.pair.recipe_file, "--store", tmp_path / "file",
                  "--output", tmp_path / "out", "--json")  # fmt: skip
    assert ended.code == 2
    assert str(tmp_path / "file") in ended.err and "Traceback" not in ended.err
    assert ended.out == "" and not (tmp_path / "out").exists()


def test_what_the_store_does_not_hold_ends_with_1(bench: Bench, tmp_path: Path) -> None:
    ended = crane(tmp_path, "store", "show", "nothing", "--store", bench.store)
    assert ended.code == 1
    assert "nothing" in ended.err and "Traceback" not in ended.err


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom flows.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'prefect', 'transformers', 'zarr', 'datasets', 'numpy', 'matplotlib'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_script_ends_as_documented(tmp_path: Path) -> None:
    process = script(tmp_path, "merge", "nowhere.yaml")
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == "" and "nowhere.yaml" in err


@dataclass
class Case:
    """A recipe about to be spoiled."""

    pair: TinyPair
    folder: Path
    args: list[object]

    def set(self, assignment: str) -> None:
        self.args += ["--set", assignment]

    def donor(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_tensors(self.pair.donor)
        change(tensors)
        save_tensors(self.pair.donor, tensors, shards=2)

    def config(self, **fields: object) -> None:
        file = self.pair.donor / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    def recipe(self, text: str) -> None:
        with self.pair.recipe_file.open("a") as stream:
            stream.write(text)


QUERY = "model.layers.1.self_attn.q_proj.weight"
BAD: dict[str, tuple[Callable[[Case], object], str]] = {}
Spoil = Callable[[Case], object]


def bad(message: str) -> Callable[[Spoil], Spoil]:
    """Note a way to spoil a merge, and what the message must name."""

    def note(spoil: Spoil) -> Spoil:
        BAD[spoil.__name__] = (spoil, message)
        return spoil

    return note


@bad(r"nowhere\.yaml.*no such recipe")
def missing_recipe(case: Case) -> None:
    case.args[0] = "nowhere.yaml"


@bad(r"crane-31b.*crane-30b")
def unknown_shipped_recipe(case: Case) -> None:
    case.args[0] = "crane-31b"


@bad(r"alhpa: unknown key")
def misspelt_key(case: Case) -> None:
    case.recipe("alhpa: 0.3\n")


@bad(r"recipe\.yaml: not YAML")
def no_yaml(case: Case) -> None:
    case.recipe("name: [\n")


@bad(r"tau: .*greater than 0")
def tau_zero(case: Case) -> None:
    case.args += ["--tau", "0"]


@bad(r"alpha: .*greater than or equal to 0")
def negative_alpha(case: Case) -> None:
    case.args += ["--alpha", "-0.1"]


@bad(r"alpha: .*beyond 3\.4e\+38")
def alpha_beyond_float32(case: Case) -> None:
    case.args += ["--alpha", "1e39"]


@bad(r"merge\.lm_head\.rows\.x: .*beyond 3\.4e\+38")
def fraction_beyond_float32(case: Case) -> None:
    case.args += ["--set", "merge.lm_head.rows={x: 1e39}"]


@bad(r"alpha: .*a number, not True")
def switch_for_a_number(case: Case) -> None:
    case.args += ["--set", "alpha=yes"]


@bad(r"projector\.rank: .*a number, not True")
def switch_for_a_count(case: Case) -> None:
    case.args += ["--set", "projector.rank=on"]


@bad(r"recipe\.yaml: not YAML: the key 'tau' is given twice")
def key_given_twice(case: Case) -> None:
    case.recipe("tau: 0.5\ntau: 0.03\n")


@bad(r"nested too deeply")
def nested_recipe(case: Case) -> None:
    case.recipe("deep: " + "[" * 10_000 + "]" * 10_000)


@bad(r"more than 100,000 values")
def yaml_bomb(case: Case) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    case.recipe("\n".join(lines) + "\n")


@bad(r"~nosuchuser/out: there is no such user")
def home_of_nobody(case: Case) -> None:
    case.args += ["--output", "~nosuchuser/out"]


@bad(r"255 bytes at most")
def too_long_a_name(case: Case) -> None:
    case.args += ["--set", f"donor={'d' * 300}"]


@bad(r"a path has no NUL")
def nul_in_a_path(case: Case) -> None:
    case.args += ["--set", 'calibration.agent.data="a\\0b"']


@bad(r"store: the store is a folder, this is a file")
def store_that_is_a_file(case: Case) -> None:
    (case.folder / "store").write_text("")


@bad(r"store format \[\], not 1")
def store_of_another_kind(case: Case) -> None:
    (case.folder / "store").mkdir()
    (case.folder / "store" / "crane-store.json").write_text("[]")


@bad(r"generation_config\.json: no generation config: Expecting")
def generation_config_that_is_no_json(case: Case) -> None:
    (case.pair.donor / "generation_config.json").write_text("{")
    case.args += ["--set", "evaluate.generate=1"]


@bad(r"generation_config\.json: eos_token_id is 'x', no token id")
def generation_config_of_words(case: Case) -> None:
    (case.pair.base / "generation_config.json").write_text('{"eos_token_id": "x"}')


@bad(r"base/config\.json: not JSON: nested too deeply")
def deep_config(case: Case) -> None:
    (case.pair.base / "config.json").write_text("[" * 100_000)


@bad(r"model\.safetensors\.index\.json: not an index")
def index_that_is_a_folder(case: Case) -> None:
    file = case.pair.donor / "model.safetensors.index.json"
    file.unlink(missing_ok=True)
    file.mkdir()


@bad(r"config\.json: num_hidden_layers is 1000000000, not 1 to 10,000")
def a_billion_layers(case: Case) -> None:
    case.config(num_hidden_layers=10**9)


@bad(r"config\.json: num_attention_heads is 0")
def no_heads(case: Case) -> None:
    case.config(num_attention_heads=0)


@bad(r"base: its tokenizer cannot be loaded")
def tokenizer_config_that_is_a_list(case: Case) -> None:
    (case.pair.base / "tokenizer_config.json").write_text("[]")


@bad(r"base: its tokenizer cannot be loaded")
def deep_tokenizer_config(case: Case) -> None:
    (case.pair.base / "tokenizer_config.json").write_text("[" * 100_000)


@bad(r"line 1: the chat template refuses it: division by zero")
def template_that_divides_by_zero(case: Case) -> None:
    (case.pair.base / "chat_template.jinja").write_text("{{ 1 / 0 }}")


@bad(r"out-report: is where the report goes, and a file")
def report_that_is_a_file(case: Case) -> None:
    (case.folder / "out-report").write_text("")


@bad(r"alpha: .*finite")
def nan_alpha(case: Case) -> None:
    case.args += ["--alpha", "nan"]


@bad(r"alpha: .*finite")
def infinite_alpha(case: Case) -> None:
    case.args += ["--alpha", "inf"]


@bad(r"nobase")
def missing_base(case: Case) -> None:
    case.set("base=nobase")


@bad(r"model-00002-of-00003\.safetensors: truncated")
def truncated_shard(case: Case) -> None:
    file = case.pair.donor / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@bad(r"model-00003-of-00003\.safetensors")
def missing_shard(case: Case) -> None:
    (case.pair.donor / "model-00003-of-00003.safetensors").unlink()


@bad(rf"NaN.*{re.escape(QUERY)}.*donor")
def nan_in_the_donor(case: Case) -> None:
    case.donor(lambda tensors: tensors[QUERY].view(-1)[3:4].fill_(float("nan")))  # type: ignore[arg-type, return-value]


@bad(rf"{re.escape(QUERY)}: \[64, 32\] against \[32, 64\]")
def misshapen_tensor(case: Case) -> None:
    case.donor(lambda t: t.update({QUERY: t[QUERY].reshape(32, 64)}))


@bad(rf"{re.escape(QUERY)} is only in the base")
def missing_tensor(case: Case) -> None:
    case.donor(lambda t: t.__delitem__(QUERY))


@bad(r"unlisted_weight")
def unlisted_tensor(case: Case) -> None:
    case.donor(lambda t: t.update({"model.unlisted_weight": torch.zeros(3)}))


@bad(r"rope_theta|rope_parameters")
def unlike_configs(case: Case) -> None:
    config = json.loads((case.pair.donor / "config.json").read_text())
    if "rope_parameters" in config:
        case.config(rope_parameters={**config["rope_parameters"], "rope_theta": 5e6})
    else:
        case.config(rope_theta=5e6)


@bad(r"llamoid")
def unknown_architecture(case: Case) -> None:
    case.config(model_type="llamoid")


@bad(r"tokenizers of .*'<think>' \(7 against 8\)")
def unlike_vocabulary(case: Case) -> None:
    swapped = {'"<think>"': '"</think>"', '"</think>"': '"<think>"'}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = case.pair.donor / name
        file.write_text(re.sub('"</?think>"', lambda m: swapped[m[0]], file.read_text()))


@bad(r"absent\.jsonl: no such data file")
def absent_data(case: Case) -> None:
    case.set("calibration.agent.data=absent.jsonl")


@bad(r"absent\.jsonl: no such data file")
def absent_heldout_data(case: Case) -> None:
    case.set("evaluate.reasoning=absent.jsonl")


@bad(r"gone\.jsonl: no such data file.*away\.jsonl: no such data file")
def two_absent_files(case: Case) -> None:
    case.set("calibration.agent.data=gone.jsonl")
    case.set("evaluate.reasoning=away.jsonl")


@bad(r"reasoning\.jsonl line 5: not JSON")
def broken_data_line(case: Case) -> None:
    with (case.pair.folder / "reasoning.jsonl").open("a") as stream:
        stream.write('{"messages": \n')


@bad(r"agent\.jsonl")
def empty_data(case: Case) -> None:
    (case.pair.folder / "agent.jsonl").write_text("")


@bad(r"heldout_agent\.jsonl line 1: the prompt has \d+ tokens, max_prompt_length is 20")
def long_prompt(case: Case) -> None:
    case.set("evaluate.max_prompt_length=20")
    (case.pair.folder / "heldout_reasoning.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}], "completion": "b"}\n'
    )
    case.set("evaluate.reasoning=null")


@bad(r"calibration\.agent: .*max_length is now max_prompt_length.*never cut")
def old_length(case: Case) -> None:
    case.set("calibration.agent.max_length=2048")


@bad(r"evalute: unknown key")
def unknown_set_key(case: Case) -> None:
    case.set("evalute.generate=3")


@bad(r"--set alpha: write dotted\.path=VALUE")
def set_without_value(case: Case) -> None:
    case.set("alpha")


@bad(r"merge\.embedding\.rows: .*'<thnik>'")
def unknown_row_token(case: Case) -> None:
    case.set("merge.embedding.rows={<thnik>: 0.8}")


@bad(r"run\.shard_size: .*'5 parsecs'")
def shard_size_nonsense(case: Case) -> None:
    case.set("run.shard_size=5 parsecs")


@bad(r"run\.shard_size: .*not 0")
def shard_size_zero(case: Case) -> None:
    case.set("run.shard_size=0")


if not torch.cuda.is_available():

    @bad(r"run\.device: cuda.*no CUDA device")
    def cuda_without_a_device(case: Case) -> None:
        case.set("run.device=cuda")


@bad(r"run\.device")
def device_nonsense(case: Case) -> None:
    case.set("run.device=gpu0")


@pytest.mark.parametrize("spoil", BAD)
def test_bad_input_is_one_message_and_exit_2(spoil: str, bench: Bench, tmp_path: Path) -> None:
    change, message = BAD[spoil]
    pair = bench.pair.copy(tmp_path / "pair")
    case = Case(pair, tmp_path, [pair.recipe_file, "--output", tmp_path / "out"])
    change(case)
    ended = crane(tmp_path, "merge", *case.args, "--store", tmp_path / "store", "--json")
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err and ended.err.count("crane:") == 1
    assert re.search(message, ended.err, re.DOTALL), ended.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("place", ["base", "donor", "base/merged", "."])
def test_an_output_that_would_overwrite_an_input_is_refused(
    place: str, bench: Bench, tmp_path: Path
) -> None:
    pair = bench.pair.copy(tmp_path / "pair")
    before = folder_bytes(pair.folder)
    for force in ([], ["--force"]):
        ended = crane(tmp_path, "merge", pair.recipe_file, "--output", pair.folder / place,
                      "--store", tmp_path / "store", *force)  # fmt: skip
        assert ended.code == 2
        assert "would overwrite the" in ended.err and "Traceback" not in ended.err
        assert folder_bytes(pair.folder) == before


def test_another_merge_in_the_output_is_replaced_only_by_force(
    bench: Bench, tmp_path: Path
) -> None:
    args = ["merge", bench.pair.recipe_file, "--store", bench.store, "--output",
            tmp_path / "out", "--json", "--alpha"]  # fmt: skip
    assert crane(tmp_path, *args, "0.41").code == 0
    before = folder_bytes(tmp_path / "out")
    refused = crane(tmp_path, *args, "0.42")
    assert refused.code == 2
    assert "another merge" in refused.err and "--force" in refused.err
    assert folder_bytes(tmp_path / "out") == before
    assert crane(tmp_path, *args, "0.42", "--force").code == 0
    assert json.loads((tmp_path / "out" / "crane.json").read_text())["recipe"]["alpha"] == 0.42
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == [
        "out", "out-report", "stdout",
    ]  # fmt: skip


def test_a_folder_that_is_no_merge_is_never_replaced(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for force in ([], ["--force"]):
        ended = crane(tmp_path, "merge", bench.pair.recipe_file, "--store", bench.store,
                      "--output", tmp_path / "out", *force)  # fmt: skip
        assert ended.code == 2 and "no merge" in ended.err
        assert folder_bytes(tmp_path / "out") == {"thesis.txt": b"years of work"}


def test_how_loud_it_is_may_be_said_anywhere(bench: Bench, tmp_path: Path) -> None:
    plain = [bench.pair.recipe_file, "--store", bench.folder / "store"]
    usual = crane(tmp_path, "scores", *plain)
    quiet = crane(tmp_path, "scores", *plain, "-q")
    loud = crane(tmp_path, "--verbose", "scores", *plain, "--store", tmp_path / "fresh")
    assert usual.code == quiet.code == loud.code == 0
    assert "scores  reused" in usual.err and quiet.err == "" and quiet.out == usual.out
    assert re.search(r"scores: \d+ of \d+", loud.err)
    told = crane(tmp_path, "--version")
    assert told.code == 0 and re.fullmatch(r"crane \d+\.\d+\.\d+\n", told.out)


# Root may write whatever the permissions say, unless it gives that up.
AS_ANYONE = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search",
             "--inh-caps", "-dac_override"]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root, no setpriv")
def test_a_store_that_may_only_be_read_is_looked_at_and_not_written(
    bench: Bench, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(bench.store, store)
    (store / "identities.jsonl").unlink()
    for folder, _, names in os.walk(store):
        for path in (Path(folder), *(Path(folder) / name for name in names)):
            path.chmod(path.stat().st_mode & ~0o222)
    program = [Path(sys.executable).with_name("crane"), bench.pair.recipe_file]

    def run(command: str, *more: object) -> subprocess.CompletedProcess[str]:
        args = [
            program[0],
            command,
            program[1],
            "--store",
            store,
            "--output",
            tmp_path / "o",
            *more,
        ]
        prefix = AS_ANYONE if os.geteuid() == 0 else []
        return subprocess.run([*prefix, *map(str, args)], capture_output=True, text=True)

    plan = run("plan", "--json")
    assert plan.returncode == 0, plan.stderr
    told = {s["name"]: s["status"] for s in json.loads(plan.stdout)["stages"]}
    assert told["scores"] == "reused"
    merge = run("merge", "--alpha", "0.77")
    assert merge.returncode == 2 and "store: cannot be written to" in merge.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["out😀", "out[/x]", "out[red]x", "o ut", "out\udcff"])
def test_a_path_is_shown_and_used_as_it_is(name: str, bench: Bench, tmp_path: Path) -> None:
    ended = crane(tmp_path, "plan", bench.pair.recipe_file, "--output", tmp_path / name)
    assert ended.code == 0 and "Traceback" not in ended.err
    assert (name if name.isprintable() else "out") in ended.out
