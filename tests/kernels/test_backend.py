"""Choice of a backend: automatic, forced, refused, logged, and seen through torch.compile."""

import logging
import subprocess
import threading
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dfptkd.kernels import backend, normalize_images, use_backend, which_backend

IMAGES = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
HALVES = (0.5, 0.5, 0.5)
LIBRARY = backend.library_path()


def cuda_images():
    """A stand-in: no GPU is needed."""
    with FakeTensorMode():
        return torch.empty(1, 2, 2, 3, dtype=torch.uint8, device="cuda")


needs_native = pytest.mark.skipif(
    backend.unavailable("native") is not None, reason=str(backend.unavailable("native"))
)


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """A machine where the native library was never built."""
    monkeypatch.setattr(backend, "library_candidates", lambda: (tmp_path / "absent.so",))
    backend._load_native.cache_clear()
    backend._log_fallback_once.cache_clear()
    yield
    monkeypatch.undo()
    backend._load_native.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in of a GPU that nothing has asked yet, and a Triton whose probe can be set."""
    probe = pytest.importorskip("dfptkd.kernels.triton_probe")
    kernel = MagicMock()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(probe, "nothing_kernel", kernel)
    backend._probe_triton.cache_clear()
    backend._log_fallback_once.cache_clear()
    yield kernel.__getitem__.return_value
    monkeypatch.undo()
    backend._probe_triton.cache_clear()
    backend._log_fallback_once.cache_clear()


@pytest.mark.parametrize("operation", sorted(backend.OPERATIONS))
def test_every_public_operation_is_registered_and_has_a_reference(operation):
    import dfptkd.kernels

    assert callable(getattr(dfptkd.kernels, operation))
    with use_backend("reference"):
        assert which_backend(operation, torch.zeros(1)) == "reference"


@needs_native
def test_automatic_choice_is_native_on_cpu_for_its_dtypes_alone():
    assert which_backend("normalize_images", IMAGES) == "native"
    assert which_backend("normalize_images", IMAGES, torch.bfloat16) == "reference"
    assert which_backend("normalize_images", torch.empty(1, device="meta")) == "reference"


def test_forced_reference_ends_with_its_block_also_after_an_error():
    before = which_backend("normalize_images", IMAGES)
    with use_backend("reference"):
        assert which_backend("normalize_images", IMAGES) == "reference"
    assert which_backend("normalize_images", IMAGES) == before
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert which_backend("normalize_images", IMAGES) == before


@needs_native
def test_blocks_nest():
    with use_backend("reference"):
        with use_backend("native"):
            assert which_backend("normalize_images", IMAGES) == "native"
        assert which_backend("normalize_images", IMAGES) == "reference"


@pytest.mark.parametrize(
    ("name", "operation", "tensor", "dtype", "reason"),
    [
        ("native", "normalize_images", IMAGES, torch.bfloat16, "does not take torch.bfloat16"),
        ("native", "normalize_images", IMAGES.to("meta"), None, "does not run on meta tensors"),
        ("triton", "normalize_images", IMAGES, None, "does not run on cpu tensors"),
        ("triton", "normalize_images", cuda_images(), torch.float64, "does not take torch.float64"),
    ],
)
def test_forced_backend_that_cannot_serve_raises(name, operation, tensor, dtype, reason):
    with use_backend(name), pytest.raises(RuntimeError, match=reason):
        which_backend(operation, tensor, dtype)


def test_a_backend_that_an_operation_does_not_have_is_named(monkeypatch):
    monkeypatch.setitem(backend.OPERATIONS, "normalize_images", {})
    with use_backend("triton"), pytest.raises(RuntimeError, match="has no triton backend"):
        which_backend("normalize_images", IMAGES)


@pytest.mark.parametrize(
    ("name", "operation"),
    [("triton", "frozen_conv2d"), ("triton", "batch_norm_affine")],
)
def test_what_a_backend_leaves_to_pytorch_is_not_refused(name, operation):
    with use_backend(name):
        assert which_backend(operation, torch.zeros(1)) == "reference"


def test_triton_runs_on_cpu_tensors_only_under_its_interpreter(monkeypatch):
    monkeypatch.setitem(backend.OPERATIONS, "normalize_images", {"triton": (torch.uint8,)})
    monkeypatch.setattr(backend, "_find_triton", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(RuntimeError, match="does not run on cpu"):
        which_backend("normalize_images", IMAGES)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        assert which_backend("normalize_images", IMAGES) == "triton"
    assert which_backend("normalize_images", IMAGES) == "reference"  # never on its own


def test_triton_serves_where_its_probe_launches_and_is_asked_once(gpu):
    for operation in ("normalize_images", "normalize_images", "frozen_relu"):
        assert which_backend(operation, cuda_images(), torch.float32) == "triton"
    assert gpu.call_count == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC"),
        FileNotFoundError(2, "No such file or directory", "/nonexistent"),
        PermissionError(13, "Permission denied", "/root/.triton"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        ImportError("cuda_utils.so: cannot open shared object file"),
        "PTXASError",
        "OutOfResources",
    ],
    ids=lambda e: e if isinstance(e, str) else type(e).__name__,
)
def test_a_triton_that_cannot_launch_leaves_all_to_the_reference_and_says_so_once(
    gpu, caplog, error
):
    if error == "PTXASError":
        error = pytest.importorskip("triton.runtime.errors").PTXASError("unknown gpu\nmore")
    elif error == "OutOfResources":
        error = pytest.importorskip("triton.runtime.errors").OutOfResources(9, 1, "shared memory")
    gpu.side_effect = error
    with caplog.at_level(logging.WARNING, logger=backend.__name__):
        for operation in ("normalize_images", "frozen_relu", "dual_path_loss"):
            assert backend.choose(operation, cuda_images(), torch.float32) == "reference"
    reason = backend.unavailable("triton")
    assert reason.startswith("triton cannot launch a kernel: ")
    assert str(error).splitlines()[0].rstrip(".: ") in reason
    assert "\n" not in reason
    assert [record.getMessage() for record in caplog.records] == [
        f"fused operations: {reason}; the reference serves it, slower"
    ]
    assert gpu.call_count == 1
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton cannot launch"):
        which_backend("frozen_relu", cuda_images(), torch.float32)
    assert isinstance(error, backend.backend_failures())


def test_triton_is_not_probed_without_a_gpu_nor_within_a_capture(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable("triton") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_is_capturing", lambda: True)
    assert backend.unavailable("triton") is None
    assert gpu.call_count == 0
    monkeypatch.setattr(backend, "_is_capturing", lambda: False)
    gpu.side_effect = RuntimeError("no driver")
    assert backend.unavailable("triton") == "triton cannot launch a kernel: no driver"


def test_failures_of_a_backend_are_not_those_of_the_program():
    assert not issubclass(ValueError, backend.backend_failures())
    assert not issubclass(KeyboardInterrupt, backend.backend_failures())


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="unknown operation 'normalise'"):
        which_backend("normalise", IMAGES)


@needs_native
def test_forced_backend_is_a_matter_of_one_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(which_backend("normalize_images", IMAGES))
        )
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_without_library_the_reference_serves_and_says_so_once(no_library, caplog):
    with caplog.at_level(logging.WARNING, logger=backend.__name__):
        for _ in range(3):
            normalize_images(IMAGES, HALVES, HALVES, dtype=torch.float32)
    assert len(caplog.records) == 1
    assert "the native library is not built" in caplog.text
    with use_backend("native"), pytest.raises(RuntimeError, match="is not built"):
        normalize_images(IMAGES, HALVES, HALVES, dtype=torch.float32)


def test_a_broken_library_is_a_reason_and_not_a_crash(no_library, monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(backend, "library_candidates", lambda: (tmp_path / "broken.so",))
    assert "does not load" in backend.unavailable("native")
    assert which_backend("normalize_images", IMAGES) == "reference"


@needs_native
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
def test_a_library_that_was_cut_short_is_not_loaded(no_library, monkeypatch, tmp_path, share):
    """The loader would map it and end the process by SIGBUS."""
    whole = LIBRARY.read_bytes()
    (tmp_path / "short.so").write_bytes(whole[: int(len(whole) * share)])
    monkeypatch.setattr(backend, "library_candidates", lambda: (tmp_path / "short.so",))
    assert "expected a whole file" in backend.unavailable("native")


def test_library_is_looked_for_in_the_package_first_then_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package, cached = backend.library_candidates()
    assert package.parent.name == "kernels"
    assert cached.is_relative_to(tmp_path / "dfptkd")
    monkeypatch.setattr(backend, "library_candidates", lambda: (tmp_path / "none.so", cached))
    assert backend.library_path() is None
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert backend.library_path() == cached


@needs_native
def test_compiled_code_follows_the_forced_backend():
    torch._dynamo.reset()
    calls = []

    def compiler(graph, _):
        calls.append(any("dfptkd" in str(node.target) for node in graph.graph.nodes))
        return graph

    @torch.compile(fullgraph=True, backend=compiler)
    def run(images):
        return normalize_images(images, HALVES, HALVES, dtype=torch.float32) + 1

    run(IMAGES)
    with use_backend("reference"):
        run(IMAGES)
    run(IMAGES)
    assert calls == [
        True,
        False,
    ]  # the operator, then its reference; the third call finds the first


@needs_native
def test_a_backend_forced_inside_compiled_code_is_taken():
    torch._dynamo.reset()
    calls = []

    def compiler(graph, _):
        calls.append(any("dfptkd" in str(node.target) for node in graph.graph.nodes))
        return graph

    @torch.compile(fullgraph=True, backend=compiler)
    def run(images):
        with use_backend("reference"):
            first = normalize_images(images, HALVES, HALVES, dtype=torch.float32)
        return first + 1

    run(IMAGES)
    assert calls == [False]
    assert which_backend("normalize_images", IMAGES) == "native"
