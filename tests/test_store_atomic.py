"""A directory is the old save or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_store import IMAGES, Net, message, pruned
from torch_otprune.errors import LoadError
from torch_otprune.store import atomic, load, save
from torch_otprune.store.atomic import put, rescued

ROOT = Path(__file__).parent.parent


@pytest.fixture
def net() -> nn.Module:
    return pruned(Net(), IMAGES).eval()


@pytest.fixture
def saved(net: nn.Module, tmp_path: Path) -> Path:
    return save(net, tmp_path / "net", shard=500)


def moved(model: nn.Module) -> nn.Module:
    """Change every weight, so that a second save differs from the first."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    return model


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 10, 600, 2000])
def test_a_full_disk_leaves_the_earlier_save_and_no_debris(
    net: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    before, opened, left = contents(saved), Path.open, [room]

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        return Full(file, left) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(LoadError) as error:
        save(moved(net), saved, shard=500)
    assert "the model cannot be saved: No space left on device." in message(error)
    monkeypatch.undo()
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_a_real_limit_on_file_sizes_leaves_the_earlier_save(net: nn.Module, saved: Path) -> None:
    before = contents(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(LoadError) as error:
            save(moved(net), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert "the model cannot be saved: File too large." in message(error)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """A disk of 64 kB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("no disk may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=False)


def test_a_real_full_disk_leaves_the_earlier_save(disk: Path) -> None:
    model = pruned(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)), torch.ones(1, 8))
    saved = save(model, disk / "net")
    before = contents(saved)
    free = os.statvfs(disk)
    (disk / "others").write_bytes(b"\0" * (free.f_bavail * free.f_bsize - 4096))
    with pytest.raises(LoadError) as error:
        save(moved(model), saved)
    assert "the model cannot be saved: No space left on device." in message(error)
    assert contents(saved) == before
    assert sorted(path.name for path in disk.iterdir()) == ["net", "others"]


KILLED = """
import sys, torch
torch.set_num_threads(1)
from tests.test_store_atomic import *
net = load(sys.argv[1], factory=Net)
print("ready", flush=True)
while True:
    save(moved(net), sys.argv[1], shard=500)
"""


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Run code in a process of its own, and wait until it says that it is ready."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def rest_of(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a process, and return what else it printed."""
    assert process.stdout is not None
    printed = process.stdout.read()
    process.wait(timeout=120)
    return printed


def test_a_killed_process_leaves_a_whole_save(saved: Path) -> None:
    for seed in range(4):
        process = started(KILLED, str(saved))
        time.sleep(random.Random(seed).uniform(0.01, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        model = load(saved, factory=Net)  # checks every hash
    save(model, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


@pytest.mark.parametrize("step", ["_sync", "_swap", "_exchanged", "_replace"])
def test_a_death_at_any_step_leaves_a_whole_save(
    net: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Die without cleaning up, in front of a step and behind it."""
    real, y = getattr(atomic, step), net(IMAGES)
    if step == "_replace":
        monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    for late in (False, True):
        child = os.fork()
        if child == 0:

            def die(*args: Any, late: bool = late) -> None:
                if late:
                    real(*args)
                os._exit(0)

            setattr(atomic, step, die)
            save(net, saved, shard=500)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(load(saved, factory=Net)(IMAGES), y)
    save(net, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_where_directories_cannot_be_exchanged_the_old_one_is_replaced(
    net: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    save(moved(net), saved)
    assert torch.equal(load(saved, factory=Net)(IMAGES), net(IMAGES))
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_a_failed_replacement_puts_the_earlier_save_back(
    net: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, before = Path.rename, contents(saved)

    def fail_once(self: Path, target: Path) -> Path:
        if target == saved and not self.name.endswith(".old"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(LoadError):
        save(moved(net), saved)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_a_death_between_two_renames_is_made_good_by_a_load(net: nn.Module, saved: Path) -> None:
    saved.rename(saved.with_name(".net.0123abcd.old"))
    assert torch.equal(load(saved, factory=Net)(IMAGES), net(IMAGES))


def test_what_others_are_writing_is_not_swept_away(net: nn.Module, saved: Path) -> None:
    def nested(aside: Path) -> None:
        (aside / "model.safetensors").touch()
        save(net, saved)
        assert (aside / "model.safetensors").exists()
        raise OSError(errno.EIO, "stopped")

    with pytest.raises(LoadError, match="stopped"):
        put(saved, nested)


def test_a_directory_of_the_users_with_such_a_name_is_not_swept_away(
    net: nn.Module, saved: Path
) -> None:
    mine = saved.with_name(".net.0123abcd")
    mine.mkdir()
    (mine / "diary.odt").touch()
    save(net, saved)
    assert (mine / "diary.odt").exists()


WRITER = """
import sys, torch
torch.set_num_threads(1)
from tests.test_store_atomic import *
net = load(sys.argv[1], factory=Net)
print("ready", flush=True)
for _ in range(8):
    save(moved(net), sys.argv[1], shard=500)
"""


def test_two_processes_may_save_to_one_place_at_once(saved: Path) -> None:
    writers = [started(WRITER, str(saved)) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        load(saved, factory=Net)
    assert [writer.returncode for writer in writers] == [0, 0]
    load(saved, factory=Net)
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_a_link_stays_a_link_and_what_it_names_is_replaced(
    net: nn.Module, saved: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved, target_is_directory=True)
    assert save(moved(net), link) == saved
    assert link.is_symlink()
    assert torch.equal(load(link, factory=Net)(IMAGES), net(IMAGES))


def test_a_link_to_nowhere_gets_its_directory(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(net, tmp_path / "link")
    assert (tmp_path / "real" / "plan.json").is_file()


LOADED = """
try:
    load(sys.argv[1], factory=Net)
except LoadError as error:
    print(error)
"""

READ_ONLY = """
import os, sys, torch
torch.set_num_threads(1)
from tests.test_store_atomic import *
net = load(sys.argv[1], factory=Net)
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
print("ready", flush=True)
try:
    save(net, sys.argv[1])
except LoadError as error:
    print(error)
"""


@pytest.fixture
def closed(net: nn.Module) -> Iterator[Path]:
    """A save below a directory that everybody may look into, and nobody write to."""
    with tempfile.TemporaryDirectory() as root:
        parent = Path(root) / "closed"
        parent.mkdir()
        save(net, parent / "net")
        Path(root).chmod(0o755)
        parent.chmod(0o555)
        yield parent
        parent.chmod(0o755)


def test_a_read_only_directory_is_named_and_keeps_its_save(closed: Path) -> None:
    before = contents(closed / "net")
    printed = rest_of(started(READ_ONLY, str(closed / "net")))
    assert printed.splitlines() == [
        "the model cannot be saved: Permission denied.",
        f"  where: {closed / 'net'}",
        "  fix:   pass a directory that you may write to, on a disk with room.",
    ]
    assert contents(closed / "net") == before
    assert [path.name for path in closed.iterdir()] == ["net"]


def test_a_directory_that_nobody_may_look_into_is_named(closed: Path) -> None:
    closed.chmod(0o000)
    code = READ_ONLY.replace("net = load(sys.argv[1], factory=Net)", "net = pruned(Net(), IMAGES)")
    printed = rest_of(started(code + LOADED, str(closed / "net")))
    closed.chmod(0o755)
    assert [line for line in printed.splitlines() if line[0] != " "] == [
        "the model cannot be saved there: it cannot be read: Permission denied.",
        "this is no saved model: it cannot be read: Permission denied.",
    ]


def test_a_place_that_cannot_be_exchanged_is_told_to_go_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()

    def busy(*_: object) -> bool:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(atomic, "_exchanged", busy)
    with pytest.raises(LoadError) as error:
        put(tmp_path / "volume", lambda aside: (aside / "plan.json").touch())
    assert "name a directory inside of it, such as" in message(error)


def test_nothing_is_rescued_where_nothing_is_missing(saved: Path) -> None:
    other = saved.with_name(".net.0123abcd.old")
    other.mkdir()
    assert rescued(saved) == saved
    assert other.exists()


# Memory, in a process of its own

MEMORY = """
import json, os, sys, threading, torch
torch.set_num_threads(1)
from pathlib import Path
from torch import nn
import torch_otprune as otp
from torch_otprune.store import load, save
from tests.test_store import plan_for, remember, cut_

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

class Peak:
    def __enter__(self):
        self.start, self.peak, self.on = resident(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while self.on:
            self.peak = max(self.peak, resident())
    def __exit__(self, *_):
        self.on = False
        self.thread.join()
        self.peak = max(self.peak, resident()) - self.start

def build():
    layers = (nn.Linear(2048, 2048) for _ in range(int(sys.argv[2])))
    return nn.Sequential(*layers, nn.Linear(2048, 2))

def empty():
    with torch.device("meta"):
        return build()

def size(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())

torch.ones(1).sum()
root, found = Path(sys.argv[1]), {}
small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
plan = plan_for(small, torch.ones(1, 8))
from torch_otprune.structure.fingerprint import fingerprint
model = build()
count = sum(p.numel() for p in model.parameters())
plan = plan.model_copy(update={
    "cuts": (), "fingerprint": fingerprint(model),
    "params": plan.params.model_copy(update={"after": count})})
save(small_ := model, root / "warm", plan=plan)
found["model"] = size(model)
with Peak() as peak:
    save(model, root / "m", plan=plan, shard="20MB")
found["save"] = peak.peak
with Peak() as peak:
    save(model, root / "one", plan=plan)
found["save_one"] = peak.peak
del model, small_
import gc; gc.collect()
for name, factory in (("load_meta", empty), ("load_real", build)):
    with Peak() as peak:
        back = load(root / "m", factory=factory)
    found[name] = peak.peak
    del back; gc.collect()
print(json.dumps(found))
"""


def measured(root: Path, layers: int) -> dict[str, int]:
    """Measure in a process of its own how many bytes each step adds at its height."""
    import json

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(root), str(layers)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
def test_saving_copies_no_model_and_loading_holds_one(tmp_path: Path) -> None:
    tensor = 2048 * 2048 * 4
    found = measured(tmp_path, 6)
    floor = 3 * tensor  # one tensor on its way, and what Python keeps
    assert found["save"] < floor
    assert found["save_one"] < floor
    assert found["load_meta"] < found["model"] + floor
    assert found["load_real"] < found["model"] + floor
