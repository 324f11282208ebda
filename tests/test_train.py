"""train.py and eval.py as a user runs them: whole runs on a small drawn world, faults, and the pieces of the loop."""
import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys

import pytest
import torch
import torch.nn.functional as F

import adapters
import clip
import data
import eval
import losses
import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 drawn scenes in the layout of the real data, and a run that trained the tiny CLIP on them from scratch."""
    folder = tmp_path_factory.mktemp("world")
    data.write_world(folder / "aerial", data.draw_aerial, images=36, test=12, seed=5)
    flags = ["--dataset", "precomp", "--data-root", str(folder / "aerial"),
             "--epochs", "2", "--batch-size", "16"]
    run(*flags, "--model", "tiny", "--method", "none", "--train", "all", "--loss", "contrastive",
        "--out", str(folder / "scratch"))
    return folder, flags + ["--model", str(folder / "scratch")]


def run(*flags):
    return train.train([str(flag) for flag in flags])


def state(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def command(monkeypatch, capsys, module, *flags):
    """Exit code and error output of a script called with flags."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code, capsys.readouterr().err


# ---------------------------------------------------------------- whole runs

def test_a_run_leaves_its_files_and_a_clip_that_loads(world):
    folder, _ = world
    assert {path.name for path in (folder / "scratch").iterdir()} == {
        "best.pt", "last.pt", "log.csv", "log.txt", "metrics.json", "curve.png"}
    metrics = json.loads((folder / "scratch/metrics.json").read_text())
    assert [row[0] for row in metrics["rows"]] == ["chance", "from scratch, contrastive"]
    assert metrics["rows"][1][1] == metrics["total_parameters"]
    assert len(list(csv.DictReader(open(folder / "scratch/log.csv")))) == 2
    model = clip.load_clip(folder / "scratch")
    assert sum(p.numel() for p in model.parameters()) == metrics["total_parameters"]


@pytest.mark.parametrize("loss", ["hmmc", "hmmc-softmax", "contrastive"])
def test_an_adapter_run_changes_the_adapter_alone(world, tmp_path, loss):
    folder, flags = world
    rows = run(*flags, "--loss", loss, "--mask-same", "--out", tmp_path / "run")
    assert [row[0] for row in rows] == ["chance", "zero-shot", f"mrs, {loss}, same masked"]
    saved = state(tmp_path / "run/best.pt")
    assert "state_dict" not in saved
    assert sum(tensor.numel() for tensor in saved["trained"].values()) == rows[2][1]
    assert os.path.getsize(tmp_path / "run/best.pt") < 4 * rows[2][1] + 40_000
    plain, (adapted, tokenizer, _) = clip.load_clip(folder / "scratch"), eval.load_run(tmp_path / "run")
    for name, value in plain.openai_state_dict().items():
        assert torch.equal(value, adapted.openai_state_dict()[name])
    assert tokenizer.vocab_size == plain.config.vocab_size
    assert any(tensor.abs().sum() > 0 for name, tensor in saved["trained"].items() if "up" in name)


def test_eval_of_a_run_prints_the_row_that_training_printed(world, tmp_path, monkeypatch, capsys):
    _, flags = world
    rows = run(*flags, "--lr", "5e-3", "--out", tmp_path / "run")
    assert rows[-1][3] != rows[0][3]        # not chance: reading wrong pictures would show
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "run"), "--cache", str(tmp_path)])
    eval.main()
    assert eval.table(rows).splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]


def test_full_fine_tuning_changes_clip_and_loads_without_its_start(world, tmp_path):
    folder, flags = world
    run(*flags, "--method", "none", "--train", "backbone", "--out", tmp_path / "run")
    before, after = clip.load_clip(folder / "scratch").state_dict(), clip.load_clip(tmp_path / "run").state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["logit_scale"]      # the hinge loss has no temperature


def test_the_same_seed_gives_the_same_run_and_another_another(world, tmp_path):
    _, flags = world
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(*flags, "--epochs", "1", "--out", tmp_path / name, "--seed", seed)
    a, b, c = (state(tmp_path / name / "last.pt")["learned"] for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_run_stopped_within_an_epoch_resumes_to_the_same_end(world, tmp_path, monkeypatch):
    _, flags = world
    flags = [*flags, "--augment", "crop", "--train", "all"]     # adapter dropout, augmentation, all of CLIP
    run(*flags, "--out", tmp_path / "whole")
    calls, compute = [], train.compute_loss     # 19 pictures x 5 captions / 16 = 6 steps an epoch: 8 is in the second

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(train, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--out", tmp_path / "broken")
    saved = state(tmp_path / "broken/last.pt")
    assert saved["step"] == 8
    torch.save(saved | {"seconds": 6000.0}, tmp_path / "broken/last.pt")
    run("--out", tmp_path / "broken", "--resume")
    assert 100 < json.loads((tmp_path / "broken/metrics.json").read_text())["minutes"] < 101     # both parts of it
    whole, resumed = state(tmp_path / "whole/last.pt"), state(tmp_path / "broken/last.pt")
    assert all(torch.equal(value, resumed["learned"][name]) for name, value in whole["learned"].items())
    assert whole["history"] == resumed["history"]
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "broken/log.csv").read_text()
    rows = [json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in ("whole", "broken")]
    assert rows[0] == rows[1]


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, monkeypatch):
    _, flags = world
    monkeypatch.setattr(losses, "hmmc_loss", lambda *args: (torch.tensor(float("nan"), requires_grad=True), {}))
    with pytest.raises(ValueError, match="loss is nan .* at step 0, on pictures .*png.*nothing was saved yet.*--lr"):
        run(*flags, "--out", tmp_path / "run")


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    train.save(tmp_path / "last.pt", {"step": 1})

    def full_disk(content, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        train.save(tmp_path / "last.pt", {"step": 2})
    assert state(tmp_path / "last.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# ---------------------------------------------------------------- mistakes on the command line

def test_each_mistake_is_one_line_and_nothing_is_written(world, tmp_path, monkeypatch, capsys):
    folder, flags = world
    bad = folder / "bad"
    data.write_world(bad, data.draw_aerial, images=20, test=4, seed=6)
    (bad / "images/000003.png").write_bytes(b"not a picture")
    monkeypatch.chdir(tmp_path)
    root = ["--dataset", "precomp", "--data-root"]
    for mistake, words in ((["--method", "none", *flags], "nothing to train"),
                           (["--dataset", "ucm"], "needs --data-root"),
                           ([*root, "nowhere", "--model", folder / "scratch"], "nowhere does not exist"),
                           ([*root, bad, "--model", folder / "scratch", "--out", folder / "new"], "000003.png"),
                           ([*flags[:4], "--model", "nothing.pt"], "nothing.pt"),
                           ([*flags[:4], "--model", "tiny"], "--train all"),
                           ([*flags, "--bottleneck", "0"], "bottleneck"),
                           ([*flags, "--method", "bitfit", "--rank", "3"], "rank"),
                           ([*flags, "--resume"], "--resume needs --out"),
                           ([*flags, "--image-size", "1", "2", "3"], "--image-size"),
                           ([*flags, "--out", folder / "scratch"], "already holds a run"),
                           ([*flags, "--epochs", "0"], "--epochs 0: 1 to"),
                           ([*flags, "--loss", "hinge"], "invalid choice"),
                           ([*flags, "--dataset", "coco"], "invalid choice")):
        code, error = command(monkeypatch, capsys, train, *mistake)
        assert code == 2 and words in error and "Traceback" not in error, (mistake, error)
        assert error.splitlines()[-1].startswith("train.py: error:") and words in error.splitlines()[-1], error
        assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_resume(world, tmp_path):
    _, flags = world
    run(*flags, "--out", tmp_path / "run")
    with pytest.raises(ValueError, match="--lr 0.1: the run .* has 0.0002; leave the flag out"):
        run(*flags, "--out", tmp_path / "run", "--resume", "--lr", 0.1)
    with pytest.raises(FileNotFoundError, match="runn/last.pt is not there: repeat the flags that the run began with"):
        run("--out", tmp_path / "runn", "--resume")


def test_a_run_whose_data_grew_is_not_resumed(world, tmp_path):
    _, flags = world
    data.write_world(tmp_path / "more", data.draw_aerial, images=50, test=12, seed=5)
    run(*flags, "--epochs", "1", "--out", tmp_path / "run")
    with pytest.raises(ValueError, match="run/last.pt does not fit this run: .* the data has changed"):
        run("--out", tmp_path / "run", "--resume", "--data-root", tmp_path / "more")
    data.write_world(tmp_path / "others", data.draw_aerial, images=36, test=12, seed=6)     # as many, others
    with pytest.raises(ValueError, match="run/last.pt does not fit this run: .* the data has changed"):
        run("--out", tmp_path / "run", "--resume", "--data-root", tmp_path / "others")


def test_a_resumed_run_shows_its_own_settings_in_help(tmp_path, monkeypatch, capsys):
    torch.save({"settings": vars(train.parse([])) | {"lr": 0.00321}}, tmp_path / "last.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--resume", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    assert "0.00321" in capsys.readouterr().out


def test_a_run_is_resumed_on_its_device_if_that_is_there(tmp_path, monkeypatch):
    settings = vars(train.parse([])) | {"device": "cuda:1"}
    torch.save({"settings": settings}, tmp_path / "last.pt")
    flags = ["--resume", "--out", str(tmp_path)]
    assert train.parse(flags).device == train.parse([]).device or "cuda:1" in eval.DEVICES
    monkeypatch.setattr(eval, "DEVICES", ["cpu", "cuda", "cuda:0", "cuda:1"])
    assert train.parse(flags).device == "cuda:1"


def test_a_clip_from_scratch_has_the_activation_asked_for():
    for flags, activation in (([], "quick_gelu"), (["--activation", "gelu"], "gelu")):
        args = train.parse(["--model", "tiny", "--method", "none", "--train", "all", "--device", "cpu", *flags])
        assert train.build(args, ["two boats"])[0].config.activation == activation


def test_an_adapter_on_another_clip_is_refused(world, tmp_path, monkeypatch, capsys):
    folder, flags = world
    run(*flags, "--out", tmp_path / "run")
    saved = state(tmp_path / "run/best.pt")
    torch.save(saved | {"fingerprint": "0" * 16}, tmp_path / "best.pt")
    code, error = command(monkeypatch, capsys, eval, tmp_path / "best.pt")
    assert code == 2 and "trained on other weights" in error
    code, error = command(monkeypatch, capsys, eval, folder / "aerial")
    assert code == 2 and len(error.splitlines()) == 1


# ---------------------------------------------------------------- pieces of the loop

def test_the_papers_recipe_is_the_default_on_its_data():
    args = train.parse(["--dataset", "ucm", "--data-root", "x"])
    assert (args.model, args.method, args.loss, args.train) == ("ViT-B/32", "mrs", "hmmc", "method")
    assert (args.lr, args.epochs, args.batch_size, args.augment) == (2e-4, 30, 16, "none")
    assert (args.epoch_over, args.margin, args.weight_decay) == ("captions", 0.2, 0.0)
    rates = [train.learning_rate(args, 10 * epoch, 10) for epoch in range(30)]
    assert rates == pytest.approx([2e-4] * 19 + [1.4e-4] * 11)


def test_warm_up_then_cosine():
    args = train.parse(["--epochs", "4", "--lr", "1", "--warmup", "1", "--schedule", "cosine"])
    rates = [train.learning_rate(args, step, 2) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0] + [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)])


def small_clip():
    torch.manual_seed(0)
    return clip.CLIP(clip.CLIPConfig(32, 32, 16, 64, 2, 10, 50, 64, 2))


TOKENS = torch.tensor([[48, 5, 6, 49, 0, 0], [48, 7, 49, 0, 0, 0], [48, 3, 9, 2, 49, 0]])


def test_two_views_in_one_forward_are_two_forwards():
    model, images = small_clip(), torch.randn(3, 3, 32, 32)
    for tower, inputs, encode in ((model.visual, images, model.encode_image), (model.text, TOKENS, model.encode_text)):
        torch.manual_seed(7)
        first, second = (F.normalize(x, dim=-1) for x in train.encode_views(tower, inputs, 2, 0.2))
        assert torch.allclose(first, encode(inputs), atol=1e-6)
        torch.manual_seed(7)
        x = F.dropout(tower.embed(inputs), 0.2)
        expected = F.normalize(tower.pool(tower.transformer(x), inputs), dim=-1)
        assert torch.allclose(second, expected, atol=1e-6)
        assert not torch.allclose(first, second, atol=1e-3)


def test_frozen_weights_in_bf16_change_nothing_under_autocast():
    images, outputs = torch.randn(3, 3, 32, 32), []
    for freeze in (lambda model: None, train.freeze_in_bf16):
        model = small_clip()
        adapters.add_method(model, "lora")
        freeze(model)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs.append((model.encode_image(images), model.encode_text(TOKENS)))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert model.visual.transformer.resblocks[0].inner.mlp.c_fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("loss, views", [("contrastive", 1), ("hmmc", 2)])
def test_captions_of_any_order_and_length_are_encoded_as_each_alone(loss, views):
    model, images = small_clip(), torch.randn(3, 3, 32, 32)
    args = train.argparse.Namespace(loss=loss, precision="fp32")
    features = train.encode(model, args, images, TOKENS, dropout=0.0)
    assert len(features) == 2 * views
    for image, text in zip(features[::2], features[1::2]):
        for n in range(3):
            assert torch.allclose(image[n], model.visual(images[n:n + 1])[0], atol=1e-5)
            assert torch.allclose(text[n], model.text(TOKENS[n:n + 1])[0], atol=1e-5)


@pytest.mark.parametrize("what", ["method", "backbone", "all"])
def test_what_learns(what):
    model = small_clip()
    own = {name for name, _ in model.named_parameters()}
    adapters.add_method(model, "prompts")
    train.choose_trained(model, what)
    learns = {name.replace("inner.", "") for name, p in model.named_parameters() if p.requires_grad}
    added = {name.replace("inner.", "") for name in adapters.trainable_state(model)}
    assert learns == {"method": added, "backbone": own, "all": own | added}[what]
    assert not own & added


# ---------------------------------------------------------------- prompt decoupling

@pytest.fixture(scope="module")
def people(world, tmp_path_factory):
    """Drawn people in RSTPReid's layout, and stage 1 of prompt decoupling on the CLIP of `world`."""
    folder = tmp_path_factory.mktemp("people")
    data.write_people(folder / "people", people=20, views=2, seed=3)
    flags = ["--dataset", "RSTPReid", "--data-root", folder / "people", "--batch-size", "16", "--epochs", "1",
             "--warmup", "0"]
    stage_1 = [*flags, "--model", world[0] / "scratch", "--image-size", "96", "48"]
    run(*stage_1, "--out", folder / "stage1")
    return folder, flags, stage_1


def prompts_of(path):
    return state(path / "best.pt")["trained"]


def test_stage_1_changes_all_prompts_and_nothing_of_clip(world, people):
    folder, _, _ = people
    model, _, settings = eval.load_run(folder / "stage1")
    assert (settings["method"], settings["train"], settings["loss"]) == ("prompts", "method", "sdm")
    start = clip.load_clip(world[0] / "scratch", (96, 48))
    torch.manual_seed(settings["seed"] * 2 ** 32)       # what `prepare` draws the prompts from
    adapters.add_method(start, "prompts")
    before, after = adapters.trainable_state(start), prompts_of(folder / "stage1")
    assert list(after) == [name for name in before] and len(after) == 2 + 2        # blocks of the tiny CLIP
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert state(folder / "stage1/last.pt")["learned"].keys() == after.keys()
    for name, value in start.openai_state_dict().items():
        assert torch.equal(value, model.openai_state_dict()[name]), name


def test_a_method_that_widens_the_features_trains_and_searches(people, tmp_path):
    folder, _, stage_1 = people
    run(*stage_1, "--method", "linear-probe", "--loss", "sdm+id", "--out", tmp_path / "probe")
    model, tokenizer, _ = eval.load_run(tmp_path / "probe")
    D = model.config.embed_dim
    assert state(tmp_path / "probe/last.pt")["learned"]["classifier.weight"].shape[1] == 2 * D
    texts = ["a man with a red bag", "woman", "a man with a red bag"]
    encoded = eval.encode_texts(model, tokenizer(texts))
    for text, row in zip(texts, encoded):
        assert torch.allclose(row, model.encode_text(tokenizer([text]))[0], atol=1e-6)
    paths = eval.find_pictures(folder / "people")[:3]
    for _ in range(2):      # encoded, and from the file
        assert eval.encode_files(model, paths, tmp_path / "features.pt")[1].shape == (3, 2 * D)


def test_stage_2_keeps_the_prompts_and_changes_clip(world, people):
    folder, flags, _ = people
    rows = run(*flags, "--init", folder / "stage1", "--train", "backbone", "--lr", "1e-3", "--out", folder / "stage2")
    settings = state(folder / "stage2/best.pt")["settings"]
    assert (settings["method"], settings["loss"], settings["image_size"]) == ("prompts", "sdm+id", (96, 48))
    before, after = prompts_of(folder / "stage1"), prompts_of(folder / "stage2")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    start, end = clip.load_clip(world[0] / "scratch", (96, 48)), clip.load_clip(folder / "stage2")
    same = [name for name, value in start.openai_state_dict().items() if torch.equal(value, end.state_dict().get(
        name, end.openai_state_dict()[name]))]
    assert same == ["logit_scale"]                      # SDM's temperature is fixed
    assert set(rows[-1][3]) == {"R1", "R5", "R10", "mAP", "mINP"}
    assert not any("classifier" in name for name in state(folder / "stage2/best.pt")["state_dict"])


def test_a_run_that_trains_the_method_of_another_on_is_tested_and_loads(people, tmp_path, capsys):
    folder, flags, _ = people
    run(*flags, "--init", folder / "stage1", "--lr", "1e-3", "--out", tmp_path / "on")
    assert f"method  prompts: from {folder / 'stage1'}; method learns" in capsys.readouterr().out
    model, _, _ = eval.load_run(tmp_path / "on")
    before, after = prompts_of(folder / "stage1"), adapters.trainable_state(model)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)


def test_few_epochs_of_a_recipe_with_a_long_warmup_are_all_warmup(people):
    folder, _, _ = people
    args = train.parse(["--dataset", "RSTPReid", "--data-root", "x", "--train", "backbone", "--epochs", "3"])
    assert (args.epochs, args.warmup) == (3, 3)


def test_stage_2_starts_where_stage_1_ended(people, tmp_path):
    folder, flags, _ = people
    first = run(*flags, "--init", folder / "stage1", "--train", "backbone", "--lr", "0", "--out", tmp_path / "run")
    metrics = json.loads((folder / "stage1/metrics.json").read_text())["rows"]
    assert first[-1][3] == metrics[-1][3]


def test_without_val_the_last_epoch_is_taken_and_without_test_val_is_measured(world, tmp_path, capsys):
    folder, flags = world
    names = sorted((folder / "aerial/images").iterdir())
    for splits, said in (("train test", "no val split: the last epoch"),
                         ("train val", "no test split: figures are of val")):
        lines = [f"{name}\ta picture of {n} things\t{splits.split()[n % 4 == 0]}" for n, name in enumerate(names)]
        (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n")
        out = tmp_path / splits.replace(" ", "-")
        run("--dataset", "folder", "--data-root", tmp_path, *flags[4:], "--lr", "1e-2", "--out", out)
        printed = capsys.readouterr().out
        assert said in printed
        assert printed.endswith(f"next: python eval.py {out}{' --split val' * ('test' not in splits)}\n")
        assert (out / "curve.png").is_file()
        assert state(out / "best.pt")["epoch"] in ((2,) if "test" in splits else (1, 2))
    last = state(tmp_path / "train-test/last.pt")["learned"]
    assert all(torch.equal(last[name], value) for name, value in prompts_of(tmp_path / "train-test").items())


def test_what_contradicts_the_run_in_init_is_refused(people, tmp_path, monkeypatch, capsys):
    folder, flags, _ = people
    code, error = command(monkeypatch, capsys, train, *flags, "--init", folder / "stage1", "--method", "mrs")
    assert code == 2 and "--method mrs: the run that this one goes on from has prompts" in error
    code, error = command(monkeypatch, capsys, train, *flags, "--init", tmp_path / "nothing")
    assert code == 2 and "nothing" in error and "Traceback" not in error


def test_a_loss_on_persons_needs_persons(world, tmp_path, monkeypatch, capsys):
    _, flags = world
    code, error = command(monkeypatch, capsys, train, *flags, "--loss", "sdm", "--out", tmp_path / "run")
    assert code == 2 and "needs person ids" in error and not (tmp_path / "run").exists()


def test_pairs_of_one_person_picture_or_caption_are_no_negatives(people, tmp_path, monkeypatch):
    folder, _, stage_1 = people
    shutil.copytree(folder / "people", tmp_path / "people")
    entries = json.loads((tmp_path / "people/data_captions.json").read_text())
    for entry in entries[::3]:
        entry["captions"][0] = "somebody"       # a caption that several persons share
    (tmp_path / "people/data_captions.json").write_text(json.dumps(entries))
    pairs, seen, contrastive = data.read("RSTPReid", tmp_path / "people", "train"), [], losses.contrastive_loss

    def spy(image, text, scale, same):
        seen.append(same)
        return contrastive(image, text, scale, same)
    monkeypatch.setattr(losses, "contrastive_loss", spy)
    run(*stage_1, "--data-root", tmp_path / "people", "--loss", "contrastive", "--mask-same", "--out", tmp_path / "run")
    rows = data.epoch_order(pairs, "captions", 0, 0)[:16]
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            image_a, image_b = pairs.image_of_caption[a], pairs.image_of_caption[b]
            assert seen[0][i, j] == (pairs.ids[image_a] == pairs.ids[image_b] or pairs.captions[a] == pairs.captions[b])
    assert seen[0].sum() > 16


def test_groups_of_re_identification():
    args = train.parse(["--dataset", "RSTPReid", "--data-root", "x", "--train", "backbone", "--method", "prompts"])
    assert (args.loss, args.epochs, args.lr, args.warmup, args.weight_decay) == ("sdm+id", 60, 1e-5, 5, 4e-5)
    shapes = {"block.weight": (2, 2), "block.bias": (2,), "ln.weight": (2,), "classifier.weight": (3, 2),
              "classifier.bias": (3,)}
    learned = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    optimizer = train.make_optimizer(learned, {"classifier.weight", "classifier.bias"}, args)
    found = {name: (group["factor"], group["weight_decay"]) for group in optimizer.param_groups
             for name, p in learned.items() if any(p is other for other in group["params"])}
    assert found == {"block.weight": (1, 4e-5), "block.bias": (2, 0), "ln.weight": (1, 0),
                     "classifier.weight": (5, 4e-5), "classifier.bias": (5, 0)}


# ---------------------------------------------------------------- pieces and processes

@pytest.mark.parametrize("method, sizes", [("adaptformer", dict(bottleneck=8, dropout=0.5)), ("coop", {}), ("vpt", {})])
def test_pieces_give_the_gradient_of_the_whole_batch_with_the_same_dropout(method, sizes):
    model, images = small_clip().train(), torch.randn(3, 3, 32, 32)
    adapters.add_method(model, method, **sizes)
    for parameter in model.parameters():        # the zero init would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    args = train.argparse.Namespace(loss="hmmc", margin=0.2, device="cpu", precision="fp32")
    pieces = list(zip(images.split(2), TOKENS.split(2)))
    learned = [p for p in model.parameters() if p.requires_grad]

    def encode(piece):
        return train.encode(model, args, *piece)

    def loss_of(features):
        return train.compute_loss(args, features, 10.0)
    loss, parts = losses.backward(encode, loss_of, pieces, lambda n: torch.manual_seed(5 + n))
    gradients = [p.grad.clone() for p in learned]
    model.zero_grad()
    whole = []
    for n, piece in enumerate(pieces):          # the oracle: everything in one graph
        torch.manual_seed(5 + n)
        whole.append(encode(piece))
    expected, _ = loss_of([torch.cat(rows) for rows in zip(*whole)])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and set(parts) == {
        "image-text", "image-image", "text-text"}
    for gradient, parameter in zip(gradients, learned):
        assert torch.allclose(gradient, parameter.grad, atol=1e-5) and parameter.grad.abs().sum() > 0


def test_a_run_in_pieces_is_the_run(world, tmp_path):
    _, flags = world
    flags = [*flags, "--loss", "contrastive", "--dropout", "0", "--precision", "fp32", "--lr", "1e-3", "--epochs", "1"]
    run(*flags, "--out", tmp_path / "whole")
    run(*flags, "--chunk", "5", "--out", tmp_path / "pieces")
    whole, pieces = (state(tmp_path / name / "last.pt")["learned"] for name in ("whole", "pieces"))
    assert all(torch.allclose(whole[name], pieces[name], atol=1e-4) for name in whole)


def one_of_two(number, port, runs):
    """A process of two, as torchrun would start it; HMMC's second view without dropout, to compare."""
    os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train.encode.__defaults__ = (0.0,)
    for flags in runs:
        run(*flags)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two(world, people, tmp_path_factory):
    """A folder with a run of one process and of two for each loss; 100 captions in batches of 20."""
    folder = tmp_path_factory.mktemp("processes")
    data.write_world(folder / "aerial", data.draw_aerial, images=27, test=2, seed=8)
    pairs = ["--dataset", "precomp", "--data-root", folder / "aerial", "--epochs", "1", "--dropout", "0",
             "--batch-size", "20", "--model", world[0] / "scratch"]
    runs = []
    for loss, flags in (("hmmc", pairs), ("contrastive", pairs), ("sdm", people[2])):
        runs.append([*flags, "--loss", loss, "--precision", "fp32", "--lr", "1e-3", "--augment", "none",
                     "--device", "cpu", "--out", folder / f"{loss}-2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.encode, "__defaults__", (0.0,))
        for flags in runs:
            run(*flags[:-1], folder / flags[-1].name.replace("-2", "-1"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["torch._dynamo", "test_train"])
    pair = [start.Process(target=one_of_two, args=(number, port, runs)) for number in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("loss", ["hmmc", "contrastive", "sdm"])
def test_two_processes_are_one_with_the_whole_batch(one_and_two, loss):
    one, two = (state(one_and_two / f"{loss}-{n}" / "last.pt") for n in (1, 2))
    assert one["step"] == two["step"] > 1
    assert one["history"][0]["loss"] == pytest.approx(two["history"][0]["loss"], rel=1e-5)
    assert all(torch.allclose(one["learned"][name], two["learned"][name], atol=1e-5) for name in one["learned"])
    moments = [[p["exp_avg"] for p in run["optimizer"]["state"].values()] for run in (one, two)]
    assert all(torch.allclose(a, b, rtol=0.01, atol=1e-4 * a.abs().max()) for a, b in zip(*moments))    # not halved
    one, two = (json.loads((one_and_two / f"{loss}-{n}" / "metrics.json").read_text())["rows"] for n in (1, 2))
    assert two[-1][3] == pytest.approx(one[-1][3], abs=0.01)


def test_one_of_two_processes_writes(one_and_two):
    lines = (one_and_two / "hmmc-2/log.txt").read_text()
    assert lines.count("epoch   1/1") == 1 and "2 processes" in lines
