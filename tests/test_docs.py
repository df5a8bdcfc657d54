"""What README and docs say exists: files, options, configs, names; and marked Python blocks print what they claim."""

import argparse
import ast
import contextlib
import inspect
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import sam3_lora
from sam3_lora.adapter_plan import plan_adapter
from sam3_lora.cli import build_parser
from sam3_lora.components import COMPONENTS, KINDS
from sam3_lora.presets import PRESETS, Preset
from sam3_lora.training.composition import shipped_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = ROOT / "src" / "sam3_lora" / "configs"

FENCE = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(
    r"`((?:src|docs|tests|scripts|examples)/[\w./-]+\.\w+)`|\b((?:scripts|examples)/[\w./-]+\.(?:py|yaml))\b"
)
PRINT = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)


def as_test_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[tuple[str, bool]]:
    """Return the fenced blocks of a language, each with whether it is marked to be run."""
    found = FENCE.findall(document.read_text(encoding="utf-8"))
    return [(code, bool(marked)) for marked, name, code in found if name == language]


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, by GitHub's rule."""
    without_code = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(params=DOCS, ids=as_test_id)
def document(request) -> Path:
    return request.param


def test_every_relative_link_resolves(document):
    broken = []
    for link in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_no_document_names_a_file_of_the_project_that_does_not_exist(document):
    named = {first or second for first, second in PATH.findall(document.read_text(encoding="utf-8"))}
    assert not sorted(name for name in named if not (ROOT / name).exists())


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in DOCS[1:]]
    assert not [page for page in pages if page != "README.md" and f"({page})" not in index]


def test_marked_python_blocks_print_what_they_say(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "a_document"}
    for code, marked in blocks(document, "python"):
        compile(code, as_test_id(document), "exec")
        if marked:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            assert printed.getvalue().splitlines() == PRINT.findall(code)


def commands(document: Path) -> list[list[str]]:
    """Return the words of every ``sam3-lora`` command in a shell block, a transcript or inline code."""
    text = document.read_text(encoding="utf-8")
    shell = "\n".join(code for language in ("bash", "text") for code, _ in blocks(document, language))
    lines = shell.replace("\\\n", " ").splitlines() + re.findall(
        r"`(sam3-lora [^`\n]+)`", FENCE.sub("", text)
    )
    found = [
        re.search(
            r"(?:^|[$ ]|=\S+ )sam3-lora ((?:train|evaluate|demo|presets|components|plan|estimate|doctor|data)\b.*)",
            line,
        )
        for line in lines
    ]
    return [shlex.split(match[1], comments=True) for match in found if match]


def verb_of(words: list[str]) -> str:
    """Return the verb of a command, with its group."""
    return " ".join(words[:2] if words[0] == "data" else words[:1])


def options_by_verb() -> dict[str, dict[str, argparse.Action]]:
    found = {}
    groups = [("", build_parser())]
    for group, parser in groups:  # grows while it is walked
        verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if verbs is None:
            found[group.strip()] = parser._option_string_actions
        else:
            groups += [(f"{group} {verb}", each) for verb, each in verbs.choices.items()]
    return found


def test_every_command_in_the_documents_exists(document):
    known = options_by_verb()
    wrong = [
        f"{verb_of(words)} {word}"
        for words in commands(document)
        for word in words
        if word.startswith("-") and word.partition("=")[0] not in known[verb_of(words)]
    ]
    assert not wrong


def test_complete_commands_in_the_documents_parse(document):
    for words in commands(document):
        named_only = words[0] == "data" and len(words) == 2  # a heading
        if not named_only and (words[0] not in ("train", "evaluate") or "--data" in words):
            build_parser().parse_args(words)


def test_the_reference_lists_every_option():
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `sam3-lora ([\w ]+)`$(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
    missing = [
        f"{verb} {option}"
        for verb, options in options_by_verb().items()
        for option in options
        if option not in ("-h", "--help") and f"`{option}" not in sections[verb]
    ]
    assert not missing


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading; an empty first cell repeats the one above it."""
    table = page.partition(f"## {heading}\n")[2].partition("| ---")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    for above, row in itertools.pairwise(rows):
        row[0] = row[0] or above[0]
    return rows


def test_the_table_of_components_has_the_numbers_of_the_model():
    page = (ROOT / "docs" / "reference" / "components-and-presets.md").read_text(encoding="utf-8")
    written = {
        (row[0].strip("`"), row[1].split()[0]): (int(row[2]), int(row[3].replace(",", "")))
        for row in table_rows(page, "Components")
    }
    everything = plan_adapter(Preset("all", dict.fromkeys(COMPONENTS, 1), KINDS))
    assert written == {
        (part.component, part.kind): (part.modules, part.trainable_parameters) for part in everything.parts
    }


def test_the_table_of_presets_has_the_numbers_of_the_model():
    page = (ROOT / "docs" / "reference" / "components-and-presets.md").read_text(encoding="utf-8")
    written = {row[0].strip("`"): row[2:] for row in table_rows(page, "Presets")}
    assert list(written) == list(PRESETS)
    for name, cells in written.items():
        plan = plan_adapter(name)
        expected = [str(plan.modules), f"{plan.trainable_parameters:,}", f"{plan.adapter_bytes / 1e6:.2f} MB"]
        assert cells == [", ".join(PRESETS[name].kinds), *expected]


def test_every_config_that_is_named_exists(document):
    named = re.findall(r"sam3_lora/([a-z]\w*)\b(?![/.])", document.read_text(encoding="utf-8"))
    known = {path.stem for path in (CONFIGS / "sam3_lora").iterdir()} | {"configs"}
    # runs/sam3_lora and src/sam3_lora/... are folders, not configs
    assert not set(named) - known - {path.name for path in (ROOT / "src" / "sam3_lora").iterdir()}


def test_every_config_key_in_the_reference_exists():
    page = (ROOT / "docs" / "reference" / "configs.md").read_text(encoding="utf-8")
    common = OmegaConf.to_container(shipped_config())
    table = page.partition("## Keys that are usually changed")[2].partition("## Names")[0]
    keys = [
        key
        for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for key in re.findall(r"`([\w.]+)`", row)
    ]
    assert len(keys) > 20
    assert not [key for key in keys if not has_key(common, key)]


def has_key(config: object, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def test_the_example_of_a_users_yaml_builds_on_configs_that_exist():
    text = (ROOT / "examples" / "my_run.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    bases = [base for base in yaml.safe_load(text)["defaults"] if isinstance(base, str) and base != "_self_"]
    assert bases
    assert not [base for base in bases if not (CONFIGS / f"{base.lstrip('/')}.yaml").is_file()]


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "python-api.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^## (.+)$", page, re.MULTILINE))
    assert not [name for name in sam3_lora.__all__ if not re.search(rf"\b{name}\b", headings)]


def test_every_signature_in_the_reference_is_that_of_the_code():
    page = ROOT / "docs" / "reference" / "python-api.md"
    text = "\n".join(code for code, _ in blocks(page, "text"))
    signature = re.compile(r"^(\w+)\((.*?)\)(?= ->|$)", re.MULTILINE | re.DOTALL)
    written = dict(signature.findall(text))
    for name in written.keys() & set(sam3_lora.__all__):
        arguments = ast.parse(f"def f({written[name]}): ...").body[0].args
        names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs, arguments.kwarg) if a]
        assert names == list(inspect.signature(getattr(sam3_lora, name)).parameters), name
    assert len(written) > 12


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=as_test_id)
def test_examples_say_how_to_run_them(example):
    code = example.read_text(encoding="utf-8")
    compile(code, example.name, "exec")
    assert f"python {as_test_id(example)}" in code.split('"""')[1]
