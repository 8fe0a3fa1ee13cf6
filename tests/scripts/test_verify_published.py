"""The check of published weights as it is typed: what it finds, what it reports, and that what must
be equal and is not ends in status 1.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verify_published
from hub_stand_in import running_hub
from safetensors.torch import save_file
from torch import Tensor

from autoregressive.benchmarks import published_checks, published_report
from autoregressive.errors import UserError
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT_models, build_gpt
from autoregressive.serve.engine.request import Request
from autoregressive.weights.hub import stated_sha256
from autoregressive.weights.published import DEMO_GPT, DEMO_VQ, PublishedFile
from tokenizer.tokenizer_image.vq_model import VQ_models

XXL_FILE, VQ_FILE = "c2i_XXL_384.pt", "vq_ds16_c2i.pt"
ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a transformer in the form of LlamaGen's DDP files and one in that of its FSDP
    files, and their tokenizer. The transformers are as small as can be.
    """
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, file_name, tokens in (("GPT-B", "c2i_B_256.pt", 256), ("GPT-XXL", XXL_FILE, 576)):
        shape = GPTConfig(n_layer=1, n_head=1, dim=64)
        monkeypatch.setitem(GPT_models, name, partial(build_gpt, shape))
        weights = GPT_models[name](block_size=tokens).state_dict()
        torch.save({"model": weights} if name == "GPT-B" else weights, folder / file_name)
    torch.save({"model": VQ_models["VQ-16"]().state_dict()}, folder / VQ_FILE)
    return folder


@pytest.fixture
def demo(small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo model as small as can be, and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights"
    folder.mkdir()
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    gpt.init_weights(torch.Generator().manual_seed(1))
    save_file(gpt.state_dict(), folder / DEMO_GPT)
    (folder / DEMO_VQ).symlink_to(ROOT / "pretrained_models" / DEMO_VQ)
    return folder


def report_of(folder: Path, *words: str) -> Report:
    """Runs the script with one image of each model, and returns what it wrote."""
    common = ["--pretrained-dir", str(folder), "--device", "cpu", "--images", "1"]
    verify_published.main([*common, "--repeats", "1", *words])
    report: Report = json.loads(Path("verify_published.json").read_text())
    return report


def test_all_is_checked_measured_and_reported(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a check is left out, the engine's tokens are not the plain loop's, or the report
    tells more of the machine than its device.
    """
    threads = torch.get_num_threads()
    report = report_of(demo)
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == report
    assert [line.split()[:2] for line in table[1:]] == [["GPT-demo", "128"]]
    assert table[1].endswith(" nothing")
    (entry,) = report["models"]
    assert entry["precision"] == "none"
    assert entry["sampling"]["cfg_scale"] == 2.0
    gpt, vq = entry["files"]["files"]
    assert [gpt["name"], vq["name"]] == [DEMO_GPT, DEMO_VQ]
    assert gpt["sha256"] == hashlib.sha256((demo / DEMO_GPT).read_bytes()).hexdigest()
    assert gpt["hub_sha256"] is None
    exact = {"images": 1, "tokens": 256, "equal_tokens": 256, "equal_images": 1, "gap": 0.0}
    assert entry["greedy"] == {"float32": exact, "equal": True}
    settings = entry["lookahead"]["settings"]
    assert [each["lookahead"] for each in settings] == ["off", 4, 8, 16, "auto"]
    assert [each["equal_images"] for each in settings] == [1] * 5
    assert settings[0]["tokens_a_pass"] == 1.0 < settings[1]["tokens_a_pass"]
    assert entry["speed"]["off"]["seconds"] > 0
    assert entry["speed"]["auto"]["seconds"] > 0
    assert entry["failed"] == []
    assert os.sep not in json.dumps(report)
    assert torch.get_num_threads() == threads


def test_models_and_sizes_are_chosen(folder: Path) -> None:
    """Fails if a model that is found is passed over, one that was not asked for costs its time, or
    one that was is not there and nobody is told.
    """
    find = partial(published_checks.subjects, images=None, device=torch.device("cpu"))

    def found(models: list[str] | None, size: int | None) -> list[str]:
        return [each.name for each in find(models, size, pretrained_dir=folder)]

    assert found(None, None) == ["GPT-B, 256 px", "GPT-XXL, 384 px"]
    for subject in find(None, None, pretrained_dir=folder):  # both forms of checkpoints load
        subject.loaded()
    assert found(["GPT-XXL"], None) == ["GPT-XXL, 384 px"]
    assert found(None, 256) == ["GPT-B, 256 px"]
    with pytest.raises(UserError, match=r"GPT-L: there are no weights in .*llamagen-download"):
        found(["GPT-B", "GPT-L"], None)
    with pytest.raises(UserError, match="there are no published weights for 512 px"):
        found(None, 512)
    with pytest.raises(UserError, match="--images 9: must be 1 to 8"):
        find(None, None, images=9, pretrained_dir=folder)
    (folder / VQ_FILE).unlink()
    with pytest.raises(UserError, match=r"there is no vq_ds16_c2i\.pt in .*-download VQ-16"):
        found(None, 256)
    shipped = find(["GPT-demo"], None, pretrained_dir=None)
    assert [each.name for each in shipped] == ["GPT-demo, 128 px"]


def test_a_wrong_token_fails_and_costs_no_other_check(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if codes that differ with lookahead, or from the plain loop's, pass for equal."""
    draw_all = published_checks.draw_all

    def wrong(*arguments: Any) -> list[Request]:
        requests = draw_all(*arguments)
        greedy = arguments[2][0].temperature == 0
        if greedy or arguments[0].runner.config.lookahead == 8:
            codes = requests[0].codes
            assert isinstance(codes, Tensor)
            codes[0, 100 if greedy else -1] ^= 1
        return requests

    monkeypatch.setattr(published_checks, "draw_all", wrong)
    with pytest.raises(SystemExit, match="1"):
        report_of(demo)
    entry = json.loads(Path("verify_published.json").read_text())["models"][0]
    assert entry["failed"] == ["greedy", "lookahead"]
    assert entry["greedy"]["float32"]["equal_tokens"] == 255
    assert entry["greedy"]["float32"]["gap"] > published_checks.NEAR_TIE
    kept = {each["lookahead"]: each["equal_images"] for each in entry["lookahead"]["settings"]}
    assert kept == {"off": 1, 4: 1, 8: 0, 16: 1, "auto": 1}
    assert entry["speed"]["off"]["seconds"] > 0
    assert "greedy, lookahead" in capsys.readouterr().out


def test_a_near_tie_is_no_failure(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two likeliest tokens whose order is that of rounding count as an error of the
    engine.
    """
    compare = published_checks._plain_greedy

    def close(*arguments: Any) -> tuple[Tensor, Tensor]:
        codes, gaps = compare(*arguments)
        codes[0, 7:] ^= 1
        gaps[0, 7], gaps[0, 8:] = (
            published_checks.NEAR_TIE / 2,
            10.0,
        )  # what comes later follows from it
        return codes, gaps

    monkeypatch.setattr(published_checks, "_plain_greedy", close)
    (subject,) = published_checks.subjects(None, None, 1, demo, torch.device("cpu"))
    outcome = published_checks.check_greedy(subject)
    assert outcome["float32"]["equal_tokens"] == 7
    assert outcome["float32"]["gap"] == pytest.approx(published_checks.NEAR_TIE / 2)
    assert outcome["equal"]


def test_files_are_held_against_the_hubs_hashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if weights that are not the published ones pass, or a conversion is said to differ."""
    (subject,) = published_checks.subjects(["GPT-B"], None, 1, folder, torch.device("cpu"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_hub() as hub:  # it has vq_ds16_c2i.pt
        hub.describe((folder / VQ_FILE).read_bytes())
        # HF_ENDPOINT is read when huggingface_hub is imported, which may have been before.
        ask = partial(stated_sha256, endpoint=hub.endpoint)
        monkeypatch.setattr("autoregressive.weights.hub.stated_sha256", ask)
        with pytest.raises(UserError, match=r"c2i_B_256\.pt: the hub cannot be asked .*404"):
            published_report._hub_hashes([subject])
        with monkeypatch.context() as patch:
            patch.setattr(published_report, "PUBLISHED_FILES", (PublishedFile(VQ_FILE, "VQ-16"),))
            stated = published_report._hub_hashes([subject])
        assert hub.downloads() == []
    assert published_checks.check_files(subject, stated)["equal"] is True
    stated["c2i_B_256.pt"] = "0" * 64
    checked = published_checks.check_files(subject, stated)
    assert [each["equal"] for each in checked["files"]] == [False, True]
    assert published_report.has_failed(checked)
    (folder / "c2i_B_256.pt").rename(folder / "c2i_B_256.safetensors")
    (subject,) = published_checks.subjects(["GPT-B"], None, 1, folder, torch.device("cpu"))
    assert subject.found.gpt == folder / "c2i_B_256.safetensors"
    checked = published_checks.check_files(subject, {"c2i_B_256.pt": "0" * 64})
    assert checked["files"][0]["name"] == ".safetensors of c2i_B_256.pt"
    assert not published_report.has_failed(checked)


def test_a_damaged_checkpoint_is_reported_without_its_folder(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if one bad file ends the script, passes, or brings its folder into the report."""
    (demo / DEMO_GPT).write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match="1"):
        report_of(demo)
    report = json.loads(Path("verify_published.json").read_text())
    (entry,) = report["models"]
    assert entry["failed"] == ["greedy", "lookahead", "speed"]
    assert entry["greedy"] == {"error": "CheckpointError"}
    assert entry["files"]["files"][0]["bytes"] == 13
    assert os.sep not in json.dumps(report)
    assert f"greedy: CheckpointError: {demo / DEMO_GPT}" in capsys.readouterr().err


# Stand in for the bulk command and the evaluation: both note what they were called with.
BULK = """
import sys
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("progress")
name = "{--gpt-model}-{stem}-size-{--image-size}-size-{--image-size-eval}-VQ-16-topk-{--top-k}"
name += "-topp-1.0-temperature-1.0-cfg-{--cfg-scale}-seed-{--global-seed}.npz"
folder = Path(words["--sample-dir"])
folder.mkdir()
stem = Path(words["--gpt-ckpt"]).stem
(folder / name.format(**words, stem=stem)).write_text(words["--num-fid-samples"])
"""
EVALUATE = """
import json, sys
from pathlib import Path
samples, reference = map(Path, sys.argv[1:3])
images = int(samples.read_text())
if images == 3:
    sys.exit("too few")
print("a table")
print(json.dumps({"fid": 2.5, "samples": str(samples), "images": images, "of": [str(reference)]}))
"""


def test_fid_is_measured_by_the_commands_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if the guidance is not that of the published figure, the file of samples is looked for
    under another name, a failure passes, or a path comes into the report.
    """
    for name, text in (("_BULK", BULK), ("_EVALUATE", EVALUATE)):
        script = folder / f"{name}.py"
        script.write_text(text)
        monkeypatch.setattr(published_checks, name, script)
    reference = folder / "reference.npz"
    reference.write_text("")
    (subject,) = published_checks.subjects(["GPT-XXL"], None, 1, folder, torch.device("cpu"))
    outcome = published_checks.measure_fid(subject, 50, reference, Path("samples"), None)
    assert outcome["cfg_scale"] == 1.75
    assert outcome["published_fid"] == 2.34
    assert outcome["evaluation"] == {
        "fid": 2.5,
        "samples": "GPT-XXL-c2i_XXL_384-size-384-size-256-VQ-16-topk-0-topp-1.0-temperature-1.0-"
        "cfg-1.75-seed-0.npz",
        "images": 50,
        "of": ["reference.npz"],
    }
    out, err = capfd.readouterr()
    assert (out, err) == ("", "progress\n")
    with pytest.raises(UserError, match=r"_EVALUATE\.py ended with status 1"):
        published_checks.measure_fid(subject, 3, reference, Path("others"), "cpu")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fid", "50"], "--fid and --reference go together"),
        (["--reference", "x.npz"], "--fid and --reference go together"),
        (["--fid", "50", "--reference", "x.npz"], "x.npz: No such file or directory"),
        (["--fid", "50", "--reference", __file__], "not an .npz file, or damaged"),
        (["--fid", "50", "--reference", "good.npz"], "--fid: torch_fidelity is missing: pip inst"),
        (["--output", "x.txt"], "--output x.txt"),
    ],
)
def test_a_mistake_is_told_before_the_work(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a mistake is found only after minutes of measuring."""
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    monkeypatch.setattr(published_report, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=told):
        report_of(tmp_path, *words)
    assert not Path("verify_published.json").exists()
