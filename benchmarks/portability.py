"""Where can a pruned network go: to disk, to Transformers, to other runtimes, back into training?

Twelve architectures, cut in four ways, each taken to six places. Expected before measuring: every
cell passes, or the network has no such cut (nothing that can go whole) or no such place (no
Transformers model); no cell fails.

    python benchmarks/portability.py
    python benchmarks/portability.py --nets 'BERT|VGG' --out /tmp/portability.json
    python benchmarks/plot_portability.py

- *uneven width*: channels, and heads where there are any, under one budget of parameters, so that
  layers of one kind end up with different widths. *uniform width*: the same with one width for all
  layers of a kind. *depth*: one layer goes. *both*: uneven width, and one layer goes.
- *save/load*: `otp.save`, `otp.load`; equal bit for bit. *from_pretrained*: `save_pretrained`, and
  in a fresh process the model's own class; equal bit for bit. For depth and for uniform width that
  process cannot import this library. *export*: `torch.export`, saved, loaded. *ONNX*: run by ONNX
  Runtime. *compile*: `torch.compile`, every gradient too. *Trainer step*: three steps of
  Transformers' Trainer; every parameter moves, and the loss is a number.

Each cell runs in a process of its own and is stopped at the limit. Rows are written one by one and
skipped when they are there already.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_otprune as otp
from benchmarks.common import environment, in_a_child, read_json, write_json
from benchmarks.portability_nets import NETS, Net
from torch_otprune.errors import OTPruneError
from torch_otprune.structure import flat_tensors, run

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "portability.json"
KINDS = ("uneven width", "uniform width", "depth", "both")
SEED, SAMPLES, CLOSE = 0, 16, 1e-5
PACKAGES = ("transformers", "accelerate", "onnx", "onnxscript", "onnxruntime")
Row = dict[str, Any]


class CannotError(Exception):
    """This network has no such cut, or no such place to go; the text says why."""


@dataclass(frozen=True)
class Case:
    """A pruned network, on its way.

    Args:
        net: what it was.
        kind: how it was cut.
        model: what it is now.
        place: a directory of its own.
    """

    net: Net
    kind: str
    model: nn.Module
    place: Path

    @property
    def example(self) -> dict[str, Tensor]:
        """A batch that the cut was not made with."""
        return self.net.draw(4, SEED + 1)

    def answers(self, model: nn.Module | None = None) -> list[Tensor]:
        """Run a model on the example."""
        with torch.no_grad():
            return _floats(run(self.model if model is None else model, self.example))


def _floats(out: Any) -> list[Tensor]:
    return [t for t in flat_tensors(out) if t.is_floating_point()]


def policy_of(net: Net, kind: str, *, heads: bool = True) -> otp.Policy:
    """Say what is cut.

    Args:
        net: the architecture.
        kind: one of `KINDS`.
        heads: whether heads may go, where there are any.

    Returns:
        the policy.
    """
    layers = [otp.Layers(drop=1)] if kind in {"depth", "both"} else []
    if kind == "depth":
        return otp.Policy(rules=layers)
    width = [otp.Channels(), otp.Heads()] if net.heads and heads else [otp.Channels()]
    serving = {"serving": "uniform"} if kind == "uniform width" else {}
    left = "60%" if layers else "75%"  # a layer alone is up to a quarter
    return otp.Policy(rules=[*width, *layers], budget=otp.Budget(params=left), **serving)


def pruned(net: Net, kind: str) -> tuple[nn.Module, str]:
    """Cut a network.

    Args:
        net: the architecture.
        kind: one of `KINDS`.

    Returns:
        the smaller network, in evaluation mode, and what it had to do without.
    """
    said = ""
    for heads in (True, False):
        model = net.model(SEED)
        try:
            data = [net.draw(SAMPLES, SEED)]
            otp.prune_(model, policy_of(net, kind, heads=heads), data, timing=0)
        except OTPruneError as error:
            said = said or short(error.problem)
            if kind == "uniform width" and heads and net.heads:
                continue  # some configurations have no field for a number of heads
            raise CannotError(said) from error
        return model, f"channels alone: {said}" if said else ""
    raise CannotError(said)


def short(problem: str) -> str:
    """Keep the first of several reasons of one kind."""
    first = problem.partition(";")[0].rstrip(".")
    return first + ")" * (first.count("(") - first.count(")"))


def save_load(case: Case) -> str:
    """Save and load, in this library's own format."""
    otp.save(case.model, case.place / "saved")
    again = otp.load(case.place / "saved", factory=lambda: case.net.model(SEED + 1))
    return _equal(case.answers(again), case.answers())


_READER = """
import sys
import torch
if sys.argv[3] == "stock":
    sys.modules["torch_otprune"] = None
else:
    import torch_otprune
import transformers
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).eval()
if hasattr(model, "set_experts_implementation") and sys.argv[4]:
    model.set_experts_implementation(sys.argv[4])
stored = torch.load(sys.argv[2] + "/example.pt", weights_only=True)
with torch.no_grad():
    out = model(**stored)
torch.save([t for t in out.to_tuple() if isinstance(t, torch.Tensor)], sys.argv[2] + "/answers.pt")
"""


def from_pretrained(case: Case) -> str:
    """Save as Transformers does, and load in a fresh process."""
    if not case.net.transformers:
        raise CannotError("no Transformers model")
    model: Any = case.model
    where = case.place / "pretrained"
    model.save_pretrained(where)
    torch.save(case.example, where / "example.pt")
    how = "stock" if case.kind in {"depth", "uniform width"} else "registered"
    experts = model.config._experts_implementation or ""
    words = [sys.executable, "-c", _READER, type(model).__name__, str(where), how, experts]
    path = {"PYTHONPATH": "" if how == "stock" else str(ROOT)}
    done = subprocess.run(
        words,
        env={**os.environ, **path},
        cwd=case.place,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found = torch.load(where / "answers.pt", weights_only=True)
    with torch.no_grad():
        wanted = [t for t in model(**case.example).to_tuple() if isinstance(t, Tensor)]
    return _equal(found, wanted)


def export(case: Case) -> str:
    """Write for torch alone; the library compares the file with the model."""
    otp.export(case.model, case.place / "model.pt2", case.example, to="torch_export")
    return ""


def onnx(case: Case) -> str:
    """Write for ONNX; the library compares the file with the model."""
    otp.export(case.model, case.place / "model.onnx", case.example, to="onnx")
    return ""


def compile(case: Case) -> str:
    """Compile, run, and run backwards; eager kernels, so that no compiler is needed."""
    small, backend = copy.deepcopy(case.model), "aot_eager"
    compiled = torch.compile(small, backend=backend)
    got = _floats(run(compiled, case.example))
    wanted = _floats(run(case.model, case.example))
    for outputs in (got, wanted):
        outputs[0].sum().backward()
    pairs = [*zip(got, wanted, strict=True), *_gradients(small, case.model)]
    far = max(_gap(one, other) for one, other in pairs)
    return "" if far < CLOSE else f"off by {far:.1e}"


def _gradients(one: nn.Module, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-3))


class WithLoss(nn.Module):
    """A network that computes its own loss, as Transformers' Trainer asks.

    Args:
        model: any classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_step(case: Case) -> str:
    """Train three steps with Transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    model = case.model if case.net.transformers else WithLoss(case.model)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        batch, labels = case.net.batch(12), case.net.labels(12)
    rows = [{"labels": labels[i]} | {k: v[i] for k, v in batch.items()} for i in range(12)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrainingArguments(
        output_dir=str(case.place / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    loss = Trainer(model=model, args=settings, train_dataset=rows).train().training_loss
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    if still:
        return f"{still[0]} does not move"
    return "" if loss == loss else "the loss is no number"


def _equal(found: list[Tensor], wanted: list[Tensor]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} outputs, not {len(wanted)}"
    same = all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    far = 0.0 if same else max(_gap(one, other) for one, other in zip(found, wanted, strict=True))
    return "" if same else f"off by {far:.1e}"


PLACES: dict[str, Callable[[Case], str]] = {
    "save/load": save_load,
    "from_pretrained": from_pretrained,
    "export": export,
    "ONNX": onnx,
    "compile": compile,
    "Trainer step": trainer_step,
}


def outcome(name: str, kind: str, place: str) -> Row:
    """Take one cut network to one place.

    Args:
        name: of the architecture.
        kind: one of `KINDS`.
        place: one of `PLACES`.

    Returns:
        `passes`, `cannot` or `fails`, with what was said.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model, without = pruned(NETS[name], kind)
            said = PLACES[place](Case(NETS[name], kind, model, Path(folder)))
        except CannotError as reason:
            return {"status": "cannot", "said": str(reason)}
        except Exception as error:  # any failure is a result here
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            return {"status": "fails", "said": f"{type(error).__name__}: {lines[0]}"[:300]}
    return {"status": "fails" if said else "passes", "said": said or without}


def measure(name: str, kind: str, place: str, limit: float) -> Row:
    """Take one cut network to one place, in a process of its own.

    Args:
        name: of the architecture.
        kind: one of `KINDS`.
        place: one of `PLACES`.
        limit: seconds of processor time after which it is stopped.

    Returns:
        its row; `fails` where it was stopped or the process died.
    """
    found = in_a_child(lambda: outcome(name, kind, place), limit)
    said = f"stopped after {limit:g} s of processor time" if found is None else "the process died"
    return found or {"status": "fails", "said": said}


def _warm(kinds: list[str], places: list[str]) -> None:
    """Import what children would each import anew; nothing of it is kept."""
    with redirect_stdout(io.StringIO()):
        for place in places:
            outcome("Llama" if place == "from_pretrained" else "VGG", kinds[0], place)


def main(words: list[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="", help="regular expression on names")
    parser.add_argument("--kinds", default=";".join(KINDS), help="which, with semicolons")
    parser.add_argument("--places", default=";".join(PLACES), help="which, with semicolons")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds of processor time a cell may take"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    rows = read_json(args.out)["rows"] if args.out.exists() else []
    known = {(row["net"], row["kind"], row["place"]) for row in rows}
    kinds, places = args.kinds.split(";"), args.places.split(";")
    cells = [(n, k, p) for n in NETS if re.search(args.nets, n) for k in kinds for p in places]
    cells = [cell for cell in cells if cell not in known]
    torch.set_num_threads(1)
    if cells:
        _warm(kinds, list(dict.fromkeys(place for _, _, place in cells)))
    about = environment(seed=SEED)
    about["packages"] |= {name: metadata.version(name) for name in PACKAGES}
    for net, kind, place in cells:
        row = {"net": net, "kind": kind, "place": place, "commit": about["commit"]}
        rows.append(row | measure(net, kind, place, args.limit))
        write_json(args.out, {"environment": about, "rows": rows})
        print(net, kind, place, rows[-1]["status"], rows[-1]["said"], flush=True)


if __name__ == "__main__":
    main()
