"""What the text promises is so: examples run, imports point one way, `import normkit` is light."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit

ROOT = Path(__file__).parents[1]
PACKAGE = Path(normkit.__file__).parent
MODULES = (
    "",
    ".functional.rows",
    ".functional.channels",
    ".layers.rows",
    ".layers.channels",
    ".layers.control",
    ".layers.recompute",
    ".layers.columns",
    ".functional.columns",
    ".layers.samples",
    ".placement",
    ".theory",
    ".backends",
    ".convert.batch_norm",
    ".convert.conventions",
)


# ------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_what_they_say(name: str) -> None:
    torch.set_printoptions(profile="default")
    failures, _ = doctest.testmod(importlib.import_module("normkit" + name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


def _public() -> list[tuple[str, object]]:
    """Every public function and class that normkit names, in the package and in its public modules."""
    named = {name: getattr(normkit, name) for name in normkit.__all__}
    named |= {name: getattr(normkit.functional, name) for name in normkit.functional.__all__}
    return sorted((name, value) for name, value in named.items() if callable(value))


@pytest.mark.parametrize(("name", "value"), _public(), ids=[name for name, _ in _public()])
def test_every_public_name_says_what_it_is(name: str, value: object) -> None:
    assert value.__doc__, f"{name} has no docstring"
    assert re.match(r"\S.*[.)]", value.__doc__.strip().splitlines()[0]), f"{name}: one sentence first"


@pytest.mark.parametrize("name", normkit.functional.__all__)
def test_every_function_of_the_library_has_an_example(name: str) -> None:
    value = getattr(normkit.functional, name)
    if not isinstance(value, type):
        assert ">>>" in value.__doc__


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


RUNNABLE = [page for page in PAGES if page.name != "records.md"]  # which reads a study's folder


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace for all, so that a later block may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    torch.set_printoptions(profile="default")
    namespace: dict[str, object] = {"__name__": "__page__"}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for i, block in enumerate(blocks):
        if block.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block, namespace, f"{page.name}[{i}]", page.name, None)
            namespace |= test.globs
            assert (
                doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, clear_globs=False).failed == 0
            )
            namespace |= test.globs
        else:
            exec(compile(block, f"{page.name}[{i}]", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py")))
    for name in re.findall(r"`(?:tests/)?(test_\w+)(\.py)?`", text):
        assert (ROOT / "tests" / f"{name[0]}.py").exists() if name[1] else f"def {name[0]}(" in sources, name


# ------------------------------------------------------------------------------------------ direction of imports

ANY = "anything"
# DESIGN.md, "Imports go down this list only". A key is a module of normkit or a package; it may import itself.
IMPORTS: dict[str, set[str]] = {
    "__init__": {ANY},
    "__main__": {"cli"},
    "cli": {ANY},
    "study": {"layers", "placement", "theory", "functional", "__init__"},
    "explain": {"functional", "statistics", "theory"},
    "studies": {"study", "report", "layers", "placement", "theory", "functional", "__init__"},
    "report": set(),
    "placement": {"layers", "functional", "statistics", "_checks"},
    "layers": {"functional", "statistics", "ranks", "_checks"},
    "functional": {"autograd", "statistics", "ranks", "backends", "reference", "_checks"},
    "autograd": {"statistics", "ranks", "backends", "reference"},
    "backends": {"kernels", "reference"},
    "kernels": {"_core", "reference"},  # reference only for accumulation_dtype and the type Count
    "statistics": {"ranks", "reference"},  # of reference only the type Count
    "ranks": set(),
    "theory": set(),
    "reference": set(),
    "_checks": set(),
    "convert": {"_checks"},
}
# One module of a package may have an arrow more than the package.
MORE: dict[str, set[str]] = {"study/observe.py": {"report"}}
LIGHT = {"statistics", "ranks", "kernels", "reference", "_checks", "theory", "layers", "placement", "functional"}
LIGHT |= {"autograd"}


def _imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, in functions too; relative ones made absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(("normkit", *path.relative_to(PACKAGE).parts[: -node.level])) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def _arrows(path: Path) -> list[tuple[int, str]]:
    """(line, target) for imports of normkit; the target is the module or package directly under normkit."""
    arrows = []
    for line, name in _imported(path):
        parts = name.split(".")
        if parts[0] != "normkit":
            continue
        part = parts[1] if len(parts) > 1 else "__init__"
        is_module = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() or part == "_core"
        arrows.append((line, part if is_module else "__init__"))
    return arrows


def _wrong_arrows(path: Path) -> list[str]:
    inside = path.relative_to(PACKAGE)
    source = inside.parts[0].removesuffix(".py")
    allowed = IMPORTS[source] | MORE.get(inside.as_posix(), set()) | {source}
    if ANY in allowed:
        return []
    return [f"{inside}:{line} imports normkit.{target}" for line, target in _arrows(path) if target not in allowed]


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down_only(path: Path) -> None:
    assert _wrong_arrows(path) == []


def test_an_arrow_upwards_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser finds every way to write an import."""
    (tmp_path / "kernels").mkdir()
    for name in ("functional.py", "layers.py", "backends.py"):
        (tmp_path / name).touch()
    wrong = tmp_path / "kernels" / "cpu.py"
    wrong.write_text(
        "import normkit.functional\nfrom normkit import layers\nfrom normkit.backends import select\n"
        "def later():\n    from .. import functional\n    from ..layers import x\n    import normkit\n"
    )
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert [text.split(" imports ")[1] for text in _wrong_arrows(wrong)] == [
        "normkit.functional",
        "normkit.layers",
        "normkit.backends",
        "normkit.functional",
        "normkit.layers",
        "normkit.__init__",
    ]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in LIGHT], ids=str
)
def test_the_layers_need_torch_and_the_standard_library_only(path: Path) -> None:
    foreign = {name.split(".")[0] for _, name in _imported(path)} - set(sys.stdlib_module_names) - {"torch", "normkit"}
    of_triton = path.parent.name == "kernels" and ("triton" in path.name or path.name.endswith("_kernels.py"))
    optional = {"recompute.py": {"rich"}}.get(path.name, {"triton"} if of_triton else set())
    assert foreign <= optional  # imported in a function, where it is used


def test_the_report_knows_nothing_of_torch() -> None:
    for path in (PACKAGE / "report").rglob("*.py"):
        assert not {name.split(".")[0] for _, name in _imported(path)} & {"torch", "normkit.functional"}, path.name


def _loaded_by(statement: str) -> set[str]:
    """The modules in memory after a statement, in a fresh interpreter."""
    script = f"{statement}\nimport sys\nprint(chr(10).join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def test_import_normkit_adds_only_its_own_light_modules_to_torch() -> None:
    """So it costs what reading these few files costs; the number of milliseconds is measured by `make bench`."""
    added = _loaded_by("import normkit") - _loaded_by("import torch")
    heavy = {"triton", "matplotlib", "sklearn", "rich", "typer", "jinja2", "pandas", "numpy.testing", "setuptools"}
    assert {name.split(".")[0] for name in added}.isdisjoint(heavy)
    own = {name for name in added if name.split(".")[0] == "normkit"}
    assert own.isdisjoint({"normkit.study", "normkit.report", "normkit.cli"})
    strangers = added - own - {name for name in added if name.split(".")[0] in sys.stdlib_module_names}
    assert len(strangers) <= 5, f"import normkit also loads {sorted(strangers)}"
