"""A generated pair with all that an edit is made of, and the ways to apply it that are compared.

Run as a program it does one of them and prints what it took, as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scoring_case import Case, write_case
from torch import Tensor

from artifacts.ref import Ref
from artifacts.store import Draft, Store
from artifacts.tables import write_table
from crane_tasks.apply.stage import APPLY
from crane_tasks.delta import DELTA
from crane_tasks.models.files.layout import unit_name
from crane_tasks.numerics.projector import protection
from crane_tasks.numerics.scores import GainSums
from crane_tasks.projector import PROJECTOR, read_basis
from crane_tasks.recipe_file import recipe_from
from crane_tasks.scores.stage import COLUMNS, SCORES
from crane_tasks.session import Context, Session
from crane_tasks.site_walk import sites_in_use
from crane_tasks.sizes import PLAIN, gated
from crane_tasks.stage import Keys
from crane_tasks.threshold import THRESHOLD

ALPHA, TAU, RANK = 0.25, 0.03, 256
READ_BYTES = 16 * 2**20
NOISE = 0.02  # of the donor's delta, relative to the weights' own spread


def write_pair(config: dict[str, Any], folder: Path, device: str = "cpu") -> None:
    """A base and a donor in bfloat16, a file per layer, with a tokenizer."""
    write_case(Case(config, (), ()), folder / "base", torch.bfloat16, device)
    (folder / "donor").mkdir()
    generator = torch.Generator(device).manual_seed(2)
    for file in (folder / "base").iterdir():
        target = folder / "donor" / file.name
        if file.suffix != ".safetensors":
            target.write_bytes(file.read_bytes())
            continue
        moved = {}
        for name, tensor in load_file(file, device=device).items():
            noise = torch.empty_like(tensor).normal_(0, NOISE * 0.02, generator=generator)
            moved[name] = (tensor + noise).cpu()
        save_file(moved, target, {"format": "pt"})
    for side in ("base", "donor"):
        write_tokenizer(folder / side)


def context(folder: Path, device: str, alpha: float, output: Path) -> Context:
    """The surroundings of a merge whose checkpoints are taken to be known."""
    needed = {"data": "rows.jsonl"}  # in the output's record; nothing is computed from it
    row = {"messages": [{"role": "user", "content": "hi"}], "completion": "hello"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = recipe_from(
        {
            "name": "generated",
            "base": str(folder / "base"),
            "donor": str(folder / "donor"),
            "alpha": alpha,
            "tau": TAU,
            "calibration": {
                "reasoning": needed,
                "agent": needed,
                "format": {**needed, "patterns": ["</think>"]},
            },
            "evaluate": {"calls": "hermes"},  # no row is read to find it
        },
        (folder,),
        "generated",
    )
    store = Store(folder / "store")
    store.prepare()
    return Context(
        session=Session(recipe, store),
        base=folder / "base",
        donor=folder / "donor",
        base_id="base",
        donor_id="donor",
        tokenizer_id="tokenizer",
        side_files_id="side files",
        stops={},
        output=output,
        devices=(device,),
        compute="float32",
    )


def keys(ctx: Context) -> Keys:
    """The keys of the edit and of what it is made of; scores and bases are made up."""
    given = {"base": ctx.base_id}
    made_up = {s.role: Ref(s.name, s.version, {}, given) for s in (SCORES, PROJECTOR)}
    known = Keys(made_up)
    for stage in (DELTA, THRESHOLD, APPLY):
        known = known | Keys({stage.role: stage.ref(ctx, known)})
    return known


def prepare(ctx: Context) -> None:
    """Delta and thresholds as a merge makes them; scores of 1 and random bases."""
    known, store, base = keys(ctx), ctx.store, ctx.pair().base
    DELTA.build(ctx, known)
    THRESHOLD.build(ctx, known)

    def gains(draft: Draft) -> None:
        sums = GainSums(p=1.0, base2=1.0, numel=1.0)
        for layer, slots in base.layers():
            rows = [
                (slot.tensor_name(e), slot.component, [getattr(sums, c) for c in COLUMNS])
                for slot in gated(slots)
                for e in range(len(base.pieces[slot.name]))
            ]
            with draft.unit(unit_name(layer)) as unit:
                write_table(unit, "tensors", COLUMNS, rows)

    def bases(draft: Draft) -> None:
        width = base.config["hidden_size"]
        for layer in range(base.num_layers):
            with draft.unit(unit_name(layer)) as unit:
                for site in sites_in_use(base.layout, "published"):
                    if site.name != "linattn_inner":
                        generator = torch.Generator().manual_seed(layer)
                        rows = torch.randn(width, RANK, generator=generator)
                        unit.write(f"{site.name}.directions", torch.linalg.qr(rows).Q.contiguous())
                        sigma = torch.logspace(0, -3, RANK, dtype=torch.float64)
                        unit.write(f"{site.name}.sigma", sigma)
                        unit.write(f"{site.name}.rows", torch.tensor([4096]))

    assert SCORES.schema is not None and PROJECTOR.schema is not None
    store.build(known[SCORES], SCORES.schema, gains)
    store.build(known[PROJECTOR], PROJECTOR.schema, bases)


def apply(ctx: Context) -> None:
    """This project's stage."""
    APPLY.build(ctx, keys(ctx))


def copy(ctx: Context, *, sync: bool) -> None:
    """The ceiling: read both, write one."""
    ctx.output.mkdir()
    memory = memoryview(bytearray(READ_BYTES))
    for file in sorted(ctx.base.glob("*.safetensors")):
        with (
            file.open("rb", buffering=0) as ours,
            (ctx.donor / file.name).open("rb", buffering=0) as theirs,
            (ctx.output / file.name).open("wb", buffering=0) as out,
        ):
            while theirs.readinto(memory):
                count = ours.readinto(memory)
                out.write(memory[:count])
            if sync:
                os.fsync(out.fileno())


@torch.no_grad()
def loop(ctx: Context) -> None:
    """A shard at a time, as the method's script does it: both shards and the output are held,
    tensor by tensor subtract, take the median, threshold, project, add, save."""
    ctx.output.mkdir()
    device, base = ctx.torch_device, ctx.pair().base
    artifact = ctx.store.open(keys(ctx)[PROJECTOR])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for file in sorted(ctx.base.glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(ctx.donor / file.name)
        merged = {}
        for name, weight in ours.items():
            slot = base.slots[base.layout.classify(name)[0].name]  # type: ignore[index]
            if slot.component in PLAIN:
                merged[name] = weight
                continue
            delta = theirs[name].to(device) - weight.to(device)
            size = delta.float().abs().flatten()
            median = torch.kthvalue(size, max(1, size.numel() // 2)).values
            step = torch.where(delta.abs() > median, delta * 2, 0).float() * ctx.recipe.alpha
            if slot.site is not None and not slot.site.extended:
                key = f"{slot.unit} {slot.site.name}"
                if key not in found:
                    v, sigma = read_basis(artifact, slot, slot.site, 0)  # type: ignore[misc]
                    found[key] = v.to(device), protection(sigma, TAU).float().to(device)
                v, w = found[key]
                step = step - ((step @ v) * w) @ v.T
            merged[name] = (weight.to(device).float() + step).to(weight.dtype).cpu()
        with safe_open(file, "pt") as stream:
            save_file(merged, ctx.output / file.name, stream.metadata())


def main() -> None:
    """WAY FOLDER DEVICE ALPHA OUTPUT -> seconds of the work alone, and peak bytes of a GPU."""
    way, folder, device, alpha, output = sys.argv[1:]
    ctx = context(Path(folder), device, float(alpha), Path(output))
    if device == "cuda":
        torch.zeros(1, device=device)
    began = time.perf_counter()
    if way.startswith("copy"):
        copy(ctx, sync=way == "copy and sync")
    else:
        {"prepare": prepare, "apply": apply, "loop": loop}[way](ctx)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_gpu": peak}) + "\n")


if __name__ == "__main__":
    main()
