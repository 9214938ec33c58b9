"""What a user reads of other packages' errors. Messages of compilers are those of Triton 3.9 and torch 2.13."""

import logging
from subprocess import CalledProcessError
from typing import NamedTuple

import av
import pytest

from parallel_backend.errors import LONGEST, reason_of


class CompilationError(Exception):
    """As Triton's, which need not be installed."""


class CompileTimeAssertionFailure(CompilationError):
    """As Triton's."""


class PTXASError(Exception):
    """As Triton's."""


class BackendCompilerFailed(RuntimeError):
    """As torch's."""


class ActorDiedError(Exception):
    """As Ray's."""


class Case(NamedTuple):
    error: BaseException
    reason: str
    shortened: bool = False


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


HEADS = (
    "at 7:40:\n    row = tl.program_id(0)\n    head = tl.arange(0, FEATURES)\n           ^\narange's range must be a power of 2"
)
OUTER = "at 2:8:\ndef bad2(x, F: tl.constexpr):\n    y = inner(x, F)\n        ^"
ASSEMBLER = (
    "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
    "ptxas-blackwell info    : (C7505) Potential Performance Loss: 'setmaxnreg' ignored to allow debugging.\n"
    "ptxas fatal   : (C7600) Register allocation failed with register count of '128'\n\n"
    "Repro command: /venv/bin/ptxas -v --gpu-name=sm_90a /tmp/tmp.ptx -o /tmp/tmp.ptx.o\n"
)
INDUCTOR = (
    "backend='inductor' raised:\nRuntimeError: Failed to find C compiler. Please specify via CC environment variable.\n\n"
    'Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace. For even more developer context, set TORCH_LOGS="+dynamo"\n'
)
CUDA = (
    "CUDA error: no kernel image is available for execution on the device\n"
    "CUDA kernel errors might be asynchronously reported at some other API call.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
ACTOR = (
    "The actor died because of an error raised in its creation task, ray::single#1:XDiTGroup.__init__() (pid=1, ip=10.0.0.2)\n"
    '  File "/pack/parallel_backend/cluster/actor.py", line 33, in __init__\n    self.held = import_module(module)\n'
    "ModuleNotFoundError: No module named 'parallel_backend'\n"
)
CASES = {
    "Triton": Case(
        CompilationError(HEADS), "Triton could not compile the kernel: arange's range must be a power of 2", shortened=True
    ),
    "Triton, in a function that a kernel calls": Case(
        caused(CompilationError(OUTER), CompilationError(HEADS)),
        "Triton could not compile the kernel: arange's range must be a power of 2",
        shortened=True,
    ),
    "Triton, an assertion": Case(
        CompileTimeAssertionFailure("at 2:4:\ndef bad4(x):\n    ^\nF must be 3"),
        "Triton could not compile the kernel: F must be 3",
        shortened=True,
    ),
    "Triton's assembler": Case(
        PTXASError(ASSEMBLER),
        "Triton could not assemble the kernel: (C7600) Register allocation failed with register count of '128'",
        shortened=True,
    ),
    "torch's compiler": Case(
        BackendCompilerFailed(INDUCTOR),
        "backend='inductor' raised: RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
        shortened=True,
    ),
    "Ray, an actor that does not start": Case(ActorDiedError(ACTOR), "ModuleNotFoundError: No module named 'parallel_backend'"),
    "Ray, an actor that was lost": Case(
        ActorDiedError("The actor died unexpectedly before finishing this task.\n\tclass_name: XDiTGroup"),
        "The actor died unexpectedly before finishing this task.",
        shortened=True,
    ),
    "no C compiler": Case(
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        "Failed to find C compiler. Please specify via CC environment variable.",
    ),
    "a C compiler that fails": Case(
        CalledProcessError(1, ["/usr/bin/gcc", "/tmp/tmpx/main.c", "-O3", "-lcuda"]),
        "gcc failed with exit status 1",
        shortened=True,
    ),
    "a shared library": Case(
        ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"),
        "libcudart.so.12: cannot open shared object file: No such file or directory",
    ),
    "CUDA": Case(RuntimeError(CUDA), "CUDA error: no kernel image is available for execution on the device", shortened=True),
    "the core": Case(
        Exception(
            "**** ERROR: Saving image outside the output folder is not allowed.\n full_output_folder: /a\n output_dir: /b"
        ),
        "Saving image outside the output folder is not allowed.",
        shortened=True,
    ),
    "no message": Case(RuntimeError(), "RuntimeError"),
    "an empty first line": Case(ValueError("\n  \n the file is cut off\n"), "the file is cut off"),
    "a key": Case(KeyError("patch_size"), "KeyError: 'patch_size'"),
    "no memory": Case(OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_reason_is_one_line_and_the_rest_is_in_the_log(name, caplog):
    case = CASES[name]
    with caplog.at_level(logging.INFO, logger="parallel_backend"):
        assert reason_of(case.error) == case.reason + (" (details in the log)" if case.shortened else "")
    assert [record.getMessage() for record in caplog.records] == [f"{type(case.error).__name__}: {case.error}"] * case.shortened


def test_a_file_that_is_no_video_has_ffmpeg_s_words_for_a_reason(tmp_path):
    (tmp_path / "text.mp4").write_text("words")
    with pytest.raises(av.FFmpegError) as caught:
        av.open(str(tmp_path / "text.mp4"))
    assert reason_of(caught.value) == f"Invalid data found when processing input: '{tmp_path / 'text.mp4'}'"


def test_triton_s_own_error_is_understood():
    """The others are copies; this one shows that a kernel's failure still has the form that they have."""
    triton = pytest.importorskip("triton.compiler.errors")
    found = triton.CompilationError("a = 1\nb = 2", type("Node", (), {"lineno": 2, "col_offset": 0})(), "the reason")
    assert reason_of(found) == "Triton could not compile the kernel: the reason (details in the log)"


def test_a_long_reason_is_cut_and_whole_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="parallel_backend"):
        said = reason_of(ValueError("x" * 2 * LONGEST))
    assert said == f"{'x' * (LONGEST - 1)}… (details in the log)" and "x" * 2 * LONGEST in caplog.text
