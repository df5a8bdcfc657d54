"""The examination of an installation: one finding for each thing, with a fix wherever something is to be done."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from sam3_lora import doctor
from sam3_lora.base import tiny
from sam3_lora.cli import main

NAMES = "Python|torch|torchvision|sam3|peft|transformers|huggingface-hub|other packages".split("|")
OURS = "torch torchvision sam3 peft transformers huggingface_hub numpy".split()


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """A Hub cache and a token of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


def test_this_installation_has_nothing_bad(tmp_path):
    findings = doctor(tmp_path, offline=True)
    assert [finding.name for finding in findings][: len(NAMES)] == NAMES
    assert [finding for finding in findings if finding.status == "bad"] == []
    found = by_name(findings)
    assert {"triton", "BPE vocabulary", "tiny base", "checkpoint", "disk", "write access"} <= set(found)
    assert "Hub access" not in found
    assert found["peft"].detail.endswith("(<0.22,>=0.21)")
    assert list(tmp_path.iterdir()) == [], "it changes nothing"


def test_everything_that_is_not_good_says_what_to_do(tmp_path):
    for finding in doctor(tmp_path / "missing", offline=True):
        assert bool(finding.fix) == (finding.status != "good"), finding


def test_a_machine_without_a_gpu_is_a_warning(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = by_name(doctor(offline=True))["GPU"]
    assert gpu.status == "warning"
    assert gpu.detail.startswith("no CUDA GPU (torch is built for ")


@pytest.fixture
def our_metadata(monkeypatch, tmp_path):
    """Return a function that gives this package the metadata of another release."""

    def write(*requirements, python=">=3.10"):
        folder = tmp_path / "site" / "sam3_lora-9.dist-info"
        folder.mkdir(parents=True)
        asked = [f"Requires-Dist: {line}" for line in [*(n for n in OURS), *requirements]]
        lines = [
            "Metadata-Version: 2.1",
            "Name: sam3-lora",
            "Version: 9",
            f"Requires-Python: {python}",
            *asked,
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return write


@pytest.mark.parametrize(
    ("requirement", "name", "detail", "fix"),
    [
        pytest.param("peft>=99,<100", "peft", "needs <100,>=99", "pip install 'peft<100,>=99'", id="too old"),
        pytest.param("no-such-package>=2", "no-such-package", "not installed, needs >=2", "pip install 'no-such-package>=2'", id="missing"),
        pytest.param("rich<1", "rich", "needs <1", "pip install 'rich<1'", id="too new"),
    ],
)  # fmt: skip
def test_the_supported_versions_are_those_of_our_own_metadata(our_metadata, requirement, name, detail, fix):
    our_metadata(requirement)
    finding = by_name(doctor(offline=True))[name]
    assert (finding.status, finding.fix) == ("bad", fix)
    assert finding.detail.endswith(detail)


def test_a_requirement_of_another_system_is_left_out(our_metadata):
    our_metadata("no-such-package; platform_system == 'Plan9'")
    assert "no-such-package" not in by_name(doctor(offline=True))


def test_an_old_python_is_bad(our_metadata):
    our_metadata(python=">=4")
    finding = by_name(doctor(offline=True))["Python"]
    assert (finding.status, finding.fix) == ("bad", "make an environment of Python >=4")


def test_a_package_that_cannot_be_imported_is_bad_and_hides_no_other_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    findings = by_name(doctor(offline=True))
    assert findings["torchvision"].status == "bad"
    assert "cannot be imported: ModuleNotFoundError" in findings["torchvision"].detail
    assert findings["torchvision"].fix.startswith("pip install 'torchvision>=")
    assert "write access" in findings


def test_a_check_that_breaks_is_one_bad_line_and_hides_no_other(our_metadata):
    our_metadata("torch >> 2")  # not a requirement at all
    findings = by_name(doctor(offline=True))
    assert findings["packages"].detail.startswith("cannot be examined: InvalidRequirement")
    assert findings["tiny base"].status == "good"


def test_damaged_and_missing_weights_of_the_tiny_base_are_bad(monkeypatch, tmp_path):
    path = tmp_path / "tiny_sam3.safetensors"
    monkeypatch.setattr(tiny, "packaged_weights", lambda: path)
    assert by_name(doctor(offline=True))["tiny base"].detail == f"no file {path}"
    path.write_bytes(b"half a file")
    finding = by_name(doctor(offline=True))["tiny base"]
    assert finding.status == "bad" and finding.detail.startswith("damaged: SHA-256 ")


def test_a_folder_that_cannot_be_written_is_bad(tmp_path):
    finding = by_name(doctor(tmp_path / "missing", offline=True))["write access"]
    assert (finding.status, finding.detail) == (
        "bad",
        f"{tmp_path / 'missing'} cannot be written: No such file or directory",
    )


def test_a_checkpoint_in_the_cache_is_found_and_needs_no_token(empty_cache):
    snapshot = empty_cache / "models--facebook--sam3" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "sam3.pt").write_bytes(b"weights")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    findings = by_name(doctor())
    assert findings["checkpoint"].status == "good"
    assert str(snapshot / "sam3.pt") in findings["checkpoint"].detail
    assert not {"Hub token", "Hub access"} & set(findings)


@pytest.fixture
def hub(monkeypatch):
    """Return a function that starts a Hub on this machine, which gives one answer."""
    servers = []

    def start(status, **headers):
        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "expected", "detail"),
    [
        pytest.param(200, {"ETag": '"a"', "Content_Length": "9"}, "good", "facebook/sam3 may be downloaded", id="access"),
        pytest.param(403, {"X_Error_Code": "GatedRepo"}, "warning", "this token has no access to facebook/sam3", id="gated"),
        pytest.param(401, {"X_Error_Code": "RepoNotFound"}, "warning", "the Hub refuses this token for facebook/sam3", id="wrong token"),
        pytest.param(503, {}, "warning", "the Hub answers HfHubHTTPError", id="out of order"),
    ],
)  # fmt: skip
def test_access_to_the_official_checkpoint(hub, status, headers, expected, detail):
    hub(status, **headers)
    finding = by_name(doctor())["Hub access"]
    assert finding.status == expected
    assert finding.detail.startswith(detail)


def test_a_hub_that_cannot_be_reached_is_a_warning():
    finding = by_name(doctor())["Hub access"]  # the tests run with HF_HUB_OFFLINE
    assert finding.status == "warning"
    assert finding.detail.startswith("the Hub cannot be reached: OfflineModeIsEnabled")
    assert "--offline" in finding.fix


def test_the_command_prints_each_finding_with_its_fix_and_ends_with_0(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["good", "Python"]
    assert any(line.startswith("warning  checkpoint") for line in lines)
    assert any(line.lstrip().startswith("-> it comes with the first use") for line in lines)
    assert lines[-1].endswith("warnings, 0 bad")


def test_something_bad_makes_the_exit_code_1_in_both_forms(our_metadata, capsys):
    our_metadata("no-such-package")
    assert main(["doctor", "--offline"]) == 1
    assert "bad      no-such-package" in capsys.readouterr().out
    assert main(["doctor", "--offline", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert all(list(finding) == ["name", "status", "detail", "fix"] for finding in findings)
    assert [finding["name"] for finding in findings if finding["status"] == "bad"] == ["no-such-package"]
