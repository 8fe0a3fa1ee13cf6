"""Measures how each product and the attention are best cut up on this GPU, and writes the table
that the engine reads.

    python scripts/benchmarks/tune_kernels.py --models GPT-B,GPT-XL

Kernels of a step overlap, so a setting is judged by the time of whole layers: one operation's
candidates are tried while the others keep the best found so far, in turn. Settings depend neither
on the number of rows nor on the context, so the mean of 16 rows and 2, and of three contexts,
decides. What the table says of other models' shapes stays. Needs a GPU of compute capability 8.0 or
above.

With --tensor-parallel-size it tunes the layers of one of so many ranks, which share the model.
Nothing is exchanged then.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError, either

with slow_imports(__name__):
    import torch
    from torch import Tensor
    from typing_extensions import override

    from autoregressive.benchmarks.harness import with_random_weights
    from autoregressive.benchmarks.script import (
        add_models,
        add_output,
        names,
        script_parser,
    )
    from autoregressive.benchmarks.tune_candidates import (
        attention_candidates,
        fused_candidates,
        fused_whole_candidates,
        linear_candidates,
        quantized_candidates,
        swiglu_candidates,
        whole_candidates,
    )
    from autoregressive.files import check_file, write_whole
    from autoregressive.models.config import GPT_SHAPES, GPTConfig
    from autoregressive.models.gpt import Transformer
    from autoregressive.serve.engine.batch import Batch, BatchShape
    from autoregressive.serve.engine.exchange import Exchange
    from autoregressive.serve.engine.kv_pages import LayerPages
    from autoregressive.serve.engine.layers import LayersFactory, ModelWeights
    from autoregressive.serve.engine_flags import add_tensor_parallel_flag
    from autoregressive.serve.floor import median_seconds
    from autoregressive.weights.quantized import pair_products, quantize_products
    from kernels import tiles as tile_tables
    from kernels.attention import head_stride
    from kernels.hopper.peers import Inboxes
    from kernels.operations import MANY_ROWS, triton_operations
    from kernels.tiles import SECTIONS, TileTable, read_table, tile_table

_ROWS = (16, 2)
_TOKENS, _PAGE_SIZE = 576, 16
# their mean is a whole image's; at one alone, tiles win that lose at the others
_CONTEXTS = (96, 288, 480)
_COLD_BYTES = 300e6  # weights of a chain: several times the second-level cache
_COLD_HEAD_BYTES = 100e6
_ON_HOPPER = ("fused_", "quantized_")  # sections that only compute capability 9.0 uses
# What ranks that share a model tune. Their attention has the tiles of the nearest number of heads,
# and their part of the output head has the rule's.
_OF_RANKS = ("fused_linear", "fused_project", "fused_swiglu")
_OF_HEAD = ("whole_linear", "fused_head")  # sections of what no layer of one GPU has


class NoOtherRank(Exchange):
    """Stands for the other ranks, of which there are none."""

    reaches_memory = True

    @override
    def gather(self, own: Tensor, parts: Tensor) -> None:
        raise NotImplementedError

    inboxes = dict.fromkeys(("attention", "ffn"), Inboxes((0,), own=0))


class Chain:
    """Layers of random weights in bf16 on the GPU, as a step runs them, and several heads.

    Args:
        config: of as many layers as wanted.
        capability: of the GPU.
        quantized: whether the layers' weights are fp8, and paired.
    """

    def __init__(
        self, config: GPTConfig, capability: tuple[int, int], *, quantized: bool = False
    ) -> None:
        self.config, self.capability, self.quantized = config, capability, quantized
        device, dtype = torch.device("cuda"), torch.bfloat16
        with torch.device("meta"):
            gpt = Transformer(config)
        gpt = with_random_weights(gpt, device, dtype)
        if quantized:
            quantize_products(gpt, "fp8")
            pair_products(gpt)
        self.weights = ModelWeights.of(gpt)
        head = self.weights.head
        others = range(1 + int(_COLD_HEAD_BYTES / head.nbytes))
        self.heads = [head, *(torch.randn_like(head) * 0.02 for _ in others)]
        self.batch = Batch(BatchShape.of(MANY_ROWS, _TOKENS, _PAGE_SIZE), device)
        pages = max(_ROWS) * self.batch.shape.pages_per_row
        # More rows than these share pages: only whether the kernels run matters then.
        self.batch.page_table.copy_(
            (torch.arange(self.batch.page_table.numel()) % pages).view_as(self.batch.page_table)
        )
        self.batch.positions.fill_(_CONTEXTS[0])
        self.batch.limits.fill_(_TOKENS)
        shape = (config.n_layer, 2, pages, config.heads_of_rank, _PAGE_SIZE)
        self.kv_pages = (
            torch.randn(
                *shape, head_stride(config.head_size, dtype.itemsize), device=device, dtype=dtype
            )
            * 0.02
        )

    def prepare(self, table: TileTable, rows: int, section: str) -> Callable[[], None]:
        """What runs one step with the table's tiles, with scratch memory of its own: through all
        heads if the section is of the head, else through the layers.
        """
        operations = triton_operations(
            table,
            self.config.heads_of_rank,
            self.config.head_size,
            launch_pdl=self.capability >= (9, 0),
            hopper=self.capability == (9, 0),
        )

        def filled(name: str, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.ones(dims, dtype=dtype, device="cuda")

        factory = LayersFactory(
            self.config,
            torch.bfloat16,
            operations,
            library=False,
            quantized=self.quantized,
            pairable=self.quantized,
            reaches_memory=True,
        )
        layers = factory.make(rows, 1, filled, NoOtherRank())
        weights = self.weights
        layers.normed.normal_()

        def run() -> None:
            if section in _OF_HEAD:
                for head in self.heads:
                    layers.head(head)
                return
            for layer, next_norm, pages in zip(
                weights.layers, weights.next_norms, self.kv_pages, strict=True
            ):
                layers.layer(layer, next_norm, LayerPages(pages), weights.rotary, self.batch)

        return run


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, tunes each model, writes the table.

    Raises:
        UserError: no GPU with Triton kernels is here, or the table cannot be written, or is none.
    """
    arguments = parse_arguments(argv)
    capability = torch.cuda.get_device_capability()
    path: Path = arguments.output
    table = replace(
        table_so_far(path), shared_memory=tile_table(capability, torch.bfloat16).shared_memory
    )
    for name in arguments.models:
        shape = GPT_SHAPES[name]
        config = replace(shape, n_layer=1, block_size=_TOKENS, ranks=arguments.tensor_parallel_size)
        table = tune(config, table, capability, name, arguments.sections)
        write_table(table, path, torch.cuda.get_device_name())
    print(json.dumps({"benchmark": "tune_kernels", "models": arguments.models, "table": str(path)}))


@dataclass(frozen=True)
class TunedSection:
    """A setting of the table and what is tried for it."""

    section: str
    key: tuple[int, int]
    candidates: list[Any]


def stages_of(config: GPTConfig, hopper: bool) -> list[TunedSection]:
    """The settings to tune, in their order."""
    width, heads, ffn = config.dim, config.width_of_rank, config.ffn_of_rank
    vocabulary = config.vocabulary_of_rank
    candidates = list(attention_candidates(config.head_size, hopper))
    attention = TunedSection("attention", (config.heads_of_rank, config.head_size), candidates)

    def stage(
        section: str, outputs: int, inputs: int, candidates: Callable[..., Any]
    ) -> TunedSection:
        return TunedSection(section, (outputs, inputs), list(candidates(outputs, inputs)))

    if hopper:
        most_4, most_6 = (partial(fused_candidates, most_splits=most) for most in (4, 6))
        pairs = partial(fused_whole_candidates, tiles=(64, 128, 256), matrices=2)
        whole = partial(fused_whole_candidates, tiles=(64, 128), matrices=1)
        once = partial(quantized_candidates, splits=(1,), matrices=2)
        clusters = partial(quantized_candidates, splits=(1, 2, 4))
        parts = partial(quantized_candidates, splits=range(1, 7))
        layer = [
            stage("fused_project", width, ffn, most_4),
            stage("fused_project", width, heads, most_4),
            stage("fused_swiglu", ffn, width, pairs),
            stage("fused_linear", 3 * heads, width, most_6),
            attention,
        ]
        quantized = [
            stage("quantized_project", width, ffn, clusters),
            stage("quantized_project", width, width, clusters),
            stage("quantized_swiglu", ffn, width, once),
            stage("quantized_linear", 3 * width, width, parts),
        ]
        head = stage("fused_head", vocabulary, width, whole)
        return [*layer, *layer, *quantized, *quantized, head]
    return [
        attention,
        stage("linear", 3 * width, width, linear_candidates),
        stage("swiglu", ffn, width, swiglu_candidates),
        stage("linear", width, ffn, linear_candidates),
        stage("linear", width, width, linear_candidates),
        attention,
        stage("whole_linear", vocabulary, width, whole_candidates),
    ]


def tune(
    config: GPTConfig,
    table: TileTable,
    capability: tuple[int, int],
    name: str,
    sections: Sequence[str],
) -> TileTable:
    """The table with the best settings found for one model, in these sections; the others keep
    theirs.
    """
    stages = [
        stage
        for stage in stages_of(config, hopper=capability == (9, 0))
        if stage.section in sections
    ]
    compile_in_parallel(config, table, stages, capability)
    # of a byte a weight, so that quantised ones are not in the cache, either
    layer_bytes = config.dim * (4 * config.width_of_rank + 3 * config.ffn_of_rank)
    deep = replace(config, n_layer=2 + int(_COLD_BYTES / layer_bytes))
    chains = chains_for([stage.section for stage in stages], deep, capability)
    for stage in stages:
        chain, tried = chains[_is_quantized(stage.section)], {}
        for candidate in stage.candidates:
            changed = table.with_setting(stage.section, stage.key, candidate)
            try:
                tried[candidate] = score(chain, changed, stage.section)
            except Exception as error:  # a setting that does not fit the GPU is no candidate
                print(f"  {candidate}: {str(error).splitlines()[0][:100]}")
        told = "no candidate runs, the rule's tiles stay"
        if tried:
            best = min(tried, key=lambda candidate: sum(tried[candidate]))
            table = table.with_setting(stage.section, stage.key, best)
            times = (f"{n} rows {us:.2f} us" for n, us in zip(_ROWS, tried[best], strict=True))
            told = f"best of {len(tried)}: {best}, {', '.join(times)}"
        print(f"{name} {stage.section} {stage.key}: {told}", flush=True)
    return table


def chains_for(
    sections: Sequence[str], config: GPTConfig, capability: tuple[int, int]
) -> dict[bool, Chain]:
    """The layers that these sections are tuned with: by whether their weights are quantised."""
    return {
        quantized: Chain(config, capability, quantized=quantized)
        for quantized in {_is_quantized(section) for section in sections}
    }


def _is_quantized(section: str) -> bool:
    return section.startswith("quantized_")


def score(chain: Chain, table: TileTable, section: str) -> list[float]:
    """Microseconds of a layer, the mean over the contexts, or of the head, at each number
    of rows.
    """
    heads = section in _OF_HEAD
    repeats = len(chain.heads) if heads else chain.config.n_layer
    if chain.capability != (9, 0):  # whose programs hold fewer tiles then
        # raises where the largest tile of rows does not fit
        chain.prepare(table, MANY_ROWS, section)()
    times = []
    for rows in _ROWS:
        run = chain.prepare(table, rows, section)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        medians = []
        for context in _CONTEXTS[:1] if heads else _CONTEXTS:
            chain.batch.positions.fill_(context)
            medians.append(median_seconds(graph.replay, chain.batch.positions.device, repeats=9))
        times.append(sum(medians) / len(medians) / repeats * 1e6)
    return times


def compile_in_parallel(
    config: GPTConfig, table: TileTable, stages: list[TunedSection], capability: tuple[int, int]
) -> None:
    """Fills Triton's cache on all cores: the measurements then wait for no compiler."""
    settings = {(stage.section, stage.key, tiles) for stage in stages for tiles in stage.candidates}
    tables = [(table.with_setting(*setting), setting[0]) for setting in settings]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(tables), (os.cpu_count() or 1) - 1))
    processes = [
        context.Process(target=_compile, args=(config, tables[index::workers], capability))
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _compile(
    config: GPTConfig, tables: list[tuple[TileTable, str]], capability: tuple[int, int]
) -> None:
    chains = chains_for([section for _, section in tables], config, capability)
    for table, section in tables:
        try:
            chains[_is_quantized(section)].prepare(table, _ROWS[0], section)()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"  does not run: {str(error).splitlines()[0][:100]}")


def write_table(table: TileTable, path: Path, gpu: str) -> None:
    """Writes the settings as JSON, one a line."""
    members = [f'  "measured_on": {json.dumps(f"{gpu}, torch {torch.__version__}")}']
    for name, section in SECTIONS.items():
        entries = [
            dict(zip(section.keys, key, strict=True)) | {"tiles": asdict(tiles)}
            for key, tiles in sorted(table.measured.get(name, {}).items())
        ]
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        if entries:
            members.append(f'  "{name}": [\n{lines}\n  ]')
    text = "{\n" + ",\n".join(members) + "\n}\n"
    write_whole(path, lambda part: part.write_text(text))


def table_so_far(path: Path) -> TileTable:
    """What is there already; shapes that are not tuned again keep their settings. Empty where
    nothing is.

    Raises:
        UserError: something else is there.
    """
    if not path.exists():
        return TileTable()
    try:
        # which another benchmark's figures have not, nor any section
        json.loads(path.read_text())["measured_on"]
        return read_table(path)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no table of this script's: remove it, or choose another --output"
        ) from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the path of the table; ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser, gpu_only=True)
    parser.add_argument(
        "--sections",
        type=names(list(SECTIONS)),
        metavar="NAMES",
        help=(
            f"of {', '.join(SECTIONS)}, with commas between them (default: all that this GPU uses)"
        ),
    )
    add_tensor_parallel_flag(parser)
    parser.set_defaults(tensor_parallel_size=1)
    add_output(
        parser,
        "the table (default: that of this GPU's architecture in kernels/, which the engine reads)",
    )
    typed = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UserError("tuning needs a GPU of compute capability 8.0 or above")
    major, minor = torch.cuda.get_device_capability()
    hopper = (major, minor) == (9, 0)
    used = [
        name for name in SECTIONS if name == "attention" or name.startswith(_ON_HOPPER) == hopper
    ]
    if typed.tensor_parallel_size > 1:
        check_rank_counts(typed)
        used = list(_OF_RANKS)
    typed.sections = typed.sections or used
    unused = [section for section in typed.sections if section not in used]
    if unused:
        of = "this GPU uses" if typed.tensor_parallel_size == 1 else "ranks tune"
        raise UserError(f"--sections {','.join(unused)}: {of} {', '.join(used)}")
    if typed.output is None:
        typed.output = Path(tile_tables.__file__).parent / f"tiles_sm{major}{minor}.json"
        check_file("--output", typed.output, ".json")
    return typed


def check_rank_counts(typed: argparse.Namespace) -> None:
    """Raises `UserError` where so many ranks cannot share a model, or have no tiles to tune."""
    for name in typed.models:
        counts = GPT_SHAPES[name].rank_counts
        if typed.tensor_parallel_size not in counts:
            given = f"--tensor-parallel-size {typed.tensor_parallel_size}"
            raise UserError(f"{given}: {name} takes {either(counts)}")
    if torch.cuda.get_device_capability() != (9, 0):
        raise UserError("--tensor-parallel-size: ranks are tuned on compute capability 9.0 alone")


if __name__ == "__main__":
    run_command(main)
