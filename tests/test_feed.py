"""Two processes whose copies of the shards are not equally good: they stay in step, and stop together or not at all."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from affekt.data.accounting import Accounting
from affekt.data.decode import Window
from affekt.data.loader import train_loader

RANK = """
import json, sys
import torch, torch.distributed as dist
from affekt.data.accounting import Accounting
from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.data.loader import train_loader
from affekt.data.shards import ShardIndex
from affekt.pretrain.feed import Feed, together

rank, port, world = int(sys.argv[1]), sys.argv[2], 2
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
window = Window(num_frames=2, frame_stride=1, mel_frames=4)
for folder, budget in json.load(sys.stdin):
    accounting = Accounting()
    try:
        index = together(lambda: ShardIndex.open(folder))
    except DataError as error:
        print(json.dumps([0, str(error), {}]), flush=True)
        continue
    loader = train_loader(index, window, global_batch=8, total_steps=200, seed=1, rank=rank, world_size=world)
    feed, told, done = Feed(loader, accounting, budget, 0, rank), "", 0
    try:
        for done in range(1, 201):
            batch = next(feed)
            assert len(batch.ids) == 4 and batch.video.shape == (4, 2, 16, 16, 3) and len(batch.clip) == 4
            dist.all_reduce(batch.has_video.float())  # as a step of training: nobody gets past it alone
            if done % 10 == 0:
                feed.check()
    except DataError as error:
        told = str(error)
    print(json.dumps([done, told, accounting.summed_over_ranks().to_dict()]), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def spoil(index, folder: Path, every: int) -> Path:
    """A copy of the shards in which every so-many-th clip has its sound replaced by zeros."""
    shutil.copytree(index.root, folder)
    for sample in index.samples[::every]:
        offset, size, _ = sample.members["flac"]
        with open(folder / index.shard_name(sample), "r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    return folder


@pytest.fixture(scope="module")
def answers(tiny_shards, tmp_path_factory):
    """Of both ranks for each case: steps done, the error told, the accounting."""
    index, folder = tiny_shards(40, seconds=0.4, size=16, shards=4), tmp_path_factory.mktemp("spoilt")
    tenth, every = spoil(index, folder / "tenth", 10), spoil(index, folder / "every", 1)
    good = str(index.root)
    cases = {
        "within": (good, tenth, 1.0),
        "over": (good, tenth, 0.01),
        "one rank": (good, every, 1.0),
        "sound": (good, good, 0),
        "missing": (good, folder / "nowhere", 1.0),
    }
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), port], **pipes) for rank in range(2)]
    for rank, process in enumerate(ranks):
        process.stdin.write(json.dumps([(str(case[rank]), case[2]) for case in cases.values()]))
        process.stdin.close()
    output = [process.stdout.read().splitlines() for process in ranks]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    found = dict(zip(cases, zip(*([json.loads(line) for line in lines] for lines in output), strict=True), strict=True))
    return index, found


def test_ranks_stay_in_step_though_one_skips_clips(answers):
    _, found = answers
    one, two = found["within"]
    assert one == two and one[:2] == [200, ""]
    assert one[2]["used"] == 200 * 8 and one[2]["padded"] == 0
    skipped = sum(one[2]["skipped"].values())
    assert one[2]["planned"] == one[2]["used"] + skipped == one[2]["used"] + one[2]["causes"]["checksum"]
    # Four clips of forty, once an epoch of five steps, about half of the time in the half of rank 1.
    assert 50 < skipped < 110 and len(one[2]["skipped"]) == 4


def test_bad_clips_of_one_rank_stop_both_above_the_budget(answers):
    _, found = answers
    one, two = found["over"]
    assert one == two and 0 < one[0] < 1000 // 8
    first, *worst = one[1].splitlines()
    assert "could not be used, more than 1.0%" in first and "checksum" in first and "data.skip_budget" in first
    assert len(worst) == 4 and all("shard-00000" in line and "clip clip00" in line for line in worst)


def test_a_rank_without_any_good_clip_stops_both(answers):
    _, found = answers
    one, two = found["one rank"]
    assert one == two and one[0] == 10  # the first check
    assert one[1].startswith("process 1: clip clip00") and one[1].count("shard-00000") == 5
    assert one[2]["padded"] == 10 * 4 and one[2]["used"] == 10 * 4
    assert one[2]["planned"] == one[2]["used"] + one[2]["padded"]


def test_shards_that_are_missing_on_one_machine_are_told_on_all(answers):
    (_, one, _), (_, two, _) = answers[1]["missing"]
    assert one == f"process 1: {two}" and "nowhere/index.safetensors: No such file" in two


def test_the_ledger_of_two_ranks_is_that_of_one_process(answers):
    index, found = answers
    accounting = Accounting()
    window = Window(num_frames=2, frame_stride=1, mel_frames=4)
    for step, batch in enumerate(train_loader(index, window, global_batch=8, total_steps=200, seed=1)):
        accounting.add(batch, step)
    assert found["sound"][0] == found["sound"][1] == [200, "", accounting.to_dict()]
    assert found["within"][0][2]["ledger"] != accounting.to_dict()["ledger"]
