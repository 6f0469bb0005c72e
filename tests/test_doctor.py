"""Is this machine fit to run: every trouble is found, says so, and comes with its repair."""

import json
import subprocess
import sys
from collections import namedtuple
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from dgal_bench.cli import info as doctor
from dgal_bench.cli.info import ABSENT, DoctorFinding, ProbeAnswer, ProbeSite, examine_machine, findings_table

H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15"


def said(**facts):
    return ProbeAnswer(json.dumps(facts))


def torch_sees(*gpus, cuda="13.2"):
    return said(torch="2.15.0", torchvision="0.29.2", cuda=cuda, gpus=gpus)


def faiss_sees(gpus=0, gpu_build=False):
    return said(version="1.15.1", gpu_build=gpu_build, gpus=gpus, usable=gpus > 0)


ANSWERS = {"driver": ProbeAnswer(error=ABSENT), "torch": torch_sees(), "faiss": faiss_sees()}


def free_disk(monkeypatch, n_bytes):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - n_bytes, n_bytes))


@pytest.fixture
def place(tmp_path):
    for name in ("data", "cache", "results"):
        (tmp_path / name).mkdir()
    return tmp_path


CHECKS = doctor.CHECKS
CACHED = {name: cache(getattr(doctor, name)) for name in ("packages_distributions", "version")}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path_factory):
    """No variable of this shell, no key of this user, room on the disk; the packages, which take a while, read once."""
    free_disk(monkeypatch, 10**11)
    for name, cached in CACHED.items():
        monkeypatch.setattr(doctor, name, cached)
    for name in ("CUDA_VISIBLE_DEVICES", "WANDB_API_KEY", "WANDB_BASE_URL", "OMP_NUM_THREADS", "DGAL_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))


@pytest.fixture
def findings(monkeypatch, place):
    """Examine the place, with given answers of the other processes; one topic, or all of them."""

    def of(topic=None, **answers):
        given = ANSWERS | answers

        def answer(command):
            return given["driver" if command[0] == "nvidia-smi" else "faiss" if "faiss" in command[-1] else "torch"]

        monkeypatch.setattr(doctor, "run_probe", answer)
        if topic:
            monkeypatch.setattr(doctor, "CHECKS", [check for check in CHECKS if check[0] == topic])
        found = examine_machine(place / "data", place / "cache", place / "results")
        assert all(finding.repair for finding in found if finding.state == "trouble")
        assert not any("\n" in finding.text + finding.repair for finding in found)
        return found

    return of


def states(found):
    return [finding.state for finding in found]


def own(monkeypatch, *names):
    """These distributions own the module faiss, and each name twice, as packages_distributions gives them."""
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"faiss": [*names, *names]} if names else {})


def test_a_good_machine_has_no_trouble_and_every_topic_in_order(findings, place):
    found = findings()
    assert [state for state in states(found) if state == "trouble"] == []
    topics = list(dict.fromkeys(finding.topic for finding in found))
    assert topics == [topic for topic, _ in doctor.CHECKS]
    assert sorted(place.rglob("*")) == [place / "cache", place / "data", place / "results"]  # nothing remains


def test_the_python_that_is_needed_is_the_one_that_pyproject_asks_for(findings, monkeypatch):
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'requires-python = ">={doctor.MIN_PYTHON[0]}.{doctor.MIN_PYTHON[1]}"' in pyproject
    monkeypatch.setattr(doctor, "MIN_PYTHON", (3, 99))
    (finding,) = findings("python")
    assert finding.state == "trouble"
    assert "3.99" in finding.repair


def test_a_requirement_that_is_not_met_is_a_trouble_with_its_pip_command(findings, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy>=99.1", "no-such-package", "wandb; extra == 'x'"])
    fit, *unmet = findings("packages")
    assert states(unmet) == ["trouble", "trouble"]
    assert "numpy>=99.1 is needed" in unmet[0].text
    assert unmet[0].repair.endswith("-m pip install 'numpy>=99.1'")
    assert "no-such-package is not installed" in unmet[1].text
    assert "numpy" not in fit.text
    assert "torch 2" in fit.text


@pytest.mark.parametrize(("lightning", "trouble"), [("2.6.2", True), ("2.6.3", True), ("2.6.6", False), ("3.0", True)])
def test_releases_that_our_own_requirements_exclude(findings, monkeypatch, lightning, trouble):
    def version(name):
        return lightning if name == "lightning" else "99.0"

    monkeypatch.setattr(doctor, "version", version)
    assert any("lightning" in finding.text for finding in findings("packages")[1:]) == trouble


def test_the_requirements_of_an_extra_count_where_its_faiss_is_installed(findings, monkeypatch):
    installed = {"torch": "2.12.0+cu126"}

    def version(name):
        if name.startswith("faiss") and name not in installed:
            raise PackageNotFoundError(name)
        return installed.get(name, "2.99")

    wanted = ["torch>=2.11", "torch>=2.15; extra == 'gpu-cuvs'"]
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    assert states(findings("packages")) == ["ok"]
    installed["faiss-gpu-cuvs"] = "1.15.1"
    assert "torch>=2.15" in findings("packages")[1].repair


def test_a_torchvision_of_another_torch_is_a_trouble(findings):
    error = "exit code 1: RuntimeError: operator torchvision::nms does not exist"
    (finding,) = findings("torch", torch=ProbeAnswer(error=error))
    assert finding.state == "trouble"
    assert "nms" in finding.text
    assert "torch torchvision" in finding.repair
    found = findings("faiss", torch=ProbeAnswer(error=error)) + findings("gpu", torch=ProbeAnswer(error=error))
    assert states(found) == ["note", "note"]  # one cause is one trouble


def test_one_owner_of_faiss_is_ok(findings, monkeypatch):
    own(monkeypatch, "faiss-cpu")
    (finding,) = findings("faiss")
    assert (finding.state, finding.text) == ("ok", "1.15.1 (faiss-cpu), CPU build")


@pytest.mark.parametrize(
    ("driver", "keeps"), [(ProbeAnswer(error=ABSENT), "faiss-cpu"), (ProbeAnswer(H100), "faiss-gpu")]
)
def test_two_owners_of_faiss_are_a_trouble_that_names_both_and_keeps_what_fits(findings, monkeypatch, driver, keeps):
    own(monkeypatch, "faiss-gpu", "faiss-cpu")
    first, imported = findings("faiss", driver=driver)
    assert first.state == "trouble"
    assert "faiss-cpu and faiss-gpu own the same module" in first.text
    assert "pip uninstall -y faiss-cpu faiss-gpu && " in first.repair
    assert first.repair.endswith(f"-m pip install {keeps}")
    assert imported.state == "ok"


def test_no_faiss_is_a_note(findings, monkeypatch):
    own(monkeypatch)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (finding,) = findings("faiss", faiss=ProbeAnswer(error="exit code 1: ModuleNotFoundError: No module named 'faiss'"))
    assert finding.state == "note"
    assert "torch searches" in finding.text
    assert finding.repair.endswith("pip install faiss-cpu")


def test_a_faiss_that_aborts_is_a_trouble(findings, monkeypatch):
    own(monkeypatch, "faiss-gpu")
    (finding,) = findings("faiss", faiss=ProbeAnswer(error="killed by signal 6: CUDA driver version is insufficient"))
    assert finding.state == "trouble"
    assert "signal 6" in finding.text
    assert finding.repair.endswith("install faiss-cpu")


@pytest.mark.parametrize(
    ("answers", "state", "words"),
    [
        ({}, "ok", "none; device=auto uses the CPU"),
        ({"driver": ProbeAnswer(H100)}, "trouble", "torch sees none (it is built for CUDA 13.2)"),
        ({"driver": ProbeAnswer(H100), "torch": torch_sees(cuda=None)}, "trouble", "built for CUDA none"),
        ({"driver": ProbeAnswer(error="exit code 9: no driver")}, "note", "none (nvidia-smi: exit code 9: no driver)"),
        ({"driver": ProbeAnswer(H100), "torch": torch_sees("H100")}, "note", "FAISS is the CPU build"),
        (
            {"driver": ProbeAnswer(H100), "torch": torch_sees("H100"), "faiss": faiss_sees(0, gpu_build=True)},
            "note",
            "FAISS sees none",
        ),
        (
            {"driver": ProbeAnswer(H100), "torch": torch_sees("H100"), "faiss": faiss_sees(1, gpu_build=True)},
            "ok",
            "torch sees 1: H100 (NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15); FAISS sees 1",
        ),
        ({"torch": torch_sees("H100", "H100"), "faiss": faiss_sees(2, gpu_build=True)}, "ok", "torch sees 2"),
    ],
)
def test_what_driver_torch_and_faiss_see(findings, answers, state, words):
    (finding,) = findings("gpu", **answers)
    assert finding.state == state
    assert words in finding.text
    assert bool(finding.repair) == (state != "ok")


def test_a_hidden_gpu_is_no_trouble(findings, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (finding,) = findings("gpu", driver=ProbeAnswer(H100))
    assert (finding.state, finding.repair) == ("note", "unset CUDA_VISIBLE_DEVICES")


def test_data_not_there_is_a_note_with_the_command(findings, place):
    digits, mnist, fashion, *_ = findings("data")
    assert states([digits, mnist, fashion]) == ["ok", "note", "note"]
    assert "4 of 4 files are not there" in mnist.text
    assert mnist.repair.startswith(f"dgal-bench data mnist data={place / 'data'}")


@pytest.mark.parametrize(
    ("variable", "root", "knob"),
    [
        (None, "data", ""),
        (None, "./data", ""),
        (None, "my data", " data='my data'"),
        ("/shared/data", "/shared/data", ""),
        ("/shared/data", "data", " data=data"),
    ],
)
def test_the_command_for_data_names_the_folder_only_where_it_is_not_the_default(
    findings, monkeypatch, place, variable, root, knob
):
    monkeypatch.chdir(place)
    if variable:
        monkeypatch.setenv("DGAL_DATA", variable)
    findings("data")  # gives the answers of the other processes
    found = examine_machine(Path(root), place / "cache", place / "results")
    mnist = next(finding for finding in found if finding.text.startswith("mnist:"))
    assert mnist.repair.startswith(f"dgal-bench data mnist{knob}, or set DGAL_DATA")


def test_a_truncated_file_is_a_trouble_and_the_other_sets_are_still_examined(findings, place):
    from dgal_bench.data.torchvision import MNIST

    raw = MNIST.at(place / "data")
    raw.mkdir(parents=True)
    for name in MNIST.files:
        (raw / name).write_bytes(bytes(20))
    digits, mnist, fashion, *_ = findings("data")
    assert states([digits, mnist, fashion]) == ["ok", "trouble", "note"]
    assert "is not the published file (20 bytes, sha256 " in mnist.text
    assert "dgal-bench data mnist" in mnist.repair


def test_a_data_folder_that_cannot_be_examined_does_not_hide_the_other_sets(findings, monkeypatch):
    from dgal_bench.data import torchvision as files

    def refuse(source, where):
        if source.name == "mnist":
            raise PermissionError(13, "Permission denied", str(where))
        return list(source.files)

    monkeypatch.setattr(files, "missing_files", refuse)
    assert states(findings("data")[:3]) == ["ok", "trouble", "note"]


@pytest.mark.parametrize(("topic", "knob"), [("cache", "DGAL_CACHE"), ("results", "results=DIR")])
@pytest.mark.parametrize("kind", ["a file", "a dangling link"])
def test_a_folder_that_cannot_be_made_is_a_trouble_that_names_the_knob(findings, place, topic, knob, kind):
    (place / topic).rmdir()
    if kind == "a dangling link":
        (place / topic).symlink_to(place / "nowhere")
    else:
        (place / topic).write_text("")
    (finding,) = findings(topic)
    assert finding.state == "trouble"
    assert "is no folder" in finding.text
    assert knob in finding.repair


def test_a_folder_below_a_file(monkeypatch, place):
    monkeypatch.setattr(doctor, "run_probe", lambda command: ProbeAnswer(error=ABSENT))
    (place / "file").write_text("")
    found = examine_machine(place / "data", place / "file" / "deep" / "cache", place / "results")
    (finding,) = (finding for finding in found if finding.topic == "cache")
    assert finding.state == "trouble"
    assert f"{place / 'file'} is no folder" in finding.text


def test_a_folder_that_is_not_there_yet_is_ok_and_is_not_made(monkeypatch, place):
    monkeypatch.setattr(doctor, "run_probe", lambda command: ProbeAnswer(error=ABSENT))
    found = examine_machine(place / "data", place / "new" / "cache", place / "new" / "results")
    assert states(finding for finding in found if finding.topic in ("cache", "results")) == ["ok", "ok"]
    assert not (place / "new").exists()


def test_a_file_system_without_locks_is_a_trouble(findings, monkeypatch, place):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(doctor.fcntl, "flock", refuse)
    (finding,) = findings("results")
    assert finding.state == "trouble"
    assert "No locks available" in finding.text
    assert list((place / "results").iterdir()) == []


def test_little_disk_space_is_a_trouble(findings, monkeypatch):
    free_disk(monkeypatch, 4_940_000_000)
    for topic in ("cache", "results"):
        (finding,) = (finding for finding in findings(topic) if finding.state == "trouble")
        assert "4.9 GB of disk free, below 5 GB" in finding.text
        assert f"{topic}=DIR" in finding.repair


def test_the_cache_is_counted(findings, place):
    from dgal_bench.core.cache import get_or_make

    for key in ("whole", "torn", "begun"):
        get_or_make(place / "cache", key, lambda folder: ({"a": np.zeros(250_000)}, {}))
    (place / "cache" / "torn" / "a.npy").unlink()
    (place / "cache" / "begun").rename(place / "cache" / "begun.part")
    found = findings("cache")
    assert states(found) == ["ok", "ok"]
    assert found[1].text == "2 entries (1 damaged: made again on use), 4.0 MB"


def test_wandb_without_a_key_is_a_note(findings):
    (finding,) = findings("wandb")
    assert finding.state == "note"
    assert "offline" in finding.text
    assert finding.repair.endswith("wandb login")


def test_a_wandb_key_is_found_for_its_host_only_and_never_shown(findings, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine wandb.example:8080 login user password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert states(findings("wandb")) == ["note"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    (finding,) = findings("wandb")
    assert finding.state == "ok"
    assert str(tmp_path / "netrc") in finding.text
    (tmp_path / "netrc").write_text("machine torn")
    assert states(findings("wandb")) == ["note"]
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    (finding,) = findings("wandb")
    assert finding.state == "ok"
    assert "s3cret" not in findings_table(findings())


def test_a_check_that_crashes_is_a_trouble_and_the_others_still_run(findings, monkeypatch):
    def crash(site: ProbeSite):
        yield "ok", "so far"
        raise RuntimeError("a line\nand another")

    monkeypatch.setattr(doctor, "CHECKS", (("first", crash), *doctor.CHECKS))
    found = findings()
    assert found[0] == DoctorFinding("first", "ok", "so far")
    assert found[1].state == "trouble"
    assert found[1].text == "cannot be examined: RuntimeError: a line and another"
    assert {finding.topic for finding in found} == {topic for topic, _ in doctor.CHECKS}


def test_an_error_of_many_lines_is_cut(findings, monkeypatch):
    """As torch raises them: the cause, then its C++ stack."""
    error = "\n".join(["CUDA error: out of luck", *(f"frame #{i}: c10::Error::Error({i})" for i in range(99))])

    def crash(site: ProbeSite):
        raise RuntimeError(error)
        yield

    monkeypatch.setattr(doctor, "CHECKS", (("first", crash),))
    (finding,) = findings()
    assert finding.text.startswith("cannot be examined: RuntimeError: CUDA error: out of luck")
    assert len(finding.text) < 310
    assert len(doctor.run_probe([sys.executable, "-c", "import sys; sys.exit('long ' * 999)"]).error) < 310


def test_without_torch_there_is_no_traceback(place):
    """In a process of its own: here torch is imported long since."""
    code = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None; from dgal_bench.cli import info as doctor\n"
        "doctor.run_probe = lambda command: doctor.ProbeAnswer(error='exit code 1: No module named torch')\n"
        "print(doctor.findings_table(doctor.examine_machine(*map(Path, sys.argv[1:]))))"
    )
    folders = [str(place / name) for name in ("data", "cache", "results")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    crashed = [i for i, line in enumerate(lines) if "cannot be examined: ModuleNotFoundError" in line]
    assert [lines[i].split()[:2] for i in crashed] == [["trouble", "dgal-bench"], ["trouble", "data"]]
    assert all("pip install" in lines[i + 1] for i in crashed)
    assert lines[-1] == "3 troubles found"


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print('noise'); print('{\"a\": 1}')", ProbeAnswer('noise\n{"a": 1}')),
        ("import sys; sys.exit('what\\nwent wrong')", ProbeAnswer(error="exit code 1: went wrong")),
        ("import os; os.abort()", ProbeAnswer(error="killed by signal 6: no output")),
        ("", ProbeAnswer(error="exit code 0: no output")),
    ],
)
def test_a_process_answers_or_says_why_not(code, answer):
    assert doctor.run_probe([sys.executable, "-c", code]) == answer
    assert doctor.run_probe([sys.executable, "-c", code]).facts == ({"a": 1} if answer.text else {})


def test_a_command_that_is_not_there_or_hangs(monkeypatch):
    assert doctor.run_probe(["no-such-command-at-all"]) == ProbeAnswer(error=ABSENT)
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    assert doctor.run_probe([sys.executable, "-c", "import time; time.sleep(60)"]) == ProbeAnswer(
        error="no answer in 0.2 s"
    )


@pytest.mark.parametrize(
    ("troubles", "last"), [(0, "no trouble found"), (1, "1 trouble found"), (2, "2 troubles found")]
)
def test_the_table_shows_repairs_and_ends_with_the_count(troubles, last):
    found = [DoctorFinding("a", "ok", "fine"), DoctorFinding("longer", "note", "known", "or so")]
    found += [DoctorFinding("b", "trouble", f"broken {i}", f"mend {i}") for i in range(troubles)]
    lines = findings_table(found).splitlines()
    assert lines[:3] == ["ok       a       fine", "note     longer  known", "                 -> or so"]
    assert lines[-1] == last
    assert len(lines) == 2 + 1 + 2 * troubles + 1
    assert findings_table([]) == "no trouble found"
