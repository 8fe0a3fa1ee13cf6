"""A process whose memory test_gpu_engine.py measures: GPT-XL for 256 rows at 384 pixels, drawn and
decoded. Prints JSON.
"""

import json

import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner
from tokenizer.tokenizer_image.vq_model import VQ_models


def main() -> None:
    """Draws 128 guided images, decodes them, and says how much memory the GPU has left."""
    with torch.device("cuda"), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        gpt = GPT_models["GPT-XL"](block_size=576).eval()
        torch.set_default_dtype(torch.float32)
        vq = VQ_models["VQ-16"]().eval()
        gpt.init_weights(torch.Generator("cuda").manual_seed(0))
    gpt.cuda()  # the rotary table is made on the CPU
    engine = Engine(gpt, vq, EngineConfig(max_num_seqs=256))
    codes = engine.generate([7] * 128, SamplingParams(cfg_scale=2.0), decode=False)
    assert engine.decoder is not None
    for some in codes.split(8):  # pixels are their user's: few at a time
        engine.decoder.decode(some.cuda())
    torch.cuda.synchronize()
    assert isinstance(engine.runner, ModelRunner)
    pages = engine.runner.kv_pages
    weights = [*gpt.parameters(), *gpt.buffers(), *vq.parameters(), *vq.buffers()]
    sizes = {
        "free_bytes": torch.cuda.mem_get_info()[0],
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "page_bytes": pages.nbytes,
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
