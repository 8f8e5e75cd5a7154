"""Maps as repairs of a cut, and as replacements in Transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import PolicyError

WORDS: dict[str, dict[str, Any]] = {
    "sparse_map": {"map": {"budget": 2}},
    "domain_map": {},
    "flow": {"map": {"anchors": 1}, "rows": 128},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(4)]


def cut(model: nn.Module, repair: object, data: list[Any] | None = None) -> otp.Report:
    rule = otp.Channels(keep="50%", criterion="magnitude", repair=repair)  # type: ignore[arg-type]
    return otp.prune_(model, otp.Policy(rules=[rule]), data or batches(), timing=0)


# After a cut


@pytest.mark.parametrize("word", WORDS)
def test_a_map_mends_what_reads_cut_channels_and_reports_it(word: str) -> None:
    report = cut(net(), {"kind": word} | WORDS[word])
    (note,) = report.repairs
    assert (note.kind, note.site, note.accepted) == (word, "2", True)
    assert note.before is not None and note.after is not None and note.after < note.before
    for told in ("distance of laws", "by chance", "Monge gap", "of 4 channels moved"):
        assert told in note.note
    assert report.output_error is not None
    assert report.output_error.after_repair < report.output_error.before_repair


def test_channels_beyond_the_budget_keep_their_weights_bit_for_bit() -> None:
    plain, mended = net(), net()
    cut(plain, "none")
    cut(mended, {"kind": "sparse_map", "map": {"budget": 2}})
    same = (plain[2].weight == mended[2].weight).all(dim=1)
    assert int(same.sum()) == 2


def test_a_map_that_may_move_every_channel_is_the_regression_of_the_outputs() -> None:
    plain, mended, dense = net(), net(), net()
    cut(plain, "none")
    cut(mended, {"kind": "sparse_map", "map": {"budget": 4}})
    x = torch.cat(batches())
    with torch.no_grad():
        source, target = plain(x), dense(x)
        found = mended(x)
    learn = torch.arange(len(x)) % 8 != 7
    design = torch.cat([source, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    best = torch.linalg.lstsq(design[learn], target[learn]).solution
    torch.testing.assert_close(found, design @ best, atol=1e-4, rtol=1e-4)


def test_too_few_rows_for_the_channels_are_told_and_nothing_is_written() -> None:
    plain, mended = net(), net()
    few = [batches()[0][:6]]
    cut(plain, "none", few)
    (note,) = cut(mended, "domain_map", few).repairs
    assert not note.accepted and note.note == "5 rows are too few for a map of 4 channels"
    assert torch.equal(plain[2].weight, mended[2].weight)


@pytest.mark.parametrize(
    ("repair", "told"),
    [
        ({"kind": "sparse_map", "map": {"solver": "mbo"}}, "what sparse_map fits"),
        ({"kind": "flow", "map": {"form": "points"}}, "what flow fits"),
    ],
)
def test_a_repair_whose_map_bends_is_refused_in_the_policy(repair: object, told: str) -> None:
    with pytest.raises(PolicyError) as error:
        otp.Channels(keep="50%", repair=repair)  # type: ignore[arg-type]
    assert told in error.value.problem and "cannot be folded" in error.value.problem
    assert error.value.where.endswith(".map") and "form 'affine'" in error.value.fix


@pytest.mark.parametrize("word", WORDS)
def test_a_repair_by_a_map_goes_through_yaml_and_json_and_back(word: str) -> None:
    policy = otp.Policy(rules=[otp.Channels(keep="50%", repair={"kind": word} | WORDS[word])])
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    assert otp.Policy.from_json(policy.to_json()) == policy


# In Transformers' models


def bert() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2Model(config).eval()


def texts(padding: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(16, 6, dtype=torch.int64)
    mask[:, 4:] = 0 if padding else 1
    ids = [torch.randint(1, 40, (16, 6), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": mask} for i in ids]


CASES = [(bert, "encoder.layer.1", "encoder.layer.0.output.dense"), (gpt2, "h.1", "h.0.mlp.c_proj")]


@pytest.mark.parametrize(("make", "block", "front"), CASES, ids=["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["sparse_map", "transport_map", "monge_net"])
def test_a_map_stands_in_for_a_layer_and_is_undone_saved_and_loaded(
    make: Callable[[], Any], block: str, front: str, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    model, data = make(), texts()
    replace = {"kind": kind} | ({"map": {"steps": 2}} if kind == "monge_net" else {})
    rule = otp.Layers(targets=[block], drop=1, replace=replace, repair=())
    policy = otp.Policy(rules=[rule])
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = otp.prune_(model, policy, data, timing=0)
    (note,) = report.repairs
    assert (note.site, note.accepted) == (block if kind == "monge_net" else front, True)
    assert otp.Plan.from_json(report.plan.to_json()) == report.plan
    with torch.no_grad():
        small = model(**data[0]).last_hidden_state
        otp.save(model, tmp_path / "small")
        again = otp.load(tmp_path / "small", factory=make)
        assert torch.equal(again(**data[0]).last_hidden_state, small)
    report.undo_()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_padding_does_not_count_in_a_map() -> None:
    pytest.importorskip("transformers")
    rule = otp.Layers(targets=["encoder.layer.1"], drop=1, replace="transport_map", repair=())
    found = []
    for noise in (0, 1):
        data = texts(padding=True)
        for batch in data:  # what stands behind the mask is anything
            batch["input_ids"] = batch["input_ids"].clone()
            batch["input_ids"][:, 4:] = 3 + 7 * noise
        model = bert()
        otp.prune_(model, otp.Policy(rules=[rule]), data, timing=0)
        found.append(model.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
