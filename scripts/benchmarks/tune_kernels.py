"""Measures how each product and the attention are best cut up on this GPU, and writes the table
that the engine reads.

    python scripts/benchmarks/tune_kernels.py --models GPT-B,GPT-XL

Kernels of a step overlap, so a setting is judged by the time of whole layers: one operation's
candidates are tried while the others keep the best found so far, in turn. Settings depend neither
on the number of rows nor on the context, so the mean of 16 rows and 2, and of three contexts,
decides. What the table says of other models' shapes stays. Needs a GPU of compute capability 8.0 or
above.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    from torch import Tensor

    from autoregressive.benchmarks.arguments import add_models, names, output_file, script_parser
    from autoregressive.benchmarks.tune_candidates import (
        attention_candidates,
        fused_candidates,
        fused_head_candidates,
        fused_swiglu_candidates,
        linear_candidates,
        swiglu_candidates,
        whole_candidates,
    )
    from autoregressive.files import check_file, write_whole
    from autoregressive.models.config import GPT_SHAPES, GPTConfig
    from autoregressive.serve.engine.batch import Batch, BatchShape
    from autoregressive.serve.engine.layers import Layers, LayersFactory, LayerWeights, ModelWeights
    from autoregressive.serve.floor import median_seconds
    from kernels import tiles as tile_tables
    from kernels.attention import head_stride
    from kernels.operations import MANY_ROWS, Operations, triton_operations
    from kernels.tiles import SECTIONS, TileTable, read_table, tile_table

_ROWS = (16, 2)
_TOKENS, _PAGE_SIZE = 576, 16
# their mean is a whole image's; at one alone, tiles win that lose at the others
_CONTEXTS = (96, 288, 480)
_COLD_BYTES = 300e6  # weights of a chain: several times the second-level cache


@dataclass(frozen=True)
class Chain:
    """Layers of random weights, as a step runs them."""

    config: GPTConfig
    weights: ModelWeights
    heads: list[Tensor]  # [vocabulary, width]
    kv_pages: Tensor  # [layers, 2, pages, heads, page_size, stride of a head]
    batch: Batch

    @classmethod
    def of(cls, config: GPTConfig, layers: int) -> "Chain":
        """A chain on the GPU, in bf16."""
        width, ffn, device = config.dim, config.ffn_dim, torch.device("cuda")

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

        norm = torch.ones(width, device=device, dtype=torch.bfloat16)
        made = [
            LayerWeights(
                attention_norm=norm,
                qkv=random(3 * width, width),
                output=random(width, width),
                ffn_norm=norm,
                gate_up=random(2 * ffn, width),
                down=random(width, ffn),
            )
            for _ in range(layers)
        ]
        head, classes = random(config.vocab_size, width), random(1, width)
        rotary = torch.rand(_TOKENS + 1, config.head_size // 2, 2, device=device)
        weights = ModelWeights(head, classes, made, norm, head, rotary)
        heads = [
            head,
            *(random(config.vocab_size, width) for _ in range(1 + int(100e6 / (2 * head.numel())))),
        ]
        batch = Batch(BatchShape.of(MANY_ROWS, _TOKENS, _PAGE_SIZE), device)
        pages = max(_ROWS) * batch.shape.pages_per_row
        # More rows than these share pages: only whether the kernels run matters then.
        batch.page_table.copy_(
            (torch.arange(batch.page_table.numel()) % pages).view_as(batch.page_table)
        )
        batch.positions.fill_(_CONTEXTS[0])
        kv = (layers, 2, pages, config.n_head, _PAGE_SIZE, head_stride(config.head_size, 2))
        return cls(config, weights, heads, random(*kv), batch)

    def layers_step(self, operations: Operations, rows: int) -> Callable[[], None]:
        """What runs one step through the layers, with its scratch memory."""
        layers = self._layers(operations, rows)

        def run() -> None:
            for layer, next_norm, pages in zip(
                self.weights.layers, self.weights.next_norms, self.kv_pages, strict=True
            ):
                layers.layer(layer, next_norm, pages, self.weights.rotary, self.batch)

        return run

    def heads_step(self, operations: Operations, rows: int) -> Callable[[], None]:
        """What runs the last product, several times."""
        layers = self._layers(operations, rows)

        def run() -> None:
            for head in self.heads:
                layers.head(head)

        return run

    def _layers(self, operations: Operations, rows: int) -> Layers:
        def filled(name: str, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.ones(dims, dtype=dtype, device="cuda")

        layers = LayersFactory(self.config, torch.bfloat16, operations, library=False).make(
            rows, filled
        )
        layers.normed.normal_()
        return layers


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, tunes each model, writes the table.

    Raises:
        UserError: no GPU with Triton kernels is here, or the table cannot be written, or is none.
    """
    arguments = parse_arguments(argv)
    major, minor = torch.cuda.get_device_capability()
    path: Path = arguments.output
    rules = TileTable(shared_memory=tile_table((major, minor), torch.bfloat16).shared_memory)
    table = replace(table_so_far(path), shared_memory=rules.shared_memory)
    for name in arguments.models:
        shape = GPT_SHAPES[name]
        config = GPTConfig(dim=shape.dim, n_layer=1, n_head=shape.n_head, block_size=_TOKENS)
        kernels = Kernels(launch_pdl=(major, minor) >= (9, 0), hopper=(major, minor) == (9, 0))
        table = tune(config, table, kernels, name, arguments.sections)
        write_table(table, path, torch.cuda.get_device_name())
    print(json.dumps({"benchmark": "tune_kernels", "models": arguments.models, "table": str(path)}))


@dataclass(frozen=True)
class Kernels:
    """What the GPU runs."""

    launch_pdl: bool
    hopper: bool

    def operations(self, table: TileTable, config: GPTConfig) -> Operations:
        """The operations with the table's tiles."""
        return triton_operations(
            table, config.n_head, config.head_size, launch_pdl=self.launch_pdl, hopper=self.hopper
        )


@dataclass(frozen=True)
class Stage:
    """A setting of the table and what is tried for it."""

    section: str
    key: Any
    candidates: list[Any]

    @property
    def of_head(self) -> bool:
        """Whether the setting is of the head, which no layer has."""
        return self.section in ("whole_linear", "fused_head")


def stages_of(config: GPTConfig, kernels: Kernels) -> list[Stage]:
    """The settings to tune, in their order."""
    width, ffn, vocabulary = config.dim, config.ffn_dim, config.vocab_size
    candidates = list(attention_candidates(config.head_size, kernels.hopper))
    attention = Stage("attention", (config.n_head, config.head_size), candidates)
    if kernels.hopper:
        layer = [
            Stage("fused_project", (width, ffn), list(fused_candidates(width, ffn, most_splits=8))),
            Stage(
                "fused_project", (width, width), list(fused_candidates(width, width, most_splits=8))
            ),
            Stage("fused_swiglu", (ffn, width), list(fused_swiglu_candidates(width))),
            Stage(
                "fused_linear",
                (3 * width, width),
                list(fused_candidates(3 * width, width, most_splits=6)),
            ),
            attention,
        ]
        return [
            *layer,
            *layer,
            Stage("fused_head", (vocabulary, width), list(fused_head_candidates(width))),
        ]
    return [
        attention,
        Stage("linear", (3 * width, width), list(linear_candidates(3 * width, width))),
        Stage("swiglu", (ffn, width), list(swiglu_candidates(width))),
        Stage("linear", (width, ffn), list(linear_candidates(width, ffn))),
        Stage("linear", (width, width), list(linear_candidates(width, width))),
        attention,
        Stage("whole_linear", (vocabulary, width), list(whole_candidates(width))),
    ]


def sections_of(hopper: bool) -> list[str]:
    """The sections of the table that a GPU uses for the weights that are tuned here."""
    return [
        section
        for section in SECTIONS
        if section == "attention" or section.startswith("fused_") == hopper
    ]


def tune(
    config: GPTConfig, table: TileTable, kernels: Kernels, name: str, sections: Sequence[str]
) -> TileTable:
    """The table with the best settings found for one model, in these sections; the others keep
    theirs.
    """
    width, ffn = config.dim, config.ffn_dim
    stages = [stage for stage in stages_of(config, kernels) if stage.section in sections]
    compile_in_parallel(config, table, stages, kernels)
    layer_bytes = 2 * (4 * width * width + 3 * width * ffn)
    chain = Chain.of(config, 2 + int(_COLD_BYTES / layer_bytes))
    for stage in stages:
        tried = {}
        for candidate in stage.candidates:
            changed = table.with_setting(stage.section, stage.key, candidate)
            try:
                tried[candidate] = score(chain, changed, kernels, heads=stage.of_head)
            except Exception as error:  # a setting that does not fit the GPU is no candidate
                print(f"  {candidate}: {str(error).splitlines()[0][:100]}")
        if not tried:
            print(
                f"{name} {stage.section} {stage.key}: no candidate runs, the rule's tiles stay",
                flush=True,
            )
            continue
        best = min(tried, key=lambda candidate: sum(tried[candidate]))
        table = table.with_setting(stage.section, stage.key, best)
        times = ", ".join(
            f"{rows} rows {micros:.2f} us" for rows, micros in zip(_ROWS, tried[best], strict=True)
        )
        print(
            f"{name} {stage.section} {stage.key}, best of {len(tried)}: {best}, {times}", flush=True
        )
    return table


def score(chain: Chain, table: TileTable, kernels: Kernels, heads: bool) -> list[float]:
    """Microseconds of a layer, the mean over the contexts, or of the head, at each number
    of rows.
    """
    operations = kernels.operations(table, chain.config)
    prepare = chain.heads_step if heads else chain.layers_step
    repeats = len(chain.heads if heads else chain.weights.layers)
    if not kernels.hopper:  # whose programs hold fewer tiles then
        prepare(operations, MANY_ROWS)()  # raises where the largest tile of rows does not fit
    times = []
    for rows in _ROWS:
        run = prepare(operations, rows)
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
    config: GPTConfig, table: TileTable, stages: list[Stage], kernels: Kernels
) -> None:
    """Fills Triton's cache on all cores: the measurements then wait for no compiler."""
    tried = {
        (stage.section, stage.key, tiles): stage for stage in stages for tiles in stage.candidates
    }
    jobs = [
        (config, table.with_setting(stage.section, stage.key, key[2]), kernels, stage.of_head)
        for key, stage in tried.items()
    ]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(jobs), (os.cpu_count() or 1) - 1))
    processes = [
        context.Process(target=_compile, args=(jobs[index::workers],)) for index in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _compile(jobs: list[tuple[GPTConfig, TileTable, Kernels, bool]]) -> None:
    chain = Chain.of(jobs[0][0], layers=1)
    for config, table, kernels, of_head in jobs:
        operations = kernels.operations(table, config)
        try:
            (chain.heads_step if of_head else chain.layers_step)(operations, _ROWS[0])()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"  does not run: {str(error).splitlines()[0][:100]}")


def write_table(table: TileTable, path: Path, gpu: str) -> None:
    """Writes the settings as JSON, one a line."""

    def lines(entries: list[dict[str, Any]]) -> str:
        return ",\n".join(f"    {json.dumps(entry)}" for entry in entries)

    def entries(section: str, settings: Mapping[Any, Any]) -> list[dict[str, Any]]:
        return [
            dict(zip(SECTIONS[section].keys, key, strict=True)) | {"tiles": asdict(tiles)}
            for key, tiles in sorted(settings.items())
        ]

    parts = {
        name: entries(name, settings) for name in SECTIONS if (settings := table.measured.get(name))
    }
    versions = f"torch {torch.__version__}"
    members = [f'  "measured_on": {json.dumps(f"{gpu}, {versions}")}']
    members += [f'  "{name}": [\n{lines(entries)}\n  ]' for name, entries in parts.items()]
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
    parser.add_argument(
        "--output",
        type=output_file("--output", ".json"),
        metavar="FILE.json",
        help="the table (default: that of this GPU's architecture in kernels/, which the engine "
        "reads)",
    )
    typed = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UserError("tuning needs a GPU of compute capability 8.0 or above")
    used = sections_of(hopper=torch.cuda.get_device_capability() == (9, 0))
    typed.sections = typed.sections or used
    unused = [section for section in typed.sections if section not in used]
    if unused:
        raise UserError(f"--sections {','.join(unused)}: this GPU uses {', '.join(used)}")
    if typed.output is None:
        major, minor = torch.cuda.get_device_capability()
        typed.output = Path(tile_tables.__file__).parent / f"tiles_sm{major}{minor}.json"
        check_file("--output", typed.output, ".json")
    return typed


if __name__ == "__main__":
    run_command(main)
