"""Folders outside of the project: none is needed to draw, and an installed copy keeps its weights
in the user's own.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from autoregressive import folders
from autoregressive.folders import can_be_written, prepare_compilers, pretrained_folder

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = (
    "HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR",
    "TEMP", "TMP",
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_DIR",
)  # fmt: skip
UNUSABLE = "/dev/null"  # a folder in it cannot be made, by the superuser either


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that says nothing; variables that are set in it are unset again."""
    # made before the temporary folder is forgotten, and not asked for again
    assert tmp_path.is_dir()
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back even if it is not set now
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", UNUSABLE)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return monkeypatch


def chosen() -> tuple[str | None, str | None]:
    """Where the compiler and Triton are told to keep what they compile."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR"), os.environ.get("TRITON_HOME")


def below(folder: Path) -> tuple[str, str]:
    """What `chosen` should be."""
    return str(folder / "inductor"), str(folder)


def test_the_standard_cache_folder_is_first(nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if XDG_CACHE_HOME does not count before ~/.cache, if either is told of, or if a folder
    is made already.
    """
    nobody.setenv("HOME", str(tmp_path / "home"))
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prepare_compilers() is None
    assert chosen() == below(tmp_path / "cache" / "llamagen")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("xdg", [None, "", "relative"])
def test_the_home_folder_is_next(
    nobody: pytest.MonkeyPatch, tmp_path: Path, xdg: str | None
) -> None:
    """Fails if the usual case, without XDG_CACHE_HOME, is told of; a relative one is to
    be ignored.
    """
    nobody.setenv("HOME", str(tmp_path))
    if xdg is not None:
        nobody.setenv("XDG_CACHE_HOME", xdg)
    assert prepare_compilers() is None
    assert chosen() == below(tmp_path / ".cache" / "llamagen")


def test_a_standard_folder_that_cannot_be_used_is_told_of(
    nobody: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if the user's choice is passed over silently."""
    nobody.setenv("HOME", str(tmp_path))
    nobody.setenv("XDG_CACHE_HOME", UNUSABLE)
    note = prepare_compilers()
    assert note is not None
    assert note.startswith(
        f"{UNUSABLE}/llamagen cannot be used: compiled kernels go to {tmp_path}/.cache/llamagen;"
    )
    assert prepare_compilers() is None  # once


def test_a_private_temporary_folder_is_next(nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if it is readable by others, differs from one command to the next, or is not told of in
    one line.
    """
    nobody.setenv("TMPDIR", str(tmp_path))
    note = prepare_compilers()
    private = tmp_path / f"llamagen-{os.geteuid()}"
    assert note == (
        f"/dev/null/.cache/llamagen cannot be used: compiled kernels go to {private}; "
        "XDG_CACHE_HOME names another folder"
    )
    assert chosen() == below(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    assert prepare_compilers() == note


@pytest.mark.parametrize("obstacle", ["open to others", "a link", "a file"])
def test_a_temporary_folder_that_is_not_private_is_not_used(
    nobody: pytest.MonkeyPatch, tmp_path: Path, obstacle: str
) -> None:
    """Fails if libraries could be loaded from a folder into which somebody else can put them."""
    nobody.setenv("TMPDIR", str(tmp_path))
    private = tmp_path / f"llamagen-{os.geteuid()}"
    if obstacle == "open to others":
        private.mkdir()
        private.chmod(0o777)
    elif obstacle == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        private.symlink_to("elsewhere")
    else:
        private.touch()
    note = prepare_compilers()
    assert note is not None
    assert "have no place" in note
    assert chosen() == ("/", "/")
    assert prepare_compilers() is None


def test_without_a_temporary_folder_the_cache_has_one(
    nobody: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if Triton and the compiler, which need both, find no temporary folder though there is a
    cache folder.
    """
    nobody.setattr(tempfile, "_candidate_tempdir_list", lambda: [UNUSABLE])
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare_compilers() is None
    assert os.environ["TMPDIR"] == str(tmp_path / "llamagen" / "tmp")
    assert (tmp_path / "llamagen" / "tmp").is_dir()


def test_triton_keeps_its_kernels_there(nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if Triton stops reading the variable, so that its kernels go to the home folder, or to
    nowhere.
    """
    knobs = pytest.importorskip("triton.knobs")
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare_compilers()
    assert Path(knobs.cache.dir).is_relative_to(tmp_path / "llamagen")


def test_what_the_user_has_chosen_stays(nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if a variable of torch's compiler or of Triton that is set already is overruled."""
    nobody.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare_compilers()
    assert chosen() == ("/mine", str(tmp_path / "llamagen"))
    os.environ.pop("TRITON_HOME")
    nobody.setenv("TRITON_CACHE_DIR", "/mine/too")
    assert prepare_compilers() is None
    assert chosen() == ("/mine", None)


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_gets_one(
    nobody: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    """Fails if a user id that has no entry in /etc/passwd ends the compiler, which asks for the
    name; 3.13 raises OSError.
    """

    def nameless(_: int) -> None:
        raise error

    import getpass
    import pwd

    nobody.setattr(pwd, "getpwuid", nameless)
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare_compilers()
    assert getpass.getuser() == f"uid-{os.getuid()}"


def test_the_checkout_keeps_its_weights() -> None:
    """Fails if the repository's own folder is not where its commands look."""
    assert pretrained_folder() == ROOT / "pretrained_models"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_DATA_HOME": "/data", "HOME": "/home/me"}, "/data/llamagen/pretrained_models"),
        (
            {"XDG_DATA_HOME": "data", "HOME": "/home/me"},
            "/home/me/.local/share/llamagen/pretrained_models",
        ),
        ({"HOME": "/"}, "/.local/share/llamagen/pretrained_models"),
        ({"HOME": "relative"}, "/.local/share/llamagen/pretrained_models"),
    ],
)
def test_an_installed_copy_keeps_weights_with_the_user(
    nobody: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """Fails if weights could go to site-packages, or to the current folder where there is
    no home.
    """
    nobody.setattr(folders, "in_checkout", lambda: False)
    for name, value in variables.items():
        nobody.setenv(name, value)
    assert pretrained_folder() == Path(expected)


def test_a_folder_that_does_not_exist_yet_can_be_written_where_its_parent_can(
    tmp_path: Path,
) -> None:
    """Fails if a folder is refused because it is to be made, or allowed where a file stands in the
    way.
    """
    assert can_be_written(tmp_path / "a" / "b")
    assert not can_be_written(Path(UNUSABLE) / "a" / "b")
    assert list(tmp_path.iterdir()) == []


WATCH = """
import os, sys
touched = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        touched.append(arguments[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"):
        touched.append(arguments[0])
sys.addaudithook(watch)
import getpass
def nameless():
    raise KeyError("no name was to be asked for")
getpass.getuser = nameless
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
print([str(path) for path in touched if str(path) != os.devnull])
"""


def test_importing_the_package_touches_nothing(tmp_path: Path) -> None:
    """Fails if an import of ours makes a file or a folder, or asks for the user's name, as a
    compiler's import does.
    """
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("autoregressive", "kernels", "tokenizer")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert len(modules) > 50
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": UNUSABLE,
        "TMPDIR": UNUSABLE,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", WATCH, *modules]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr[-2000:]


# Runs a command for a user without a name, in a container without a folder that could be written.
BARE = """
import os, pwd, runpy, sys, tempfile
def nameless(user):
    raise KeyError(user)
pwd.getpwuid = nameless
if sys.argv[1] == "nothing":
    tempfile._candidate_tempdir_list = lambda: ["/dev/null"]
del sys.argv[:2]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_bare(
    temporary: str, command: str, *typed: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """A command's end in such a container; `temporary`: "nothing", or what TMPDIR is."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": UNUSABLE,
        "TMPDIR": temporary,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    arguments = [sys.executable, "-c", BARE, temporary, str(ROOT / command), *typed]
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_picture_is_drawn_without_name_home_and_temporary_folder(tmp_path: Path) -> None:
    """Fails if a user id without a passwd entry, or a system that cannot be written, ends a
    command; it says where caches go.
    """
    typed = [
        "--gpt-model",
        "GPT-demo",
        "--device",
        "cpu",
        "--class-labels",
        "fox",
        "--cfg-scale",
        "1",
    ]
    done = run_bare("nothing", "autoregressive/sample/sample_c2i.py", *typed, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == (
        "sample_c2i.py: /dev/null/.cache/llamagen cannot be used: compiled kernels have no place, "
        "and what must be compiled "
        "fails; XDG_CACHE_HOME names another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sample_c2i.png"]


@pytest.mark.parametrize(
    "script",
    ["demo_training/evaluate_demo.py", "demo_training/train_demo.py", "convert_checkpoint.py"],
)
def test_a_script_that_imports_a_compiler_starts_for_a_user_without_a_name(
    tmp_path: Path, script: str
) -> None:
    """Fails if the folders are chosen only after the imports: those of the first two ask for the
    name and make a folder.
    """
    done = run_bare(str(tmp_path), f"scripts/{script}", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert f"compiled kernels go to {tmp_path}/llamagen-{os.geteuid()};" in done.stderr


def _setpriv() -> str | None:
    return shutil.which("setpriv") if os.geteuid() == 0 else None


@pytest.mark.skipif(
    _setpriv() is None, reason="takes the superuser, and setpriv, to become another user"
)
def test_a_real_user_without_a_passwd_entry_draws() -> None:
    """Fails if the commands ask the system for more than the tests above imitate."""
    command = [
        "setpriv", "--reuid=12345", "--regid=12345", "--clear-groups",
        # the interpreter may lie in the superuser's home
        "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
        sys.executable, str(ROOT / "autoregressive/serve/sample_c2i.py"), "--class-labels", "fox",
        "--cfg-scale", "1",
        "--gpt-model", "GPT-demo", "--device", "cpu",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to other users
        os.chown(outside, 12345, 12345)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/",
            "TMPDIR": outside,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            command, cwd=outside, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.splitlines() == [
            "sample_c2i.py: /.cache/llamagen cannot be used: compiled kernels go to "
            f"{outside}/llamagen-12345; "
            "XDG_CACHE_HOME names another folder"
        ]


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, installed into a folder of its own."""
    pytest.importorskip("setuptools")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("autoregressive", "kernels", "tokenizer", "pretrained_models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_installed(
    site: Path, home: Path, module: str, *typed: str
) -> subprocess.CompletedProcess[str]:
    """Runs a module of the installed copy, from a folder that has nothing to do with it."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-m", module, *typed]
    return subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False
    )


def test_an_installed_copy_draws_from_any_folder(site_packages: Path, tmp_path: Path) -> None:
    """Fails if the demo model does not come along, or anything is written to site-packages."""
    before = sorted(site_packages.rglob("*"))
    command = [
        "autoregressive.serve.sample_c2i",
        "--gpt-model",
        "GPT-demo",
        "--device",
        "cpu",
        "--class-labels",
        "fox",
    ]
    command += ["--cfg-scale", "1"]
    done = run_installed(site_packages, tmp_path, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "sample_c2i.png").is_file()
    assert sorted(site_packages.rglob("*")) == before


def test_an_installed_services_advice_and_help_fit(site_packages: Path, tmp_path: Path) -> None:
    """Fails if a user without the repository is told to run a file of it."""
    done = run_installed(
        site_packages,
        tmp_path,
        "autoregressive.serve.api_server",
        "--gpt-model",
        "GPT-B",
        "--port",
        "0",
    )
    weights = tmp_path / ".local" / "share" / "llamagen" / "pretrained_models"
    assert done.returncode == 2
    puts = f"which puts c2i_B_384.pt and vq_ds16_c2i.pt into {weights}"
    assert f"get them with --download, {puts}" in done.stderr
    assert "scripts/" not in done.stderr
    shown = run_installed(
        site_packages, tmp_path, "autoregressive.serve.sample_c2i", "--help"
    ).stdout
    assert "usage: python -m autoregressive.serve.sample_c2i [flags]" in shown
    assert ".local/share/llamagen/pretrained_models" in "".join(shown.split())
    assert ".py" not in shown.replace("autoregressive/sample/sample_c2i.py", "")
