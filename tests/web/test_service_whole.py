"""The service as people run it: the demo model behind the command, and the page in a browser on the
service itself.
"""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from fake_service import running_service
from PIL import Image

from autoregressive.cli.drawing import resolve_settings
from autoregressive.cli.flags import build_parser
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.images import picture_grid
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.weights.finding import find_weights
from autoregressive.weights.loading import load_models

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-tests"


def offline(label: int, seed: int, n: int) -> tuple[torch.Tensor, list[np.ndarray]]:
    """The same from the engine without HTTP: codes, and pictures as the command saves them."""
    settings = resolve_settings(
        build_parser("", "").parse_args(["--gpt-model", "GPT-demo", "--device", "cpu"])
    )
    models = load_models(settings.model, find_weights(settings.model))
    engine = Engine(models.gpt, models.vq, EngineConfig(max_num_seqs=4))
    codes = engine.generate(
        [label], SamplingParams(cfg_scale=2.0, top_k=0, seed=seed, n=n), decode=False
    )
    assert engine.decoder is not None
    pixels = engine.decoder.decode(codes)
    return codes, [
        picture_grid(pixels[index : index + 1]).permute(1, 2, 0).numpy() for index in range(n)
    ]


def test_the_demo_model_is_served_as_the_engine_draws_it() -> None:
    """Fails if codes or pixels change on their way through the service."""
    command = [
        sys.executable,
        str(ROOT / "autoregressive/serve/api_server.py"),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    command += ["--gpt-model", "GPT-demo", "--max-num-seqs", "4"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            ready = next(
                match
                for line in process.stdout
                if (match := re.match(r"ready after .*: (http\S+)", line))
            )
            with httpx2.Client(base_url=ready[1], timeout=120) as client:
                body = {"prompt": "fox", "seed": 3, "n": 2}
                codes = client.post("/v1/codes", json=body).json()["data"]
                images = client.post("/v1/images/generations", json=body).json()["data"]
        finally:
            process.terminate()
        assert process.wait(30) == 0
    expected_codes, expected_pictures = offline(7, 3, 2)
    assert [one["codes"] for one in codes] == expected_codes.tolist()
    for data, expected in zip(images, expected_pictures, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
        # A picture decoded alone and one decoded beside another differ in the last bits of their
        # sums.
        assert np.abs(np.array(picture).astype(int) - expected).max() <= 1
        assert json.loads(picture.info["llamagen"])["weights"] == "demo_gpt.safetensors"


def test_a_service_that_can_draw_nothing_does_not_start() -> None:
    """Fails if clients are told what only the operator can mend."""
    command = [
        sys.executable,
        str(ROOT / "autoregressive/serve/api_server.py"),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, "--gpt-model", "GPT-demo", "--num-pages", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--num-pages" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_page_works_on_the_service_itself(tmp_path: Path) -> None:
    """Fails if page and service have drifted apart: key, picker, previews, pictures, cancel, the
    content security policy.
    """
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright to drive a browser"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    environment = {"LLAMAGEN_API_KEY": KEY}
    wrong: list[str] = []
    with (
        running_service(tmp_path, environment=environment) as service,
        sync_api.sync_playwright() as playwright,
    ):
        service.faults.set("step_seconds", "0.03")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda said: (
                None if "Failed to load resource" in said.text else wrong.append(said.text)
            ),
        )
        page.on(
            "request",
            lambda sent: (
                None
                if sent.url.startswith((service.url, "blob:", "data:"))
                else wrong.append(sent.url)
            ),
        )
        page.goto(service.url)
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        page.get_by_label("Class", exact=True).fill("fox")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(re.compile(r"Row \d of 8")).first.wait_for()
        page.locator(".run[data-state=done]").wait_for()
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("button", name="Cancel").first.click()
        service.client.headers["Authorization"] = f"Bearer {KEY}"
        service.wait_for(service.is_empty, 2)
        assert service.gauges()['requests_total{outcome="success"}'] == 1
        assert service.gauges()['requests_total{outcome="disconnected"}'] == 1
        browser.close()
    assert wrong == []
