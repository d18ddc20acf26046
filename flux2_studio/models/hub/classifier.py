"""Finds the weights of the larger picture classifier on this machine.

They are never downloaded automatically. The user enables the classifier with
`hf download Falconsai/nsfw_image_detection`, or with a folder of their own.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from flux2_studio.errors import ClassifierError
from flux2_studio.models.hub.cache import HubCache

CLASSIFIER_REPO = "Falconsai/nsfw_image_detection"
CLASSIFIER_FILES = ("config.json", "model.safetensors")


def find_classifier(local_folder: Path | None, cache: Path | None = None) -> Path | None:
    """Returns the folder of Falconsai's classifier: `local_folder` if given, otherwise in the hub cache; None if it is
    not there.

    cache: the cache folder, by default huggingface_hub's. Raises `ClassifierError` if `local_folder` is incomplete,
    because silently using another copy would ignore the user's choice.
    """
    if local_folder is not None:
        if not all((local_folder / name).is_file() for name in CLASSIFIER_FILES):
            raise ClassifierError(
                f"FLUX2_NSFW_MODEL_PATH points to {local_folder}, where there is no "
                f"{' with '.join(CLASSIFIER_FILES)}: set it to the "
                f"folder of {CLASSIFIER_REPO}, or unset it."
            )
        return local_folder
    folder = HubCache(cache or Path(constants.HF_HUB_CACHE)).snapshot(CLASSIFIER_REPO)
    return folder if folder and all((folder / name).is_file() for name in CLASSIFIER_FILES) else None
