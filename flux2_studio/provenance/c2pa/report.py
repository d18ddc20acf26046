"""What a picture's content credentials say, in plain words: from the signing library's JSON to what a page shows.

Everything in here was written by whoever signed the picture, and may be anything: titles with HTML, names with control
characters, a million actions. Strings are cut, stripped of what does not print, and meant to be shown as text, never
as HTML; lists are cut too, and say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

MAX_TEXT_CHARS = 200  # characters of a text that is shown
MAX_LIST_ITEMS = 50  # of a list that is shown

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
UNTRUSTED = "signingCredential.untrusted"  # said of every signer but one's own: no defect of the picture


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing that was done: in words, and as the specification calls it."""

    text: str
    name: str
    agent: str  # the program and model that did it, "" where none is named
    when: str  # as the signer's clock had it, "" where not said
    prompt: str  # "" where it was not published


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """One picture that went into this one."""

    title: str
    relation: str
    signed: bool  # it has credentials of its own
    generator: str  # the program that made it, as its credentials say
    problems: tuple[str, ...]  # of its credentials, as they were when it was used


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What is known of a picture's content credentials. `summary` says all in a few sentences.

    state: none (there are none), intact, broken (the picture or they were changed), unreadable. `own`: intact, and
    signed by this installation's identity, which is the only one that it trusts. Texts are plain, never HTML.
    """

    state: Literal["none", "intact", "broken", "unreadable"]
    summary: str
    own: bool = False
    signer: str = ""  # as the certificate says, confirmed by nobody unless `own`
    generator: str = ""
    actions: tuple[Action, ...] = ()
    ingredients: tuple[Ingredient, ...] = ()
    assertions: tuple[str, ...] = ()  # their labels
    problems: tuple[str, ...] = ()
    report: str = ""  # the library's own JSON, indented, for those who want to know it all

    @property
    def present(self) -> bool:
        return self.state != "none"

    @property
    def intact(self) -> bool:
        return self.state == "intact"


def no_credentials() -> Credentials:
    """Of a picture that has none."""
    return Credentials(
        state="none",
        summary="There are no content credentials: the picture was never signed, or a program that saved it again "
        "dropped them.",
    )


def unreadable_credentials(why: str) -> Credentials:
    """Of a picture that cannot be judged. why: half a sentence, without a full stop."""
    return Credentials(
        state="unreadable",
        summary=f"The content credentials cannot be read: {_text(why, 300)}.",
        problems=(_text(why, 300),),
    )


def parse_report(report: str, serial: str | None) -> Credentials:
    """The credentials in the JSON text of c2pa's `Reader`. serial: of one's own certificate, which is trusted."""
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
                (_ingredient(it, manifests) for it in _in_order(manifest.get("ingredients"))), _more_ingredients
            )
        ),
        assertions=tuple(
            _truncate_list((_text(it.get("label")) for it in _objects(manifest.get("assertions"))), _more)
        ),
        problems=problems,
        report=json.dumps(store, indent=2),
    )


def _is_unchanged(results: Mapping[str, Any]) -> bool:
    """Whether nothing is wrong but the certificate: it has expired, perhaps."""
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
    """What failed, in words, each once; that a signer is unknown is no failure."""
    found: dict[str, None] = {}
    for status in _objects(results.get("failure")):
        code = _text(status.get("code"))
        if code != UNTRUSTED:
            found[PROBLEMS.get(code) or f"{_text(status.get('explanation')) or 'A check failed'} ({code})."] = None
    return tuple(_truncate_list(found, _more))


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
    """ "FLUX.2 [klein] 4B in flux2-studio 0.1.0"."""
    program = " ".join(filter(None, (_text(agent.get("name")), _text(agent.get("version")))))
    model = _text(agent.get("model"))
    return f"{model} in {program}" if model and program else model or program


def _generator(manifest: Mapping[str, Any]) -> str:
    for agent in _objects(manifest.get("claim_generator_info")):
        return _agent(agent)
    return _text(manifest.get("claim_generator"))


def _in_order(ingredients: object) -> list[Mapping[str, Any]]:
    """The edited picture first, "Image 2" before "Image 10": the library puts those with credentials last."""

    def place(ingredient: Mapping[str, Any]) -> tuple[bool, int, str]:
        title = _text(ingredient.get("title"))
        return ingredient.get("relationship") != "parentOf", len(title), title

    return sorted(_objects(ingredients), key=place)


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


def _more(left: int) -> str:
    return f"and {left} more"


def _more_actions(left: int) -> Action:
    return Action(text=_more(left), name="", agent="", when="", prompt="")


def _more_ingredients(left: int) -> Ingredient:
    return Ingredient(title=_more(left), relation="", signed=False, generator="", problems=())


def _truncate_list(items: Iterable[T], more: Callable[[int], T]) -> list[T]:
    found = list(items)
    return found if len(found) <= MAX_LIST_ITEMS else [*found[:MAX_LIST_ITEMS], more(len(found) - MAX_LIST_ITEMS)]


def _text(value: object, longest: int = MAX_TEXT_CHARS) -> str:
    """`value` if it is a text: on one line, without control and direction characters, cut; else ""."""
    if not isinstance(value, str):
        return ""
    shown = "".join(it if it.isprintable() else " " for it in value[: longest + 1])
    return f"{shown[: longest - 1]}…" if len(shown) > longest else shown.strip()


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [it for it in value if isinstance(it, dict)] if isinstance(value, list) else []
