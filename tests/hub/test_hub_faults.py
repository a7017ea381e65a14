"""Every fault of an upload ends in one clear line and in a state from which running again ends right."""

import re

import pytest
from loopback_hub import TOKEN


REPO = "me/Llama-tiny-diff"
# By name: the fault, and what the user is told.
FAULTS = {
    "token_refused": (
        {"endpoint": "info", "status": 401, "message": "Invalid credentials in Authorization header"},
        r"does not accept the token.*hf auth login.*HTTP 401",
    ),
    "gated": (
        {"endpoint": "info", "status": 403, "headers": {"X_Error_Code": "GatedRepo"}},
        r"access is restricted; ask for it on its page",
    ),
    "creation_forbidden": ({"endpoint": "create", "status": 403}, r"may not do this.*HTTP 403: injected"),
    "revision_gone": (
        {"endpoint": "preupload", "status": 404, "headers": {"X_Error_Code": "RevisionNotFound"}},
        r"no such revision",
    ),
    "repository_gone": (
        {"endpoint": "commit", "status": 404, "headers": {"X_Error_Code": "RepoNotFound"}},
        r"no such repository",
    ),
    "busy": ({"endpoint": "commit", "status": 409}, r"busy with another operation.*HTTP 409"),
    "changed_meanwhile": ({"endpoint": "commit", "status": 412}, r"has changed since this upload began.*HTTP 412"),
    "rate_limited": (
        {"endpoint": "commit", "status": 429, "headers": {"Retry_After": "7"}},
        r"too many requests; wait 7 seconds and run again \(HTTP 429",
    ),
    "commit_fails_after_upload": ({"endpoint": "commit", "status": 500}, r"the Hub failed; run again.*HTTP 500"),
    "upload_fails_midway": ({"endpoint": "put", "status": 500, "skip": 3}, r"the Hub failed; run again.*HTTP 500"),
    "upload_dropped": ({"endpoint": "put", "action": "drop", "skip": 2}, r"connection to the Hub failed"),
    "damaged_on_the_way": ({"endpoint": "put", "action": "corrupt", "times": 1}, r"HTTP 422.*checksum is not what"),
    "commit_dropped": ({"endpoint": "commit", "action": "drop"}, r"connection to the Hub failed"),
    "answer_lost": ({"endpoint": "commit", "action": "drop_after"}, r"connection to the Hub failed"),
    "wrong_object_id": (
        {"endpoint": "tree", "action": "wrong_oid", "skip": 1},
        r"there with other bytes than were sent.*do not use it",
    ),
    "comparison_fails": ({"endpoint": "tree", "status": 500, "skip": 1}, r"committed, but could not be compared"),
}
COMMITTED = {"answer_lost", "wrong_object_id", "comparison_fails"}
# The client tries these again by itself.
PASSING = {
    "upload_fails_twice": {"endpoint": "put", "status": 500, "times": 2},
    "upload_rate_limited": {"endpoint": "put", "status": 429, "headers": {"RateLimit": '"api";r=0;t=7'}, "times": 1},
    "upload_dropped_once": {"endpoint": "put", "action": "drop", "times": 1},
}


@pytest.fixture(scope="module")
def reports(converted, run_pushes):
    """By name, the push that met the fault and the one after it; "clean" is one that met none."""
    push = {"arguments": [str(converted["v1"]), REPO]}
    steps = {("clean", "first"): push}
    for name, (fault, _) in FAULTS.items():
        steps[name, "first"] = push | {"faults": [fault]}
        steps[name, "again"] = push | {"fresh": False}
    for name, fault in PASSING.items():
        steps[name, "first"] = push | {"faults": [fault]}
    steps["overtaken", "first"] = push | {"faults": [{"endpoint": "commit", "action": "overtaken"}]}
    steps["overtaken", "again"] = push | {"fresh": False}
    steps["verbose", "first"] = {
        "arguments": [*push["arguments"], "--verbose"],
        "faults": [FAULTS["upload_fails_midway"][0]],
    }
    steps["no_token", "first"] = push | {"token": None}
    return dict(zip(steps, run_pushes(list(steps.values())), strict=True))


@pytest.fixture(params=FAULTS)
def name(request):
    return request.param


def visible(report: dict) -> dict[str, bytes]:
    return report["files"].get(REPO, {}).get("main", {})


def test_clean_push_is_whole(reports, converted):
    clean = reports["clean", "first"]
    assert clean["exit_code"] == 0, clean["stderr"]
    assert visible(clean).keys() == {path.name for path in converted["v1"].iterdir()}


def test_fault_ends_in_one_line(reports, name):
    report = reports[name, "first"]
    assert report["exit_code"] == 1
    assert report["stderr"].startswith(f"error: {REPO}: ") and report["stderr"].count("\n") == 1
    assert re.search(FAULTS[name][1], report["stderr"]), report["stderr"]
    assert "://" not in report["stderr"], "addresses may carry signatures"


def test_nothing_partial_is_seen(reports, name):
    """Readers see an empty repository or the whole upload."""
    expected = visible(reports["clean", "first"]) if name in COMMITTED else {}
    assert visible(reports[name, "first"]) == expected


def test_running_again_ends_as_if_nothing_had_happened(reports, name):
    report = reports[name, "again"]
    assert report["exit_code"] == 0, report["stderr"]
    assert visible(report) == visible(reports["clean", "first"])


def test_somebody_elses_commit_is_not_built_upon_unseen(reports):
    first, again = reports["overtaken", "first"], reports["overtaken", "again"]
    assert first["exit_code"] == 1 and "HTTP 412" in first["stderr"]
    assert visible(first).keys() == {"other.txt"}
    assert visible(again) == visible(reports["clean", "first"]) | visible(first)


def test_what_was_uploaded_is_not_uploaded_again(reports):
    assert "put" in reports["commit_fails_after_upload", "first"]["endpoints"]
    assert "put" not in reports["commit_fails_after_upload", "again"]["endpoints"]
    assert "commit" not in reports["answer_lost", "again"]["endpoints"]


@pytest.mark.parametrize("name", PASSING)
def test_client_overcomes_passing_faults(reports, name):
    report = reports[name, "first"]
    assert report["exit_code"] == 0, report["stderr"]
    assert report["waits"], "it waited before the second try"
    assert visible(report) == visible(reports["clean", "first"])


def test_client_waits_as_long_as_the_hub_asks(reports):
    assert max(reports["upload_rate_limited", "first"]["waits"]) >= 7


def test_without_a_token_the_line_says_how_to_log_in(reports):
    report = reports["no_token", "first"]
    assert report["exit_code"] == 1 and "hf auth login" in report["stderr"] and report["stderr"].count("\n") == 1


def test_traceback_is_shown_when_asked_for(reports):
    assert "Traceback" in reports["verbose", "first"]["stderr"]


def test_token_is_in_no_output(reports):
    for key, report in reports.items():
        assert TOKEN not in report["stdout"] + report["stderr"], key
        for content in visible(report).values():
            assert TOKEN.encode() not in content, key
