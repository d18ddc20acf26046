"""Laws of tests/models/test_plan.py, for requests that take longer to plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flux2_studio.models.memory.plan import RequestShape
from tests.models import test_plan as plans


@pytest.mark.parametrize("workload", [replace(plans.LARGE, use_cfg=True), RequestShape(width=64, height=640, count=5)])
@pytest.mark.parametrize("streaming", [True, False])
def test_less_memory_never_gives_a_quicker_way_nor_more_than_there_is(workload: RequestShape, streaming: bool) -> None:
    plans.test_less_memory_never_gives_a_quicker_way_nor_more_than_there_is(workload, streaming)


@pytest.mark.parametrize(
    "workload",
    [
        RequestShape(width=512, height=512, references=((256, 512),) * 3),
        RequestShape(width=512, height=1024, count=4, use_cfg=True),
    ],
)
def test_a_refusal_names_a_request_that_fits(workload: RequestShape) -> None:
    plans.test_a_refusal_names_a_request_that_fits(workload)
