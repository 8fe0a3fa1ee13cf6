"""What a bulk job's options may be. Nothing here imports torch."""

from numbers import Integral

from autoregressive.models.sampling_params import Bounds

# LlamaGen's defaults; the evaluation's size is the model's where that is less.
NUM_FID_SAMPLES, IMAGE_SIZE_EVAL = 50_000, 256
NAIVE_BATCH = 32  # images of a batch of the plain loop, as in LlamaGen
# A CPU draws more images at once no faster, and would lose them all if it was interrupted.
CPU_IMAGES = 8
RANDOM, BALANCED = "random", "balanced"  # how classes are chosen; else a file says them
BULK_BOUNDS = {
    "num_fid_samples": Bounds(Integral, 1, 99_999_999, "1 to 99999999"),
    "image_size_eval": Bounds(Integral, 1, 4096, "1 to 4096"),
    "per_proc_batch_size": Bounds(Integral, 1, 32767, "1 to 32767"),
}
