"""Twelve small networks with random weights, each with batches and a loss, to be carried about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETS", "Net"]

CLASSES, TOKENS, LENGTH, IMAGE = 5, 50, 7, 16


@dataclass(frozen=True)
class Net:
    """One architecture.

    Args:
        build: makes it; deterministic under `torch.manual_seed`.
        batch: makes so many samples as the model takes them, by keyword.
        labels: makes so many labels.
        heads: whether some attention in it can lose heads.
        transformers: whether `from_pretrained` is meant for it.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    labels: Callable[[int], Tensor]
    heads: bool = False
    transformers: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """Build it in evaluation mode, with weights and norms that do something."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            if norms:
                model.train()(**self.batch(32))
        return model.eval()

    def draw(self, samples: int, seed: int) -> dict[str, Tensor]:
        """Draw a batch."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.batch(samples)


def conv(into: int, out: int, stride: int = 1, **more: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride, 1, bias=False, **more), nn.BatchNorm2d(out), nn.ReLU()
    )


class Residual(nn.Module):
    """A block of CIFAR's residual networks."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = conv(into, out, stride)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.short = nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.second(self.first(x))) + self.short(x))


class Inverted(nn.Module):
    """A block of MobileNet-v2: expand, filter each channel, project."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.ReLU6())
        self.filter = conv(inner, inner, groups=inner)
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.filter(self.expand(x)))


class Pictures(nn.Module):
    """Convolutions, a mean over all places, and a classifier."""

    def __init__(self, *body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def resnet() -> nn.Module:
    sizes = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1)]
    return Pictures(conv(3, 8), *(Residual(*size) for size in sizes), width=16)


def mobilenet() -> nn.Module:
    blocks = [Inverted(8, 24), Inverted(8, 24), conv(8, 12, 2), Inverted(12, 36)]
    return Pictures(conv(3, 8), *blocks, width=12)


def vgg() -> nn.Module:
    body = [conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 16), conv(16, 16), nn.MaxPool2d(2)]
    return Pictures(*body, conv(16, 24), width=24)


class UNet(nn.Module):
    """Down and up again, with what was seen on the way put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 8), conv(8, 16)
        self.bottom = conv(16, 24)
        self.up_two = nn.ConvTranspose2d(24, 16, 2, 2)
        self.mix_two, self.up_one = conv(32, 16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.mix_one, self.head = conv(16, 8), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        y = self.up_two(self.bottom(F.max_pool2d(two, 2)))
        y = self.up_one(self.mix_two(torch.cat([y, two], 1)))
        return self.head(self.mix_one(torch.cat([y, one], 1)))


class Recurrent(nn.Module):
    """An LSTM that reads a text, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 12)
        self.read = nn.LSTM(12, 20, num_layers=2, batch_first=True)
        self.mix, self.head = nn.Linear(20, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        seen, _ = self.read(self.embed(x))
        return self.head(F.relu(self.mix(seen[:, -1])))


class Encoder(nn.Module):
    """Torch's own transformer encoder, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


DEPTH = 4
_TEXT = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
}
_DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {"num_key_value_heads": 2, "max_position_embeddings": 64}


def bert() -> nn.Module:
    import transformers as hf

    short = {"max_position_embeddings": 64}
    config = hf.BertConfig(**_TEXT, **_SIZES, **_DRY, **short, num_labels=CLASSES)
    return hf.BertForSequenceClassification(config)


def vit() -> nn.Module:
    import transformers as hf

    config = hf.ViTConfig(**_SIZES, **_DRY, image_size=IMAGE, patch_size=8, num_labels=CLASSES)
    return hf.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    import transformers as hf

    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = hf.GPT2Config(**_TEXT, **dry, n_embd=24, n_layer=DEPTH, n_head=4, n_positions=64)
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    import transformers as hf

    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, **_SIZES, **_GROUPED))


def t5() -> nn.Module:
    import transformers as hf

    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": DEPTH, "num_heads": 4}
    rest = {"num_decoder_layers": DEPTH, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**_TEXT, **sizes, **rest))


def mixtral() -> nn.Module:
    import transformers as hf

    config = hf.MixtralConfig(**_TEXT, **_SIZES, **_GROUPED, num_local_experts=4)
    model = hf.MixtralForCausalLM(config)
    # Its fused kernel takes widths in steps of 16 bytes only.
    model.set_experts_implementation("eager")
    return model


def _tokens(samples: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, TOKENS, (samples, length))


def _pictures(samples: int) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, 3, IMAGE, IMAGE)}


def _one_class(samples: int) -> Tensor:
    return torch.randint(0, CLASSES, (samples,))


def _text(samples: int) -> dict[str, Tensor]:
    mask = torch.ones(samples, LENGTH, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": _tokens(samples), "attention_mask": mask}


NETS: dict[str, Net] = {
    "ResNet": Net(resnet, _pictures, _one_class),
    "MobileNet": Net(mobilenet, _pictures, _one_class),
    "VGG": Net(vgg, _pictures, _one_class),
    "U-Net": Net(UNet, _pictures, lambda n: torch.randint(0, CLASSES, (n, IMAGE, IMAGE))),
    "LSTM": Net(Recurrent, lambda n: {"x": _tokens(n)}, _one_class),
    "TransformerEncoder": Net(Encoder, lambda n: {"x": _tokens(n)}, _one_class),
    "BERT": Net(bert, _text, _one_class, heads=True, transformers=True),
    "ViT": Net(
        vit,
        lambda n: {"pixel_values": torch.randn(n, 3, IMAGE, IMAGE)},
        _one_class,
        heads=True,
        transformers=True,
    ),
    "GPT-2": Net(gpt2, lambda n: {"input_ids": _tokens(n)}, _tokens, heads=True, transformers=True),
    "Llama": Net(llama, _text, _tokens, heads=True, transformers=True),
    "T5": Net(
        t5,
        lambda n: {"input_ids": _tokens(n), "decoder_input_ids": _tokens(n, 5)},
        lambda n: _tokens(n, 5),
        heads=True,
        transformers=True,
    ),
    "Mixtral": Net(mixtral, _text, _tokens, heads=True, transformers=True),
}
