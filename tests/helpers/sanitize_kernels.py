"""Every kernel once, on odd shapes, compared with its reference: small enough for
compute-sanitizer. Needs a GPU.

    export PYTHONPATH=tests/helpers
    compute-sanitizer --tool memcheck python tests/helpers/sanitize_kernels.py

`--tool racecheck` looks for races.

Under racecheck cuDNN's own attention (the tokenizer's one block with attention) is reported;
kernels of this project are not.
"""

import torch
from kernel_cases import (
    Place,
    check_add_norm,
    check_attention,
    check_embed,
    check_fused_linear,
    check_fused_project,
    check_fused_swiglu,
    check_gate,
    check_linear,
    check_swiglu,
)
from quantized_cases import (
    check_quantized_linear,
    check_quantized_project,
    check_quantized_swiglu,
)
from sampling_cases import mixed_case

from autoregressive.serve.engine.vq_forward import VQForward
from kernels.attention import AttentionTiles
from kernels.hopper.products import FusedTiles
from kernels.quantization import FP8
from kernels.sampling import draw_tokens
from kernels.tiles import LINEAR, SWIGLU, TileTable
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel


def main() -> None:
    """Runs what the GPU's capability allows."""
    device, capability = torch.device("cuda"), torch.cuda.get_device_capability()
    for dtype in (torch.bfloat16, torch.float32):
        place = Place(device, dtype, launch_pdl=capability >= (9, 0))
        table = TileTable(itemsize=dtype.itemsize)
        check_linear(place, 17, 200, 328, table.find(LINEAR, 200, 328))
        check_swiglu(place, 17, 96, 328, table.find(SWIGLU, 96, 328))
        check_gate(place, 3, 96)
        check_add_norm(place, 3, 200, 3)
        check_embed(place, 9, 200, blocks=5)
        check_attention(place, [0, 63, 64, -1, 130], 2, 100, 16, AttentionTiles(32, 1))
    if capability == (9, 0):
        _fused(Place(device, torch.bfloat16, launch_pdl=True))
        _quantized(Place(device, torch.bfloat16, launch_pdl=True))
    mixed_case(6, 16384, seed=3).copy("cuda").drawn_by(draw_tokens)
    vq = VQModel(VQConfig(ch_mult=(1, 1), num_res_blocks=1)).eval().cuda()
    VQForward(vq, grid=4)(torch.randint(0, 16384, (2, 16), device=device))
    torch.cuda.synchronize()
    print("every kernel has run")


def _fused(place: Place) -> None:
    for splits in (1, 4):
        for rows in (17, 130):  # and those of many rows
            check_fused_linear(place, rows, 200, 328, FusedTiles(64, 64, splits, 2, 4))
            check_fused_project(place, rows, 200, 328, FusedTiles(64, 64, splits, 2, 4))
    check_fused_project(place, 64, 200, 1336, FusedTiles(128, 128, 4, 8, 8))
    for rows in (17, 130):
        check_fused_swiglu(place, rows, 72, 328, FusedTiles(32, 64, 1, 2, 4))
    # its result is compared with that of the kernel of many rows
    check_attention(place, [0, 63, 64, -1, 130], 2, 100, 16, AttentionTiles(64, 1), hopper=True)
    check_attention(place, [5, 70], 2, 64, 7, AttentionTiles(32, 1), hopper=True)


def _quantized(place: Place) -> None:
    for splits in (1, 4):
        tiles = FusedTiles(64, 128, splits, 2, 4)
        for rows in (17, 130):  # and those of many rows
            check_quantized_linear(place, rows, 200, 384, tiles, "fp8")
            check_quantized_project(place, rows, 200, 384, tiles, "int8")
    for rows in (17, 130):
        check_quantized_swiglu(place, rows, 72, 384, FusedTiles(32, 128, 1, 2, 4), "fp8")
    for head_size, dtype in ((64, FP8), (100, torch.int8)):
        for window in (1, 3):
            check_attention(
                place,
                [0, 63, 64, -1, 130],
                2,
                head_size,
                16,
                AttentionTiles(32, 1),
                window=window,
                hopper=True,
                page_dtype=dtype,
            )


if __name__ == "__main__":
    main()
