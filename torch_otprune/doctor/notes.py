"""What a reader of a diagnosis should know about the model and the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from torch_otprune.structure.doctor import Finding

__all__ = ["notes"]

_NAMED = 3  # modules named in one note


def notes(model: nn.Module, found: Sequence[Finding]) -> Iterator[str]:
    """Say what was frozen, whether the weights exist, and what the example did not reach.

    Args:
        model: any module.
        found: what can become of its parameters.

    Yields:
        sentences.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        yield (
            "the weights do not exist (meta device): this is read off the shapes alone, and what "
            "folds is not looked for"
        )
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        total = sum(1 for _ in model.parameters())
        yield (
            f"{len(frozen)} of {total} parameters are frozen (requires_grad=False): they can be "
            "cut all the same, and what is left of them stays frozen"
        )
    idle = list(dict.fromkeys(f.parameter.rpartition(".")[0] for f in found if _idle(f)))
    if idle:
        more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
        names = ", ".join(f"'{path}'" for path in idle[:_NAMED])
        yield (
            f"{names}{more} did not run: all of this holds for the way that the example takes "
            "through the model, and what it does not reach stays"
        )


def _idle(finding: Finding) -> bool:
    return "did not run" in finding.reason
