"""Documents are held to the program: commands parse or run, links lead somewhere, lists agree."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import milepost
from milepost.cli.main import DATA_VERBS, LAB_VERBS, VERBS, build_app, run
from milepost.config.problems import field_names
from milepost.config.recipe import config_from_toml, load_recipe, packaged_recipes
from milepost.core import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TRAIN_GUIDE = ROOT / "docs" / "guides" / "train.md"
OTHER_PROGRAMS = {"git", "source", "cd", "pip", "python", "curl", "mkdir", "cp", "ls", "head"}
LAUNCHER_WORDS = {"demo", "test"}


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[str]:
    """The lines of the page's bash blocks, continued ones joined, without comments."""
    joined = "".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def documented_recipe(name: str) -> str | None:
    """The TOML of a recipe that a page shows, found by its file's name before the block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = re.search(rf"`{re.escape(name)}`[^`]*```toml\n(.*?)^```", text, re.M | re.S)
        if found:
            return found.group(1)
    return None


def milepost_words(line: str) -> list[str] | None:
    """The words after `./run` or `milepost`; None for another program."""
    words = shlex.split(line, comments=True)
    while words[0] == "srun" or re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "torchrun":
        words = words[words.index("--") + 1 :]
    if words[0] in ("./run", "milepost"):
        return words[1:]
    assert words[0] in OTHER_PROGRAMS, f"what is {words[0]} in {line!r}?"
    return None


def check_command(words: list[str], folder: Path) -> None:
    """Parses a command against the real command line; plans are made, recipes loaded."""
    app = build_app(words)
    function, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert callable(function)
    if words[0] not in ("plan", "train"):
        return
    recipe = bound.arguments["recipe"]
    shown = documented_recipe(recipe) if recipe.endswith(".toml") else None
    if shown is not None:
        (folder / recipe).write_text(shown)
        recipe = str(folder / recipe)
    load_recipe(recipe, overrides=bound.arguments.get("overrides", ()))
    if words[0] == "plan":
        assert run([recipe if word.endswith(".toml") else word for word in words]) == 0


def test_pages_are_found() -> None:
    assert ROOT / "README.md" in PAGES
    assert TRAIN_GUIDE in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_page_are_understood(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in command_lines(page):
        words = milepost_words(line)
        if words is not None and words[0] not in LAUNCHER_WORDS:
            check_command(words, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            path = page.parent / target.split("#")[0]
            assert path.exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_names_no_verb_that_is_not_there(page: Path) -> None:
    known = {*VERBS, "data", "lab", *LAUNCHER_WORDS}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:milepost|\./run) ([a-z]+)", text))
    assert named <= known, f"{page.relative_to(ROOT)} names {named - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shown_python_compiles_and_shown_recipes_load(page: Path) -> None:
    for source in blocks(page, "python"):
        compile(source, str(page), "exec")
    for text in blocks(page, "toml"):
        if "[model]" in text:
            config_from_toml(text, source=str(page))
        else:
            tomllib.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shown_plans_are_what_the_plan_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in blocks(page, "text"):
        found = re.match(r"plan of (\S+)(?: on (\d+) x (\S+))?\n", text)
        if found is None:
            continue
        recipe, gpus, gpu = found.groups()
        assert run(["plan", recipe, *(["--gpu", gpu, "--gpus", gpus] if gpu else [])]) == 0
        said = capsys.readouterr().out.splitlines()
        for line in text.splitlines():
            assert line in said, f"{page.relative_to(ROOT)} shows {line!r}"


GROUPS = {"data": DATA_VERBS, "lab": LAB_VERBS}


@pytest.mark.parametrize(
    "verb", [*VERBS, *(f"{group} {verb}" for group, verbs in GROUPS.items() for verb in verbs)]
)
def test_every_verb_has_help_with_an_example_that_parses(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*verb.split(), "--help"]) == 0
    assert "Example: " in capsys.readouterr().out
    app = build_app(verb.split())
    function = app[verb.split()[0]]
    for word in verb.split()[1:]:
        function = function[word]
    documentation = function.default_command.__doc__ or ""
    examples = re.findall(r"Example: `milepost (.*?)`", documentation, re.DOTALL)
    assert examples, f"the docstring of {verb} has no example"
    for example in examples:
        words = shlex.split(" ".join(example.split()))
        assert " ".join(words).startswith(verb)
        check_command(words, tmp_path)


def test_every_packaged_recipe_loads_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in packaged_recipes():
        load_recipe(name)
        assert name in readme


def test_the_contract_names_every_field_of_a_recipe() -> None:
    contract = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    for field in field_names():
        section, name = field.split(".")
        if section != "model":  # those are Hugging Face's
            assert re.search(rf"\[{section}\]`.*\b{name}\b", contract), field


def test_the_contract_names_every_kind_of_event() -> None:
    contract = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    kinds = set(re.findall(r"events\.append\(\s*\"(\w+)\"", "".join(sources)))
    assert "step" in kinds
    for kind in kinds:
        assert f"`{kind}`" in contract, kind


def test_the_contracts_exit_codes_are_those_of_the_errors() -> None:
    contract = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", contract, re.MULTILINE)}
    tree = [errors.MilepostError, *errors.MilepostError.__subclasses__()]
    ours = {error.exit_code for error in tree if error.__module__ == errors.__name__}
    assert listed == ours | {0, errors.LEFT_AT_ONCE_EXIT_CODE}


def test_the_architecture_names_only_modules_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layout = text.split("## Layout")[1].split("Layers, enforced")[0]
    package = ROOT / "src" / "milepost"
    named = re.findall(r"^    (\w+)/ *(.*)$", layout, re.MULTILINE)
    assert {folder for folder, _ in named} == {p.parent.name for p in package.glob("*/__init__.py")}
    for folder, modules in named:
        for module in modules.split():
            found = [package / folder / module, package / folder / f"{module}.py"]
            assert any(path.exists() for path in found), f"{folder}/{module}"


def test_the_faults_name_only_tests_that_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert rows
    for row in rows:
        for name in row.rstrip("| ").rsplit(" | ", 1)[1].split(", "):
            folder = "." if "/" in name else "faults"
            assert (ROOT / "tests" / folder / f"{name}.py").exists(), f"{name} in {row[:40]}"


def test_licence_notice_and_citation_are_whole() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "vocab.bpe" in (ROOT / "NOTICE").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "arXiv:2412.13335" in citation
    assert f"version: {milepost.__version__}\n" in citation


def test_the_training_guide_can_be_followed_from_its_first_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    draw = random.Random(7)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "en", "i", "or", "u")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(400)]
    (tmp_path / "texts").mkdir()
    for number in range(60):
        text = ". ".join(" ".join(draw.choices(words, k=12)) for _ in range(40))
        (tmp_path / "texts" / f"{number:03}.txt").write_text(text)
    first_section = TRAIN_GUIDE.read_text(encoding="utf-8").split("\n## ")[1]
    (tmp_path / "small.toml").write_text(re.findall(r"```toml\n(.*?)```", first_section, re.S)[0])
    lines = "".join(re.findall(r"```bash\n(.*?)```", first_section, re.S)).splitlines()
    assert len(lines) == 5
    for line in lines:
        command = [sys.executable, "-m", "milepost.cli.main", *(milepost_words(line) or [])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    page = (tmp_path / "runs/small/report/index.html").read_text(encoding="utf-8")
    assert "validation" in page.lower()
    assert (tmp_path / "runs/small/checkpoints/step-00000040/model.safetensors").exists()
