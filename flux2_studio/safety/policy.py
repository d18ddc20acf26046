"""The safety policy: whether a finding stops a run, is only reported, or is not looked for.

| where the studio runs | auto means |
|---|---|
| a Space, a shared link, an address that other machines reach | on: flagged pictures are neither saved nor shown |
| one's own machine | warn: flags are reported, pictures are shown all the same |

`off` is never chosen automatically. One rule ignores the policy: prompts for sexual content with minors are always
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flux2_studio.settings import SafetyMode

Policy = Literal["on", "warn", "off"]

POLICY_DESCRIPTIONS: Mapping[Policy, str] = {
    "on": "Safety check: on. Prompts and references that it flags are refused, pictures that it flags are withheld.",
    "warn": "Safety check: warnings only. What it flags is told, and shown all the same.",
    "off": "Safety check: off, by this studio's settings.",
}


def decide_policy(setting: SafetyMode, *, shared: bool, on_space: bool) -> Policy:
    """The policy for FLUX2_SAFETY at `setting`. shared: others reach this studio; on_space: it runs on a Space."""
    if setting != "auto":
        return setting
    return "on" if shared or on_space else "warn"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of a check. `reasons` complete "because it ...". `scores`: 0..1 by what was checked.

    under_every_policy: refused whatever the policy.
    """

    allowed: bool
    reasons: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    under_every_policy: bool = False

    @property
    def reason_text(self) -> str:
        return " and ".join(self.reasons)
