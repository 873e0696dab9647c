"""A change that adds kernels to a step says so: counts stand in launches.csv.

The headline's captured step takes minutes to compile: DFPTKD_NULL_GPU_HEADLINE=1 includes it.
"""

import json
import os

import pytest
from null_gpu.conftest import HERE
from null_gpu.record import HEADLINE, QUICK, SLOW, VERSION, case_of, key, on_record, row_of

RENEW = "if that is meant: python tests/null_gpu/record.py (--headline), and say why in the commit"


def compare(on_null_gpu, record_property, cases):
    recorded = on_record()
    if not any(row["torch"] == VERSION for row in recorded.values()):
        pytest.skip(f"no counts of torch {VERSION} on record: tests/null_gpu/record.py adds them")
    ended = on_null_gpu(HERE / "steps.py", stdin=json.dumps([case_of(*case) for case in cases]))
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases), ended.stderr[-3000:]
    assert [r["error"] for r in results] == [None] * len(cases), ended.stderr[-3000:]
    assert [r["waits"] for r in results] == [0] * len(cases)
    lines, more = [f"launches and nodes of a step, torch {VERSION}"], []
    for (pair, _, _), result in zip(cases, results, strict=True):
        row = row_of(pair, result)
        old = recorded[key(row)]
        line = f"{' '.join(key(row)[1:])}: {row['launches']} launches, {row['nodes']} nodes"
        lines.append(f"{line}, on record {old['launches']}, {old['nodes']}")
        if any(int(row[name]) > int(old[name]) for name in ("launches", "nodes")):
            more.append(lines[-1])
    record_property("table", "\n".join(lines))
    assert not more, "\n".join([*more, RENEW])


@pytest.mark.parametrize("method", sorted({method for _, method, _ in QUICK}))
def test_no_kernel_was_added(on_null_gpu, record_property, method):
    compare(on_null_gpu, record_property, [case for case in QUICK if case[1] == method])


@pytest.mark.skipif(
    not os.environ.get("DFPTKD_NULL_GPU_HEADLINE"),
    reason="three minutes of compilation a method: DFPTKD_NULL_GPU_HEADLINE=1",
)
@pytest.mark.parametrize("case", SLOW, ids=[method for _, method, _ in SLOW])
def test_no_node_was_added_to_the_headline(on_null_gpu, record_property, case):
    assert case[0] == HEADLINE
    compare(on_null_gpu, record_property, [case])
