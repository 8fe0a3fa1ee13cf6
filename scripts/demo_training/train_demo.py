"""Trains the demo model: first the tokenizer, then the transformer, on emoji drawn on the fly.
Minutes on one GPU, hours on a CPU.

    # Trains both stages, and resumes what it finds in --run-dir.
    python scripts/demo_training/train_demo.py
    # Stops in time, to be resumed by the same command.
    python scripts/demo_training/train_demo.py --minutes 9

Every step depends on nothing but the state it starts from and (seed, step), so that an interrupted
run ends with the very weights of an unbroken one on the same machine and versions.
"""

import argparse
import io
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    import torch._inductor.config
    from safetensors.torch import save as safetensors_bytes
    from torch import Tensor

    from autoregressive.benchmarks.harness import use_device
    from autoregressive.benchmarks.script import add_device, script_parser, whole_number
    from autoregressive.demo_training.emoji_data import add_font, load_sprites
    from autoregressive.demo_training.stages import GPTStage, Plan, TokenizerStage, TrainingStage
    from autoregressive.files import check_folder, write_whole

ROOT = Path(__file__).resolve().parents[2]


def train(
    name: str,
    stage: TrainingStage,
    run_dir: Path,
    *,
    deadline: float = math.inf,
    stop_after: int,
    save_every: int,
) -> bool:
    """Runs a stage to its end or a limit, from the last saved state. True when it is done.

    Args:
        deadline: a `time.monotonic` value, at which this run stops.
        stop_after: steps of the stage in this run.
        save_every: so many steps.
    """
    state_path, log_path = run_dir / f"{name}.pt", run_dir / f"{name}.jsonl"
    step = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=stage.device, weights_only=True)
        different = [
            key for key, value in stage.made_with.items() if state["made_with"].get(key) != value
        ]
        if different:
            raise UserError(
                f"{state_path} was made with another {', '.join(different)}: use the same values "
                "or another --run-dir"
            )
        stage.load_state_dict(state["stage"])
        step = state["step"]
        print(f"{name}: resuming at step {step}", flush=True)
    started, first = time.monotonic(), step

    def save(path: Path) -> None:
        content = io.BytesIO()  # a full disk is an OSError only to Python's own writing
        torch.save(
            {"stage": stage.state_dict(), "step": step, "made_with": stage.made_with}, content
        )
        path.write_bytes(content.getbuffer())

    end = min(stage.steps, first + stop_after)
    while step < end and time.monotonic() < deadline:
        figures = stage.step(step)
        step += 1
        if step % 200 == 0 or step == stage.steps:
            line = {
                "step": step,
                **{key: round(value.item(), 5) for key, value in figures.items()},
                "steps_per_s": round((step - first) / (time.monotonic() - started), 2),
            }
            print(f"{name}: {json.dumps(line)}", flush=True)
            with log_path.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % save_every == 0:
            write_whole(state_path, save)
    write_whole(state_path, save)
    return step >= stage.steps


def export(weights: dict[str, Tensor], path: Path, description: str) -> None:
    """Writes weights in float16 as safetensors, whole or not at all."""
    tensors = {
        key: value.detach().to("cpu", torch.float16).contiguous() for key, value in weights.items()
    }
    # One entry only: safetensors writes several in random order, and equal weights would make
    # unequal files.
    metadata = {
        "description": f"{description}; data rendered from Noto Color Emoji (SIL Open Font License "
        "1.1)"
    }
    # The library's save_file writes a temporary file of its own, which would stay if the process
    # were killed.
    write_whole(path, lambda temporary: temporary.write_bytes(safetensors_bytes(tensors, metadata)))
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--stage",
        choices=["all", "tokenizer", "gpt"],
        default="all",
        metavar="STAGE",
        help="all, tokenizer, or gpt (after the tokenizer) (default: %(default)s)",
    )
    add_font(parser)
    for flag, default, what in (
        ("--run-dir", "runs/demo", "states to resume from, and logs"),
        ("--output-dir", "pretrained_models", "weights"),
    ):
        told = f"{what}; made if need be (default: %(default)s)"
        parser.add_argument(flag, type=Path, default=ROOT / default, metavar="DIR", help=told)
    add_device(parser)
    stop = "then the same command resumes (default: no limit)"
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help=f"stop after so long; {stop}"
    )
    parser.add_argument(
        "--stop-after",
        type=whole_number(1),
        default=10**9,
        metavar="STEPS",
        help=f"of a stage in this run; {stop}",
    )
    parser.add_argument(
        "--save-every",
        type=whole_number(1),
        default=2000,
        metavar="STEPS",
        help="between savings of the state (default: %(default)s)",
    )
    plan = parser.add_argument_group(
        "plan", "what the weights depend on; the defaults are those of the weights that ship"
    )
    for field in fields(Plan):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        told = f"{field.metadata['help']} (default: %(default)s)"
        plan.add_argument(
            flag, type=kind, default=field.default, metavar="N" if kind is int else "X", help=told
        )
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    if not typed.minutes >= 0:  # nor NaN
        raise UserError(f"--minutes {typed.minutes}: must be 0 or more")
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not trained yet and exports it."""
    arguments = parse_arguments(argv)
    plan = Plan(**{field.name: getattr(arguments, field.name) for field in fields(Plan)})
    deadline = time.monotonic() + 60 * arguments.minutes
    for flag, folder in (("--run-dir", arguments.run_dir), ("--output-dir", arguments.output_dir)):
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(flag, folder)
    emoji = load_sprites(arguments.font)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # else reductions are tuned by timing, and the last bits vary
    torch._inductor.config.deterministic = True
    torch.set_float32_matmul_precision("high")
    sprites = emoji.to(arguments.device)
    vq_path, gpt_path = (
        arguments.output_dir / f"demo_{name}.safetensors" for name in ("vq", "gpt")
    )
    for name in ("tokenizer", "gpt") if arguments.stage == "all" else (arguments.stage,):
        if name == "tokenizer":
            stage: TrainingStage = TokenizerStage(plan, sprites)
            path, model = vq_path, "VQ-demo"
        elif vq_path.exists():
            stage = GPTStage(plan, sprites, vq_path)
            path, model = gpt_path, "GPT-demo"
        else:
            raise UserError(f"{vq_path} is missing: train the tokenizer first (--stage tokenizer)")
        if not train(
            name,
            stage,
            arguments.run_dir,
            deadline=deadline,
            stop_after=arguments.stop_after,
            save_every=arguments.save_every,
        ):
            print(f"{name}: stopped; the same command goes on")
            return
        export(stage.average, path, f"{model}, {stage.steps} steps, seed {plan.seed}")


if __name__ == "__main__":
    run_command(main)
