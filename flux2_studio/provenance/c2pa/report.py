"""Convert the signing library's JSON report on content credentials into plain text for the page.

Everything in the report is untrusted: whoever signed the picture wrote it. It may contain HTML in titles, control
characters in names, or a million actions. Strings are truncated and stripped of unprintable characters; the page must
show them as text, never as HTML. Lists are truncated too, with a note.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

MAX_TEXT_CHARS = 200  # per displayed string
MAX_LIST_ITEMS = 50  # per displayed list

ACTIONS = {
    "c2pa.created": "Created",
    "c2pa.opened": "Opened an existing picture",
    "c2pa.placed": "Placed another picture into it",
    "c2pa.edited": "Edited",
    "c2pa.converted": "Converted to another format",
    "c2pa.cropped": "Cropped",
    "c2pa.resized": "Resized",
    "c2pa.transcoded": "Encoded anew",
    "c2pa.published": "Published",
    "c2pa.watermarked": "Watermarked",
    "c2pa.watermarked.bound": "Watermarked",
    "c2pa.watermarked.unbound": "Watermarked",
}
SOURCES = {  # IPTC's NewsCodes, "digital source type"
    "trainedAlgorithmicMedia": "made by an AI model",
    "compositeWithTrainedAlgorithmicMedia": "partly made by an AI model",
    "algorithmicMedia": "made by an algorithm",
    "digitalCapture": "taken with a camera",
    "computationalCapture": "taken with a camera, processed",
    "humanEdits": "edited by a person",
    "digitalCreation": "made by a person with software",
    "composite": "put together from several",
    "screenCapture": "a screenshot",
}
RELATIONS = {
    "parentOf": "the picture that was edited",
    "componentOf": "a part of this picture",
    "inputTo": "shown to the model",
}
CHANGED = "The picture was changed after it was signed."
PROBLEMS = {  # validation status codes of the C2PA specification
    "assertion.dataHash.mismatch": CHANGED,
    "assertion.boxesHash.mismatch": CHANGED,
    "assertion.bmffHash.mismatch": CHANGED,
    "assertion.dataHash.malformed": "The part that ties the credentials to the picture is damaged.",
    "assertion.hashedURI.mismatch": "A statement in the credentials was changed after they were signed.",
    "assertion.missing": "A statement that the credentials announce is missing.",
    "claim.hardBindings.missing": "Nothing ties the credentials to this picture.",
    "claimSignature.mismatch": "The signature does not fit: the credentials were changed or forged.",
    "claimSignature.missing": "The signature is missing.",
    "signingCredential.expired": "The signer's certificate has expired.",
    "signingCredential.invalid": "The signer's certificate is not one for signing pictures.",
    "signingCredential.ocsp.revoked": "The signer's certificate was revoked.",
}
UNTRUSTED = "signingCredential.untrusted"  # reported for every signer but one's own: not a defect of the picture


@dataclass(frozen=True, kw_only=True)
class Action:
    """One action, in words and by its name in the specification."""

    text: str
    name: str
    agent: str  # program and model, "" if not named
    when: str  # by the signer's clock, "" if not given
    prompt: str  # "" if not published


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A picture that was used to make this one."""

    title: str
    relation: str
    signed: bool  # has its own credentials
    generator: str  # program that made it, from its credentials
    problems: tuple[str, ...]  # with its credentials, at the time of use


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A picture's content credentials. `summary` describes them in a few sentences.

    state: "none" (there are none), "intact", "broken" (the picture or the credentials were changed) or "unreadable".
    `own`: intact and signed by this installation's identity, the only one it trusts. All texts are plain, never HTML.
    """

    state: Literal["none", "intact", "broken", "unreadable"]
    summary: str
    own: bool = False
    signer: str = ""  # from the certificate; unconfirmed unless `own`
    generator: str = ""
    actions: tuple[Action, ...] = ()
    ingredients: tuple[Ingredient, ...] = ()
    assertions: tuple[str, ...] = ()  # labels
    problems: tuple[str, ...] = ()
    report: str = ""  # the library's full JSON, indented

    @property
    def present(self) -> bool:
        return self.state != "none"

    @property
    def intact(self) -> bool:
        return self.state == "intact"


def no_credentials() -> Credentials:
    """The result for a picture without credentials."""
    return Credentials(
        state="none",
        summary="There are no content credentials: the picture was never signed, or a program that saved it again "
        "dropped them.",
    )


def unreadable_credentials(why: str) -> Credentials:
    """The result for unreadable credentials. why: half a sentence, without a full stop."""
    return Credentials(
        state="unreadable",
        summary=f"The content credentials cannot be read: {_text(why, 300)}.",
        problems=(_text(why, 300),),
    )


def parse_report(report: str, serial: str | None) -> Credentials:
    """Parse the JSON text of c2pa's `Reader`. serial: of one's own certificate, the only trusted one."""
    try:
        store = _object(json.loads(report))
    except (ValueError, RecursionError):
        return unreadable_credentials("what they say is not well-formed")
    manifests = _object(store.get("manifests"))
    label = store.get("active_manifest")
    manifest = _object(manifests.get(label)) if isinstance(label, str) else {}
    if not manifest:
        return unreadable_credentials("they name no manifest that is there")
    results = _object(store.get("validation_results"))
    problems = _problems(_object(results.get("activeManifest")))
    for delta in _objects(results.get("ingredientDeltas")):
        problems += tuple(f"In an earlier picture: {it}" for it in _problems(_object(delta.get("validationDeltas"))))
    state = store.get("validation_state")
    intact = state in ("Valid", "Trusted")
    signature = _object(manifest.get("signature_info"))
    own = state == "Trusted" and serial is not None and signature.get("cert_serial_number") == serial
    signer = _text(signature.get("issuer")) or _text(signature.get("common_name")) or "somebody without a name"
    return Credentials(
        state="intact" if intact else "broken",
        summary=_summary(intact, own, signer, problems, _is_unchanged(_object(results.get("activeManifest")))),
        own=own,
        signer=signer,
        generator=_generator(manifest),
        actions=tuple(_truncate_list(_actions(manifest), _more_actions)),
        ingredients=tuple(
            _truncate_list(
                (_ingredient(it, manifests) for it in _sorted_ingredients(manifest.get("ingredients"))),
                _more_ingredients,
            )
        ),
        assertions=tuple(
            _truncate_list((_text(it.get("label")) for it in _objects(manifest.get("assertions"))), _more_text)
        ),
        problems=problems,
        report=json.dumps(store, indent=2),
    )


def _is_unchanged(results: Mapping[str, Any]) -> bool:
    """Whether the signature is valid and only the certificate failed (expired, for example)."""
    failed = [_text(status.get("code")) for status in _objects(results.get("failure"))]
    passed = [_text(status.get("code")) for status in _objects(results.get("success"))]
    return "claimSignature.validated" in passed and all(it.startswith("signingCredential.") for it in failed)


def _summary(intact: bool, own: bool, signer: str, problems: tuple[str, ...], unchanged: bool) -> str:
    if not intact and unchanged:
        return f"Unchanged since it was signed, but the signature does not count: {' '.join(problems[:3])}"
    if not intact:
        return f"Not intact: {' '.join(problems[:3]) or 'the credentials do not follow the specification.'}"
    if own:
        return "Intact: unchanged since this installation signed it."
    return (
        f"Intact: unchanged since it was signed. The certificate names “{signer}”; nobody here confirms that name, for "
        f"this studio trusts no identity but its own."
    )


def _problems(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The failed checks in words, without duplicates; an unknown signer is not a failure."""
    found: dict[str, None] = {}
    for status in _objects(results.get("failure")):
        code = _text(status.get("code"))
        if code != UNTRUSTED:
            found[PROBLEMS.get(code) or f"{_text(status.get('explanation')) or 'A check failed'} ({code})."] = None
    return tuple(_truncate_list(found, _more_text))


def _actions(manifest: Mapping[str, Any]) -> Iterable[Action]:
    for assertion in _objects(manifest.get("assertions")):
        if not _text(assertion.get("label")).startswith("c2pa.actions"):
            continue
        for action in _objects(_object(assertion.get("data")).get("actions")):
            name = _text(action.get("action"))
            source = _text(action.get("digitalSourceType")).rpartition("/")[2]
            parts = [ACTIONS.get(name, name), SOURCES.get(source, source), _text(action.get("description"))]
            agent = action.get("softwareAgent")
            yield Action(
                text=", ".join(part for part in parts if part),
                name=name,
                agent=_agent(agent) if isinstance(agent, dict) else _text(agent),
                when=_text(action.get("when")),
                prompt=_text(_object(action.get("parameters")).get("flux2-studio.prompt"), 10_000),
            )


def _agent(agent: Mapping[str, Any]) -> str:
    """Format an agent, for example: FLUX.2 [klein] 4B in flux2-studio 0.1.0."""
    program = " ".join(filter(None, (_text(agent.get("name")), _text(agent.get("version")))))
    model = _text(agent.get("model"))
    return f"{model} in {program}" if model and program else model or program


def _generator(manifest: Mapping[str, Any]) -> str:
    for agent in _objects(manifest.get("claim_generator_info")):
        return _agent(agent)
    return _text(manifest.get("claim_generator"))


def _sorted_ingredients(ingredients: object) -> list[Mapping[str, Any]]:
    """Sort: the edited picture first, "Image 2" before "Image 10". The library puts those with credentials last."""

    def sort_key(ingredient: Mapping[str, Any]) -> tuple[bool, int, str]:
        title = _text(ingredient.get("title"))
        return ingredient.get("relationship") != "parentOf", len(title), title

    return sorted(_objects(ingredients), key=sort_key)


def _ingredient(ingredient: Mapping[str, Any], manifests: Mapping[str, Any]) -> Ingredient:
    label = ingredient.get("active_manifest")
    relation = _text(ingredient.get("relationship"))
    return Ingredient(
        title=_text(ingredient.get("title")) or "a picture without a title",
        relation=RELATIONS.get(relation, relation),
        signed=isinstance(label, str),
        generator=_generator(_object(manifests.get(label))) if isinstance(label, str) else "",
        problems=_problems(_object(_object(ingredient.get("validation_results")).get("activeManifest"))),
    )


def _more_text(left: int) -> str:
    return f"and {left} more"


def _more_actions(left: int) -> Action:
    return Action(text=_more_text(left), name="", agent="", when="", prompt="")


def _more_ingredients(left: int) -> Ingredient:
    return Ingredient(title=_more_text(left), relation="", signed=False, generator="", problems=())


def _truncate_list(items: Iterable[T], more: Callable[[int], T]) -> list[T]:
    listed = list(items)
    return listed if len(listed) <= MAX_LIST_ITEMS else [*listed[:MAX_LIST_ITEMS], more(len(listed) - MAX_LIST_ITEMS)]


def _text(value: object, longest: int = MAX_TEXT_CHARS) -> str:
    """Return `value` on one line, truncated and without control and direction characters; "" if it is not a string."""
    if not isinstance(value, str):
        return ""
    shown = "".join(it if it.isprintable() else " " for it in value[: longest + 1])
    return f"{shown[: longest - 1]}…" if len(shown) > longest else shown.strip()


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [it for it in value if isinstance(it, dict)] if isinstance(value, list) else []
