"""train.py as a user runs it: whole runs on small data sets, mistakes, and the pieces of the loop."""
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import adapters
import clip
import data
import eval
import losses
import train
from conftest import tiny_clip, write_pairs, write_people


def run(*flags):
    return train.train(train.parse([str(flag) for flag in flags]))


def state(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def error_of(capsys, *flags):
    """The one line that a wrong command ends in."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data set, a tiny CLIP trained on it from scratch, and the flags that start from that."""
    folder = tmp_path_factory.mktemp("world")
    flags = ["--dataset", "precomp", "--data-root", write_pairs(folder / "pairs"), "--epochs", "2",
             "--batch-size", "16", "--precision", "fp32"]
    run(*flags, "--model", "tiny", "--out", folder / "scratch")
    return folder, [*flags, "--model", folder / "scratch"]


# ------------------------------------------------------------------------------------------- whole runs

def test_a_run_from_scratch_leaves_its_files_and_a_clip_that_loads(world):
    folder, _ = world
    assert {path.name for path in (folder / "scratch").iterdir()} == {
        "best.pt", "last.pt", "metrics.json", "curve.png"}
    metrics = json.loads((folder / "scratch/metrics.json").read_text())
    assert [row[0] for row in metrics["rows"]] == ["chance", "from scratch, contrastive"]
    assert len(metrics["history"]) == 2
    parameters = sum(p.numel() for p in clip.load_clip(folder / "scratch").parameters())
    assert parameters == metrics["settings"]["total_parameters"] == metrics["rows"][1][1]


@pytest.mark.parametrize("loss", ["hmmc", "hmmc-softmax", "contrastive"])
def test_an_adapter_run_changes_the_adapter_alone(world, tmp_path, loss):
    folder, flags = world
    rows = run(*flags, "--loss", loss, "--mask-same", "--precision", "bf16", "--out", tmp_path / "run")
    assert (rows[1][0], rows[1][2]) == ("before: from scratch, contrastive", 100)
    assert rows[2][0] == f"mrs, {loss}, same masked" and 0 < rows[2][2] < 10
    saved = state(tmp_path / "run/best.pt")
    assert "state_dict" not in saved
    assert sum(tensor.numel() for tensor in saved["trained"].values()) == rows[2][1]
    assert any(tensor.abs().sum() > 0 for name, tensor in saved["trained"].items() if "up" in name)
    start, (adapted, _, _) = clip.load_clip(folder / "scratch"), eval.load_run(tmp_path / "run")
    for name, value in start.openai_state_dict().items():
        assert torch.equal(value, adapted.openai_state_dict()[name]), name


def test_eval_of_a_run_prints_the_row_that_training_printed(world, tmp_path, monkeypatch, capsys):
    rows = run(*world[1], "--lr", "5e-3", "--out", tmp_path / "run")
    assert rows[-1][3] != rows[0][3]            # not chance: reading wrong images would show
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)                 # another folder than the run was started in
    eval.main([str(tmp_path / "run")])
    expected = eval.table([rows[0], rows[-1]]).splitlines()[-1]
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_full_fine_tuning_changes_all_of_clip_but_an_unused_temperature(world, tmp_path):
    folder, flags = world
    rows = run(*flags, "--train", "backbone", "--loss", "hmmc", "--out", tmp_path / "run")
    assert rows[-1][0] == "full fine-tuning, hmmc"
    before = clip.load_clip(folder / "scratch").state_dict()
    after = clip.load_clip(tmp_path / "run").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == ["logit_scale"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, tmp_path):
    learned = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(*world[1], "--epochs", "1", "--seed", seed, "--out", tmp_path / name)
        learned.append(state(tmp_path / name / "last.pt")["learned"])
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])
    assert not all(torch.equal(learned[0][name], learned[2][name]) for name in learned[0])


def test_a_run_stopped_within_an_epoch_resumes_to_the_end_of_the_unbroken_one(world, tmp_path, monkeypatch):
    _, flags = world
    flags = [*flags, "--augment", "crop", "--train", "all", "--method", "mrs", "--dropout", "0.2"]
    run(*flags, "--out", tmp_path / "whole")
    calls, compute_loss = [], train.compute_loss        # 20 images x 5 captions / 16: 7 steps an epoch

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return compute_loss(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "compute_loss", interrupted)
        patch.setattr(train, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--out", tmp_path / "broken")
    assert state(tmp_path / "broken/last.pt")["step"] == 8
    rows = run("--resume", "--out", tmp_path / "broken")
    whole, broken = state(tmp_path / "whole/last.pt"), state(tmp_path / "broken/last.pt")
    assert all(torch.equal(value, broken["learned"][name]) for name, value in whole["learned"].items())
    assert whole["history"] == broken["history"]
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["rows"] == [list(row) for row in rows]


def test_grad_checkpointing_gives_the_same_run(world, tmp_path):
    _, flags = world
    run(*flags, "--epochs", "1", "--out", tmp_path / "plain")
    run(*flags, "--epochs", "1", "--grad-checkpointing", "--out", tmp_path / "less")
    plain, less = (state(tmp_path / name / "last.pt")["learned"] for name in ("plain", "less"))
    assert all(torch.allclose(plain[name], less[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("split, said", [("test", "no val split: the last epoch"), ("val", "no test split")])
def test_without_val_the_last_epoch_counts_and_without_test_val(world, tmp_path, capsys, split, said):
    folder, flags = world
    lines = []
    for number in range(24):
        name = folder / f"pairs/images/{number}.png"
        lines.append(f"{name}\tan image of {number} things\t{split if number % 4 == 0 else 'train'}")
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run("--dataset", "folder", "--data-root", tmp_path, *flags[4:], "--lr", "1e-2", "--out", tmp_path / "run")
    assert said in capsys.readouterr().out
    if split == "test":
        last, best = state(tmp_path / "run/last.pt")["learned"], state(tmp_path / "run/best.pt")["trained"]
        assert all(torch.equal(last[name], best[name]) for name in best)


# ------------------------------------------------------------------------- what must learn, and what must not

def test_the_temperature_can_fall_from_its_bound_and_never_passes_it(world, tmp_path):
    folder, flags = world
    saved = state(folder / "scratch/best.pt")
    for start, name in ((math.log(100), "falls"), (6.0, "clipped")):
        (tmp_path / name).mkdir()
        saved["state_dict"]["logit_scale"] = torch.tensor(start)
        torch.save(saved, tmp_path / name / "best.pt")
        run(*flags[:-1], tmp_path / name, "--train", "backbone", "--loss", "contrastive", "--lr", "1e-4",
            "--out", tmp_path / f"run-{name}")
        end = state(tmp_path / f"run-{name}/best.pt")["state_dict"]["logit_scale"].item()
        assert end <= math.log(100) + 1e-6
        if name == "falls":
            assert end < math.log(100) - 1e-4


@pytest.mark.parametrize("method", [name for name in adapters.METHODS if name != "none"])
def test_stage_2_in_bf16_keeps_the_bits_of_what_is_fixed_and_of_what_is_saved(method):
    model = tiny_clip()
    adapters.add_method(model, method)
    before = adapters.trainable_state(model)
    train.choose_what_learns(model, "backbone", "contrastive")
    train.hold_frozen_in_bf16(model)
    after = adapters.trainable_state(model)
    for name, value in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(value, after[name])
    assert all(value.dtype == torch.float32 for value in model.openai_state_dict().values())


def test_frozen_matrices_in_bf16_change_nothing_under_autocast():
    images, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[598, 5, 599], [598, 7, 599], [598, 3, 599]])
    outputs = []
    for hold in (lambda model: None, train.hold_frozen_in_bf16):
        model = tiny_clip()
        adapters.add_method(model, "lora")
        hold(model)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs.append((model.encode_image(images), model.encode_text(tokens)))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert model.visual.transformer.resblocks[0].inner.mlp.c_fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["method", "backbone", "all"])
def test_what_learns(what):
    model = tiny_clip()
    own = {name for name, _ in model.named_parameters()}
    adapters.add_method(model, "prompts")
    train.choose_what_learns(model, what, "contrastive")
    learns = {name.replace("inner.", "") for name, p in model.named_parameters() if p.requires_grad}
    added = {name.replace("inner.", "") for name in adapters.trainable_state(model)}
    assert learns == {"method": added, "backbone": own, "all": own | added}[what]


def test_a_loss_that_is_not_finite_stops_before_the_step(world, tmp_path, monkeypatch):
    run(*world[1], "--epochs", "1", "--out", tmp_path / "run")
    saved = state(tmp_path / "run/last.pt")
    saved["settings"]["epochs"] = 2
    torch.save(saved, tmp_path / "run/last.pt")
    monkeypatch.setattr(losses, "hmmc_loss", lambda image, *others: (math.nan * image.sum(), {}))
    with pytest.raises(ValueError, match="loss nan.* at step 7; .*--lr 7e-05"):
        run("--resume", "--out", tmp_path / "run")
    assert state(tmp_path / "run/last.pt")["step"] == 7


def test_a_hinge_at_its_collapse_value_is_told(world, tmp_path, capsys):
    folder, flags = world
    saved = state(folder / "scratch/best.pt")           # projections of nothing: all are alike
    for name in ("visual.proj", "text_projection"):
        saved["state_dict"][name] = torch.zeros_like(saved["state_dict"][name])
    torch.save(saved, tmp_path / "best.pt")
    run(*flags[:-1], tmp_path / "best.pt", "--epochs", "1", "--lr", "1e-9", "--out", tmp_path / "run")
    assert "17.1 is the loss when all similarities are equal" in capsys.readouterr().out


def test_few_steps_from_scratch_are_told(world, tmp_path, capsys):
    run(*world[1][:-2], "--model", "tiny", "--out", tmp_path / "run")
    assert "4 steps from scratch teach little" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ prompt decoupling

@pytest.fixture(scope="module")
def people(world, tmp_path_factory):
    """A small re-identification set, and stage 1 of prompt decoupling on it."""
    folder = tmp_path_factory.mktemp("people")
    flags = ["--dataset", "RSTPReid", "--data-root", write_people(folder / "people"), "--batch-size", "16",
             "--epochs", "1", "--warmup", "0", "--lr", "1e-3"]
    stage_1 = [*flags, "--model", world[0] / "scratch", "--image-size", "96", "48"]
    run(*stage_1, "--out", folder / "stage1")
    return folder, flags, stage_1


def test_stage_1_changes_every_prompt_and_nothing_of_clip(world, people):
    folder, _, _ = people
    model, _, settings = eval.load_run(folder / "stage1")
    assert (settings["method"], settings["train"], settings["loss"]) == ("prompts", "method", "sdm")
    start = clip.load_clip(world[0] / "scratch", (96, 48))
    torch.manual_seed(settings["seed"] * 2 ** 32)       # what the run drew its prompts from
    adapters.add_method(start, "prompts")
    before, after = adapters.trainable_state(start), adapters.trainable_state(model)
    assert list(before) == list(after) and len(after) == 2 + 2          # the blocks of the tiny CLIP
    assert all(not torch.equal(before[name], after[name]) for name in before)
    for name, value in start.openai_state_dict().items():
        assert torch.equal(value, model.openai_state_dict()[name]), name


def test_stage_2_keeps_the_prompts_to_the_bit_and_changes_clip(world, people, tmp_path):
    folder, flags, _ = people
    rows = run(*flags, "--init", folder / "stage1", "--train", "backbone", "--precision", "bf16",
               "--out", tmp_path / "stage2")
    assert [row[0] for row in rows] == ["chance", "before: prompts, sdm",
                                        "full fine-tuning with fixed prompts, sdm+id"]
    before, after = state(folder / "stage1/best.pt")["trained"], state(tmp_path / "stage2/best.pt")["trained"]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    start = clip.load_clip(world[0] / "scratch", (96, 48)).state_dict()
    end = clip.load_clip(tmp_path / "stage2").state_dict()
    assert [name for name in start if torch.equal(start[name], end[name])] == ["logit_scale"]
    assert not any("classifier" in name for name in state(tmp_path / "stage2/best.pt")["state_dict"])
    row = json.loads((folder / "stage1/metrics.json").read_text())["rows"][-1]
    assert rows[1][3] == row[3]                         # stage 2 starts where stage 1 ended


def test_a_run_trains_the_method_of_another_on_and_may_be_told_where_its_clip_is_now(world, people, tmp_path):
    folder, flags, _ = people
    shutil.copytree(world[0] / "scratch", tmp_path / "moved")
    run(*flags, "--init", folder / "stage1", "--model", tmp_path / "moved", "--out", tmp_path / "on")
    assert state(tmp_path / "on/best.pt")["settings"]["model"] == str(tmp_path / "moved")
    before, after = state(folder / "stage1/best.pt")["trained"], state(tmp_path / "on/best.pt")["trained"]
    assert not any(torch.equal(before[name], after[name]) for name in before)
    torch.save(tiny_clip().openai_state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="600 tokens"):
        run(*flags, "--init", folder / "stage1", "--model", tmp_path / "other.pt")


def test_pairs_of_one_person_image_or_caption_are_no_negatives(people, tmp_path, monkeypatch):
    folder, _, stage_1 = people
    seen, contrastive_loss = [], losses.contrastive_loss

    def spy(image, text, scale, same):
        seen.append(same)
        return contrastive_loss(image, text, scale, same)
    monkeypatch.setattr(losses, "contrastive_loss", spy)
    run(*stage_1, "--loss", "contrastive", "--mask-same", "--out", tmp_path / "run")
    pairs = data.read("RSTPReid", folder / "people", "train")
    batch = data.batches(pairs, "captions", 16, epochs=1, seed=0)[0]
    for i, a in enumerate(batch):
        for j, b in enumerate(batch):
            same_person = pairs.ids[pairs.image_of_caption[a]] == pairs.ids[pairs.image_of_caption[b]]
            assert seen[0][i, j] == (same_person or pairs.captions[a] == pairs.captions[b])
    assert seen[0].sum() > 16


def test_a_step_encodes_the_images_and_the_captions_of_its_batch(world, tmp_path, monkeypatch):
    seen, encode = [], train.encode

    def spy(tower, inputs, views):
        seen.append(inputs)
        return encode(tower, inputs, views)
    monkeypatch.setattr(train, "encode", spy)
    run(*world[1], "--epochs", "1", "--out", tmp_path / "run")
    pairs, tokenizer = data.read("precomp", world[0] / "pairs", "train"), eval.load_run(tmp_path / "run")[1]
    plan = data.batches(pairs, "captions", 16, epochs=1, seed=0)
    assert len(seen) == 2 * len(plan) > 2
    for n, batch in enumerate(plan):
        images = [Image.open(pairs.images[pairs.image_of_caption[m]]) for m in batch]
        pixels = torch.stack([clip.preprocess(image, 32) for image in images])
        assert torch.equal(seen[2 * n], clip.normalize(pixels))
        assert torch.equal(seen[2 * n + 1], tokenizer([pairs.captions[m] for m in batch], 32))


def test_irras_groups_of_parameters():
    args = train.parse(["--dataset", "RSTPReid", "--data-root", "x", "--train", "backbone"])
    assert (args.loss, args.epochs, args.lr, args.warmup, args.weight_decay) == ("sdm+id", 60, 1e-5, 5, 4e-5)
    shapes = {"block.weight": (2, 2), "block.bias": (2,), "ln.weight": (2,), "classifier.weight": (3, 2),
              "classifier.bias": (3,)}
    learned = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    optimizer = train.make_optimizer(learned, args)
    found = [(group["factor"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1, 4e-5), (2, 0), (1, 0), (5, 4e-5), (5, 0)]


def test_the_papers_recipe_is_the_default_on_its_data():
    args = train.parse(["--dataset", "ucm", "--data-root", "x"])
    assert (args.model, args.method, args.loss, args.train) == ("ViT-B/32", "mrs", "hmmc", "method")
    assert (args.lr, args.epochs, args.batch_size, args.augment) == (2e-4, 30, 16, "none")
    assert (args.epoch_over, args.margin, args.weight_decay) == ("captions", 0.2, 0.0)
    rates = [train.learning_rate(args, 10 * epoch, 10) for epoch in range(30)]
    assert rates == pytest.approx([2e-4] * 19 + [1.4e-4] * 11)


@pytest.mark.parametrize("flags, wanted", [
    (["--model", "tiny"], ("none", "all", "contrastive")),
    (["--train", "backbone"], ("none", "backbone", "hmmc")),
    (["--method", "none"], ("none", "backbone", "hmmc")),
    (["--method", "lora", "--loss", "contrastive"], ("lora", "method", "contrastive"))])
def test_what_is_left_out_follows_from_what_is_given(flags, wanted):
    args = train.parse(["--dataset", "ucm", "--data-root", "x", *flags])
    assert (args.method, args.train, args.loss) == wanted


def test_warm_up_then_cosine():
    args = train.parse(["--epochs", "4", "--lr", "1", "--warmup", "1", "--schedule", "cosine"])
    rates = [train.learning_rate(args, step, 2) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0] + [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)])
    args.warmup = 0.25                      # half a step
    assert train.learning_rate(args, 0, 2) == 1.0


def test_two_views_in_one_forward_are_two_forwards():
    model = tiny_clip()
    tokens = torch.tensor([[598, 5, 6, 599, 0], [598, 7, 599, 0, 0]])
    for tower, inputs in ((model.visual, torch.randn(2, 3, 32, 32)), (model.text, tokens)):
        tower.head = torch.nn.Linear(64, 64)
        torch.manual_seed(7)
        first, second = train.encode(tower, inputs, views=2)
        assert torch.allclose(first, tower(inputs), atol=1e-5)
        torch.manual_seed(7)
        x = F.dropout(tower.embed(inputs), 0.2)
        assert torch.allclose(second, tower.head(tower.pool(tower.transformer(x), inputs)), atol=1e-5)
        assert not torch.allclose(first, second, atol=1e-3)


def test_a_failed_save_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    train.save(tmp_path / "last.pt", {"step": 1})

    def full_disk(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="cannot write .*last.pt: No space left on device.*make room"):
        train.save(tmp_path / "last.pt", {"step": 2})
    assert state(tmp_path / "last.pt") == {"step": 1}


@pytest.mark.parametrize("flags, words", [
    (["--method", "none", "--train", "method"], "give a method and a trained CLIP"),
    (["--train", "backbone", "--method", "prompts"], "at random: give --init RUN"),
    (["--batch-size", "1"], "--batch-size 1: 2 or more"),
    (["--lr", "nan"], "--lr nan"),
    (["--image-size", "0"], "--image-size [0]"),
    (["--loss", "sdm"], "needs person ids"),
    (["--loss", "sdm", "--mask-same"], "--mask-same changes nothing"),
    (["--device", "mps", "--precision", "bf16"], "bf16 does not work on mps"),
    (["--image-size", "32", "10"], "images of (32, 10) pixels are smaller than a patch of 16"),
    (["--resume"], "there is no last.pt"),
    (["--data-root", "nowhere"], "nowhere")])
def test_a_mistake_is_one_line_and_writes_nothing(world, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval, "DEVICES", ["cpu", "mps"])
    line = error_of(capsys, *world[1], *flags)
    assert line.startswith("train.py: error:") and words in line
    assert list(tmp_path.iterdir()) == []


def test_mistakes_with_folders_of_runs(world, people, tmp_path, capsys):
    folder, flags = world
    assert "already holds a run" in error_of(capsys, *flags, "--out", folder / "scratch")
    assert "there is no" in error_of(capsys, "--resume", "--out", folder / "scrach")
    assert "has 0.001, which stays" in error_of(capsys, "--resume", "--out", folder / "scratch", "--lr", "1")
    assert "has precomp, which stays" in error_of(capsys, "--resume", "--out", folder / "scratch", "--dataset", "toy-aerial")
    again = train.parse(["--resume", "--out", str(people[0] / "stage1"), "--image-size", "96", "48", "--skip-bad"])
    assert (again.image_size, again.loss) == ((96, 48), "sdm")      # a flag may be repeated as it was
    assert "the place of that run's CLIP" in error_of(capsys, "--init", people[0] / "stage1", "--model", "tiny")
    args = train.parse(["--init", str(people[0] / "stage1"), "--train", "backbone"])
    assert (args.dataset, args.data_root) == ("RSTPReid", str(people[0] / "people"))    # that run's data
    assert "--method" in error_of(capsys, *people[1], "--init", people[0] / "stage1", "--method", "mrs")
    run(*people[2], "--out", tmp_path / "prompts", "--train", "all", "--method", "prompts")
    assert "give the run's folder" in error_of(capsys, *flags[:-1], folder / "scratch/last.pt")
    assert "take --init for it" in error_of(capsys, *flags[:-1], tmp_path / "prompts")


def test_a_run_whose_data_changed_is_not_resumed(world, tmp_path):
    run(*world[1], "--epochs", "1", "--out", tmp_path / "run")
    captions = write_pairs(tmp_path / "edited") / "train_caps.txt"      # as many steps, other words
    captions.write_text(captions.read_text().replace("under", "below"))
    with pytest.raises(ValueError, match="does not fit: the data or weights"):
        run("--resume", "--out", tmp_path / "run", "--data-root", tmp_path / "edited")


def test_two_processes_are_one_with_the_whole_batch(world, people, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = {"hmmc": [*world[1], "--dropout", "0"], "sdm": people[2],
            "contrastive": [*world[1], "--train", "all", "--method", "none"]}       # the logit scale learns
    commands = []
    for loss, flags in runs.items():
        flags = [*flags, "--loss", loss, "--precision", "fp32", "--lr", "1e-3", "--augment", "none",
                 "--batch-size", "20", "--epochs", "1", "--out", loss]
        commands.append([str(flag) for flag in flags])
    script = ("import sys, json, conftest, train\n"
              "train.VIEW_DROPOUT = 0.0\n"              # processes draw other dropout
              "for *flags, loss in json.loads(sys.argv[1]):\n"
              "    train.train(train.parse([*flags, f'{sys.argv[2]}-{loss}']))\n")
    processes = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        environment = os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
                                        CUDA_VISIBLE_DEVICES="")    # a GPU takes one process
        command = [sys.executable, "-c", script, json.dumps(commands), tmp_path / str(size)]
        processes.append(subprocess.Popen(command, env=environment, cwd=os.path.dirname(__file__),
                                          stdout=subprocess.PIPE))
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    for loss in ("hmmc", "contrastive", "sdm"):
        one, two = (state(tmp_path / f"{size}-{loss}" / "last.pt") for size in (1, 2))
        assert one["step"] == two["step"] > 1
        assert one["history"][0]["loss"] == pytest.approx(two["history"][0]["loss"], rel=1e-4)
        for name in ["logit_scale"] if loss == "contrastive" else one["learned"]:
            assert torch.allclose(one["learned"][name], two["learned"][name], atol=1e-5), (loss, name)
        for index, moments in one["optimizer"]["state"].items():        # Adam's step hides a wrong factor
            other = two["optimizer"]["state"][index]["exp_avg"]
            assert torch.allclose(moments["exp_avg"], other, rtol=0.02, atol=1e-3 * other.abs().max()), loss
