"""The stage that makes a drawn picture the requested one: padding cropped, colours matched, kept pixels put back."""

from __future__ import annotations

from PIL import Image

from flux2_studio.images.masks import EditRegion, composite_within, match_colours
from flux2_studio.request import Request


def crop_padding(image: Image.Image, request: Request) -> Image.Image:
    """What of a drawn picture, of any scale, is the picture that was asked for: without what it was padded by."""
    assert request.width and request.height
    across, down = request.padded_size
    if (across, down) == (request.width, request.height):
        return image
    width, height = round(image.width * request.width / across), round(image.height * request.height / down)
    return image.crop((0, 0, max(1, width), max(1, height)))


def composite_region(
    image: Image.Image, request: Request, region: EditRegion | None, first_reference: Image.Image | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """Match the colours of a drawn picture if `request` asks for it, and restore every pixel outside `region`.

    image: of the size that `request` asks for. first_reference: the target of the colours if there is no region.
    Returns the picture and notes for the user.
    """
    notes: tuple[str, ...] = ()
    if request.match_colours and first_reference is not None:
        like, change = (region.original, region.edit_mask) if region else (first_reference, None)
        matched = match_colours(image, like, change)
        if matched is None:
            notes = (
                "The colours were not matched: the mask leaves too little outside to match them with. Make it smaller.",
            )
        image = matched or image
    return (composite_within(image, region) if region else image), notes
