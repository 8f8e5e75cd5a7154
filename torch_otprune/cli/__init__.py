"""The command line: parse, call, print. Importing this imports no torch, so that help is quick."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from torch_otprune import __version__
from torch_otprune.cli.screen import screen

__all__ = ["app", "main"]

app = typer.Typer(
    name="otprune",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="The dense model, as package.module:factory.")
]
Data = Annotated[
    str, typer.Option("--data", "-d", help="Batches without labels, as package.module:loader.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", "-w", help="Safetensors file to load into the model.")
]
Rules = Annotated[
    Path | None,
    typer.Option("--policy", "-p", help="Policy as YAML; by default the one on the model's class."),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict", help="Whether the factory's classes and attributes must be those."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"otprune {__version__}")
        raise typer.Exit


@app.callback()
def front(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Make trained PyTorch models smaller, and prove what that did."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")] = Path("report"),
    seed: Annotated[int, typer.Option(min=0, help="Fixes every random choice.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Train less, time less.")] = False,
    json: Json = False,
) -> None:
    """Train, prune and check a small network on handwritten digits."""
    with screen(json=json) as show:
        from torch_otprune.cli.actions import run_demo

        run_demo(show, out, seed=seed, quick=quick)


@app.command()
def doctor(  # noqa: PLR0917 (the shell names them)
    model: Model,
    example: Annotated[
        str,
        typer.Option("--example", "--data", "-d", help="A batch or batches, as for --data."),
    ],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", "-p", help="Policy as YAML: shows what it protects."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="A row for every module, not one for all alike.")
    ] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="The modules as a tree in place of the tables.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="PNG file for a picture of the groups.")
    ] = None,
    json: Json = False,
) -> None:
    """Explain what can go: channels, layers, activations; and what cannot, why."""
    with screen(json=json) as show:
        from torch_otprune.cli.diagnose import diagnose

        diagnose(show, model, example, policy=policy, every=every, tree=tree, picture=picture)


@app.command()
def plan(  # noqa: PLR0917 (the shell names them)
    model: Model,
    data: Data,
    policy: Rules = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the plan.")] = None,
    json: Json = False,
) -> None:
    """Decide what to remove. The model is not touched."""
    with screen(json=json) as show:
        from torch_otprune.cli.actions import make_plan

        make_plan(show, model, data, policy=policy, weights=weights, out=out)


@app.command()
def compare(  # noqa: PLR0917 (the shell names them)
    model: Model,
    policies: Annotated[list[Path], typer.Argument(metavar="POLICY...", help="YAML files.")],
    data: Data,
    held: Annotated[
        str, typer.Option("--held", help="Batches that --data does not hold, as module:loader.")
    ],
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Carry out several policies on copies, and say which stays nearest to the dense model."""
    with screen(json=json) as show:
        from torch_otprune.cli.contest import run_compare

        run_compare(show, model, policies, data=data, held=held, weights=weights)


@app.command()
def apply(  # noqa: PLR0917 (the shell names them)
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for model/ and report/.")],
    stored: Annotated[
        Path | None, typer.Option("--plan", help="Plan that `otprune plan` wrote.")
    ] = None,
    policy: Rules = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Carry out a stored plan or a policy; write model and report."""
    with screen(json=json) as show:
        from torch_otprune.cli.actions import carry_out

        carry_out(show, model, data, plan=stored, policy=policy, weights=weights, out=out)


@app.command()
def verify(  # noqa: PLR0917 (the shell names them)
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `apply` or otp.save wrote.")
    ],
    factory: Annotated[
        str, typer.Option("--factory", "-f", help="Builds the dense model: package.module:factory.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Batches to run, as package.module:loader.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", help="Dense weights to compare the answers with."),
    ] = None,
    strict: Strict = True,
    json: Json = False,
) -> None:
    """Reload a saved model, check its hashes and sizes, and run it."""
    with screen(json=json) as show:
        from torch_otprune.cli.actions import check

        check(show, directory, factory, data=data, weights=weights, strict=strict)


@app.command()
def export(  # noqa: PLR0917 (the shell names them)
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `apply` or otp.save wrote.")
    ],
    factory: Annotated[
        str, typer.Option("--factory", "-f", help="Builds the dense model: package.module:factory.")
    ],
    data: Data,
    to: Annotated[
        str | None,
        typer.Option("--to", help="onnx or torch_export; by the ending of --out, or onnx."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; by default beside the model.")
    ] = None,
    fixed: Annotated[
        bool,
        typer.Option("--fixed-batch", help="Take as many samples as the first batch, no others."),
    ] = False,
    sequence: Annotated[
        bool, typer.Option("--dynamic-sequence", help="Take texts of any length.")
    ] = False,
    strict: Strict = True,
    json: Json = False,
) -> None:
    """Write a saved model as ONNX or for torch.export, and compare the file with the model."""
    with screen(json=json) as show:
        from torch_otprune.cli.deliver import deliver

        options = {"dynamic_batch": not fixed, "dynamic_sequence": sequence}
        ask = partial(deliver, show, directory, factory, data=data, options=options)
        ask(to=to, out=out, strict=strict)


@app.command()
def schema() -> None:
    """Print the JSON schema of a policy file, for editors."""
    with screen(json=True) as show:
        from torch_otprune.cli.actions import print_schema

        print_schema(show)


def main() -> None:
    """Run the command line."""
    app()
