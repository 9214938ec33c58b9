"""Environment variables: a value that makes no sense is named and costs nothing else."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from parallel_backend.config import Config
from parallel_backend.system import folders

from .conftest import REPO
from .support import front_end

SETTINGS = {variable: field for field, variable in Config.settings()}
PATHS = ("XDIT_PYTHON", "XDIT_RUNTIME_DIR")
TABLE = REPO / "docs" / "variables.md"


@pytest.mark.parametrize("variable", SETTINGS)
def test_a_variable_is_parsed_or_named_in_one_line_and_its_default_used(variable, caplog):
    field = SETTINGS[variable]
    if variable in PATHS:  # any text may be a path
        assert Config.read({variable: "/a/path"}) == Config(**{field.name: "/a/path"})
    else:
        assert Config.read({variable: "2.5"}) == Config(**{field.name: 2.5})
        assert not caplog.messages
        for text in ("10s", "nan", "inf", "-1"):
            read = Config.read({variable: text})
            assert read == Config() and caplog.messages == [read.rejected[field.name]]
            assert caplog.messages[0].startswith(f"{variable} is '{text}'; give ") and "\n" not in caplog.messages[0]
            caplog.clear()
    assert Config.read({variable: ""}) == Config() and not caplog.messages


@pytest.mark.parametrize("variable", [variable for variable in SETTINGS if variable not in PATHS])
def test_only_what_can_be_turned_off_may_be_zero(variable, caplog):
    may_be, field = variable in ("XDIT_IDLE_MINUTES", "XDIT_PRELOAD"), SETTINGS[variable]
    assert getattr(Config.read({variable: "0"}), field.name) == (0.0 if may_be else field.default)
    assert (f"{variable} is '0'" in caplog.text) != may_be


def test_the_memory_limit_is_found_under_its_older_name_too(caplog):
    assert Config.read({"XDIT_MEMORY_GB": "24"}) == Config(memory_gib=24.0)
    assert Config.read({"XDIT_MEMORY_GB": "24", "XDIT_MEMORY_GIB": "16"}) == Config(memory_gib=16.0)
    assert Config.read({"XDIT_MEMORY_GB": "much"}) == Config() and "XDIT_MEMORY_GB is 'much'; give GiB" in caplog.text


def test_the_table_of_variables_has_every_one_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]+ \|$", TABLE.read_text(), re.MULTILINE)
    defaults = {name: "" if field.default is None else f"{field.default:g}" for name, field in SETTINGS.items()}
    assert dict(rows) == defaults and len(rows) == len(defaults)


@pytest.mark.parametrize("field", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_used(field):
    files = [path for folder in ("parallel_backend", "nodes") for path in (REPO / folder).rglob("*.py")]
    assert any(re.search(rf"\bCONFIG\.{field.name}\b", file.read_text()) for file in files)


def test_the_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().idle_minutes = 1.0


def test_the_command_line_starts_with_variables_that_make_no_sense():
    wrong = {name: "10s" for name in ("XDIT_STOPPED_SECONDS", "XDIT_IDLE_MINUTES", "XDIT_KEEP_SECONDS")}
    command = [sys.executable, "-m", "parallel_backend", "status"]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, **wrong}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "XDIT_STOPPED_SECONDS is '10s'; give a number such as 5" in done.stderr


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """The temporary folder's cache, and no memory of one that was found before."""
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    folders.writable_cache.cache_clear()
    yield
    folders.writable_cache.cache_clear()


@pytest.mark.parametrize("cause", ["XDG_CACHE_HOME", "HOME"])
def test_kernels_are_kept_elsewhere_where_the_cache_folder_cannot_be_made(cause, caches, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(cause, "/dev/null/none")
    found = folders.writable_cache()
    assert found == folders.temporary_cache() and found.is_dir()
    assert f"compiled kernels are kept in {found}, as /dev/null/none" in caplog.text


def test_kernels_of_another_user_are_not_run(caches, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    made, owner = folders.temporary_cache(), os.getuid() + 1
    made.mkdir(parents=True)
    monkeypatch.setattr(folders, "temporary_cache", lambda: made)
    monkeypatch.setattr(folders.os, "getuid", lambda: owner)
    assert folders.writable_cache() == folders.preferred_cache()  # where they cannot be kept either
    assert "compiled kernels cannot be kept" in caplog.text and "belongs to another user" in caplog.text


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(folders.os.path, "expanduser", lambda path: path)  # as Python answers for an unknown user
    assert folders.preferred_cache() == folders.temporary_cache()


@pytest.fixture(scope="module")
def pack():
    """The pack's entry point as a module, without its nodes."""
    spec = importlib.util.spec_from_file_location("entry_point", REPO / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read_with(pack, monkeypatch, tmp_path):
    """Reads the configuration with settings of ComfyUI, and with variables that are set already."""

    def read(settings: str, **variables: str) -> Config:
        environment = dict(variables)
        monkeypatch.setattr(pack.os, "environ", environment)
        (tmp_path / "comfy.settings.json").write_text(settings)
        pack.use_settings(tmp_path / "comfy.settings.json")
        return Config.read(environment)

    return read


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            {"CogVideoX-xDiT.Processes.IdleMinutes": 5, "CogVideoX-xDiT.Processes.MemoryGiB": 20.5},
            Config(idle_minutes=5.0, memory_gib=20.5),
        ),
        (
            {"CogVideoX-xDiT.Processes.Python": "/a/python", "CogVideoX-xDiT.Processes.Preload": True},
            Config(python="/a/python", preload=1.0),
        ),
        ({"CogVideoX-xDiT.Processes.IdleMinutes": 0, "CogVideoX-xDiT.Processes.Preload": False}, Config(idle_minutes=0.0)),
        ({"CogVideoX-xDiT.Processes.MemoryGiB": 0, "CogVideoX-xDiT.Processes.Python": "", "Comfy.Locale": "zh"}, Config()),
        ({"CogVideoX-xDiT.Processes.IdleMinutes": None}, Config()),
    ],
)
def test_settings_of_comfyui_set_variables(settings, expected, read_with):
    found = read_with(json.dumps(settings))
    assert found == expected and not found.rejected


def test_a_variable_counts_more_than_a_setting(read_with):
    assert read_with('{"CogVideoX-xDiT.Processes.IdleMinutes": 5}', XDIT_IDLE_MINUTES="7") == Config(idle_minutes=7.0)


@pytest.mark.parametrize("broken", ["", "{", "[]", "3", '"text"'])
def test_settings_that_cannot_be_read_are_ignored(broken, read_with):
    assert read_with(broken) == Config()


def test_the_page_and_the_server_know_the_same_settings(pack):
    shown = {name.replace("_", ".") for name in front_end.settings((REPO / "web" / "js" / "settings.js").read_text("utf-8"))}
    assert shown == set(pack.SETTINGS)
    assert set(pack.SETTINGS.values()) <= {variable for _, variable in Config.settings()}
