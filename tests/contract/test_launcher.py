"""The launcher, as a program in a folder of its own: a copy of `run`, of pyproject and of src."""

from __future__ import annotations

import ast
import fcntl
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAN = ["plan", "corpus-30m", "--json"]


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MILEPOST_", "PYTEST_"))}
    return kept | changes


def launch(
    folder: Path, *words: str, cwd: Path | None = None, **changes: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `./run WORDS` in the folder."""
    done = subprocess.run(
        [sys.executable, str(folder / "run"), *words],
        cwd=cwd or folder,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def load(folder: Path) -> ModuleType:
    """The folder's launcher as a module, so that a test can write the stamp it would write."""
    loader = importlib.machinery.SourceFileLoader("launcher", str(folder / "run"))
    spec = importlib.util.spec_from_loader("launcher", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def write_stamp(folder: Path, *extras: str) -> None:
    launcher = load(folder)
    launcher.STAMP.write_text(json.dumps(launcher.expected() | {"extras": list(extras)}))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the launcher needs, and nothing installed."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("run", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / "src").symlink_to(ROOT / "src")
    return folder


@pytest.fixture
def installed(checkout: Path) -> Path:
    """The same with an environment that sees this one's packages, and its stamp."""
    venv.create(checkout / ".venv", symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(checkout / ".venv")})
    paths = [path for path in sys.path if path.endswith("-packages")] + [str(ROOT / "src")]
    Path(packages, "borrowed.pth").write_text("\n".join(paths) + "\n")
    write_stamp(checkout, "demo")
    return checkout


def test_it_can_be_run_and_read_by_an_old_python() -> None:
    assert os.access(ROOT / "run", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    ast.parse((ROOT / "run").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_help_installs_nothing(checkout: Path) -> None:
    code, out, _ = launch(checkout, "--help")
    assert code == 0
    assert "./run demo" in out
    assert "MILEPOST_TORCH_INDEX" in out
    assert not (checkout / ".venv").exists()


def test_without_an_environment_the_python_at_hand_runs_from_any_folder(
    checkout: Path, tmp_path: Path
) -> None:
    code, out, err = launch(checkout, *PLAN, cwd=tmp_path, MILEPOST_NO_VENV="1")
    assert (code, err) == (0, "")
    assert json.loads(out)["recipe"] == "corpus-30m"
    assert not (checkout / ".venv").exists()


def test_a_python_at_hand_that_lacks_something_is_named(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['cyclopts'] = None\n")
    code, _, err = launch(checkout, *PLAN, MILEPOST_NO_VENV="1", PYTHONPATH=str(tmp_path))
    assert code == 1
    assert f"error: {sys.executable} has no cyclopts" in err
    assert f"hint: {sys.executable} -m pip install -e {checkout}" in err


def test_a_stamped_environment_starts_without_installing(installed: Path) -> None:
    seconds = []
    for _ in range(2):  # the first start of a machine under load may be slow
        started = time.monotonic()
        code, out, err = launch(installed, *PLAN)
        seconds.append(time.monotonic() - started)
        assert (code, err) == (0, "")
        assert json.loads(out)["recipe"] == "corpus-30m"
    assert min(seconds) < 3


def test_exit_codes_are_those_of_the_program(installed: Path) -> None:
    code, _, err = launch(installed, "plan", "no-such-recipe")
    assert code == 2
    assert "there is no recipe 'no-such-recipe'" in err


def test_the_stamp_holds_only_for_what_it_was_written_for(installed: Path) -> None:
    launcher = load(installed)
    assert launcher.is_installed(set())
    assert launcher.is_installed({"demo"})
    assert not launcher.is_installed({"dev"}), "an extra is missing"

    launcher.UNFINISHED.write_text("")
    assert not launcher.is_installed(set()), "a killed installation"
    launcher.UNFINISHED.unlink()

    stamp = launcher.STAMP.read_text()
    for torn in ("", stamp[: len(stamp) // 2], "[]", "null"):
        launcher.STAMP.write_text(torn)
        assert not launcher.is_installed(set()), torn
    launcher.STAMP.write_text(stamp)

    project = installed / "pyproject.toml"
    project.write_text(project.read_text() + "\n# changed\n")
    assert not launcher.is_installed(set()), "another pyproject"


def test_an_environment_that_was_moved_is_not_taken_for_installed(installed: Path) -> None:
    moved = installed.with_name("moved")
    installed.rename(moved)
    assert not load(moved).is_installed(set())


def test_it_says_what_to_do_where_venv_is_missing(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None\n")
    code, _, err = launch(checkout, *PLAN, PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "error: this Python has no ensurepip" in err
    assert "sudo apt install python3-venv" in err
    assert not (checkout / ".venv").exists()


def test_it_says_what_to_do_where_python_is_too_old(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 2)\n")
    code, _, err = launch(checkout, *PLAN, PYTHONPATH=str(tmp_path), PATH="")
    assert code == 1
    assert "error: Milepost needs Python 3.11 or later, this is 3.9.2" in err
    assert "hint: install a newer one" in err


def test_where_pip_fails_it_says_so_and_can_be_started_again(checkout: Path) -> None:
    venv.create(checkout / ".venv", symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(checkout / ".venv")}))
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").write_text("")
    (packages / "pip" / "__main__.py").write_text(
        "import sys; print('no network, said', *sys.argv[1:]); sys.exit(1)\n"
    )
    code, out, err = launch(checkout, *PLAN, MILEPOST_TORCH_INDEX="https://example.invalid/cpu")
    assert (code, out) == (1, "")
    wanted = "torch>=2.11,<2.14"
    assert f"run: installing {wanted} from https://example.invalid/cpu" in err
    assert f"install --no-input {wanted} --index-url https://example.invalid/cpu" in err
    assert "error: pip could not install what Milepost needs" in err
    assert "hint: check the network" in err
    launcher = load(checkout)
    assert not launcher.is_installed(set())
    assert not launcher.UNFINISHED.exists(), "pip took back what it had begun"


def put_pip(folder: Path, code: str) -> None:
    """A pip of the environment that says what it is given, then runs the code."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / ".venv")}))
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").write_text("")
    program = f"import sys; print('pip was given', *sys.argv[1:]); {code}\n"
    (packages / "pip" / "__main__.py").write_text(program)


def test_data_are_prepared_with_the_faster_encoder(installed: Path) -> None:
    put_pip(installed, "sys.exit(0)")
    code, _, err = launch(installed, "data", "prepare", "no-such-texts", "--out", "out")
    assert code == 3 and "there is no source no-such-texts" in err
    assert f"--editable {installed}[demo,fast]" in err
    _, _, err = launch(installed, "data", "prepare", "no-such-texts", "--out", "out")
    assert "pip was given" not in err, "once"


def test_other_verbs_of_data_install_nothing(installed: Path) -> None:
    put_pip(installed, "sys.exit(0)")
    code, _, err = launch(installed, "data", "inspect", "no-such-data")
    assert code == 3 and "pip was given" not in err


def test_data_are_prepared_without_the_faster_encoder_where_there_is_none(
    installed: Path,
) -> None:
    put_pip(installed, "sys.exit('fast' in sys.argv[-1])")
    code, _, err = launch(installed, "data", "prepare", "no-such-texts", "--out", "out")
    assert code == 3 and "there is no source no-such-texts" in err
    assert "run: going on without the faster encoder; the data come out the same" in err


def test_an_environment_for_the_tests_has_what_the_verbs_want(installed: Path) -> None:
    launcher = load(installed)
    put_pip(installed, "sys.exit(0)")
    assert launcher.pip_install({"dev"}) == 0
    for words in (["demo"], ["judge"], ["data", "prepare"], ["train"]):
        assert launcher.is_installed(launcher.extras_of(words)), words


def test_a_second_launcher_waits_for_the_first(installed: Path) -> None:
    launcher = load(installed)
    stamp = launcher.STAMP.read_text()
    launcher.STAMP.unlink()
    with launcher.LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [sys.executable, str(installed / "run"), *PLAN],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert "another ./run is installing; waiting for it" in second.stderr.readline()
        launcher.STAMP.write_text(stamp)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert json.loads(out)["recipe"] == "corpus-30m"


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """A project as small as can be, for the launcher's own `test`."""
    folder = tmp_path / "small"
    package = folder / "src" / "small"
    (folder / "tests").mkdir(parents=True)
    package.mkdir(parents=True)
    shutil.copy2(ROOT / "run", folder / "run")
    (folder / "pyproject.toml").write_text(
        "[tool.ruff]\nline-length = 100\n"
        '[tool.mypy]\npackages = ["small"]\nmypy_path = "src"\n'
        '[tool.importlinter]\nroot_package = "small"\n'
        '[[tool.importlinter.contracts]]\nname = "none"\ntype = "forbidden"\n'
        'source_modules = ["small"]\nforbidden_modules = ["small.other"]\n'
        '[tool.pytest.ini_options]\naddopts = "-q"\n'
    )
    for name in ("__init__", "other"):
        (package / f"{name}.py").write_text('"""Nothing."""\n')
    (folder / "tests" / "test_small.py").write_text("def test_it() -> None:\n    pass\n")
    return folder


def test_the_checks_end_with_pytests_closing_line_and_fail_if_one_fails(
    small_project: Path,
) -> None:
    for module in ("ruff", "mypy", "importlinter"):
        pytest.importorskip(module)
    words = ["test", "-n0", "-p", "no:cacheprovider"]
    code, out, err = launch(small_project, *words, MILEPOST_NO_VENV="1")
    assert code == 0, out + err
    assert out.splitlines()[-1].startswith("1 passed in ")
    for check in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert f"run: {check}: ok, " in err
    (small_project / "src" / "small" / "other.py").write_text("import os\n")
    code, out, err = launch(small_project, *words, MILEPOST_NO_VENV="1")
    assert code == 1
    assert "run: ruff check: FAILED (exit 1), " in err
    assert "error: failed before the tests: ruff check" in err


@pytest.mark.long
def test_after_a_killed_installation_the_environment_is_made_again(checkout: Path) -> None:
    venv.create(checkout / ".venv", symlinks=True)
    launcher = load(checkout)
    launcher.UNFINISHED.write_text("")
    torn = checkout / ".venv" / "half-a-package"
    torn.write_text("")
    nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    code, _, err = launch(checkout, *PLAN, **nothing)
    assert code == 1
    assert "run: .venv is torn, of another Python or from another folder; making it again" in err
    assert "error: pip could not install what Milepost needs" in err
    assert not torn.exists()
    assert launcher.venv_works()


@pytest.mark.long
def test_a_fresh_copy_installs_itself_once(tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    ignored = shutil.ignore_patterns(".venv*", ".git", "*cache*", "runs", "data")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copytree(ROOT / "src" / "milepost" / "data", folder / "src" / "milepost" / "data")
    done = subprocess.run(
        [str(folder / "run"), *PLAN], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "corpus-30m"
    assert "run: installed in " in done.stderr
    started = time.monotonic()
    code, _, err = launch(folder, "doctor")
    assert (code, err) == (0, "")
    assert time.monotonic() - started < 5
