"""Which policy holds where."""

from __future__ import annotations

import pytest

from flux2_studio.safety.policy import Policy, decide_policy
from flux2_studio.settings import SafetyMode


@pytest.mark.parametrize(
    ("setting", "shared", "on_space", "policy"),
    [
        ("auto", False, False, "warn"),
        ("auto", True, False, "on"),
        ("auto", False, True, "on"),
        ("auto", True, True, "on"),
        ("on", False, False, "on"),
        ("warn", True, True, "warn"),
        ("off", False, False, "off"),
        ("off", True, True, "off"),
    ],
)
def test_policy(setting: SafetyMode, shared: bool, on_space: bool, policy: Policy) -> None:
    assert decide_policy(setting, shared=shared, on_space=on_space) == policy
