"""The result as the contract describes it, as the README does, and as a worker gives it."""

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from avatar_client import AvatarEndpoint
from avatar_client.contract import DryRunResult, JobInput, JobResult, Motion
from avatar_client.contract.result import Metrics, ParametersUsed, Plan
from local_endpoint import LocalEndpoint, WorkerProcess

README = Path(__file__).parents[3] / "README.md"
DRAFT: dict[str, Any] = {"resolution": 256, "num_inference_steps": 2}


@pytest.fixture
def result_of(
    endpoint: LocalEndpoint,
    shared_worker: WorkerProcess,
    make_portrait: Callable[..., bytes],
    make_speech: Callable[..., bytes],
) -> Callable[..., dict[str, Any]]:
    """The output of a job with these fields."""

    def run(**fields: Any) -> dict[str, Any]:
        with AvatarEndpoint(endpoint.url, endpoint.api_key) as client:
            job = client.submit(make_portrait(), make_speech(0.4), **DRAFT, **fields)
            output = job.wait(timeout_seconds=300).output
        assert output is not None
        return output

    return run


def require(value: Any, kind: Any) -> None:
    """Passes if the value has the keys of a TypedDict, and of those in it, and their types."""
    if typing.get_origin(kind) is list and typing.is_typeddict(typing.get_args(kind)[0]):
        for each in value:
            require(each, *typing.get_args(kind))
        return
    if value is not None:  # pydantic reads no TypedDict of Python 3.11, nor one "or None"
        [kind] = [each for each in typing.get_args(kind) if typing.is_typeddict(each)] or [kind]
    if not typing.is_typeddict(kind):
        TypeAdapter(kind).validate_python(value, strict=True)
        return
    assert kind.__required_keys__ <= set(value) <= set(kind.__annotations__)
    for name, inner in typing.get_type_hints(kind).items():
        if name in value:
            require(value[name], inner)


def readme_fields() -> set[str]:
    """The names in the first column of the README's table of the result."""
    section = README.read_text().split("### Result\n")[1].split("\n\nWhile a job runs")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_readme_names_the_fields_of_a_result() -> None:
    assert readme_fields() == set(JobResult.__annotations__)


@pytest.mark.parametrize("output", [{}, {"delivery": "inline", "thumbnail": True, "gif": True}])
def test_a_result_has_the_fields_of_the_contract_and_their_types(
    result_of: Callable[..., dict[str, Any]], output: dict[str, Any]
) -> None:
    result = result_of(output=output, user_data={"order": 5})
    assert set(result) == JobResult.__required_keys__
    of_drafts = {"attention_density", "attention_error", "attention_fallbacks"}
    of_drafts |= {"resumed_from_step", "seconds_saved"}
    assert set(result["metrics"]) == set(Metrics.__annotations__) - of_drafts
    require(result, JobResult)


def test_a_plan_has_the_fields_of_the_contract_and_their_types(
    result_of: Callable[..., dict[str, Any]],
) -> None:
    result = result_of(dry_run=True)
    assert set(result["plan"]) == set(Plan.__annotations__)
    require(result, DryRunResult)
    inline = result_of(dry_run=True, output={"delivery": "inline"})
    assert set(inline["plan"]) == Plan.__required_keys__
    require(inline, DryRunResult)


def test_the_parameters_of_a_result_are_fields_of_the_request() -> None:
    assert set(ParametersUsed.__annotations__) < set(JobInput.model_fields)
    motion = typing.get_type_hints(ParametersUsed)["motion"]
    assert set(motion.__annotations__) == set(Motion.model_fields)
