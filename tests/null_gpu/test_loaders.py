"""A batch's memory is not given out again while another stream may still read it."""

import json

import pytest
from null_gpu.conftest import HERE
from sample_images import write_folder


@pytest.fixture(scope="module")
def reports(on_null_gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    write_folder(folder, train=16, val=4, classes=tuple("abcdefghij"))
    ended = on_null_gpu(HERE / "loaders.py", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {r["name"]: r for r in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize(("name", "batches"), [("loader", 10), ("seed", 15)])
def test_memory_that_a_stream_may_still_read_is_kept(reports, name, batches):
    addresses = reports[name]["addresses"]
    assert len(addresses) == batches
    assert len(set(addresses)) == batches


def test_a_loader_copies_out_of_pinned_memory_and_does_not_wait(reports):
    assert reports["loader"]["copies"] >= 10
    assert reports["loader"]["waits"] == 0
