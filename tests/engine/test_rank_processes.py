"""Ranks as processes that share a model, on a CPU: what they draw, and how they start and end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from rank_service import CHECKPOINT, other_ranks, rank_command
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import Shard, distribute_tensor

from autoregressive.errors import SettingError, UserError
from autoregressive.models.ranks import Rank
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import Exchange
from autoregressive.serve.engine.model_runner import ModelRunner
from autoregressive.serve.pipeline import Pipeline
from autoregressive.serve.worker import rank_processes
from autoregressive.serve.worker.following_rank import Prepare, RankLoaded, RankRecipe
from autoregressive.serve.worker.messages import StartFailed
from autoregressive.serve.worker.process import connect
from autoregressive.serve.worker.rank_processes import LeadingRank, RankLostError
from autoregressive.serve.worker.transport import encode, receive
from autoregressive.weights.checkpoint import CheckpointError
from autoregressive.weights.finding import FoundWeights, ModelSettings, check_ranks, resolve_model
from autoregressive.weights.loading import load_gpt
from autoregressive.weights.options import ModelOptions

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TWO = EngineConfig(max_num_seqs=8, lookahead="off", tensor_parallel_size=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make small steps 30 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


def demo_settings(image_size: int | None = None) -> ModelSettings:
    model = resolve_model(ModelOptions(gpt_model="GPT-demo", device="cpu"))
    return model if image_size is None else replace(model, image_size=image_size)


def small_pipeline(config: EngineConfig = TWO) -> Pipeline:
    """The demo model with random weights and images of 16 tokens."""
    return Pipeline(demo_settings(4 * 8), FoundWeights(None, None), config)


def test_two_ranks_draw_the_demo_models_greedy_codes() -> None:
    """Fails if a model that two processes share draws another image than one process."""
    labels = [7, 2, 9]
    params = [SamplingParams(cfg_scale=4.0, temperature=0.0)] * 2
    params.append(SamplingParams(cfg_scale=2.0, cfg_interval=40, seed=5))
    drawn: list[Tensor] = []
    for config in (replace(TWO, tensor_parallel_size=1), TWO):
        pipe = Pipeline.from_pretrained("GPT-demo", device="cpu", engine=config)
        drawn.append(pipe.draw(labels, params))
        pipe.close()
    assert all(len(codes.unique()) > 100 for codes in drawn[0])
    assert torch.equal(*drawn)


def test_ranks_outlive_the_thread_that_built_them_and_end_with_the_pipeline() -> None:
    """Fails if ranks end with a thread that has ended, or are left when nobody can use them."""
    built: list[Pipeline] = []
    thread = threading.Thread(target=lambda: built.append(small_pipeline()))
    thread.start()
    thread.join()
    pipe = built.pop()
    assert len(other_ranks(os.getpid())) == 1
    assert pipe.draw([1, 2], SamplingParams(seed=3)).shape == (2, 16)
    assert len(other_ranks(os.getpid())) == 1
    pipe.close()
    assert other_ranks(os.getpid()) == []
    with pytest.raises(RankLostError, match="the other ranks have been ended"):
        pipe.draw([1], SamplingParams(seed=3))


def test_a_dead_rank_is_an_error_and_not_a_hang() -> None:
    """Fails if a call waits for a rank that has died, or its error does not say so."""
    pipe = small_pipeline()
    (rank,) = other_ranks(os.getpid())
    killer = threading.Timer(0.3, lambda: os.kill(rank, signal.SIGKILL))
    killer.start()
    begun = time.monotonic()
    many = SamplingParams(seed=3, n=4)
    with pytest.raises(RankLostError, match="rank 1 of 2 has died"):
        pipe.draw([1] * 400, many)
    assert time.monotonic() - begun < 30
    with pytest.raises(RankLostError, match="rank 1 of 2 has died"):
        pipe.draw([1], SamplingParams(seed=3))
    assert other_ranks(os.getpid()) == []


def command(*flags: str) -> list[str]:
    """The engine's command, with two ranks that share the demo model."""
    begin = [sys.executable, str(ROOT / "autoregressive/serve/sample_c2i.py"), "--device", "cpu"]
    begin += ["--gpt-model", "GPT-demo", "--class-labels", "fox", "--lookahead", "off"]
    return [*begin, "--tensor-parallel-size", "2", *flags]


def test_the_command_draws_with_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    """Fails if the command does not know the flag, or its end leaves a process or a complaint."""
    done = subprocess.run(command(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "image is saved to" in done.stdout
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_the_death_of_a_rank_ends_the_command(tmp_path: Path) -> None:
    """Fails if the command waits for the rank, or ends with a traceback or another status."""
    with subprocess.Popen(command(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not (ranks := other_ranks(process.pid)):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(ranks[0], signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (1, "sample_c2i.py: error: rank 1 of 2 has died\n")
    assert list(tmp_path.iterdir()) == []


def write_shards(number: int, port: int, folder: str) -> None:
    """One of two processes that write a folder of the demo model's weights, half of each."""
    init = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=init, rank=number, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    weights = load_file(CHECKPOINT)
    sharded = {
        name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in weights.items()
    }
    dcp.save(sharded, checkpoint_id=folder)
    distributed.barrier()
    os._exit(0)


def damage_what_rank_1_reads(folder: Path) -> None:
    """Overwrites the second half of the head, which no other rank of two reads."""
    for index, place in FileSystemReader(folder).read_metadata().storage_data.items():
        if index.fqn == "output.weight" and index.offset[0] > 0:
            with (folder / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(bytes(place.length))


def test_a_file_that_only_rank_1_cannot_read_is_told_as_by_one_process(tmp_path: Path) -> None:
    """Fails if the reason is lost between processes, is told twice or by a traceback, or if a
    process is left: `run` waits for all that have its stderr.
    """
    shards = tmp_path / "shards"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(write_shards, (port, str(shards)), nprocs=2)
    load_gpt(demo_settings(), shards, rank=Rank(1, 2))
    damage_what_rank_1_reads(shards)
    load_gpt(demo_settings(), shards, rank=Rank(0, 2))
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: is damaged") as alone:
        load_gpt(demo_settings(), shards)
    for make in (command, rank_command):
        told = make("--gpt-ckpt", str(shards))
        done = subprocess.run(told, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert done.stderr.endswith(f": error: {alone.value}\n")
        assert done.stderr.count("error") == 1
    assert list(tmp_path.iterdir()) == [shards]


def test_a_number_that_does_not_divide_the_model_is_refused_with_those_that_do() -> None:
    """Fails if the message leaves the user to find a number that fits."""
    told = (
        "tensor_parallel_size 3: must divide the 4 heads and the 1024 codes of GPT-demo, and its "
        "feed-forward width 768 into multiples of 32: use 1, 2 or 4"
    )
    with pytest.raises(SettingError, match=told):
        small_pipeline(replace(TWO, tensor_parallel_size=3))
    with pytest.raises(SettingError, match="tensor_parallel_size 0: must be a whole number"):
        EngineConfig(tensor_parallel_size=0)


def test_too_few_gpus_are_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ranks are started for GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = replace(demo_settings(), device=torch.device("cuda", 1))
    check_ranks(model, 2)
    with pytest.raises(SettingError, match="takes 4 GPUs, and there are 3 from cuda:1 on"):
        check_ranks(model, 4)
    first = replace(model, device=torch.device("cuda", 0))
    check_ranks(first, 2, engines=2)
    with pytest.raises(SettingError, match="takes 6 GPUs, 2 for each of 3 engines, and there"):
        check_ranks(first, 2, engines=3)


def test_gpus_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ranks round in different ways, so that they would draw different tokens, or if
    engines must be alike.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    newer = {torch.device("cuda", 2), torch.device("cuda", 3)}
    kind = lambda device: (9, 0) if device in newer else (8, 0)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", kind)
    first = replace(demo_settings(), device=torch.device("cuda", 0))
    check_ranks(first, 2, engines=2)
    with pytest.raises(SettingError, match=r"of one kind.* 8\.0, 8\.0, 9\.0, 9\.0"):
        check_ranks(first, 4)


class FakeProcess:
    """Of a rank whose part the test plays."""

    def kill(self) -> None:
        """Nothing runs."""

    def wait(self) -> None:
        """Nothing runs."""


@contextmanager
def played_rank(
    monkeypatch: pytest.MonkeyPatch, device: str = "cpu"
) -> Iterator[tuple[LeadingRank, socket.socket]]:
    """Rank 0 of two, and the other rank's end of its connection."""
    ours, theirs = connect()
    monkeypatch.setattr(rank_processes, "start_child", lambda run, name: (FakeProcess(), ours))
    devices = (torch.device(device),) * 2
    recipe = RankRecipe(demo_settings(), None, TWO, devices, "host")
    leading = LeadingRank(recipe, lambda why: None)
    yield leading, theirs
    leading.stop()
    theirs.close()


@pytest.mark.parametrize(("own", "others"), [(9, 5), (5, 9)])
def test_the_rank_with_the_least_memory_says_how_many_pages_there_are(
    monkeypatch: pytest.MonkeyPatch, own: int, others: int
) -> None:
    """Fails if admission counts pages that one of the ranks does not have."""
    with played_rank(monkeypatch) as (leading, theirs):
        theirs.sendall(encode([RankLoaded(others)]))
        assert leading.agree(own) == 5
        assert receive(theirs, {"Prepare": Prepare}) == [Prepare(5)]


def test_what_a_rank_cannot_do_is_told_as_if_rank_0_could_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a damaged file or a lack of memory on one rank is a crash."""
    error = SettingError("num_pages", 7, "a page takes too much", ["lower it"])
    with played_rank(monkeypatch) as (leading, theirs):
        theirs.sendall(encode([StartFailed(error.parts, error.remedies)]))
        theirs.close()
        with pytest.raises(UserError, match="num_pages 7: a page takes too much: lower it"):
            leading.agree(9)


def test_a_failure_after_the_start_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rank 0 waits for a rank whose memory has run out while it prepared."""
    with played_rank(monkeypatch) as (leading, theirs):
        theirs.sendall(encode([RankLoaded(5)]))
        assert leading.agree(5) == 5
        error = UserError("cuda:1 has too little free memory")
        theirs.sendall(encode([StartFailed(error.parts, error.remedies)]))
        deadline = time.monotonic() + 10
        while leading.lost is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(RankLostError, match="cuda:1 has too little free memory"):
            leading.send([Prepare(1)])


def test_a_rank_that_dies_while_it_loads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rank 0 waits for it for ever."""
    with played_rank(monkeypatch) as (leading, theirs):
        theirs.close()
        with pytest.raises(RankLostError, match="rank 1 of 2 has died"):
            leading.agree(9)


def test_a_silent_rank_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rank that hangs counts as alive."""
    with played_rank(monkeypatch) as (leading, theirs):
        theirs.sendall(encode([RankLoaded(1)]))
        leading.agree(1)
        assert leading.alive
        deadline = time.monotonic() + 10
        while leading.alive:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert leading.lost is None
        theirs.sendall(encode([RankLoaded(1)]))
        while not leading.alive:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert leading.lost is None


class FakeEvent:
    """The end of a span on a GPU, which comes at the third look at it, or never."""

    def __init__(self, comes: bool) -> None:
        self.comes, self.looks = comes, 0

    def query(self) -> bool:
        """Whether it has come."""
        self.looks += 1
        return self.comes and self.looks >= 3


@pytest.mark.parametrize("comes", [True, False])
def test_a_gpu_finishes_before_the_other_ranks_end(
    monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """Fails if the GPU of rank 0 is left waiting for numbers of ranks that are gone, or a rank that
    hangs keeps rank 0 from its end.
    """
    looks: list[int] = []
    event = FakeEvent(comes)
    monkeypatch.setattr(FakeProcess, "kill", lambda process: looks.append(event.looks))
    monkeypatch.setattr(rank_processes, "_LAST_SPAN_SECONDS", 0.2)
    with played_rank(monkeypatch) as (leading, _):
        monkeypatch.setattr(leading, "last_span", event)
    assert looks == [3] if comes else looks[0] > 3


def test_ranks_go_on_together_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rank 0 leaves a span that the other ranks have begun."""
    pipe = small_pipeline()
    greedy = SamplingParams(temperature=0.0)
    expected = pipe.draw([3, 5], greedy)
    one_pass, run, done, told = ModelRunner._pass, ModelRunner.run, 0, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal done
        if done == 1:
            signal.raise_signal(signal.SIGINT)
        one_pass(*arguments)
        done += 1

    def counted(
        runner: ModelRunner, batch: Batch, rows: int, images: int, passes: int, window: int
    ) -> None:
        nonlocal told
        told += passes
        run(runner, batch, rows, images, passes, window)

    monkeypatch.setattr(ModelRunner, "_pass", interrupted)
    monkeypatch.setattr(ModelRunner, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        pipe.draw([1], greedy)
    assert done == told >= 2
    assert torch.equal(pipe.draw([3, 5], greedy), expected)
    pipe.close()


def test_a_rank_that_dies_before_the_ranks_meet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rank 0 waits for it as for one that is slow."""
    meet = LeadingRank.connect

    def kill_and_meet(leading: LeadingRank) -> Exchange:
        (rank,) = other_ranks(os.getpid())
        os.kill(rank, signal.SIGKILL)
        return meet(leading)

    monkeypatch.setattr(LeadingRank, "connect", kill_and_meet)
    begun = time.monotonic()
    with pytest.raises(RankLostError, match="rank 1 of 2 has died"):
        small_pipeline()
    assert time.monotonic() - begun < 30
    assert other_ranks(os.getpid()) == []


def test_pictures_say_how_many_ranks_drew_them() -> None:
    """Fails if a picture cannot be made again because it does not tell the order of its sums."""
    pipe = small_pipeline()
    assert pipe([1]).images[0].record["tensor_parallel_size"] == 2
    pipe.close()
