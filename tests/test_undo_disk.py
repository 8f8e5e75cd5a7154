"""The dense model comes back from disk bit for bit, in any process, or nothing is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_store import IMAGES, Net, message
from tests.test_store_forms import RULES, Configured, Deep, Described, Weighted, meta
from torch_otprune.errors import LoadError, OTPruneError, PlanError
from torch_otprune.report import Report
from torch_otprune.store import load, plan_of, save
from torch_otprune.structure.fingerprint import fingerprint

X = torch.linspace(-1, 1, 128).view(16, 8)


def narrow(model: nn.Module, x: Tensor = X, *, keep: float = 0.5) -> Report:
    """Prune a model's channels, repaired."""
    return otp.prune_(model, otp.Policy(rules=otp.Channels(keep=keep)), [x], timing=0)


def shorten(model: nn.Module, rule: Any) -> Report:
    """Prune a model's depth."""
    return otp.prune_(model, otp.Policy(rules=rule), [X], timing=0)


class Whole:
    """Everything that undoing must bring back."""

    def __init__(self, model: nn.Module, x: Tensor = X) -> None:
        self.model, self.x, self.y = model, x, model(x).detach().clone()
        self.tensors = {k: (t.dtype, t.stride(), t.clone()) for k, t in _state(model).items()}
        self.flags = {k: m.training for k, m in model.named_modules()}
        self.grads = {k: p.requires_grad for k, p in model.named_parameters()}
        self.said = {k: _plain(m) for k, m in model.named_modules()}

    def holds_for(self, model: nn.Module) -> None:
        """Compare a model with what this one was."""
        assert list(_state(model)) == list(self.tensors)
        for name, (dtype, stride, value) in self.tensors.items():
            found = _state(model)[name]
            assert (found.dtype, found.stride()) == (dtype, stride), name
            assert torch.equal(found, value), name
        assert {k: m.training for k, m in model.named_modules()} == self.flags
        assert {k: p.requires_grad for k, p in model.named_parameters()} == self.grads
        assert {k: _plain(m) for k, m in model.named_modules()} == self.said
        assert torch.equal(model(self.x), self.y)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str, tuple, list, type(None))
    plain = {k: v for k, v in vars(module).items() if isinstance(v, kinds) and k[0] != "_"}
    return {"class": type(module), **plain}


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(8, 3, 6, 6))
    model.get_parameter("head.bias").requires_grad_(False)
    model.eval().get_submodule("bn1").train()
    return model.to(memory_format=torch.channels_last)


def test_a_narrower_model_is_dense_again_without_a_factory(tmp_path: Path) -> None:
    model = net()
    before = Whole(model.eval(), IMAGES)
    report = narrow(model, IMAGES)
    report.save_undo(tmp_path / "undo")
    back = load(save(model, tmp_path / "m"), factory=Net)
    otp.undo_(back, tmp_path / "undo")
    before.holds_for(back)


@pytest.mark.parametrize("kind", [Weighted, Described, Configured])
def test_the_living_model_is_dense_again_in_the_same_objects(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    before, parameters = Whole(model), dict(model.named_parameters())
    modules = dict(model.named_modules())
    narrow(model).save_undo(tmp_path / "undo")
    otp.undo_(model, tmp_path / "undo")
    before.holds_for(model)
    kept = [path for path in modules if "parametrizations" not in path]
    assert all(model.get_submodule(path) is modules[path] for path in kept)
    if kind is not Weighted:  # its computed weights are others after a cut
        assert all(model.get_parameter(name) is p for name, p in parameters.items())


def test_training_and_casting_in_between_do_not_matter(tmp_path: Path) -> None:
    model = net().eval()
    before = Whole(model, IMAGES)
    report = narrow(model, IMAGES)
    report.save_undo(tmp_path / "undo", shard=500)
    assert len(list((tmp_path / "undo").glob("model-0*.safetensors"))) > 2
    model.train().to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    otp.undo_(model, tmp_path / "undo")
    before.holds_for(model)


def test_a_fresh_process_restores_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    y = model(X)
    report = shorten(model, RULES[1])
    report.save_undo(tmp_path / "undo")
    save(model, tmp_path / "m")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import torch_otprune as otp\n"
        "from tests.test_undo_disk import Deep, X\n"
        "model = otp.load(sys.argv[1] + '/m', factory=Deep)\n"
        "otp.undo_(model, sys.argv[1] + '/undo', factory=Deep)\n"
        "print(model(X).tolist())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", code, str(tmp_path)]
    printed = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout) == y.tolist()


@pytest.mark.parametrize("build", [lambda f: f, meta])
@pytest.mark.parametrize("rule", RULES)
def test_removed_blocks_come_back_from_the_factory(rule: Any, build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    before, kept = Whole(model), model.head
    report = shorten(model, rule)
    report.save_undo(tmp_path / "undo")
    with pytest.raises(LoadError) as error:
        otp.undo_(model, tmp_path / "undo")
    assert "out, or put another module in its place." in message(error)
    assert "pass factory=" in message(error)
    otp.undo_(model, tmp_path / "undo", factory=build(Deep))
    before.holds_for(model)
    assert model.head is kept


def test_heads_that_went_come_back_with_the_factory(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 4)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            out: Tensor = self.head(x + self.attention(y, y, y)[0])
            return out

    torch.manual_seed(0)
    model, x = Attending().eval(), X.view(4, 4, 8)
    before = Whole(model, x)
    report = otp.prune_(model, otp.Policy(rules=otp.Heads(keep=0.5)), [x], timing=0)
    report.save_undo(tmp_path / "undo")
    back = load(save(model, tmp_path / "m"), factory=Attending)
    otp.undo_(back, tmp_path / "undo", factory=Attending)
    before.holds_for(back)


def test_of_two_prunings_the_last_goes_back_to_the_first(tmp_path: Path) -> None:
    model = net().eval()
    dense = Whole(model, IMAGES)
    narrow(model, IMAGES, keep=0.75).save_undo(tmp_path / "undo1")
    save(model, tmp_path / "m1")
    once, plan = Whole(model, IMAGES), plan_of(model)
    narrow(model, IMAGES, keep=0.5).save_undo(tmp_path / "undo2")
    save(model, tmp_path / "m2")

    back = load(tmp_path / "m2", factory=lambda: load(tmp_path / "m1", factory=Net))
    otp.undo_(back, tmp_path / "undo2")
    once.holds_for(back)
    assert plan_of(back) == plan
    assert torch.equal(load(save(back, tmp_path / "again"), factory=Net)(IMAGES), once.y)
    otp.undo_(back, tmp_path / "undo1")
    dense.holds_for(back)
    assert fingerprint(back) == fingerprint(Net())
    with pytest.raises(PlanError, match="no plan is known"):
        plan_of(back)


def test_an_optimiser_of_the_living_model_still_points_at_its_parameters(tmp_path: Path) -> None:
    model = net().eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    narrow(model, IMAGES).save_undo(tmp_path / "undo")
    otp.undo_(model, tmp_path / "undo")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_tie_is_a_tie_again(tmp_path: Path) -> None:
    from tests.test_store_forms import Outside

    torch.manual_seed(0)
    model = Outside().eval()
    before = Whole(model)
    policy = otp.Policy(rules=otp.Channels(targets=["up"], keep=0.5))
    report = otp.prune_(model, policy, [X], timing=0)
    report.save_undo(tmp_path / "undo")
    with torch.no_grad():
        model.third.weight = nn.Parameter(model.third.weight.clone())
    otp.undo_(model, tmp_path / "undo")
    before.holds_for(model)
    assert model.third.weight is model.first.weight
    with torch.no_grad():
        model.first.weight.zero_()
    assert not model.second.weight.any()


def test_a_configuration_says_again_what_it_said(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16,
        vocab_size=11, max_position_embeddings=8,
    )  # fmt: skip

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = transformers.BertModel(config).eval()
        return model

    ids, model = torch.arange(12).view(2, 6) % 11, build()
    said, y = model.config.to_dict(), model(ids).last_hidden_state
    policy = otp.Policy(rules=[otp.Heads(keep=0.5), otp.Layers(drop=1)])
    report = otp.prune_(model, policy, [{"input_ids": ids}], timing=0)
    assert model.config.to_dict() != said
    report.save_undo(tmp_path / "undo")
    back = load(save(model, tmp_path / "m"), factory=build)
    otp.undo_(back, tmp_path / "undo", factory=build)
    assert back.config.to_dict() == said
    assert {id(m.config) for m in back.modules() if "config" in vars(m)} == {id(back.config)}
    assert torch.equal(back(ids).last_hidden_state, y)


# What is refused


@pytest.fixture
def undo(tmp_path: Path) -> tuple[nn.Module, Report, Path]:
    """A pruned model, its report, and the way back on disk."""
    model = net().eval()
    report = narrow(model, IMAGES)
    return model, report, report.save_undo(tmp_path / "undo")


def test_an_undone_report_saves_nothing(
    undo: tuple[nn.Module, Report, Path], tmp_path: Path
) -> None:
    _, report, _ = undo
    report.undo_()
    with pytest.raises(OTPruneError) as error:
        report.save_undo(tmp_path / "other")
    assert "this pruning was already undone" in message(error)
    assert "call save_undo before undo_" in message(error)
    assert not (tmp_path / "other").exists()


def test_a_report_from_a_file_saves_nothing(
    undo: tuple[nn.Module, Report, Path], tmp_path: Path
) -> None:
    read = Report.from_json(undo[1].to_json())
    with pytest.raises(OTPruneError) as error:
        read.save_undo(tmp_path / "other")
    assert "this report was read from a file: it holds no dense tensors" in message(error)
    assert "call save_undo on the report that apply_ or prune_ returned" in message(error)


def test_what_only_pickle_could_hold_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = net().eval()
    model.register_buffer("neighbours", torch.eye(3).to_sparse())
    report = narrow(model, IMAGES)
    with pytest.raises(LoadError) as error:
        report.save_undo(tmp_path / "undo")
    assert "'neighbours' is a torch.float32 tensor of layout torch.sparse_coo" in message(error)
    assert "Report.save_undo" in message(error)
    assert not list(tmp_path.iterdir())


def test_a_report_of_an_earlier_pruning_saves_nothing(
    undo: tuple[nn.Module, Report, Path], tmp_path: Path
) -> None:
    model, report, _ = undo
    narrow(model, IMAGES, keep=0.5)
    with pytest.raises(PlanError) as error:
        report.save_undo(tmp_path / "other")
    assert "the model was pruned again since." in message(error)
    assert "Report.save_undo" in message(error)


def test_a_model_that_is_not_the_pruned_one_is_named(undo: tuple[nn.Module, Report, Path]) -> None:
    for other, words in [
        (Net(), "'bn1.bias' is 12 in this model, 6 in the saved."),
        (nn.Linear(2, 2), "this model has 'bias', the saved one has not."),
    ]:
        with pytest.raises(LoadError) as error:
            otp.undo_(other, undo[2])
        assert f"this is not the model that was pruned: {words}" in message(error)


def test_a_factory_of_another_model_is_named(tmp_path: Path) -> None:
    model = Deep().eval()
    shorten(model, RULES[0]).save_undo(tmp_path / "undo")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LoadError) as error:
        otp.undo_(model, tmp_path / "undo", factory=Net)
    assert "the factory's model has no 'blocks.0.0.bias', the saved one has." in message(error)

    def changed() -> nn.Module:
        built = Deep()
        built.blocks[0][1] = nn.GELU()
        return built

    with pytest.raises(LoadError) as error:
        otp.undo_(model, tmp_path / "undo", factory=changed)
    assert "'blocks.0.1' is a GELU in the factory's model, a ReLU in the saved" in message(error)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_a_truncated_file_leaves_the_model_pruned(undo: tuple[nn.Module, Report, Path]) -> None:
    model, _, path = undo
    before = Whole(model, IMAGES)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the header is right, the last tensor is not
    weights.write_bytes(content)
    with pytest.raises(LoadError, match=r"model\.safetensors is truncated or from another save"):
        otp.undo_(model, path)
    before.holds_for(model)
    weights.write_bytes(content[:-9])
    with pytest.raises(LoadError, match=r"model\.safetensors is truncated or from another save"):
        otp.undo_(model, path)


def test_an_edited_page_is_an_error(undo: tuple[nn.Module, Report, Path]) -> None:
    page = undo[2] / "undo.json"
    content = json.loads(page.read_text())
    content["configs"] = {"": {"config.hidden": "7"}}
    page.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=r"its undo\.json was edited: the hash differs"):
        otp.undo_(undo[0], undo[2])


def test_a_save_is_no_way_back_and_the_other_way_round(
    undo: tuple[nn.Module, Report, Path], tmp_path: Path
) -> None:
    saved = save(undo[0], tmp_path / "m")
    with pytest.raises(LoadError, match=r"there is no undo\.json"):
        otp.undo_(undo[0], saved)
    with pytest.raises(LoadError, match=r"there is no plan\.json"):
        load(undo[2], factory=Net)
    with pytest.raises(LoadError) as error:
        save(undo[0], undo[2])
    assert "its plan.json is not ours" in message(error)
    with pytest.raises(LoadError) as error:
        undo[1].save_undo(saved)
    assert "its undo.json is not ours" in message(error)


def test_saving_the_way_back_leaves_the_model_and_the_report_alone(tmp_path: Path) -> None:
    model = net().eval()
    dense = Whole(model, IMAGES)
    report = narrow(model, IMAGES)
    before = Whole(model, IMAGES)
    report.save_undo(tmp_path / "undo")
    report.save_undo(tmp_path / "undo")  # replaces it
    before.holds_for(model)
    report.undo_()
    dense.holds_for(model)


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.8]), st.booleans())
def test_any_weights_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, keep: float, trained: bool
) -> None:
    torch.manual_seed(seed)
    model, root = Net().eval(), tmp_path_factory.mktemp("undo")
    before = Whole(model, IMAGES)
    narrow(model, IMAGES, keep=keep).save_undo(root / "undo")
    if trained:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
    otp.undo_(model, root / "undo")
    before.holds_for(model)
