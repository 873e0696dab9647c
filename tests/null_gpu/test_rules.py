"""The null GPU notices what it is there to notice."""

import json

import pytest
from null_gpu.conftest import HERE


@pytest.fixture(scope="module")
def reports(on_null_gpu):
    ended = on_null_gpu(HERE / "rules.py")
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines, ended.stderr
    return {report["program"]: report for report in lines}


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        ("reads_back", "cudaStreamSynchronize: the stream is being captured"),
        ("leaves_a_stream_behind", "has not been joined back"),
        ("waits_for_work_outside", "recorded outside of the capture"),
        ("waits_for_the_device", "cudaDeviceSynchronize: not permitted"),
        ("another_thread_waits", "not permitted while a capture is under way"),
    ],
)
def test_a_broken_rule_ends_the_capture(reports, program, rule):
    assert rule in reports[program]["violations"][0]
    assert reports[program]["raised"] is not None


@pytest.mark.parametrize(
    "program", ["sound", "two_graphs_on_two_streams", "another_thread_waits_as_it_may"]
)
def test_what_is_allowed_passes(reports, program):
    assert reports[program]["raised"] is None
    assert reports[program]["violations"] == []
    assert reports[program]["shared_workspaces"] == 0


def test_torch_refuses_to_capture_a_copy_from_pageable_memory(reports):
    assert "pinned" in reports["copies_from_pageable_memory"]["raised"]


def test_work_that_a_graph_does_not_hold_is_counted(reports):
    assert reports["works_on_another_stream"]["strays"] == 1
    assert reports["sound"]["strays"] == 0


def test_graphs_that_share_a_workspace_are_found(reports):
    assert reports["two_graphs_on_one_stream"]["shared_workspaces"] > 0
