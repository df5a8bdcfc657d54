"""The package is the same however it is installed, complete, and free of what belongs to one machine only."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Everything that users reach by name and that a packaging mistake could leave out.
ESSENTIAL = {
    "sam3_lora/__init__.py",
    "sam3_lora/py.typed",
    "sam3_lora/base/tiny_sam3.safetensors",
    "sam3_lora/configs/__init__.py",
    "sam3_lora/configs/sam3_lora/minimal.yaml",
    "sam3_lora/configs/sam3_lora/balanced.yaml",
    "sam3_lora/configs/sam3_lora/full.yaml",
    "sam3_lora/configs/sam3_lora/demo.yaml",
    "hydra_plugins/sam3_lora_searchpath/__init__.py",
}

#: Runs inside an installation: its files as importlib.resources shows them, and what its names lead to.
PROBE = """
import importlib.metadata, importlib.resources, json

def files_below(folder, prefix):
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            yield from files_below(entry, f"{prefix}/{entry.name}")
        elif entry.is_file():
            yield f"{prefix}/{entry.name}"

import hydra_plugins.sam3_lora_searchpath as plugin
import sam3_lora
distribution = importlib.metadata.distribution("sam3-lora")
print(json.dumps({
    "location": sam3_lora.__file__,
    "files": sorted([
        *files_below(importlib.resources.files("sam3_lora"), "sam3_lora"),
        *files_below(importlib.resources.files(plugin), "hydra_plugins/sam3_lora_searchpath"),
    ]),
    "exports": sorted(sam3_lora.__all__),
    "commands": sorted(e.name + "=" + e.value for e in distribution.entry_points),
    "version": distribution.version,
}))
"""


def run(*command: object, cwd: Path) -> str:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(*options: object, source: Path, outdir: Path) -> Path:
    """Return the one file that `python -m build` leaves in an empty folder."""
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        *options,
        "--outdir",
        outdir,
        source,
        cwd=outdir.parent,
    )
    (built,) = outdir.iterdir()
    return built


def names_in_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}


def names_in_wheel(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def package_files(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("sam3_lora/", "hydra_plugins/"))}


def install(distribution: Path, environment: Path, *options: str) -> dict[str, object]:
    """Install into a new environment that sees our dependencies, but not our own editable install; return its probe.

    A path in a .pth file is added as it is: the .pth files *inside* it, such as that of the editable install, stay unread.
    """
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=environment).strip())
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
        "--no-build-isolation", *options, distribution, cwd=environment,
    )  # fmt: skip
    return json.loads(run(python, "-c", PROBE, cwd=environment))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("--sdist", source=ROOT, outdir=tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("--wheel", source=ROOT, outdir=tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def wheel_from_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("--wheel", source=source, outdir=folder / "dist")


def source_files() -> set[str]:
    files = (
        path for package in ("sam3_lora", "hydra_plugins") for path in (ROOT / "src" / package).rglob("*")
    )
    return {
        path.relative_to(ROOT / "src").as_posix()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file_of_the_source(wheel):
    assert package_files(names_in_wheel(wheel)) == source_files()


def test_the_wheel_holds_what_users_reach_by_name(wheel):
    assert names_in_wheel(wheel) >= ESSENTIAL


def test_the_wheel_made_from_the_sdist_is_the_wheel_made_from_the_tree(wheel, wheel_from_sdist):
    assert names_in_wheel(wheel_from_sdist) == names_in_wheel(wheel)


def test_wheel_and_editable_installs_show_the_same_names(wheel, wheel_from_sdist, tmp_path):
    from_wheel = install(wheel, tmp_path / "wheel")
    from_sdist = install(wheel_from_sdist, tmp_path / "sdist")
    editable = install(ROOT, tmp_path / "editable", "--editable")

    for installed, folder in ((from_wheel, "wheel"), (from_sdist, "sdist")):
        assert Path(installed.pop("location")).is_relative_to(tmp_path / folder)
    assert Path(editable.pop("location")).is_relative_to(ROOT / "src")
    assert from_wheel == from_sdist == editable
    assert set(from_wheel["files"]) >= ESSENTIAL
    assert from_wheel["commands"] == ["sam3-lora=sam3_lora.cli:main"]


def test_hydra_plugins_stays_a_namespace_that_others_can_share(wheel):
    assert "hydra_plugins/__init__.py" not in names_in_wheel(wheel)


@pytest.mark.parametrize("licence", ["LICENSE", "NOTICE"])
def test_the_licence_files_travel(licence, wheel, sdist):
    text = (ROOT / licence).read_bytes()
    assert text.strip()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f".dist-info/licenses/{licence}"))
        assert archive.read(name) == text
    assert licence in names_in_sdist(sdist)


def test_the_sdist_holds_no_second_copy_of_the_configs(sdist):
    copies = sorted(name for name in names_in_sdist(sdist) if name.endswith("/demo.yaml"))
    assert copies == ["src/sam3_lora/configs/sam3_lora/demo.yaml"]


def test_the_wheel_is_small_enough_to_download_without_a_thought(wheel):
    assert wheel.stat().st_size < 6 * 1024 * 1024


def test_the_version_is_the_same_in_the_citation():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def imported_packages(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_imported_package_is_a_declared_dependency():
    lines = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = packages_distributions()  # of what is installed; an extra need not be
    undeclared = {
        f"{path.relative_to(ROOT)}: {package}"
        for path in (ROOT / "src").rglob("*.py")
        for package in imported_packages(ast.parse(path.read_text()))
        if package not in sys.stdlib_module_names | {"sam3_lora", "hydra_plugins"}
        and not declared & {canonicalize_name(name) for name in distributions.get(package, [package])}
    }
    assert not undeclared


def tracked_files() -> list[str]:
    """The files git knows or would add; skips where this is not a git checkout, as in an unpacked archive."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listing.split("\0") if name and os.path.lexists(ROOT / name)]


def test_the_root_configs_folder_is_a_relative_link_into_the_package():
    assert "configs" in tracked_files()
    assert os.readlink(ROOT / "configs") == "src/sam3_lora/configs"


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(
            r"\bpypi\.org|pythonhosted\.org|download\.pytorch\.org", id="an index of Python packages"
        ),
        pytest.param(
            r"npmjs\.(org|com)|deb\.debian\.org|archive\.ubuntu\.com", id="another package registry"
        ),
        pytest.param(
            r"-index-url[= ]+\S|find-links[= ]+\S|trusted-host[= ]+\S", id="an option that names an index"
        ),
        pytest.param(r"(?<![\w.~}])/(?:root|home|Users|work|opt)/\w", id="a folder of one machine"),
    ],
)
def test_no_tracked_file_names(pattern):
    found = []
    for name in tracked_files():
        path = ROOT / name
        if path.is_symlink() or b"\0" in (content := path.read_bytes()):
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if re.search(pattern, line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
