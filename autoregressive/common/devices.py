"""Which device a command runs on, found out before anything is put there."""

import re

import torch

from autoregressive.common.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda (the first GPU) or cuda:N.

    Raises:
        UserError: another name, or no such GPU here.
    """
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: must be cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no GPU here; use --device cpu")
    number = name.removeprefix("cuda").removeprefix(":") or "0"
    there = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = next((device for device in there if str(device.index) == number), None)
    if found is None:
        raise UserError(f"--device {name}: the GPUs here are cuda:0 to cuda:{len(there) - 1}")
    return found
