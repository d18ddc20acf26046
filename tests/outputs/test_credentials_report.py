"""What credentials say is put in plain words, whatever a stranger wrote into them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2_studio.provenance.c2pa.report import Credentials, parse_report

SUCCESS = [{"code": "claimSignature.validated"}, {"code": "assertion.dataHash.match"}]
UNTRUSTED = {"code": "signingCredential.untrusted", "explanation": "signing certificate untrusted"}


def report(
    *failures: str, state: str = "Invalid", deltas: list[Any] | None = None, serial: str = "12", **manifest: Any
) -> str:
    failed = [UNTRUSTED, *({"code": code, "explanation": f"about {code}"} for code in failures)]
    return json.dumps(
        {
            "active_manifest": "urn:1",
            "manifests": {"urn:1": {"signature_info": {"issuer": "Fox", "cert_serial_number": serial}} | manifest},
            "validation_state": state,
            "validation_results": {
                "activeManifest": {"success": SUCCESS, "failure": failed},
                "ingredientDeltas": deltas,
            },
        }
    )


def test_an_unknown_signer_is_no_defect() -> None:
    found = parse_report(report(state="Valid"), None)
    assert (found.state, found.own, found.problems, found.signer) == ("intact", False, (), "Fox")
    assert "“Fox”; nobody here confirms that name" in found.summary


@pytest.mark.parametrize(
    ("state", "serial", "own"), [("Trusted", "12", True), ("Trusted", "13", False), ("Valid", "12", False)]
)
def test_one_is_recognised_by_trust_and_serial_together(state: str, serial: str, own: bool) -> None:
    assert parse_report(report(state=state), serial).own is own
    assert not parse_report(report(state=state), None).own


def test_defects_in_words_each_once() -> None:
    found = parse_report(
        report("assertion.dataHash.mismatch", "claimSignature.mismatch", "claimSignature.mismatch"), None
    )
    assert found.problems == (
        "The picture was changed after it was signed.",
        "The signature does not fit: the credentials were changed or forged.",
    )
    assert found.summary.startswith("Not intact: The picture was changed after it was signed. The signature")
    (unknown,) = parse_report(report("some.new.code"), None).problems
    assert unknown == "about some.new.code (some.new.code)."


def test_an_expired_certificate_does_not_mean_a_changed_picture() -> None:
    found = parse_report(report("signingCredential.expired"), None)
    assert found.state == "broken"
    assert found.summary == (
        "Unchanged since it was signed, but the signature does not count: The signer's certificate has expired."
    )


def test_defects_of_earlier_pictures_are_told_apart() -> None:
    delta = {"validationDeltas": {"failure": [{"code": "claimSignature.mismatch"}]}}
    (problem,) = parse_report(report(deltas=[delta]), None).problems
    assert problem.startswith("In an earlier picture: The signature does not fit")


def test_other_programs_ways_of_saying_it() -> None:
    actions = [
        {"action": "c2pa.opened"},
        {"action": "org.example.blur", "softwareAgent": "Photo Shop 9", "description": "soft"},
        {"action": "c2pa.created", "digitalSourceType": "http://example.org/unknownKind"},
    ]
    found = parse_report(
        report(
            state="Valid",
            assertions=[{"label": "c2pa.actions", "data": {"actions": actions}}, {"label": "stds.exif", "data": 3}],
            claim_generator="Old/1.0",
        ),
        None,
    )
    assert [it.text for it in found.actions] == [
        "Opened an existing picture",
        "org.example.blur, soft",
        "Created, unknownKind",
    ]
    assert found.actions[1].agent == "Photo Shop 9"
    assert found.generator == "Old/1.0"
    assert found.assertions == ("c2pa.actions", "stds.exif")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"active_manifest": []}', "[" * 100_000, "1" * 10_000])
def test_what_is_no_report_is_unreadable(text: str) -> None:
    assert parse_report(text, None).state == "unreadable"


KEYS = (
    "active_manifest manifests urn:1 validation_state validation_results activeManifest failure success code "
    "ingredientDeltas validationDeltas signature_info issuer assertions label data actions action softwareAgent "
    "parameters ingredients title relationship claim_generator_info name version model"
)
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=300) | st.sampled_from(["urn:1", "Valid", "c2pa.actions.v2"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=6),
    max_leaves=30,
)


@given(
    manifest=st.dictionaries(st.sampled_from(KEYS.split()), VALUES, max_size=8),
    results=st.dictionaries(st.sampled_from(KEYS.split()), VALUES, max_size=4),
)
def test_any_shape_is_read_without_an_exception(manifest: dict[str, Any], results: dict[str, Any]) -> None:
    store = {"active_manifest": "urn:1", "manifests": {"urn:1": manifest | {"x": 1}}, "validation_results": results}
    found = parse_report(json.dumps(store), "12")
    assert isinstance(found, Credentials)
    assert not found.own
    texts = [found.summary, found.signer, found.generator, *found.assertions, *found.problems]
    texts += [text for it in found.actions for text in (it.text, it.name, it.agent, it.when, it.prompt)]
    texts += [text for it in found.ingredients for text in (it.title, it.relation, it.generator, *it.problems)]
    assert all(text.isprintable() for text in texts)
