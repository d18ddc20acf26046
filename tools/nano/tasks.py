"""What the model is taught, as samples: prompt, reference scenes, target scene. The words and the geometry of it.

A sample carries every wording of its prompt; the trainer takes one of them each time, the evaluation the first.
Kinds, by how many references they take:

    0   single   painted   pair
    1   background   remove   style   grey   paint   replace   mirror   turn   zoom   add
    2   onto   beside   like
    3   row
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tools.nano.scenes import COLOURS, PAINTS, STYLES, Item, Scene, Subject

BACKGROUNDS = tuple(COLOURS)
HALF = 0.47  # side of one of two things beside each other
THIRD = 0.31
PLACES = {"left": 0.26, "right": 0.74}

STYLE_WORDS: dict[str, tuple[str, ...]] = {  # between the article and the noun
    "3d": ("", "3D", "3d"),
    "flat": ("flat",),
    "line": ("line art",),
}
STYLE_PHRASES: dict[str, tuple[str, ...]] = {  # before the article
    "3d": ("", "a 3D render of", "a 3D icon of"),
    "flat": ("a flat icon of", "a flat drawing of"),
    "line": ("a line drawing of", "line art of"),
}
STYLE_ORDERS: dict[str, tuple[str, ...]] = {
    "3d": ("make it 3D", "turn it into a 3D render", "make it a 3D render"),
    "flat": ("make it flat", "turn it into a flat icon", "make it a flat icon"),
    "line": ("turn it into a line drawing", "make it line art", "make it a line drawing"),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    kind: str
    prompts: tuple[str, ...]
    references: tuple[Scene, ...]
    target: Scene


def alone(subject: Subject, style: str, background: str) -> Scene:
    """One thing in the middle: the one geometry in which the model is taught to draw from words alone."""
    return Scene(background=background, items=(Item(subject=subject.id, style=style),))


def two(left: Subject, right: Subject, style: str, background: str) -> Scene:
    return Scene(
        background=background,
        items=(
            Item(subject=left.id, style=style, x=PLACES["left"], size=HALF),
            Item(subject=right.id, style=style, x=PLACES["right"], size=HALF),
        ),
    )


def wordings(subject: Subject, style: str, background: str) -> tuple[str, ...]:
    """Prompts for one thing; no background said means white, no style said means 3D."""
    things = [subject.phrase(word, words) for word in subject.words for words in STYLE_WORDS[style]]
    things += [f"{words} {subject.phrase(word)}" for word in subject.words for words in STYLE_PHRASES[style] if words]
    return with_background(things, background)


def with_background(things: Sequence[str], background: str) -> tuple[str, ...]:
    said = [f"{thing} on a {background} background" for thing in things]
    said += [f"{thing}, {background} background" for thing in things]
    return tuple([*things, *said] if background == "white" else said)


class Tasks:
    """Draws samples of every kind. `known` subjects can be asked for by name; edits that copy take any."""

    def __init__(self, subjects: Sequence[Subject], chance: random.Random) -> None:
        self.subjects = subjects
        self.known = [subject for subject in subjects if subject.known]
        self.chance = chance
        self._of = {subject.id: subject for subject in subjects}
        self.makers: Mapping[str, Callable[[], Sample]] = {
            "single": self.single,
            "painted": self.painted,
            "pair": self.pair,
            "background": self.background,
            "remove": self.remove,
            "style": self.style,
            "grey": self.grey,
            "paint": self.paint,
            "replace": self.replace,
            "mirror": self.mirror,
            "turn": self.turn,
            "zoom": self.zoom,
            "add": self.add,
            "onto": self.onto,
            "beside": self.beside,
            "like": self.like,
            "row": self.row,
        }

    def draw(self, kind: str) -> Sample:
        return self.makers[kind]()

    # --- from words alone ---

    def single(self) -> Sample:
        subject, style, background = self._subject(), self._style(), self._background()
        return Sample(
            kind="single",
            prompts=wordings(subject, style, background),
            references=(),
            target=alone(subject, style, background),
        )

    def painted(self) -> Sample:
        subject, style, background = self._subject(), self.chance.choice(("3d", "flat")), self._background()
        paint = self.chance.choice([paint for paint in PAINTS if paint != background])
        scene = alone(subject, style, background)
        words = [subject.phrase(subject.name, f"{style_word} {paint}".strip()) for style_word in STYLE_WORDS[style]] + [
            f"{phrase} {subject.phrase(subject.name, paint)}" for phrase in STYLE_PHRASES[style] if phrase
        ]
        return Sample(
            kind="painted",
            prompts=with_background(words, background),
            references=(),
            target=replace(scene, items=(replace(scene.items[0], paint=paint),)),
        )

    def pair(self) -> Sample:
        (left, right), style, background = self._subjects(2), self._style(), self._background()
        a, b = (subject.phrase(self.chance.choice(subject.words)) for subject in (left, right))
        lead = ("", "a 3D render of ") if style == "3d" else tuple(f"{phrase} " for phrase in STYLE_PHRASES[style])
        things = [
            f"{start}{said}" for start in lead for said in (f"{a} and {b}", f"{a} on the left and {b} on the right")
        ]
        things += [f"{start}{a} to the left of {b}" for start in lead]
        things += [f"{start}{b} to the right of {a}" for start in lead]
        return Sample(
            kind="pair",
            prompts=with_background(things, background),
            references=(),
            target=two(left, right, style, background),
        )

    # --- one reference ---

    def background(self) -> Sample:
        scene = self._scene()
        new = self.chance.choice([name for name in BACKGROUNDS if name != scene.background])
        return Sample(
            kind="background",
            prompts=(
                f"make the background {new}",
                f"change the background to {new}",
                f"put it on a {new} background",
                f"{new} background",
            ),
            references=(scene,),
            target=replace(scene, background=new),
        )

    def remove(self) -> Sample:
        scene = self._scene(not_on=("white",))
        return Sample(
            kind="remove",
            prompts=("remove the background", "delete the background", "erase the background"),
            references=(scene,),
            target=replace(scene, background="white"),
        )

    def style(self) -> Sample:
        subject, style, background = self._subject(), self._style(), self._background()
        other = self.chance.choice([name for name in STYLES if name != style])
        return Sample(
            kind="style",
            prompts=STYLE_ORDERS[other],
            references=(alone(subject, style, background),),
            target=alone(subject, other, background),
        )

    def grey(self) -> Sample:
        scene = self._scene()
        return Sample(
            kind="grey",
            prompts=("make it black and white", "remove the colors", "make it grayscale"),
            references=(scene,),
            target=replace(scene, grey=True),
        )

    def paint(self) -> Sample:
        scene = self._scene(styles=("3d", "flat"))
        paint = self.chance.choice([paint for paint in PAINTS if paint != scene.background])
        subject = self._of[scene.items[0].subject]
        said = [f"paint it {paint}", f"make it {paint}", f"color it {paint}"]
        if subject.known:
            said += [f"make the {word} {paint}" for word in subject.words]
        return Sample(
            kind="paint",
            prompts=tuple(said),
            references=(scene,),
            target=replace(scene, items=(replace(scene.items[0], paint=paint),)),
        )

    def replace(self) -> Sample:
        (old, new), style, background = self._subjects(2), self._style(), self._background()
        return Sample(
            kind="replace",
            prompts=(
                f"replace the {old.name} with {new.phrase()}",
                f"change it into {new.phrase()}",
                f"turn the {old.name} into {new.phrase()}",
                f"replace it with {new.phrase()}",
            ),
            references=(alone(old, style, background),),
            target=alone(new, style, background),
        )

    def mirror(self) -> Sample:
        scene = self._scene()
        return Sample(
            kind="mirror",
            prompts=("mirror it", "flip it horizontally", "mirror the picture"),
            references=(scene,),
            target=self._changed(scene, mirrored=True, x=1 - scene.items[0].x),
        )

    def turn(self) -> Sample:
        scene, turns = self._scene(), self.chance.choice((1, 2, 3))
        words = {
            1: ("turn it to the left", "rotate it to the left"),
            2: ("turn it upside down", "rotate it by 180 degrees"),
            3: ("turn it to the right", "rotate it to the right"),
        }
        return Sample(kind="turn", prompts=words[turns], references=(scene,), target=self._changed(scene, turns=turns))

    def zoom(self) -> Sample:
        scene, larger = self._scene(), self.chance.random() < 0.5
        words = ("zoom in", "make it larger", "make it bigger") if larger else ("zoom out", "make it smaller")
        return Sample(
            kind="zoom",
            prompts=words,
            references=(scene,),
            target=self._changed(scene, size=scene.items[0].size * (1.25 if larger else 0.6)),
        )

    def add(self) -> Sample:
        (old, new), style, background = self._subjects(2), self._style(), self._background()
        side = self.chance.choice(("left", "right"))
        left, right = (new, old) if side == "left" else (old, new)
        said = new.phrase()
        return Sample(
            kind="add",
            prompts=(f"add {said} on the {side}", f"put {said} to the {side} of it", f"add {said} to the {side}"),
            references=(alone(old, style, background),),
            target=two(left, right, style, background),
        )

    # --- several references ---

    def onto(self) -> Sample:
        first = self._scene()
        second = self._scene(not_on=(first.background,))
        thing = self._thing(first)
        return Sample(
            kind="onto",
            prompts=(
                "the object of image 1 on the background of image 2",
                "put image 1 on the background of image 2",
                f"the {thing} of image 1 on the background of image 2",
                "image 1 on the background of image 2",
            ),
            references=(first, second),
            target=replace(first, background=second.background),
        )

    def beside(self) -> Sample:
        (left, right), style, background = self._subjects(2), self._style(), self._background()
        swapped = self.chance.random() < 0.3
        scenes = (alone(left, style, background), alone(right, style, background))
        if swapped:
            said: tuple[str, ...] = (
                "image 2 on the left and image 1 on the right",
                f"the {right.name} of image 1 to the right of the {left.name} of image 2",
            )
        else:
            said = (
                "image 1 on the left and image 2 on the right",
                "image 1 and image 2 side by side",
                f"the {left.name} of image 1 to the left of the {right.name} of image 2",
                f"the {left.name} of image 1 and the {right.name} of image 2",
                "image 1 to the left of image 2",
            )
        return Sample(
            kind="beside",
            prompts=said,
            references=scenes[::-1] if swapped else scenes,
            target=two(left, right, style, background),
        )

    def like(self) -> Sample:
        (subject, other), background = self._subjects(2), self._background()
        style, new = self.chance.sample(STYLES, 2)
        return Sample(
            kind="like",
            prompts=(
                "image 1 in the style of image 2",
                "draw image 1 in the style of image 2",
                f"the {subject.name} of image 1 in the style of image 2",
            ),
            references=(alone(subject, style, background), alone(other, new, self._background())),
            target=alone(subject, new, background),
        )

    def row(self) -> Sample:
        subjects, style, background = self._subjects(3), self._style(), self._background()
        items = tuple(
            Item(subject=subject.id, style=style, x=x, size=THIRD)
            for subject, x in zip(subjects, (0.18, 0.5, 0.82), strict=True)
        )
        return Sample(
            kind="row",
            prompts=("image 1, image 2 and image 3 side by side", "image 1, image 2 and image 3 in a row"),
            references=tuple(alone(subject, style, background) for subject in subjects),
            target=Scene(background=background, items=items),
        )

    # --- what they are made of ---

    def _subject(self) -> Subject:
        return self.chance.choice(self.known)

    def _subjects(self, count: int) -> list[Subject]:
        return self.chance.sample(self.known, count)

    def _style(self) -> str:
        return self.chance.choice(STYLES)

    def _background(self) -> str:
        return self.chance.choice(BACKGROUNDS)

    def _thing(self, scene: Scene) -> str:
        subject = self._of[scene.items[0].subject]
        return subject.name if subject.known else "object"

    def _scene(self, *, styles: Sequence[str] = STYLES, not_on: Sequence[str] = ()) -> Scene:
        """A reference for an edit that copies: any drawing, not always in the middle: copying is what is learnt."""
        style = self.chance.choice(styles)
        background = self.chance.choice([name for name in BACKGROUNDS if name not in not_on])
        if self.chance.random() < 0.4:
            return alone(self._subject(), style, background)
        size = self.chance.uniform(0.6, 0.92)
        x, y = (0.5 + self.chance.uniform(-1, 1) * (0.98 - size) / 2 for _ in range(2))
        subject = self.chance.choice(self.subjects)
        return Scene(
            background=background,
            items=(Item(subject=subject.id, style=style, x=round(x, 3), y=round(y, 3), size=round(size, 3)),),
        )

    def _changed(self, scene: Scene, **changes: object) -> Scene:
        return replace(scene, items=(replace(scene.items[0], **changes),))  # type: ignore[arg-type]
