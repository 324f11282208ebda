"""What breaks, and what happens then. The faults are real ones, killed processes, full disks, broken files: all but a
GPU without memory.

| fault | what happens | test |
|---|---|---|
| kill -9, at any moment | `--resume` ends as the unbroken run, to the bit | `test_kill_9_...`, `test_killed_...` |
| Ctrl-C in training | saves, says how to go on, exit code 130; a second one ends at once | `test_ctrl_c_...` |
| Ctrl-C before that or in the test | one line, exit code 130 | `test_ctrl_c_while_...`, `test_ctrl_c_in_...` |
| disk full | one line, exit code 2; the last checkpoint is whole, nothing half-written stays | `test_a_full_disk_...` |
| folder cannot be made | one line, exit code 2 | `test_a_folder_that_cannot_be_made...` |
| two runs into one folder | the second is refused, also when both start at once | `test_two_runs_...` |
| loss or gradient NaN or infinite | stops before the step; names step, pictures, checkpoint | `test_a_loss_...` |
| batches of one, too large, all captions equal | trains on, the loss stays finite | `test_odd_batches_...` |
| fewer pairs in a batch than processes | one line, exit code 2 | `test_more_processes_...` |
| the memory of the GPU is used up | one line with what to try, exit code 2 | `test_a_full_gpu_...` |
| a checkpoint cut off, foreign, of another run | one line that names it, exit code 2 | `test_a_wrong_...` |
| a wrong flag | one line with what is allowed, exit code 2, nothing written | `test_wrong_flags_...` |
| no network, no home, no data | `--help` works | `test_help_...` |
| a collapsed model | scores chance | `test_a_collapsed_model_...` |
| a model that gives NaN | evaluation refuses it | `test_similarities_...` |
| pictures missing, empty, cut off, foreign, too large | all named before training; `--skip-bad` | test_data.py |
| captions empty | left out, with file and line | test_data.py |
| captions: other counts, Latin-1, names twice or out of the folder | one line with file and line | test_data.py |
| line ends of Windows, BOM, tabs, emoji, 10 000 words, odd names | read as they are meant | test_data.py |
| 16 bit, palette, CMYK, alpha, animation | read as OpenAI's pipeline does, the first frame | test_data.py |
| no val, no test split | the last epoch is taken, val is measured; it says so | test_train.py |
| 2000 steps | memory and open files stay as they are | `test_soak`; all of it: `SOAK=1 pytest -k soak` |

Runs that are broken from outside are processes of their own, forked from one that has imported torch already.
"""
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import clip
import data
import eval
import train

ROOT = Path(__file__).resolve().parents[1]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch._dynamo", "test_faults"])      # what the first optimiser imports, too


# ---------------------------------------------------------------- runs and faults

@pytest.fixture(scope="module", autouse=True)
def server():
    """Start the process that all others are forked from, where it finds the modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()


def child(flags, output, faults):
    """`python train.py flags` in this process, after every one of `faults` was called."""
    os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())        # its own one is a semaphore, which would outlive kill -9
    sys.argv = ["train.py", *flags]
    for fault in faults:
        fault()
    train.main()


def start(*flags, faults=()):
    """Start a run in a process of its own -> (process, the end of a pipe that its output comes through)."""
    output, entry = processes.Pipe(duplex=False)
    process = processes.Process(target=child, args=([str(flag) for flag in flags], entry, faults))
    process.start()
    entry.close()
    return process, output


def read(output, until=None):
    """The output of a run, to its end or until these words were read."""
    text = b""
    while not (until and until.encode() in text) and (more := os.read(output.fileno(), 4096)):
        text += more
    return text.decode()


def outcome(*flags, faults=()):
    """Exit code and output of a run in a process of its own; the code after kill -9 is -9."""
    process, output = start(*flags, faults=faults)
    text = read(output)
    process.join()
    return process.exitcode, text


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(n, module, name, action):
    """Fault: `action()` right before the n-th call of module.name."""
    original, calls = getattr(module, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            action()
        return original(*args, **kwargs)
    setattr(module, name, broken)


def die_before(n, function):
    """Fault: kill -9 right before the n-th call of a function, such as "train.save_last"."""
    module, name = function.split(".")
    before(n, sys.modules[module], name, die)


def sleep():
    print("asleep", flush=True)
    time.sleep(60)


def sleep_before(n, function):
    """Fault: a minute passes before the n-th call of a function."""
    module, name = function.split(".")
    before(n, sys.modules[module], name, sleep)


def half_written(n):
    """Fault: kill -9 in the middle of the n-th checkpoint that is written."""
    original, calls = torch.save, []

    def save(content, path):
        calls.append(1)
        original(content, path)
        if len(calls) == n:
            os.truncate(path, path.stat().st_size // 2)
            die()
    torch.save = save


def save_every_step():
    train.SAVE_EVERY = -1


def full_disk(name, n):
    """Fault: when `name` is saved for the n-th time, and from then on, no file can grow beyond 100 bytes."""
    original, calls = train.save, []

    def save(path, content):
        calls.extend([1] * (path.name == name))
        if len(calls) == n:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        original(path, content)
    train.save = save


def command(monkeypatch, capsys, *flags):
    """Exit code and last line of the error output of `python train.py flags`; it is the only one but argparse's."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and all(before.startswith("usage:") for before in usage)
    return stop.value.code, line


def run(*flags):
    return train.train([str(flag) for flag in flags])


def state(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_end(a, b):
    """Whether two runs ended alike in all that they left behind."""
    ends = []
    for folder in (a, b):
        last, best = state(folder / "last.pt"), state(folder / "best.pt")
        for checkpoint in (last, best):
            del checkpoint["settings"]      # they name the folder
        del last["seconds"]
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        ends.append([last, best, rows, (folder / "log.csv").read_text(), sorted(p.name for p in folder.iterdir())])
    return same(*ends)


def save_clip(path, captions, **changes):
    """A CLIP of two blocks with random weights and its vocabulary, in one file, as --model takes it."""
    tokenizer = clip.Tokenizer.train(captions, 100)
    torch.manual_seed(0)
    model = clip.CLIP(clip.CLIPConfig(16, 32, 16, 128, 1, 32, tokenizer.vocab_size, 128, 1))
    weights = {name: p.detach().clone() for name, p in model.openai_state_dict().items()}
    torch.save(dict(state_dict=weights | changes, merges=tokenizer.merges), path)


def captions_of(folder):
    return (folder / "aerial/train_caps.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten drawn scenes, eight of them and their 40 captions to train on, and flags for runs on them."""
    folder = tmp_path_factory.mktemp("world")
    data.write_world(folder / "aerial", data.draw_aerial, images=14, test=4, seed=5, size=32)
    save_clip(folder / "clip.pt", captions_of(folder))
    return folder, ["--dataset", "precomp", "--data-root", folder / "aerial", "--model", folder / "clip.pt",
                    "--epochs", "2", "--batch-size", "8", "--lr", "1e-3", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def people(world, tmp_path_factory):
    """Flags for runs on drawn people, with sdm+id and its classifier."""
    folder = tmp_path_factory.mktemp("people")
    data.write_people(folder / "people", people=10, views=2, seed=3, size=(32, 32))
    return folder, ["--dataset", "RSTPReid", "--data-root", folder / "people", "--model", world[0] / "clip.pt",
                    "--image-size", "48", "32", "--train", "all", "--epochs", "2", "--batch-size", "8", "--warmup", "0",
                    "--lr", "1e-3", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def unbroken(world):
    """Flags for a run with all that draws random numbers, its folder when nothing broke it, and how long that took."""
    folder, flags = world
    flags = [*flags, "--train", "all", "--augment", "aerial", "--mask-same"]       # and the dropout of MRS and HMMC
    process, output = start(*flags, "--out", folder / "unbroken")
    read(output, until="run    ")
    began = time.time()
    read(output), process.join()
    assert process.exitcode == 0
    return flags, folder / "unbroken", time.time() - began


# ---------------------------------------------------------------- kill -9

def test_kill_9_at_random_moments_and_resume_end_as_the_unbroken_run(unbroken, tmp_path):
    flags, whole, seconds = unbroken
    codes = []
    for _ in range(5):
        process, output = start(*flags, "--out", tmp_path / "run", "--resume", faults=[save_every_step])
        read(output, until="run    ")
        process.join(random.random() * seconds)
        process.kill()
        read(output), process.join()
        codes.append(process.exitcode)
    assert -9 in codes
    assert outcome(*flags, "--out", tmp_path / "run", "--resume")[0] == 0
    assert same_end(tmp_path / "run", whole)


def test_killed_at_the_worst_moments_a_run_still_ends_as_the_unbroken_one(unbroken, tmp_path):
    flags, whole, _ = unbroken
    for moment, *faults in (
            ("before anything was saved", partial(die_before, 3, "train.train_step")),
            ("in the first last.pt, in the middle of an epoch", save_every_step, partial(half_written, 1)),
            ("between a last.pt and its renaming", save_every_step, partial(die_before, 8, "os.replace")),
            ("in the middle of an epoch", save_every_step, partial(die_before, 2, "train.train_step")),
            ("between the last step of an epoch and its validation", save_every_step,
             partial(die_before, 1, "train.validate")),
            ("in best.pt", partial(half_written, 1)),
            ("between best.pt and last.pt", partial(die_before, 1, "train.save_last")),
            ("in the second epoch", partial(die_before, 3, "train.train_step")),
            ("after the last epoch", partial(die_before, 1, "train.test")),
            ("at the end of the test", partial(die_before, 1, "eval.plot_curve"))):
        code, text = outcome(*flags, "--out", tmp_path / "run", "--resume", faults=faults)
        assert code == -9, (moment, code, text)
    assert outcome(*flags, "--out", tmp_path / "run", "--resume")[0] == 0
    assert same_end(tmp_path / "run", whole)


def test_killed_with_a_classifier_a_run_still_ends_as_the_unbroken_one(people, tmp_path):
    _, flags = people
    assert outcome(*flags, "--out", tmp_path / "whole")[0] == 0
    faults = [save_every_step, partial(die_before, 6, "train.train_step")]
    assert outcome(*flags, "--out", tmp_path / "run", faults=faults)[0] == -9
    assert outcome(*flags, "--out", tmp_path / "run", "--resume")[0] == 0
    assert "classifier.weight" in state(tmp_path / "run/last.pt")["learned"]
    assert same_end(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- ctrl-c

def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path):
    _, flags = world
    process, output = start(*flags, "--epochs", "100000", "--out", tmp_path / "run")
    read(output, until="epoch   2")
    os.kill(process.pid, signal.SIGINT)
    text = read(output)
    process.join()
    step = state(tmp_path / "run/last.pt")["step"]
    assert process.exitcode == 130 and step >= 10 and "Traceback" not in text
    assert text.splitlines()[-1] == f"stopped at step {step}; to go on: python train.py --resume --out {tmp_path}/run"


def test_ctrl_c_twice_ends_at_once(world, tmp_path):
    _, flags = world
    process, output = start(*flags, "--out", tmp_path / "run", faults=[partial(sleep_before, 3, "train.compute_loss")])
    read(output, until="asleep")
    os.kill(process.pid, signal.SIGINT)
    process.join(0.3)
    assert process.exitcode is None         # the first one waits for the end of the step
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == -signal.SIGINT


def test_ctrl_c_in_the_test_is_one_line(world, tmp_path):
    _, flags = world
    process, output = start(*flags, "--out", tmp_path / "run", faults=[partial(sleep_before, 1, "eval.plot_curve")])
    read(output, until="asleep\n")
    os.kill(process.pid, signal.SIGINT)
    text = read(output)
    process.join()
    assert process.exitcode == 130 and text.strip() == "stopped; --resume goes on from what was saved"


def slow_pictures():
    """Fault: every picture takes a fifth of a second to read."""
    for n in range(1, 20):
        before(n, data, "decode", partial(time.sleep, 0.2))
    before(1, data, "decode", partial(print, "reading", flush=True))


def test_ctrl_c_while_pictures_are_read_is_one_line(world, tmp_path):
    _, flags = world
    process, output = start(*flags, "--out", tmp_path / "run", faults=[slow_pictures])
    read(output, until="reading\n")
    os.kill(process.pid, signal.SIGINT)
    text = read(output)
    process.join()
    assert process.exitcode == 130 and text.strip() == "stopped; --resume goes on from what was saved"
    assert not (tmp_path / "run").exists() and list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- disks and folders

@pytest.mark.parametrize("name, epoch", [("best.pt", 1), ("last.pt", 1), ("last.pt", 2), ("log.csv", 2),
                                         ("log.txt", 1), ("metrics.json", 2)])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(world, tmp_path, name, epoch):
    _, flags = world
    n = {"log.txt": 2, "metrics.json": 1}.get(name, epoch)
    code, text = outcome(*flags, "--out", tmp_path / "run", faults=[partial(full_disk, name, n)])
    assert code == 2 and "Traceback" not in text
    assert f"train.py: error: cannot write {tmp_path / 'run' / name}: " in text.splitlines()[-1]
    assert not list((tmp_path / "run").glob("*.partial"))
    for checkpoint in (tmp_path / "run").glob("*.pt"):
        state(checkpoint)
    if epoch == 2:
        assert eval.load_run(tmp_path / "run")[2]["epochs"] == 2
        assert state(tmp_path / "run/last.pt")["step"] == (10 if name == "metrics.json" else 5)


def test_a_folder_that_cannot_be_made_is_one_line(world, tmp_path, monkeypatch, capsys):
    _, flags = world
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file/run", tmp_path / "file/deep/run", "/proc/run", "/dev/null/run"):
        assert command(monkeypatch, capsys, *flags, "--out", out)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def meet(barrier):
    """Fault: a run takes its folder at the same moment as the other one."""
    before(1, train, "take_folder", barrier.wait)


def test_two_runs_that_start_at_once_do_not_share_a_folder(world, tmp_path):
    _, flags = world
    (tmp_path / "run").mkdir()              # made by hand, and empty: this is no run
    barrier = processes.Barrier(2)
    runs = [start(*flags, "--epochs", "1", "--out", tmp_path / "run", faults=[partial(meet, barrier)])
            for _ in range(2)]
    texts = [read(output) for _, output in runs]
    codes = [process.join() or process.exitcode for process, _ in runs]
    assert sorted(codes) == [0, 2]
    assert texts[codes.index(2)] == (f"train.py: error: another run has just taken {tmp_path / 'run'}: "
                                     "give another --out\n")
    assert (tmp_path / "run/log.txt").read_text() + "\n" == texts[codes.index(0)] + "\n"


def test_two_runs_one_after_the_other_do_not_share_a_folder(world, unbroken, monkeypatch, capsys):
    _, flags = world
    code, line = command(monkeypatch, capsys, *flags, "--out", unbroken[1])
    assert code == 2 and "already holds a run: add --resume" in line


# ---------------------------------------------------------------- training

def test_a_loss_that_is_not_finite_stops_before_the_step(world, tmp_path, monkeypatch, capsys):
    folder, flags = world
    pairs = data.read("precomp", folder / "aerial", "train")
    order = data.epoch_order(pairs, "captions", 0, 0)
    first = {}                              # token id -> the step that it comes in for the first time
    for n, row in enumerate(clip.Tokenizer(folder / "clip.pt")(pairs.captions, 32)[order].tolist()):
        for token in row:
            first.setdefault(token, n // 8)
    token, step = max(first.items(), key=lambda item: item[1])
    weight = clip.load_clip(folder / "clip.pt").text.token_embedding.weight.detach().clone()
    weight[token] = math.inf
    save_clip(tmp_path / "broken.pt", captions_of(folder), **{"token_embedding.weight": weight})
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    code, line = command(monkeypatch, capsys, *flags, "--model", tmp_path / "broken.pt", "--out", tmp_path / "run")
    assert code == 2 and re.search(fr"the loss is nan and its gradient nan at step {step}, on pictures .*png", line)
    batch = {pairs.images[pairs.image_of_caption[m]] for m in order[8 * step:8 * step + 8]}
    named = re.findall(r"\S+\.png", line)
    assert set(named) <= batch and len(named) == min(4, len(batch))
    assert f"{tmp_path / 'run'}/last.pt" in line and "a third of --lr 0.001, --precision fp32" in line
    saved = state(tmp_path / "run/last.pt")
    assert saved["step"] == step > 0 and all(p.isfinite().all() for p in saved["learned"].values())


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Flags for runs on pictures of one's own, four of them to train on, with the same caption for all."""
    folder = tmp_path_factory.mktemp("alike")
    data.write_world(folder / "aerial", data.draw_aerial, images=6, test=1, seed=9, size=32)
    splits = ["train"] * 4 + ["val", "test"]
    lines = [f"aerial/images/{n:06d}.png\ta boat\t{split}\n" for n, split in enumerate(splits, 1)]
    (folder / "captions.tsv").write_text("".join(lines))
    return ["--dataset", "folder", "--data-root", folder]


@pytest.mark.parametrize("loss", ["hmmc", "hmmc-softmax", "contrastive"])
@pytest.mark.parametrize("batch, steps", [("1", 8), ("5", 2), ("1000", 1), ("captions alike", 1)])
def test_odd_batches_leave_the_loss_finite(world, alike, tmp_path, loss, batch, steps):
    flags = [*alike, "--mask-same"] if batch == "captions alike" else ["--batch-size", batch]
    run(*world[1], *flags, "--loss", loss, "--epoch-over", "images", "--epochs", "1", "--out", tmp_path / "run")
    saved = state(tmp_path / "run/last.pt")
    assert saved["step"] == steps and [row["epoch"] for row in saved["history"]] == [1]
    assert all(p.isfinite().all() for p in saved["learned"].values())
    if batch in ("1", "captions alike"):    # there is no negative
        assert saved["history"][0]["loss"] == 0
    else:
        assert 0 < saved["history"][0]["loss"] < math.inf


def test_a_learning_rate_of_0_changes_nothing(world, tmp_path):
    folder, flags = world
    run(*flags, "--method", "none", "--train", "backbone", "--lr", "0", "--weight-decay", "1",
        "--out", tmp_path / "run")
    assert same(state(tmp_path / "run/best.pt")["state_dict"], state(folder / "clip.pt")["state_dict"])


def test_the_temperature_stays_clamped(world, tmp_path):
    folder, flags = world
    save_clip(tmp_path / "hot.pt", captions_of(folder), logit_scale=torch.tensor(50.0))
    run(*flags, "--model", tmp_path / "hot.pt", "--method", "none", "--train", "backbone", "--loss", "contrastive",
        "--lr", "1", "--out", tmp_path / "run")
    assert state(tmp_path / "run/last.pt")["learned"]["logit_scale"].item() == pytest.approx(math.log(100))


def out_of_memory():
    """Fault: what torch raises when the memory of a GPU is used up, which no test can do on purpose everywhere."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_full_gpu_is_one_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "encode", train.encode)      # is put back afterwards
    before(1, train, "encode", out_of_memory)
    code, line = command(monkeypatch, capsys, *world[1], "--out", tmp_path / "run")
    assert code == 2 and line.endswith("CUDA out of memory. Tried to allocate 2.00 GiB.; try --chunk or a smaller "
                                       "--batch-size")


def one_of_two(number, port):
    """Fault: not alone, but as torchrun starts a process of two."""
    os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))


def test_more_processes_than_pairs_is_one_line(world, tmp_path):
    _, flags = world
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [start(*flags, "--batch-size", "1", "--out", tmp_path / "run", faults=[partial(one_of_two, number, port)])
            for number in range(2)]
    for process, output in runs:
        text = read(output)
        process.join()
        assert process.exitcode == 2 and "Traceback" not in text
        assert text.splitlines()[-1] == ("train.py: error: 40 pairs in batches of 1 are less than one a batch for each "
                                         "of 2 processes: start fewer, or raise --batch-size")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- checkpoints

def test_a_resumed_run_keeps_its_precision_however_fast_the_machine_is_then(world, tmp_path, monkeypatch):
    flags = [*world[1], "--precision", "auto", "--epochs", "1", "--out", tmp_path / "run"]
    monkeypatch.setattr(train, "fast_bf16", lambda device: True)
    rows = run(*flags)
    monkeypatch.setattr(train, "fast_bf16", lambda device: False)
    assert run(*flags, "--resume") == rows and state(tmp_path / "run/last.pt")["settings"]["precision"] == "bf16"


def test_a_fine_tuned_clip_without_method_can_be_started_from(world, tmp_path):
    folder, flags = world
    flags = [*flags[:4], *flags[6:], "--train", "backbone"]
    rows = run(*flags, "--model", folder / "clip.pt", "--method", "none", "--out", tmp_path / "one")
    again = run(*flags, "--init", tmp_path / "one", "--lr", "0", "--out", tmp_path / "two")
    assert again[-1][3] == rows[-1][3]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("fault, changed, words", [
    (None, ["--lr", "1e-4"], "--lr 0.0001: the run that this one goes on from has 0.001; leave the flag out"),
    (None, ["--method", "adapter"], "--method adapter: the run that this one goes on from has mrs"),
    (None, ["--bottleneck", "4"], "--bottleneck 4: the run that this one goes on from has None"),
    (None, ["--train", "method"], "--train method: the run that this one goes on from has all"),
    (None, ["--image-size", "48"], "--image-size 48: the run that this one goes on from has 32"),
    (lambda run: cut(run / "last.pt"), [], "last.pt"),
    (lambda run: os.truncate(run / "last.pt", 0), [], "last.pt"),
    (lambda run: cut(run / "best.pt"), [], "best.pt"),
    (lambda run: shutil.copy(run / "best.pt", run / "last.pt"), [], "last.pt does not fit this run: it is none"),
    (lambda run: shutil.copy(run.parent / "clip.pt", run / "last.pt"), [], "last.pt")])
def test_a_wrong_checkpoint_to_resume_is_one_line(world, unbroken, tmp_path, monkeypatch, capsys, fault, changed,
                                                        words):
    shutil.copy(world[0] / "clip.pt", tmp_path)
    shutil.copytree(unbroken[1], tmp_path / "run")
    if fault:
        fault(tmp_path / "run")
    before = [path.read_bytes() for path in sorted((tmp_path / "run").glob("*.pt"))]
    code, line = command(monkeypatch, capsys, *unbroken[0], "--out", tmp_path / "run", "--resume", *changed)
    assert code == 2 and words in line and (changed or str(tmp_path / "run") in line), line
    assert before == [path.read_bytes() for path in sorted((tmp_path / "run").glob("*.pt"))]


@pytest.mark.parametrize("flag, name, words", [
    ("--model", "cut.pt", "cut.pt cannot be loaded"), ("--model", "text.pt", "text.pt cannot be loaded"),
    ("--model", "method.pt", "no CLIP"), ("--model", "folder", "there is no file"),
    ("--init", "clip.pt", "clip.pt is no"), ("--init", "cut.pt", "cut.pt"), ("--init", "last.pt", "last.pt"),
    ("--init", "text.pt", "text.pt"), ("--init", "other.pt", "trained on other weights"),
    ("--init", "folder", "best.pt")])
def test_a_wrong_file_to_start_from_is_one_line(world, unbroken, tmp_path, monkeypatch, capsys, flag, name, words):
    shutil.copy(world[0] / "clip.pt", tmp_path / "clip.pt")
    shutil.copy(world[0] / "clip.pt", tmp_path / "cut.pt")
    shutil.copy(unbroken[1] / "last.pt", tmp_path / "last.pt")
    cut(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "folder").mkdir()
    method = {key: value for key, value in state(unbroken[1] / "best.pt").items() if key != "state_dict"}
    torch.save(method, tmp_path / "method.pt")
    torch.save(method | {"fingerprint": "0" * 16}, tmp_path / "other.pt")
    _, flags = world
    code, line = command(monkeypatch, capsys, *(flags if flag == "--model" else flags[:4] + flags[6:]), flag,
                         tmp_path / name, "--out", tmp_path / "run")
    assert code == 2 and words in line and str(tmp_path / name) in line, line
    assert not (tmp_path / "run").exists()


def test_no_file_is_unpickled_with_code_in_it():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        for call in re.findall(r"torch\.load\(.*", file.read_text()):
            assert "weights_only=True" in call, f"{file.name}: {call}"


# ---------------------------------------------------------------- the command line

WRONG = {     # flags: what the message says of them
    "--epochs 0": "1 to", "--epochs -3": "1 to", "--epochs 1.5": "invalid int", "--epochs many": "invalid int",
    "--batch-size 0": "1 to", "--batch-size -8": "1 to", "--batch-size 2.5": "invalid int", "--chunk 0": "1 to",
    "--lr -1": "0 to 1", "--lr nan": "0 to 1", "--lr inf": "0 to 1", "--lr 1e30": "0 to 1",
    "--lr": "expected one argument", "--warmup -1": "0 to 2", "--warmup 3": "0 to 2", "--warmup nan": "0 to 2",
    "--weight-decay -1": "0 to 10", "--margin -1": "0 to 2", "--margin nan": "0 to 2", "--dropout 2": "0 to 1",
    "--dropout nan": "0 to 1", "--seed -1": "0 to 2147483647", "--seed 99999999999": "0 to 2147483647",
    "--seed x": "invalid int", "--image-size 40": "multiples of this CLIP's patches, 16 pixels",
    "--image-size 32 40": "multiples", "--image-size 8": "",
    "--image-size 0": "one number of pixels is needed or two",
    "--image-size -32": "one number of pixels is needed or two",
    "--image-size 32 -32": "one number of pixels is needed or two",
    "--image-size 1 2 3": "one number of pixels is needed or two", "--image-size big": "invalid int",
    "--model tiny --train all --image-size 40": "multiples", "--model tiny": "--train all",
    "--model small": "--train all", "--model nothing.pt": "nothing.pt", "--method none": "--train backbone",
    "--bottleneck 0": "bottleneck 0", "--bottleneck -1": "bottleneck -1", "--bottleneck 1.5": "invalid int",
    "--rank 4": "no size 'rank'", "--prompt-length 4": "no size 'prompt_length'",
    "--method lora --dropout 0.1": "no size 'dropout'", "--method lora --rank 0": "rank 0",
    "--method bitfit --shared": "no size 'shared'", "--method coop --prompt-length 0": "prompt_length 0",
    "--method prompts --prompt-depth 9": "it is 1 to 1", "--method prompts --prompt-depth -1": "prompt_depth -1",
    "--loss sdm": "needs person ids", "--loss sdm+id": "needs person ids", "--loss hinge": "invalid choice",
    "--method what": "invalid choice", "--dataset what": "invalid choice", "--train what": "invalid choice",
    "--augment what": "invalid choice", "--schedule what": "invalid choice", "--epoch-over what": "invalid choice",
    "--precision fp16": "invalid choice", "--device tpu": "invalid choice", "--device cuda:99": "invalid choice",
    "--activation relu": "invalid choice", "--what 1": "unrecognized", "what": "unrecognized", "--m 1": "ambiguous",
    "--dataset ucm --data-root nowhere": "nowhere", "--dataset karpathy": "dataset*.json",
    "--dataset CUHK-PEDES": "reid_raw.json", "--dataset folder": "captions.tsv", "--init nothing": "nothing",
    "--resume": "--resume needs --out"}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_flags_are_one_line_and_nothing_is_written(world, tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.chdir(tmp_path)
    out = [] if wrong == "--resume" else ["--out", "run"]
    code, line = command(monkeypatch, capsys, *world[1], *out, *wrong.split())
    assert code == 2 and WRONG[wrong] in line, line
    assert list(tmp_path.iterdir()) == []


def test_flags_against_the_run_in_init_are_one_line(world, unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*world[1][:4], "--init", unbroken[1]]
    for wrong in (["--method", "lora"], ["--image-size", "48"], ["--model", "ViT-B/32"], ["--bottleneck", "3"]):
        code, line = command(monkeypatch, capsys, *flags, *wrong)
        assert code == 2 and f"{' '.join(wrong)}: the run that this one goes on from has " in line
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_network_no_home_and_no_data(tmp_path):
    code = f"""if True:
        import runpy, socket, sys
        socket.socket.connect = socket.getaddrinfo = None
        for script in ("train.py", "eval.py", "data.py"):
            sys.argv = [script, "--help"]
            try:
                runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__main__")
            except SystemExit as stop:
                assert stop.code == 0"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"HOME": "/nowhere", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0 and done.stdout.count("usage: ") == 3 and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- figures

@pytest.fixture(scope="module")
def held_out(world):
    """Pairs and pictures of the test split."""
    pairs = data.read("precomp", world[0] / "aerial", "test")
    return pairs, data.load_images(pairs.images, 32, world[0] / "cache")


def evaluate(path, held_out):
    return eval.evaluate(clip.load_clip(path), clip.Tokenizer(path), *held_out)


def test_evaluation_is_deterministic(world, held_out):
    assert evaluate(world[0] / "clip.pt", held_out) == evaluate(world[0] / "clip.pt", held_out)


def test_a_collapsed_model_scores_chance(world, held_out, tmp_path):
    save_clip(tmp_path / "collapsed.pt", captions_of(world[0]), **{
        f"{norm}.{part}": torch.full((128,), value) for norm in ("visual.ln_post", "ln_final")
        for part, value in (("weight", 0.0), ("bias", 1.0))})
    metrics = evaluate(tmp_path / "collapsed.pt", held_out)
    assert metrics == pytest.approx(eval.chance(held_out[0]))
    assert metrics["i2t_R@1"] == metrics["t2i_R@1"] == pytest.approx(25)       # one of four pictures
    assert evaluate(world[0] / "clip.pt", held_out) != pytest.approx(eval.chance(held_out[0]))


def test_similarities_that_are_nan_are_refused(world, held_out, tmp_path):
    save_clip(tmp_path / "broken.pt", captions_of(world[0]), **{"ln_final.weight": torch.full((128,), math.nan)})
    with pytest.raises(ValueError, match="NaN"):
        evaluate(tmp_path / "broken.pt", held_out)


# ---------------------------------------------------------------- many steps

def watch():
    """No fault: prints, for every 20th step, the memory in use in MB and the number of open files."""
    original = train.train_step

    def train_step(run, *batch):
        original(run, *batch)
        if run.step % 20 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print("in use:", pages * resource.getpagesize() / 2 ** 20, len(os.listdir("/proc/self/fd")))
    train.train_step = train_step


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_soak(world, tmp_path):
    _, flags = world
    epochs = 100 if os.environ.get("SOAK") else 3       # of 20 steps
    code, text = outcome(*flags, "--batch-size", "2", "--epochs", epochs, "--out", tmp_path / "run", faults=[watch])
    lines = [line.split() for line in text.splitlines() if line.startswith("in use")]
    memory, files = zip(*((float(memory), int(files)) for _, _, memory, files in lines))
    assert code == 0 and len(memory) == epochs
    warm = epochs // 3
    print(f"{20 * epochs} steps: {memory[0]:.1f} MB at step 20, {memory[warm]:.1f} after warm-up, at most "
          f"{max(memory[warm:]):.1f} from there; open files {min(files)} to {max(files)}")
    assert max(memory[warm:]) < 1.02 * memory[warm] and max(files) == min(files)
