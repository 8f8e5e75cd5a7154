"""Recurrent nets: layers of every kind, cells in loops, states handed over."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.net import Net, Shelf, conv, tokens

ENTRIES = Shelf("recurrent")


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Draw numbers for an example of several tensors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer(kind: type[nn.RNNBase], **settings: Any) -> nn.Module:
    """A linear layer, a recurrent one, and a head on what it says at every step."""
    rnn = kind(7, 9, batch_first=True, **settings)
    width = (settings.get("proj_size") or 9) * (1 + settings.get("bidirectional", False))
    return Net(
        lambda m, x: m.c(m.r(F.relu(m.a(x)))[0]), a=nn.Linear(6, 7), r=rnn, c=nn.Linear(width, 4)
    )


@ENTRIES(5, 6)
def lstm() -> nn.Module:
    return layer(nn.LSTM)


@ENTRIES(5, 6)
def lstm_two_layers() -> nn.Module:
    return layer(nn.LSTM, num_layers=2)


@ENTRIES(5, 6)
def lstm_bidirectional() -> nn.Module:
    return layer(nn.LSTM, num_layers=2, bidirectional=True)


@ENTRIES(5, 6)
def lstm_projected() -> nn.Module:
    return layer(nn.LSTM, proj_size=5)


@ENTRIES(5, 6)
def lstm_projected_deep() -> nn.Module:
    return layer(nn.LSTM, proj_size=5, num_layers=2, bidirectional=True)


@ENTRIES(5, 6)
def lstm_without_bias() -> nn.Module:
    return layer(nn.LSTM, bias=False, num_layers=2, dropout=0.2)


@ENTRIES(5, 6)
def gru() -> nn.Module:
    return layer(nn.GRU)


@ENTRIES(5, 6)
def gru_bidirectional() -> nn.Module:
    return layer(nn.GRU, num_layers=2, bidirectional=True)


@ENTRIES(5, 6)
def rnn_tanh() -> nn.Module:
    return layer(nn.RNN, num_layers=2)


@ENTRIES(5, 6)
def rnn_relu() -> nn.Module:
    return layer(nn.RNN, nonlinearity="relu", bidirectional=True)


@ENTRIES(5, 6)
def lstm_sequence_first() -> nn.Module:
    return Net(
        lambda m, x: m.c(m.r(x.transpose(0, 1))[0]).mean(0), r=nn.LSTM(6, 9), c=nn.Linear(9, 4)
    )


@ENTRIES(5, 6)
def lstm_last_state() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        _, (h, c) = m.r(m.a(x))
        return m.c(torch.cat([h[-1], c[-1]], 1))

    return Net(forward, a=nn.Linear(6, 7), r=nn.LSTM(7, 9, 2, batch_first=True), c=nn.Linear(18, 4))


@ENTRIES(5, 6)
def gru_both_directions_flattened() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        _, h = m.r(m.a(x))
        return m.c(h.transpose(0, 1).flatten(1))

    rnn = nn.GRU(7, 9, bidirectional=True, batch_first=True)
    return Net(forward, a=nn.Linear(6, 7), r=rnn, c=nn.Linear(18, 4))


@ENTRIES(example=lambda: (normal(2, 5, 6), normal(1, 2, 9, seed=2)))
def gru_given_state() -> nn.Module:
    def forward(m: Any, x: Tensor, h: Tensor) -> Tensor:
        return m.c(m.r(m.a(x), h)[0])

    return Net(forward, a=nn.Linear(6, 7), r=nn.GRU(7, 9, batch_first=True), c=nn.Linear(9, 4))


@ENTRIES(5, 6)
def lstm_zero_states() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        zeros = torch.zeros(1, len(x), m.r.hidden_size, dtype=x.dtype)
        return m.c(m.r(m.a(x), (zeros, zeros))[0])

    return Net(forward, a=nn.Linear(6, 7), r=nn.LSTM(7, 9, batch_first=True), c=nn.Linear(9, 4))


@ENTRIES(5, 6)
def lstm_learnt_states() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, c = (p.expand(-1, len(x), -1).contiguous() for p in (m.h, m.s))
        return m.c(m.r(m.a(x), (h, c))[0])

    return Net(
        forward, a=nn.Linear(6, 7), r=nn.LSTM(7, 9, batch_first=True), c=nn.Linear(9, 4),
        h=nn.Parameter(torch.randn(1, 1, 9)), s=nn.Parameter(torch.randn(1, 1, 9)),
    )  # fmt: skip


@ENTRIES(example=lambda: (normal(2, 5, 6), normal(2, 4, 5, seed=2)))
def states_handed_over() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        _, state = m.e(x)
        return m.c(m.d(y, state)[0])

    return Net(
        forward, e=nn.LSTM(6, 9, batch_first=True), d=nn.LSTM(5, 9, batch_first=True),
        c=nn.Linear(9, 4),
    )  # fmt: skip


@ENTRIES(example=lambda: (normal(2, 5, 6), normal(2, 4, 5, seed=2)))
def attention_over_states() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        memory, state = m.e(x)
        asked, _ = m.d(y, state)
        weights = (m.q(asked) @ memory.transpose(1, 2)).softmax(-1)
        return m.c(torch.tanh(m.j(torch.cat([weights @ memory, asked], -1))))

    return Net(
        forward, e=nn.GRU(6, 9, batch_first=True), d=nn.GRU(5, 9, batch_first=True),
        q=nn.Linear(9, 9, bias=False), j=nn.Linear(18, 7), c=nn.Linear(7, 4),
    )  # fmt: skip


@ENTRIES(example=lambda: (normal(2, 5, 6), normal(2, 4, 5, seed=2)))
def additive_attention() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        memory, _ = m.e(x)
        asked, _ = m.d(y)
        both = torch.tanh(m.k(memory)[:, None] + m.q(asked)[:, :, None])
        weights = m.v(both).squeeze(-1).softmax(-1)
        return m.c(weights @ memory)

    return Net(
        forward, e=nn.GRU(6, 9, batch_first=True), d=nn.LSTM(5, 8, batch_first=True),
        k=nn.Linear(9, 7), q=nn.Linear(8, 7), v=nn.Linear(7, 1), c=nn.Linear(9, 4),
    )  # fmt: skip


@ENTRIES(5, 6)
def lstm_cell_in_a_loop() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), m.r.hidden_size)
        c, said = torch.zeros_like(h), []
        for step in x.unbind(1):
            h, c = m.r(F.relu(m.a(step)), (h, c))
            said.append(m.c(h))
        return torch.stack(said, 1)

    return Net(forward, a=nn.Linear(6, 7), r=nn.LSTMCell(7, 9), c=nn.Linear(9, 4))


@ENTRIES(5, 6)
def gru_cells_stacked() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = second = None
        for step in range(x.shape[1]):
            first = m.r(x[:, step], first)
            second = m.s(first, second)
        return m.c(second)

    return Net(forward, r=nn.GRUCell(6, 9), s=nn.GRUCell(9, 8), c=nn.Linear(8, 4))


@ENTRIES(5, 6)
def rnn_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = None
        for step in x.unbind(1):
            h = m.r(step, h)
        return m.c(h)

    return Net(forward, r=nn.RNNCell(6, 9), c=nn.Linear(9, 4))


@ENTRIES(5, 6)
def own_gru_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), m.u.out_features, dtype=x.dtype)
        for step in x.unbind(1):
            both = torch.cat([step, h], 1)
            update, reset = torch.sigmoid(m.u(both)), torch.sigmoid(m.w(both))
            fresh = torch.tanh(m.n(torch.cat([step, reset * h], 1)))
            h = update * h + (1 - update) * fresh
        return m.c(h)

    return Net(
        forward, u=nn.Linear(15, 9), w=nn.Linear(15, 9), n=nn.Linear(15, 9), c=nn.Linear(9, 4)
    )


@ENTRIES(5, 6)
def own_lstm_of_matrices() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), m.u.shape[0], dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (step @ m.w + h @ m.u + m.b).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return m.c(h)

    return Net(
        forward, w=nn.Parameter(torch.randn(6, 36)), u=nn.Parameter(torch.randn(9, 36) / 3),
        b=nn.Parameter(torch.randn(36)), c=nn.Linear(9, 4),
    )  # fmt: skip


@ENTRIES(5, 3, 6, 7)
def conv_lstm() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = c = None
        for step in x.unbind(1):
            zero = x.new_zeros(len(x), m.g.out_channels // 4, 6, 7)
            h, c = (zero, zero) if h is None else (h, c)
            i, f, g, o = m.g(torch.cat([step, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return m.c(h).mean((2, 3))

    return Net(forward, g=conv(12, 36), c=conv(9, 4))


@ENTRIES(example=lambda: tokens(23, 2, 6))
def language_model() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.h(m.n(m.r(m.t(x))[0]))

    return Net(
        forward, t=nn.Embedding(23, 8), r=nn.LSTM(8, 9, 2, batch_first=True), n=nn.LayerNorm(9),
        h=nn.Linear(9, 23),
    )  # fmt: skip


@ENTRIES(example=lambda: tokens(23, 2, 6))
def language_model_tied() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.p(m.r(m.t(x))[0]), m.t.weight)

    return Net(forward, t=nn.Embedding(23, 8), r=nn.GRU(8, 9, batch_first=True), p=nn.Linear(9, 8))


@ENTRIES(4, 17)
def convolutional_recurrent() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.max_pool1d(F.relu(m.n(m.a(x))), 2)
        return m.c(m.r(y.transpose(1, 2))[0][:, -1])

    return Net(
        forward, a=nn.Conv1d(4, 10, 3), n=nn.BatchNorm1d(10), c=nn.Linear(18, 5),
        r=nn.GRU(10, 9, batch_first=True, bidirectional=True),
    )  # fmt: skip


@ENTRIES(5, 6)
def residual_lstms() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.r(y)[0]
        y = y + m.s(y)[0]
        return m.c(y)

    return Net(
        forward, a=nn.Linear(6, 9), r=nn.LSTM(9, 9, batch_first=True),
        s=nn.GRU(9, 9, batch_first=True), c=nn.Linear(9, 4),
    )  # fmt: skip


@ENTRIES(5, 6)
def lstm_and_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, _ = m.r(x)
        return m.c(m.n(y + m.mha(y, y, y, need_weights=False)[0]).mean(1))

    return Net(
        forward, r=nn.LSTM(6, 6, batch_first=True, bidirectional=True), n=nn.LayerNorm(12),
        mha=nn.MultiheadAttention(12, 3, batch_first=True), c=nn.Linear(12, 5),
    )  # fmt: skip


@ENTRIES(5, 6)
def packed_sequence() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.a(x), torch.tensor([5, 3]), batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(m.r(packed)[0], batch_first=True)
        return m.c(out)

    return Net(forward, a=nn.Linear(6, 7), r=nn.GRU(7, 9, batch_first=True), c=nn.Linear(9, 4))


@ENTRIES(5, 6)
def state_space_scan() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, gate = m.i(x).chunk(2, -1)
        decay, h, said = torch.exp(-F.softplus(m.d)), None, []
        for step in y.unbind(1):
            h = step if h is None else decay * h + step
            said.append(h)
        return m.o(torch.stack(said, 1) * F.silu(gate))

    return Net(forward, i=nn.Linear(6, 18), d=nn.Parameter(torch.randn(9)), o=nn.Linear(9, 4))
