"""Where a model is not linear: its activations, and the linear layers around each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from torch_otprune.structure.flow import Flow, Op, Visit
from torch_otprune.structure.graph import Block, Site
from torch_otprune.structure.layers import BatchNorm, Conv, channels, is_dense, is_linear
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["FUNCTIONS", "find_sites", "op_of", "sites_in"]

# Ops that bend a value by itself, and the module that does the same.
_BENDS = {"leaky_relu": "LeakyReLU", "log_sigmoid": "LogSigmoid"} | {
    name.lower(): name
    for name in """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Mish PReLU RReLU ReLU ReLU6 SELU SiLU
    Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    """.split()
}
# Ops whose every output depends on several inputs.
_MIXES = {"glu": "GLU", "log_softmax": "LogSoftmax", "softmax": "Softmax", "softmin": "Softmin"}
FUNCTIONS = {**_BENDS, **_MIXES}
_CLASSES = {getattr(nn, name): name.lower() for name in FUNCTIONS.values()}
_CLASSES[nn.Softmax2d] = "softmax"
_MIXED = frozenset(name.lower() for name in _MIXES.values())
_CURVED = _BENDS.keys() | {"abs", "clamp", "clamp_max", "clamp_min", "clip", "erf", "exp"}
_CURVED |= {"maximum", "minimum", "square"}
_SCALES = frozenset("mul rmul imul div rdiv truediv rtruediv true_divide".split())
_POINTWISE = (
    _CURVED
    | _SCALES
    | frozenset(
        """
        add radd sub rsub neg pow rpow log log1p sqrt rsqrt sign where gt lt ge le
        to float half double bfloat16 type type_as zeros_like ones_like
        """.split()
    )
)
_SAME = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout contiguous clone detach
    alias to float half double bfloat16 type type_as
    """.split()
)
_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"})
_VIEWS = frozenset({"flatten", "reshape", "squeeze", "view", "unflatten"})
_REDUCES = frozenset({"amax", "getitem", "mean", "sum"})
_MOVES = _VIEWS | {"expand", "expand_as", "permute", "transpose", "unsqueeze"}
_PRODUCTS = frozenset({"baddbmm", "bmm", "einsum", "matmul"})
_SOFTMAX = frozenset({"scaled_dot_product_attention", "softmax"})
# Whose channels come first, and whose come last.
_FIRST = frozenset({"batch_norm", "group_norm", "instance_norm", "interpolate", "pixel_shuffle"})
_LAST = frozenset({"addmm", "embedding", "layer_norm", "linear", "matmul", "rms_norm"}) | {
    "multi_head_attention_forward"
}

_Why = tuple[str, str]  # a reason, and what would change it
_PRODUCT = (
    "its output is multiplied with another stream",
    "leave it in: without it, a product of two streams is left.",
)
_MATRIX = (
    "its output is multiplied with another stream, as a matrix",
    _PRODUCT[1],
)
_SCORES = (
    "its output goes into a softmax",
    "leave it in: what a softmax reads is not folded into a linear layer.",
)
_MIXTURE = (
    "{} maps no value by itself",
    "leave it in: only an activation that bends single values can become linear.",
)


def find_sites(model: nn.Module, notes: Flow) -> tuple[Site, ...]:
    """Find every activation that the data goes through, as a module or as a function.

    A module is an activation if torch or its ops say so: no children, one tensor in, one of the
    same shape out, and every value bent by itself. A module that runs several times is a site for
    each run, as what is around it differs.

    Args:
        model: any module; it is read, never written.
        notes: one run of it.

    Returns:
        sites in order of execution.

    Limits: what torch computes in one op, as in an LSTM or inside an attention, is not seen, and
    neither is a rectifier that is spelled as a clamp outside a module of its own.
    """
    return tuple(_Search(model, notes).sites())


def op_of(name: str) -> str:
    """Strip a function's name of the underscores that say how it was called."""
    return name.strip("_")


def sites_in(sites: Iterable[Site], block: Block) -> tuple[Site, ...]:
    """List the activations that go with a block.

    Args:
        sites: of the model.
        block: any block or branch.

    Returns:
        those of its modules, and those between two of its layers; none that mixes values.
    """
    return tuple(site for site in sites if site.channels and _goes(site, block))


def _goes(site: Site, block: Block) -> bool:
    if block.holds(site.within):  # not `module`: many a model shares one activation
        return True
    before = site.producer is not None and block.holds(site.producer)
    return before and any(block.holds(reader) for reader in site.readers)


@dataclass(frozen=True)
class _Found:
    """One call of an activation: its input and output by node."""

    number: int
    function: str
    module: str
    within: str
    op: str  # of a functional call; empty for a module
    z: int
    phi: int


class _Search:
    """One model's activations, and what is around them."""

    def __init__(self, model: nn.Module, notes: Flow) -> None:
        self.notes, self.modules = notes, dict(model.named_modules())
        self.calls = Counter(visit.path for visit in notes.visits)
        self.inner: dict[int, Visit] = {}  # op to the innermost module around it
        for visit in notes.visits:
            self.inner.update(dict.fromkeys(range(visit.first, visit.last), visit))
        self.data = self._fed()

    def _fed(self) -> set[int]:
        """Collect the nodes that depend on the model's input; all, where none is known."""
        found = set(self.notes.visits[0].reads.values()) or set(self.notes.shapes)
        for op in self.notes.ops:
            if found.intersection(op.reads):
                found.update(op.writes)
        return found

    def sites(self) -> Iterator[Site]:
        """Yield the activations."""
        met: Counter[tuple[str, str]] = Counter()
        for found in sorted(self._found(), key=lambda f: f.number):
            met[found.module, found.op] += 1
            if found.z in self.data:
                yield self._site(found, met[found.module, found.op])

    def _found(self) -> Iterator[_Found]:
        whole = set[int]()
        for place, visit in enumerate(self.notes.visits):
            function = self._function(visit)
            given, out = stream_of(visit.args, visit.kwargs), first_of(visit.output)
            if function is None or given is None or out is None:
                continue
            whole.update(range(visit.first, visit.last))
            z, phi = visit.reads[id(given)], visit.writes[id(out)]
            yield _Found(visit.first, function, visit.path, self._around(place), "", z, phi)
        for number, op in enumerate(self.notes.ops):
            name = op_of(op.name)
            if number not in whole and name in FUNCTIONS and op.reads:
                function = FUNCTIONS[name].lower()
                ends = op.reads[0], op.writes[0]
                yield _Found(number, function, op.module, op.module, name, *ends)

    def _around(self, place: int) -> str:
        """Find the module that called another."""
        last = self.notes.visits[place].last
        outer = (v for v in reversed(self.notes.visits[:place]) if v.last >= last)
        return next((v.path for v in outer), "")

    def _function(self, visit: Visit) -> str | None:
        """Name what a module computes, if it is an activation."""
        module = self.modules[visit.path]
        for kind in type(module).__mro__:
            if kind in _CLASSES:
                return _CLASSES[kind]
        if visit.path and not list(module.children()) and self._bends(visit):
            name = type(module).__name__.lower()
            return name.removesuffix("activation") or name
        return None

    def _bends(self, visit: Visit) -> bool:
        """Tell whether a module maps every value by itself, and not along a line."""
        nodes = set(visit.reads.values())
        if len(nodes) != 1 or len(visit.writes) != 1:
            return False
        shape, bent = self.notes.shapes[next(iter(nodes))], False
        for op in self.notes.ops[visit.first : visit.last]:
            if op_of(op.name) not in _POINTWISE:
                return False
            if nodes.intersection(op.reads):
                bent |= op_of(op.name) in _CURVED
                nodes.update(op.writes)
        end = next(iter(visit.writes.values()))
        return bent and end in nodes and self.notes.shapes[end] == shape

    def _site(self, found: _Found, ordinal: int) -> Site:
        axis, shape = self._axis(found), self.notes.shapes[found.z]
        mixed = found.function in _MIXED or not shape or shape != self.notes.shapes[found.phi]
        norm, producer = self._producer(found.z)
        readers, others = self._readers(found.phi, axis, shape)
        gate = self._gate(found.phi)
        why = self._objection(found, gate=_MIXTURE if mixed else gate)
        said = found.module if not found.op else f"{found.module}:{found.function}"
        return Site(
            name=f"{said}#{ordinal}" if ordinal > 1 else said,
            function=found.function,
            module=found.module,
            within=found.within,
            functional=bool(found.op),
            ordinal=ordinal,
            calls=self.calls[found.module],
            channels=0 if mixed or gate in (_SCORES, _MATRIX) else shape[axis],
            axis=axis,
            norm=norm,
            producer=producer,
            readers=readers,
            others=others,
            reason=why[0].format(found.function),
            fix=why[1],
        )

    def _axis(self, found: _Found) -> int:
        """Find the axis of the channels by the layers around."""
        shape = self.notes.shapes[found.z]
        if len(shape) < 3:
            return -1
        pending, seen = [found.z], set[int]()
        behind = self.notes.readers.get(found.phi, ())
        while pending:
            node = pending.pop(0)
            if node in seen or node not in self.notes.maker:
                continue
            seen.add(node)
            op = self.notes.ops[self.notes.maker[node]]
            if (axis := _laid_out(op)) is not None:
                return axis
            pending += [n for n in op.reads if self.notes.shapes[n] == shape]
        told = (_laid_out(self.notes.ops[number]) for number in behind)
        return next((axis for axis in told if axis is not None), 1 if len(shape) > 3 else -1)

    def _producer(self, node: int) -> tuple[str | None, str | None]:
        """Find the batch-norm and the linear layer that a node comes from."""
        notes, norm, normed = self.notes, None, False
        while node in notes.maker:
            number = notes.maker[node]
            op, visit = notes.ops[number], self.inner.get(number)
            module = self.modules[visit.path] if visit else None
            if visit and module and is_linear(module) and node in visit.writes.values():
                return norm, visit.path
            name = op_of(op.name)
            if name not in _SAME | _NORMS or notes.shapes[op.reads[0]] != notes.shapes[node]:
                break
            if visit and isinstance(module, BatchNorm) and not normed:
                norm = visit.path
            normed |= name in _NORMS
            node = op.reads[0]
        return norm, None

    def _readers(self, phi: int, axis: int, shape: tuple[int, ...]) -> tuple[tuple[str, ...], bool]:
        """List the linear layers that read a node, and tell whether anything else does."""
        notes, found, others = self.notes, dict[str, None](), False
        pending = [phi]
        while pending:
            node = pending.pop()
            others |= node in notes.returned
            for number in notes.readers.get(node, ()):
                op = notes.ops[number]
                if (reader := self._layer(number, node, axis)) is not None:
                    found[reader] = None
                elif len(op.reads) == 1 and _kept(op, notes, axis=axis, channels=shape[axis]):
                    pending.append(op.writes[0])
                else:
                    others = True
        order = {visit.path: place for place, visit in enumerate(notes.visits)}
        return tuple(sorted(found, key=lambda path: order[path])), others

    def _layer(self, number: int, node: int, axis: int) -> str | None:
        """Name the linear layer that an op belongs to, if it reads the node's channels."""
        visit, shape = self.inner.get(number), self.notes.shapes[node]
        if visit is None or node not in visit.reads.values():
            return None
        module, last = self.modules[visit.path], axis == -1 or len(shape) == 2
        if is_dense(module) and last and shape[-1] == channels(module, "in"):
            return visit.path
        if isinstance(module, Conv) and axis == 1 and len(shape) > 2:
            return visit.path
        return None

    def _objection(self, found: _Found, *, gate: _Why | None) -> _Why:
        """Say why a module in its place could not make it linear, and what would change that."""
        module = self.modules[found.module]
        if gate is not None:
            return gate
        if found.op == "prelu" or (not found.op and [*module.parameters(), *module.buffers()]):
            return (
                f"{type(module).__name__ if not found.op else 'F.prelu'} has a state of its own",
                "replace it by an activation without parameters, and train on.",
            )
        if found.op:
            return (
                f"functional F.{found.op} in {type(module).__name__}.forward",
                f"write it as nn.{FUNCTIONS[found.op]}.",
            )
        if self.calls[found.module] > 1:
            return (
                f"it runs {self.calls[found.module]} times per forward pass",
                "give every call a module of its own.",
            )
        return "", ""

    def _gate(self, phi: int) -> _Why | None:
        """Find out whether an output is there to weigh another stream."""
        notes, pending = self.notes, [phi]
        while pending:
            node = pending.pop()
            for number in notes.readers.get(node, ()):
                op = notes.ops[number]
                name, partners = op_of(op.name), self._partners(op, node)
                if name in _SOFTMAX:
                    return _SCORES
                if name in _SCALES | _PRODUCTS and partners:
                    return _MATRIX if name in _PRODUCTS else _PRODUCT
                if name in _MOVES | _SAME | _SCALES or (name == "add" and self._lifts(op, node)):
                    pending.append(op.writes[0])
        return None

    def _partners(self, op: Op, node: int) -> list[int]:
        """List what a node is a gate for: data in the same op, and no smaller than itself."""
        size = prod(self.notes.shapes[node])
        others = [n for n in op.reads if n != node and n in self.data]
        return [n for n in others if prod(self.notes.shapes[n]) >= size]

    def _lifts(self, op: Op, node: int) -> bool:
        """Tell an addition that only shifts, such as of a mask, from one of two streams."""
        return all(n == node or n not in self.data for n in op.reads)


def _laid_out(op: Op) -> int | None:
    name = op_of(op.name)
    if name.startswith("conv") and name != "contiguous":
        return 1
    if name in _FIRST or "pool" in name:
        return 1
    return -1 if name in _LAST else None


def _kept(op: Op, notes: Flow, *, axis: int, channels: int) -> bool:
    """Tell whether an op keeps channels apart, and each in its place."""
    name = op_of(op.name)
    a, b = notes.shapes[op.reads[0]], notes.shapes[op.writes[0]]
    if name in _SAME or (name in _VIEWS and a == b):
        return a == b
    if axis == 1 and len(a) > 2:
        # Flattening lays every channel's positions side by side.
        if "pool" in name:
            return b[:2] == a[:2]
        if name in _VIEWS:
            return b == (a[0], prod(a[1:]))
        single = b in {a[:2], (*a[:2], *(1 for _ in a[2:]))}
        return name in _REDUCES and single and channels not in a[2:]
    if name in _VIEWS:
        return b == (prod(a[:-1]), channels)
    return name in _REDUCES and b == (a[0], channels) and len(a) == 3 and a[1] != channels
