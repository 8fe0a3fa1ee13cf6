"""Quantised weights and pages through the command, Pipeline, bulk jobs and the service."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file

from autoregressive.cli.flags import model_options
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.images import JSON_KEY
from autoregressive.sample import sample_c2i as naive
from autoregressive.serve import sample_c2i
from autoregressive.serve.bulk.command import build_bulk_parser
from autoregressive.serve.bulk.job import BulkJob, DifferentJobError, check_same
from autoregressive.serve.bulk.labels import make_labels
from autoregressive.serve.bulk.on_rank import resolve
from autoregressive.serve.bulk.ranks import Ranks
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine_flags import engine_config
from autoregressive.serve.lifecycle import served_model
from autoregressive.serve.pipeline import Pipeline
from autoregressive.serve.sample_c2i import build_engine_parser
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.weights.checkpoint import open_checkpoint
from autoregressive.weights.conversion import convert
from autoregressive.weights.finding import FoundWeights, find_weights, resolve_model
from autoregressive.weights.options import ModelOptions

DEMO = Path(__file__).resolve().parents[2] / "pretrained_models/demo_gpt.safetensors"
FLAGS = ["--gpt-model", "GPT-demo", "--device", "cpu"]
QUANTIZED = ["--quantization", "int8", "--kv-cache-dtype", "int8"]


def record_of(picture: str) -> dict[str, object]:
    with Image.open(picture) as image:
        image.load()
        return json.loads(image.text[JSON_KEY])  # type: ignore[attr-defined]


def drawn(
    *typed: str, command: Callable[[list[str]], object] = sample_c2i.main
) -> tuple[np.ndarray, dict[str, object]]:
    """The codes and the record of a picture that a command has drawn."""
    flags = ["--class-labels", "6", "--save-codes", "codes.npy", "--output", "x.png"]
    command([*FLAGS, *flags, *typed])
    return np.load("codes.npy"), record_of("x.png")


def test_a_converted_file_draws_what_the_flag_draws(work: Path) -> None:
    """Fails if the flags do not reach the engine, a converted file draws other codes, or a record
    does not say with which flags its picture is made again.
    """
    convert(open_checkpoint(DEMO), Path("int8.safetensors"), None, "int8")
    from_file, record = drawn("--gpt-ckpt", "int8.safetensors", "--kv-cache-dtype", "int8")
    names = ("quantization", "kv_cache_dtype")
    recorded = [(f"--{name.replace('_', '-')}", str(record[name])) for name in names]
    by_flag, record = drawn(*itertools.chain(*recorded))
    assert [record[name] for name in names] == ["int8", "int8"]
    assert np.array_equal(from_file, by_flag)
    plain, record = drawn()
    assert not {"quantization", "kv_cache_dtype"} & record.keys()
    assert not np.array_equal(plain, by_flag)
    assert (plain == by_flag).mean() > 0.1  # the same picture at first


def test_the_plain_loop_draws_from_a_quantised_file(work: Path) -> None:
    """Fails if the plain command reads other weights from it than the engine does, or its record
    does not say that they are quantised.
    """
    convert(open_checkpoint(DEMO), Path("int8.safetensors"), None, "int8")
    likeliest = ("--gpt-ckpt", "int8.safetensors", "--temperature", "0")
    by_engine, _ = drawn(*likeliest)
    by_plain_loop, record = drawn(*likeliest, command=naive.main)
    assert np.array_equal(by_plain_loop, by_engine)
    assert (record["loop"], record["quantization"]) == ("naive", "int8")
    unquantised, _ = drawn("--temperature", "0", command=naive.main)
    assert not np.array_equal(unquantised, by_engine)


def test_a_quantised_file_of_another_kind_ends_in_one_line(work: Path) -> None:
    """Fails if a file is quantised a second time, or one without scales is drawn from."""
    convert(open_checkpoint(DEMO), Path("int8.safetensors"), None, "int8")
    with refused("holds int8 weights; use the original ones, or leave out --quantization"):
        drawn("--gpt-ckpt", "int8.safetensors", "--quantization", "fp8")
    tensors = load_file("int8.safetensors")
    del tensors["layers.3.feed_forward.w2.weight_scale"]
    save_file(tensors, "bad.safetensors")
    with refused("has no scales|does not say how"):
        drawn("--gpt-ckpt", "bad.safetensors")
    assert sorted(path.name for path in work.iterdir()) == ["bad.safetensors", "int8.safetensors"]


def test_every_way_in_takes_the_settings(work: Path) -> None:
    """Fails if the command, the service, or Pipeline loses one of them on the way."""
    arguments = build_engine_parser().parse_args([*FLAGS, *QUANTIZED])
    assert model_options(arguments).gpt_model == "GPT-demo"
    wanted = EngineConfig(max_num_seqs=4, quantization="int8", kv_cache_dtype="int8")
    assert engine_config(arguments, 4) == wanted
    settings = resolve_server_settings(read_arguments([*FLAGS, *QUANTIZED], {}))
    assert (settings.engine.quantization, settings.engine.kv_cache_dtype) == ("int8", "int8")
    served = served_model(settings, find_weights(settings.model))
    assert (served.record["quantization"], served.record["kv_cache_dtype"]) == ("int8", "int8")
    environment = {"LLAMAGEN_QUANTIZATION": "fp8", "LLAMAGEN_KV_CACHE_DTYPE": "fp8"}
    settings = resolve_server_settings(read_arguments(FLAGS, environment))
    assert (settings.engine.quantization, settings.engine.kv_cache_dtype) == ("fp8", "fp8")
    pipe = Pipeline.from_pretrained(
        "GPT-demo", device="cpu", random_weights=True, engine=replace(wanted, num_pages=64)
    )
    assert pipe._record()["quantization"] == "int8"
    with refused("give engine=EngineConfig"):
        Pipeline.from_pretrained("GPT-demo", quantization="int8")


def bulk_job(quantization: str | None = None, pages: str = "auto") -> BulkJob:
    model = resolve_model(ModelOptions("GPT-demo", device="cpu"))
    return BulkJob(
        model,
        FoundWeights(None, None),
        SamplingParams(cfg_scale=1.5, top_k=0),
        128,
        make_labels("random", 4, model.num_classes, 0),
        "random",
        quantization=quantization,
        kv_cache_dtype=pages,
    )


def test_a_bulk_job_goes_on_only_as_it_was_begun() -> None:
    """Fails if images of one job are drawn with other weights or pages, or a job from before there
    were any does not go on.
    """
    plain, quantised = bulk_job().settings, bulk_job("int8", "fp8").settings
    older = {
        name: value for name, value in plain.items() if "quant" not in name and "kv" not in name
    }
    check_same(older, plain)
    check_same(quantised, quantised)
    for there, here in ((plain, quantised), (quantised, plain), (older, quantised)):
        with pytest.raises(DifferentJobError, match="quantization"):
            check_same(there, here)


def test_a_bulk_job_of_a_quantised_file_is_known_by_it(work: Path) -> None:
    """Fails if its settings do not say how its images are drawn, or a contradiction is found when
    the job's folder is there, and says for ever that it is of another job.
    """
    convert(open_checkpoint(DEMO), Path("int8.safetensors"), None, "int8")
    parser, flags = build_bulk_parser(), [*FLAGS, "--num-fid-samples", "2"]

    def resolved(*typed: str) -> BulkJob:
        arguments = parser.parse_args([*flags, "--gpt-ckpt", "int8.safetensors", *typed])
        return resolve(arguments, SamplingParams(), Ranks())[0]

    for typed in ([], ["--quantization", "int8"], ["--naive"]):
        assert resolved(*typed).settings["quantization"] == "int8"
    with refused("holds int8 weights; use the original ones, or leave out --quantization"):
        resolved("--quantization", "fp8")
    assert [path.name for path in work.iterdir()] == ["int8.safetensors"]


@pytest.mark.parametrize("flag", ["--quantization", "--kv-cache-dtype"])
def test_an_unknown_value_ends_in_one_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if an unknown scheme is taken for none."""
    with pytest.raises(SystemExit) as ended:
        build_engine_parser().parse_args([*FLAGS, flag, "fp4"])
    assert ended.value.code == 2
    assert f"argument {flag}: there is no fp4" in capsys.readouterr().err
