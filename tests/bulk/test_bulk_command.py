"""The bulk command as users type it: on one process and on several, killed and started again."""

import io
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from rank_service import other_ranks
from source_tree import ROOT

from autoregressive.errors import UserError
from autoregressive.serve.bulk.keeper import Keeper
from autoregressive.serve.bulk.parts import Images
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.pipeline import Pipeline

SCRIPT = str(ROOT / "autoregressive" / "sample" / "sample_c2i_ddp.py")
NAME = "GPT-demo-demo_gpt-size-128-size-128-VQ-demo-topk-0-topp-1.0-temperature-1.0-cfg-1.0-seed-5"
FLAGS = ["--gpt-model", "GPT-demo", "--device", "cpu", "--cfg-scale", "1", "--global-seed", "5"]
# the launcher that plain `python` uses where there are several GPUs
LAUNCH = (
    "import sys; from autoregressive.cli.command import run_command; "
    "from autoregressive.serve.bulk.ranks import run_ranks; "
    "run_command(lambda: run_ranks(int(sys.argv[1]), sys.argv[2:]))"
)


def start(ranks: int, folder: Path, images: int, *flags: str) -> "subprocess.Popen[str]":
    command = [SCRIPT, *FLAGS, "--sample-dir", str(folder), "--num-fid-samples", str(images)]
    command += flags
    if ranks > 1:
        command = ["-c", LAUNCH, str(ranks), *command]
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def kept_images(folder: Path) -> int:
    parts = (folder / NAME / "parts").glob("[0-9]*.npy")
    return sum(int(part.stem.split("-")[1]) for part in parts)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of eight images that one process has drawn in one piece."""
    folder = tmp_path_factory.mktemp("unbroken")
    status, out, errors = finish(start(1, folder, 8))
    assert status == 0, errors
    assert "8 images in " in out
    assert "start " in out
    assert "writing " in out
    return (folder / f"{NAME}.npz").read_bytes()


def broken_and_finished(folder: Path, how: str, seed: int) -> tuple[bytes, int]:
    """Breaks a job of two ranks at a random moment, and finishes it with another number of ranks.
    Returns the file, and how many images had been kept.
    """
    generator = random.Random(seed)
    process = start(2, folder, 8, "--per-proc-batch-size", "1")
    wanted = generator.randrange(5)  # of eight, so that it has not ended before it is broken
    while kept_images(folder) < wanted or len(ranks_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(generator.random())
    ranks = ranks_of(process)
    if how == "one rank":
        os.kill(generator.choice(ranks), signal.SIGKILL)
    elif how == "all":
        for each in (process.pid, *ranks):
            os.kill(each, signal.SIGKILL)
    else:  # EFBIG in the place of ENOSPC
        for rank in ranks:
            resource.prlimit(rank, resource.RLIMIT_FSIZE, (4096, 4096))
    status, _, errors = finish(process)
    assert status == {"one rank": 2, "all": -9, "full disk": 2}[how]
    if how != "all":
        told = {"one rank": "was ended by SIGKILL", "full disk": "File too large"}[how]
        assert told in errors
        assert errors.count("\n") <= 2, errors  # both ranks may find the disk full
    kept = kept_images(folder)
    assert kept >= wanted
    ranks_after = generator.choice([1, 3])
    status, _, errors = finish(start(ranks_after, folder, 8, "--per-proc-batch-size", "3"))
    assert status == 0, errors
    assert kept_images(folder) == 0
    return (folder / f"{NAME}.npz").read_bytes(), kept


def test_ranks_that_share_the_model_draw_what_one_process_draws(
    tmp_path: Path, unbroken: bytes
) -> None:
    """Fails if --tensor-parallel-size does not reach the engine of a bulk job, or changes one of
    its images.
    """
    process = start(1, tmp_path, 2, "--tensor-parallel-size", "2")
    while process.poll() is None and not other_ranks(process.pid):
        time.sleep(0.1)
    assert process.poll() is None, "it has drawn without the other rank"
    status, _, errors = finish(process)
    assert (status, errors) == (0, "")
    found, whole = (
        np.load(io.BytesIO(data))["arr_0"]
        for data in ((tmp_path / f"{NAME}.npz").read_bytes(), unbroken)
    )
    assert len(found) == 2
    assert np.array_equal(found, whole[:2])


@pytest.mark.parametrize("how", ["one rank", "all", "full disk"])
def test_a_broken_job_ends_in_the_same_file(how: str, tmp_path: Path, unbroken: bytes) -> None:
    """Fails if SIGKILL or a full disk loses, repeats or changes an image, or the number of ranks or
    the size of the batch shows in one.
    """
    found, _ = broken_and_finished(tmp_path, how, seed=1)
    assert found == unbroken


@pytest.mark.soak
def test_twelve_broken_jobs_end_in_the_same_file(tmp_path: Path, unbroken: bytes) -> None:
    """Fails as the test before, or if nothing was kept of any job that was broken."""
    kept = []
    for seed in range(12):
        (tmp_path / str(seed)).mkdir()
        how = ["one rank", "all", "full disk"][seed % 3]
        found, images = broken_and_finished(tmp_path / str(seed), how, seed)
        assert found == unbroken
        kept.append(images)
    print("images kept:", kept)
    assert 0 < sum(kept) < 96


def test_the_pipeline_makes_the_commands_file(tmp_path: Path, unbroken: bytes) -> None:
    """Fails if the Python call draws other images than the command, does not go on after Ctrl-C in
    the same process, or holds its folder.
    """
    pipe = Pipeline.from_pretrained("GPT-demo", device="cpu", engine=EngineConfig(max_num_seqs=4))
    keep = Keeper.add

    def interrupt(keeper: Keeper, images: Images) -> None:
        keep(keeper, images)
        if 3 in images.indices:
            raise KeyboardInterrupt

    with patch.object(Keeper, "add", interrupt), pytest.raises(KeyboardInterrupt):
        pipe.bulk(tmp_path, 8, seed=5, cfg_scale=1.0, progress=False)
    reports = [pipe.bulk(tmp_path, 8, seed=5, cfg_scale=1.0, progress=False) for _ in range(2)]
    for report in reports:
        assert report.samples.read_bytes() == unbroken
    assert 0 < reports[0].drawn < 8
    assert reports[1].drawn == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"images": 0}, "images 0: must be 1 to 99999999"),
        ({"seed": -1}, "seed -1: must be 0 to"),
        ({"labels": [1, 2]}, "labels [1, 2]: holds 2 ids; give 8 ids, one for each image"),
        ({"images": True}, "images True: must be a whole number"),
        ({"labels": ["fox"] * 8}, "labels ['fox', 'fox', 'fox', 'fox', 'fox', '...: holds <U3 and"),
        ({"image_size_eval": 0}, "image_size_eval 0: must be 1 to 4096"),
    ],
)
def test_the_pipeline_names_its_own_arguments(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    """Fails if a call is refused by the name of a flag, or leaves files."""
    pipe = Pipeline.from_pretrained("GPT-demo", device="cpu")
    with pytest.raises(UserError) as refused:
        pipe.bulk(tmp_path, **({"images": 8} | options))
    assert str(refused.value).startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_the_plain_loop_draws_by_fixed_batches(tmp_path: Path) -> None:
    """Fails if the plain loop's images depend on the number of ranks, or are the same in every
    batch.
    """
    files = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        flags = ["--naive", "--per-proc-batch-size", "2", "--labels", "balanced"]
        status, _, errors = finish(start(ranks, folder, 3, *flags))
        assert status == 0, errors
        files.append((folder / f"{NAME}.npz").read_bytes())
        codes = np.load(folder / NAME / "codes.npy")
        assert not np.array_equal(codes[0], codes[2])
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num-fid-samples", "0"], "--num-fid-samples 0: must be 1 to 99999999"),
        (["--global-seed", "-1"], "--global-seed -1: must be 0 to 2**63 - 1"),
        (["--labels", "nowhere.txt"], "--labels nowhere.txt: there is no such file; give random"),
        (
            ["--per-proc-batch-size", "4", "--max-num-seqs", "8"],
            "--per-proc-batch-size and --max-num-seqs say the same",
        ),
        (["--gpt-model", "GPT-XL"], "there are no trained weights for GPT-XL"),
        (["--naive", "--lookahead", "4"], "--lookahead: the engine's, and --naive draws without"),
        (["--sample-dir", ""], "--sample-dir '': is empty: name one, or leave it out"),
        (["--sample-dir", "/dev/null/x"], "--sample-dir /dev/null/x: cannot write"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], told: str) -> None:
    """Fails if a mistake ends in a traceback, begins any work, or is told by every rank."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *FLAGS, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"sample_c2i_ddp.py: error: {told}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_mistake_is_told_by_one_rank(tmp_path: Path) -> None:
    """Fails if each of the ranks says it, or the launcher adds a traceback."""
    process = start(2, tmp_path, 8, "--labels", "nowhere.txt")
    status, out, errors = finish(process)
    assert (status, out) == (2, "")
    assert errors.count("\n") == 1, errors
    assert "nowhere.txt" in errors


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """Fails if Ctrl-C of a job on several GPUs ends in a traceback, or in a line of each rank."""
    process = start(2, tmp_path, 8)
    while not (tmp_path / NAME / "parts").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(4)  # until they draw
    os.killpg(process.pid, signal.SIGINT)
    status, out, errors = finish(process)
    assert (status, out) == (130, "")
    assert errors == "interrupted: run the same command again to go on with what is kept\n"


def test_ranks_of_two_jobs_refuse_each_other(tmp_path: Path) -> None:
    """Fails if a slip on one of several machines mixes two jobs in one file."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    job = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, SCRIPT, *FLAGS, "--sample-dir", str(tmp_path)]
    started = [
        subprocess.Popen(
            [*command, *flags],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=job | {"RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, flags in enumerate(([], ["--labels", "balanced"]))
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "rank 1 was started for another job than rank 0, which has other labels" in errors[1]
    assert "another process of the job has gone" in errors[0]


def test_a_rank_that_vanishes_is_one_line(tmp_path: Path) -> None:
    """Fails if the ranks of another machine end in a traceback, or wait for ever, where no launcher
    tells them that one has gone.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    job = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    vanishes = "import os, torch.distributed as dist; dist.init_process_group('gloo'); os._exit(0)"
    with (
        subprocess.Popen(
            [sys.executable, SCRIPT, *FLAGS, "--sample-dir", str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=job | {"RANK": "0", "LOCAL_RANK": "0"},
        ) as stays,
        subprocess.Popen(
            [sys.executable, "-c", vanishes], env=job | {"RANK": "1", "LOCAL_RANK": "0"}
        ) as gone,
    ):
        _, errors = stays.communicate(timeout=120)
        gone.kill()  # where it still waits for the other, which has failed
    assert stays.returncode == 2
    assert errors.startswith("sample_c2i_ddp.py: error: another process of the job has gone: run")
    assert errors.count("\n") == 1, errors
