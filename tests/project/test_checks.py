"""`make check`, the pre-commit hooks, `.ci/run` and the hosted workflow run the same things."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.distributions import ROOT

WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def commands(target: str) -> list[str]:
    """What `make target` would run once everything is installed."""
    dry = ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.installed", target]
    return subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def ci_parts() -> list[str]:
    (parts,) = re.findall(r"^PARTS=\((.*)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    return parts.split()


def test_the_hooks_are_make_check() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["entry"] for hook in hooks] == commands("check")
    assert all((hook["language"], hook["pass_filenames"]) == ("system", False) for hook in hooks)


def test_make_check_edits_nothing() -> None:
    lint, form, _ = commands("check")
    assert "--no-fix" in lint
    assert "--check" in form


def test_every_part_of_the_ci_is_a_target_of_make() -> None:
    assert {"check", "test", "audit"} <= set(ci_parts())
    for part in ci_parts():
        assert commands(part)


def test_the_audit_is_for_all_gpus_unless_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TARGETS", raising=False)
    (every,) = commands("audit")
    assert every.split()[-1] == "--audit"
    monkeypatch.setenv("TARGETS", "sm_80 sm_100")  # as .ci/run names one
    (some,) = commands("audit")
    assert some.endswith("--audit --targets sm_80 sm_100")


def test_the_workflow_runs_every_part_on_two_pythons() -> None:
    steps = WORKFLOW["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [f".ci/run {part}" for part in ci_parts()]
    assert len(set(WORKFLOW["jobs"]["ci"]["strategy"]["matrix"]["python"])) >= 2
    triggers = WORKFLOW[True]  # YAML 1.1 reads the key "on" as a truth value
    assert {"push", "pull_request"} <= set(triggers)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    (setup,) = [step for step in steps if step.get("uses", "").startswith("actions/setup-python@")]
    assert setup["with"]["cache"] == "pip"


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "config.yml"], ids=lambda form: form.stem)
def test_issue_forms_are_complete_and_ask_for_the_environment(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    entries = content["body"]
    identifiers = [entry["id"] for entry in entries]
    assert len(set(identifiers)) == len(identifiers)
    assert {entry["type"] for entry in entries} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(entry["attributes"]["label"] for entry in entries)
    (environment,) = [entry for entry in entries if entry["id"] == "environment"]
    assert "python -m engine.env" in environment["attributes"]["description"]
    assert environment["validations"]["required"] or form.stem != "bug"
