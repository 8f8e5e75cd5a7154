"""What is in the way of a cut, in plain words, and the smallest change that would free it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["NAMED", "Obstacle", "advice", "counted", "obstacles", "remedy"]

NAMED = "they are its '"  # one of several outputs
_LEAVE = "nothing, if the output's width is the task's; otherwise add a head."
_WRAP = "where that is not needed, wrap the model so that it returns the others alone."
_BEHIND = "put a linear layer between these channels and the op, or leave them."
_PLACES = "nothing: these are places, as of pixels or tokens, and no channels."
_OTHER = "call the op in a module of its own behind a linear layer, or leave these channels."
_MISSED = "report the model: its analysis misses an op."
# The start of a reason, as the analysis says it, to what would take it away.
_REMEDIES = {
    "they reach the model's output": _LEAVE,
    NAMED: _WRAP,
    "no layer consumes them": _LEAVE,
    "they only meet in a product": "leave them; if these are queries and keys of one head, let one "
    "linear layer write all heads, seen as (heads, size), and a rule otp.Heads takes whole heads.",
    "they meet numbers that stay": "replace what is filled up or constant, such as a shortcut "
    "padded with zeros, by a 1x1 convolution or a linear layer.",
    "they meet a tensor that does not follow": "make the other operand a parameter or a layer's "
    "output, or give it size 1 along these channels.",
    "they are moved by a fixed number of places": "move whole channels, or leave them.",
    "they are one number": "keep real and imaginary parts in channels of their own.",
    "they are written as another type": "convert the whole tensor instead of its memory.",
    "their rows are looked up by number": "nothing: a number names each of them, as a word of a "
    "vocabulary.",
    "they are picked by a table of numbers": "pick them by a slice, a split or a flip, or leave "
    "them.",
    "some are written over at places named by numbers": "build the tensor by torch.cat instead of "
    "writing to a part of it, or leave them.",
    "one of them is picked by its number": "let a layer of its own write what is picked, or leave "
    "them.",
    "every head reads them": "nothing: one value that all heads read is no unit of any of them.",
    "each feeds several of a transposed layer": "give the layer as many output channels as groups, "
    "or one group.",
    "their positions are mixed": _PLACES,
    "they compete in a softmax": _BEHIND,
    "they are mixed by a Fourier transform": _BEHIND,
    "they are added up": _BEHIND,
    "they are sorted": _BEHIND,
    "they are compared": _BEHIND,
    "they are summed without a weight": "sum with a linear layer, or leave them.",
    "a mean takes all of them together": "normalise with a layer-norm or RMS-norm, or leave them.",
    "a norm takes all of them together": "normalise each channel by itself, as a batch-norm does, "
    "or cut all channels of the stream by a rule otp.Hidden.",
    "this op compares or adds up all of them": _BEHIND,
    "no row of the example": "pass a larger example, so that every expert and branch gets a row.",
    "this op may mix channels": "write the op out in plain torch functions, or put a linear layer "
    "in front of it.",
    "all channels are tied into one unit": "nothing: removing it removes the layer.",
}
_ANYWHERE = {
    "are one tensor": "untie the weights.",
    "is tied to read": "untie the weights: give the layer that reads them one of its own.",
    "model does not run": "write -1 or x.shape[..] where forward counts by a number of its own.",
    "outputs differ by": "where forward picks or writes channels by a number, as x[:, :4], let it "
    f"read that number off x.shape; otherwise {_MISSED}",
    "the model returns": _MISSED,
    "did not run": "pass an example that reaches it, or remove it from the model.",
}
_LINE = re.compile(r"\(at (?P<line>\S+:\d+)\)$")
_INSIDE = re.compile(r", in '[^']*'$")  # a path has numbers of its own
_NORMED = re.compile(
    r"outputs differ by .* at \S*?(layer_norm|rms_norm|mean|var|var_mean|std|std_mean)\b.*"
    r"\(at (?P<line>\S+:\d+)\)$"
)
_PLACED = re.compile(r"^(?P<said>.*?) \(op (?P<op>\S+?)(?: at (?P<line>\S+:\d+))?\)$")
# What torch calls inside of the layers that people write.
_WORDS = {
    "native_layer_norm": "layer_norm",
    "native_batch_norm": "batch_norm",
    "native_group_norm": "group_norm",
    "safe_softmax": "softmax",
    "constant_pad_nd": "pad",
    "mm": "matmul",
    "addmm": "linear",
    "bmm": "matmul",
    "baddbmm": "matmul",
}


class Obstacle(BaseModel):
    """One thing in the way: an op, a layer, or the model's output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    said: str = Field(description="what it does to the channels, in one clause")
    op: str = Field(default="", description="the op; empty where it is none")
    line: str = Field(default="", description="file and line of the model's code that calls it")
    fix: str = Field(description="the smallest change that would take it away")

    def __str__(self) -> str:
        """Say it in one clause."""
        place = f", {self.line}" if self.line else ""
        return f"{self.said} ({self.op}{place})" if self.op else self.said


def obstacles(reason: str) -> tuple[Obstacle, ...]:
    """Read what the analysis says of channels that cannot go.

    Args:
        reason: its clauses, with semicolons between them.

    Returns:
        one obstacle for each clause.

    Example:
        >>> (found,) = obstacles("they are sorted (op sort at net.py:12)")
        >>> found.op, found.line, str(found)
        ('sort', 'net.py:12', 'they are sorted (sort, net.py:12)')
    """
    return tuple(dict.fromkeys(map(_obstacle, reason.split("; "))))


def _obstacle(clause: str) -> Obstacle:
    found = _PLACED.match(clause)
    if found is None:
        return Obstacle(said=clause, fix=_fix(clause))
    op = _word(found["op"])
    return Obstacle(said=found["said"], op=op, line=found["line"] or "", fix=_fix(found["said"]))


def _word(op: str) -> str:
    if op.startswith("scaled_dot_product"):
        return "scaled_dot_product_attention"
    return _WORDS.get(op, op)


def _fix(clause: str) -> str:
    if found := _NORMED.search(clause):
        return (
            f"{found['line']} norms channels by hand: use nn.LayerNorm or nn.RMSNorm there, or "
            "move the norm to a module of its own."
        )
    for start, fix in _REMEDIES.items():
        if clause.startswith(start):
            return fix
    return next((fix for words, fix in _ANYWHERE.items() if words in clause), _OTHER)


def counted(said: str, sizes: Sequence[int]) -> str:
    """Say how a line of the model that fails once channels are gone could be freed of its number.

    Args:
        said: why the smaller model fails, as the trial says it.
        sizes: what may be counted there, the likeliest first: units, then channels.

    Returns:
        one sentence.

    Example:
        >>> shape = "shape '[2, 4, 8]' is invalid for input of size 32"
        >>> counted(f"the model does not run: {shape} (at net.py:9)", (4,))
        'at net.py:9, write -1 or x.shape[..] instead of the number 4.'
    """
    if "model does not run" not in said:
        return _fix(said)
    if "multiple of 16 bytes" in said:  # a fused kernel's, as of experts in one table
        return "give the rule a multiple_of: 4 in float32, 8 in a type of 16 bits."
    place = _LINE.search(said)
    head = said[: place.start()] if place else _INSIDE.sub("", said)
    there = set(map(int, re.findall(r"\d+", head)))
    number = next((f"the number {size}" for size in sizes if size in there), "a number")
    if "invalid for input of size" in head:  # a view or a reshape
        where = f"at {place['line']}" if place else "where forward counts channels"
        return f"{where}, write -1 or x.shape[..] instead of {number}."
    where = f"at {place['line']} or in front of it" if place else "where forward counts channels"
    return f"{where}, read the width off a tensor, as x.shape[..], instead of writing {number}."


def remedy(reasons: Iterable[str]) -> str:
    """Say what would free channels, all that is in their way considered.

    Args:
        reasons: clauses of the analysis.

    Returns:
        one sentence for each change that is needed; where one obstacle cannot go, that it cannot.
    """
    fixes = dict.fromkeys(_obstacle(reason).fix for reason in reasons)
    if _WRAP in fixes:
        fixes.pop(_LEAVE, None)
    final = [fix for fix in fixes if fix.startswith("nothing")]
    return final[0] if final else advice(fixes)


def advice(fixes: Iterable[str]) -> str:
    """Put several changes into one sentence each; a cause that is known needs no report.

    Args:
        fixes: what would free the channels of one layer.

    Returns:
        all of them, without doubles and without a guess beside what is known.
    """
    every = list(dict.fromkeys(fixes))
    known = [fix for fix in every if _MISSED not in fix]
    return " ".join(known or every)
