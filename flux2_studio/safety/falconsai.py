"""Falconsai/nsfw_image_detection: a vision transformer (ViT-B/16, 343 MB) with two classes, normal and nsfw.

Black Forest Labs' own tools use it; here it replaces NudeNet if its weights are available. It classifies the picture as
a whole, so it cannot say what it objects to, and it can tell neither art from pornography nor a person's age. It takes
about 0.35 s per picture on two cores, ten times as long as NudeNet.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flux2_studio.errors import ClassifierError
from flux2_studio.safety.policy import Verdict

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

NSFW_THRESHOLD = 0.85  # probability of nsfw, as in Black Forest Labs' tools


class Falconsai:
    """The classifier in `folder` (config.json and model.safetensors), loaded onto the CPU at first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> None:
        """Load the model. Raises `ClassifierError` if it cannot be used here."""
        _ = self._model

    def __call__(self, image: Image.Image) -> Verdict:
        """Classify an RGB picture. Raises `ClassifierError`."""
        score = self.probability(image)
        if score < NSFW_THRESHOLD:
            return Verdict(allowed=True, scores={"nsfw": score})
        return Verdict(allowed=False, reasons=("seems not to be safe for work",), scores={"nsfw": score})

    def probability(self, image: Image.Image) -> float:
        """Probability that an RGB picture is not safe for work."""
        import torch

        model, nsfw = self._model
        side = int(model.config.image_size)  # other ViT models may have a pair here
        # As in its preprocessor_config.json: bilinear without keeping the aspect ratio, then to -1..1.
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
        with torch.inference_mode():
            logits = model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).logits[0].float()
        return float(logits.softmax(0)[nsfw])

    @cached_property
    def _model(self) -> tuple[ViTForImageClassification, int]:
        """The model and the index of its class nsfw."""
        from transformers import ViTForImageClassification

        loaded: Any  # output_loading_info returns a pair, unlike its type hints
        try:
            loaded = ViTForImageClassification.from_pretrained(
                self._folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype="float32"
            )
        except Exception as error:  # for a damaged file, transformers raises nearly everything
            raise ClassifierError(
                f"The picture classifier in {self._folder} cannot be read: it needs the config.json and the "
                f"model.safetensors of Falconsai/nsfw_image_detection."
            ) from error
        model, report = loaded
        mismatches = {kind.removesuffix("_keys"): sorted(map(str, keys)) for kind, keys in report.items() if keys}
        if mismatches:
            listed = "; ".join(f"{kind}: {', '.join(keys[:5])}" for kind, keys in mismatches.items())
            raise ClassifierError(
                f"model.safetensors in {self._folder} is not that of a picture classifier ({listed}): use the one of "
                f"Falconsai/nsfw_image_detection."
            )
        classes = {label: int(index) for index, label in model.config.id2label.items()}
        if classes.keys() != {"normal", "nsfw"}:
            raise ClassifierError(
                f"config.json in {self._folder} does not name the classes normal and nsfw: use the one of "
                f"Falconsai/nsfw_image_detection."
            )
        return model.eval(), classes["nsfw"]
