"""Every error that a user may read. Each message says what is wrong and what to do next.

    StudioError
    ├── RequestError                the request cannot be carried out as it was made
    │   ├── ReferenceImageError     a reference picture cannot be used
    │   ├── PresetError             a preset cannot be read, kept or applied
    │   └── SafetyError             the safety check does not let a prompt, a reference or a finished picture through
    ├── WeightsError                a checkpoint's file is missing, damaged, or another model's
    │   └── DownloadError           the hub did not give a file
    ├── DeviceError                 the chosen device or precision is not to be had here
    │   └── OutOfMemory             the device's memory does not suffice for this request
    ├── RemoteTextError             the text encoder on another machine gave no context
    ├── ClassifierError             pictures cannot be checked here
    ├── UpsampleError               the language model gave no prompt that can be used
    ├── CredentialsError            a finished picture could not be signed
    └── SaveError                   a finished picture could not be written

Anything else that escapes is a defect of ours, not the user's doing.
"""


class StudioError(Exception):
    """Base of the errors whose text is written for the user and may be shown as it stands."""


class RequestError(StudioError):
    """The request cannot be carried out as it was made."""


class ReferenceImageError(RequestError):
    """A reference picture cannot be used."""


class PresetError(RequestError):
    """A preset cannot be read, kept or applied."""


class SafetyError(RequestError):
    """The safety check does not let a prompt, a reference or a finished picture through."""


class WeightsError(StudioError):
    """A checkpoint's file is missing, damaged, or belongs to another model."""


class DownloadError(WeightsError):
    """The hub did not give a file."""


class DeviceError(StudioError):
    """The chosen device or precision is not to be had on this machine."""


class OutOfMemory(DeviceError):
    """The device's memory does not suffice for this request."""


class RemoteTextError(StudioError):
    """The text encoder on another machine gave no context."""


class ClassifierError(StudioError):
    """The classifier that the safety check of pictures needs is missing or fails."""


class UpsampleError(StudioError):
    """The language model that was to enrich a prompt gave none that can be used."""


class CredentialsError(StudioError):
    """A finished picture could not be signed."""


class SaveError(StudioError):
    """A finished picture could not be written."""
