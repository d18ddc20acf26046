"""Where the weights of the larger picture classifier are, if they are on this machine. They are never downloaded: it is
the user who chooses it, by putting it there (`hf download Falconsai/nsfw_image_detection`)."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from flux2_studio.errors import ClassifierError
from flux2_studio.models.hub.cache import HubCache

CLASSIFIER_REPO = "Falconsai/nsfw_image_detection"
CLASSIFIER_FILES = ("config.json", "model.safetensors")


def find_classifier(local_folder: Path | None, cache: Path | None = None) -> Path | None:
    """The folder of Falconsai's classifier: the user's `local_folder` copy, or that of the hub's cache; None if there
    is none.

    cache: another cache folder than huggingface_hub's own choice. Raises `ClassifierError` for an own copy that is not
    there: what was asked for must not be replaced in silence.
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
