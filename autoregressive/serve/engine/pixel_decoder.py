"""Decodes codes to pixels beside the running steps, on a stream of its own. A few batch sizes are
captured as CUDA graphs.

On a GPU that computes in bf16 this runs `VQForward`. An older GPU runs `VQModel.decode_code` on
that stream, a CPU runs it at once, both in float32. A batch is split into parts of the largest
captured size, and the last part is padded to the next size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.devices import ieee_float32
from autoregressive.serve.engine.batch import uploaded
from autoregressive.serve.engine.device_future import DeviceEvent, DeviceFuture, copy_to_host
from autoregressive.serve.engine.vq_forward import VQForward
from tokenizer.tokenizer_image.vq_model import VQModel

_MOST_IMAGES = 16  # at once: more is no faster
_MOST_PIXELS = 4 * 384 * 384  # at once: VQ-16 then needs about half a GiB beside its weights


@dataclass(frozen=True)
class _Captured:
    """The decoding of a fixed number of images, captured as a graph between fixed addresses."""

    graph: torch.cuda.CUDAGraph
    codes: Tensor  # int32 [images, tokens]
    pixels: Tensor  # float32 [images, 3, height, width]


class PixelDecoder:
    """Decodes any number of images. Used by one thread.

    Args:
        vq: in eval mode, float32, on `device`; later changes to its parameters may have no effect.
        grid: codes of an image's side.
        device: where codes come from and pixels go.
        cuda_graphs: capture now (seconds); without, a GPU is kept waiting by the host at small
            batches.
        backend: of the kernels: "auto", "triton" or "torch".
        on_progress: called with graphs captured and in all.
    """

    def __init__(
        self,
        vq: VQModel,
        grid: int,
        device: torch.device,
        *,
        cuda_graphs: bool = True,
        backend: str = "auto",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._vq, self._grid, self._device = vq, grid, device
        self._size = grid * vq.config.downsample_size
        # A CPU gains nothing by more than one, whose pixels then depend on its codes alone.
        self.batch_sizes = batch_sizes(self._size) if device.type == "cuda" else (1,)
        self._captured: dict[int, _Captured] = {}
        self._forward: VQForward | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            if torch.cuda.get_device_capability(device) >= (8, 0):
                self._forward = VQForward(vq, grid, backend)
                if cuda_graphs:
                    self._capture(on_progress)

    @property
    def graphs(self) -> int:
        """How many graphs were captured."""
        return len(self._captured)

    @torch.no_grad()
    def submit(self, codes: Tensor) -> DeviceFuture[Tensor]:
        """Enqueues the decoding behind all that the current stream was given. The codes may be
        overwritten after that.

        Args:
            codes: integers [images, grid * grid], on the device. Ids outside the codebook are
                clamped.

        Returns:
            Pixels float32 [images, 3, height, width], about -1..1, on the device.
        """
        if self._device.type != "cuda":
            parts = [self._decode_plain(part) for part in codes.split(self.batch_sizes[-1])]
            return DeviceFuture.done(torch.cat(parts))
        # on the current stream, before whatever it does to them next
        codes = codes.to(torch.int32, copy=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            codes.record_stream(self._stream)
            pixels = torch.empty(codes.shape[0], 3, self._size, self._size, device=self._device)
            most = self.batch_sizes[-1]
            for part, decoded in zip(codes.split(most), pixels.split(most), strict=True):
                decoded.copy_(self._decode_part(part))
            done = DeviceEvent(self._device)
        return DeviceFuture(done.ready, lambda: done.hold_back(pixels))

    @torch.no_grad()
    def submit_to_host(
        self, codes: Tensor, as_pictures: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    ) -> DeviceFuture[tuple[Tensor, ...]]:
        """Enqueues decoding and the copy of the pictures to the host. The current stream goes on
        meanwhile.

        Args:
            codes: integers [images, grid * grid], on the CPU. Ids outside the codebook are clamped.
            as_pictures: makes what is returned of the pixels; None: rounds them.

        Returns:
            Pictures uint8 [images, height, width, 3], and whether every pixel of an image was
            finite: bool [images].
        """
        as_pictures = as_pictures or _as_pictures
        if self._device.type != "cuda":
            return DeviceFuture.done(as_pictures(self.submit(codes).result()))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            on_device = uploaded(codes.to(torch.int32), self._device)
            return copy_to_host(*as_pictures(self.submit(on_device).result()))

    def decode(self, codes: Tensor) -> Tensor:
        """`submit` and its result in one."""
        return self.submit(codes).result()

    def _decode_part(self, codes: Tensor) -> Tensor:
        """Decodes at most the largest batch size. The result is valid until the next call."""
        if self._forward is None:
            return self._decode_plain(codes)
        images = codes.shape[0]
        fitting = [size for size in self._captured if size >= images]
        if not fitting:
            return _without_tuning(self._forward, codes)
        captured = self._captured[min(fitting)]
        # the rest keeps older codes, which are valid, and whose pixels nobody takes
        captured.codes[:images] = codes
        captured.graph.replay()
        return captured.pixels[:images]

    def _decode_plain(self, codes: Tensor) -> Tensor:
        config = self._vq.config
        codes = codes.clamp(0, config.codebook_size - 1)
        return self._vq.decode_code(
            codes, [codes.shape[0], config.codebook_embed_dim, self._grid, self._grid]
        )

    def _capture(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Captures every batch size. They share one pool of memory, because they run one after the
        other.
        """
        assert self._forward is not None
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            # the largest first: the others fit into its memory
            for images in reversed(self.batch_sizes):
                codes = torch.zeros(images, self._grid**2, dtype=torch.int32, device=self._device)
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    before_bytes = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    # compiles, and builds the library's plans
                    _without_tuning(self._forward, codes)
                    needed_bytes = torch.cuda.max_memory_allocated() - before_bytes
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    # Taken in one piece and given back: the pool cuts the tensors out of it, and
                    # keeps no pieces of many sizes.
                    torch.empty(needed_bytes, dtype=torch.uint8, device=self._device)
                    pixels = _without_tuning(self._forward, codes)
                self._captured[images] = _Captured(graph, codes, pixels)
                if on_progress is not None:
                    on_progress(len(self._captured), len(self.batch_sizes))


def batch_sizes(image_size: int) -> tuple[int, ...]:
    """Numbers of images that are decoded at once: powers of two, up to what memory allows."""
    most = max(1, min(_MOST_IMAGES, _MOST_PIXELS // image_size**2))
    return tuple(2**power for power in range(most.bit_length()))


def _as_pictures(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 [images, 3, height, width] in -1..1 -> uint8 [images, height, width, 3], and whether
    all were finite [images].
    """
    # 0.5 more, for rounding
    levels = (pixels.clamp(-1, 1) * 127.5 + 128).nan_to_num(nan=0).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous(), pixels.isfinite().flatten(1).all(dim=1)


def _without_tuning(forward: VQForward, codes: Tensor) -> Tensor:
    """Decodes with convolutions chosen by rule. To choose by measurement takes seconds and changes
    the last bits from run to run.
    """
    with (
        ieee_float32(),
        torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=True
        ),
    ):
        return forward(codes)
