"""What the README says where it can mislead: its commands, its counts, its code."""
import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch

import adapters
import clip
import eval
import train
from conftest import tiny_clip

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^python (?:train|eval)\.py [^#\n]+", README, re.M)))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/stage1").mkdir(parents=True)
    settings = vars(train.parse(["--dataset", "CUHK-PEDES", "--data-root", "x"]))
    torch.save({"settings": settings}, tmp_path / "runs/stage1/best.pt")        # for --init
    script, *flags = shlex.split(command.split(" ", 1)[1])
    assert (train.parse if script == "train.py" else eval.parse)(flags) and len(COMMANDS) > 6


def test_the_counts_in_the_table_of_methods_are_right():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|.*\| ([0-9 ]+) \|$", README, re.M)
    assert {name for name, _ in rows} == set(adapters.METHODS) - {"none"}
    for name, count in rows:
        with torch.device("meta"):
            model = clip.CLIP(clip.SIZES["ViT-B/32"])
        adapters.add_method(model, name)
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert learned == int(count.replace(" ", "")), name


def test_the_reference_of_the_bench_has_our_loss(monkeypatch):
    monkeypatch.setitem(clip.SIZES, "tiny", clip.SIZES["tiny"])         # bench.py has its own
    import bench
    settings = dict(model="tiny", method="mrs", loss="hmmc", precision="fp32", device="cpu", batch_size=4,
                    captions=None)
    plain, ours = [bench.measure(argparse.Namespace(code=code, **settings)) for code in ("plain", "ours")]
    assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-5) and plain["tflop"] > ours["tflop"]


def test_the_pieces_to_copy_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "hmmc_loss" in code)
    names = {"model": tiny_clip(), "images": torch.randn(2, 3, 32, 32), "tokens": torch.tensor([[598, 599]] * 2)}
    exec(block, names)
    assert names["loss"].isfinite() and len(torch.load("adapter.pt", weights_only=True)) == 10
