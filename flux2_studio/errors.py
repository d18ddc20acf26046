"""Every error that a user may read. Each message says what is wrong and what to do next.

    StudioError
    ├── RequestError                the request cannot be carried out as it was made
    │   └── ReferenceImageError     a reference picture cannot be used
    ├── WeightsError                a checkpoint's file is missing, damaged, or another model's
    │   └── DownloadError           the hub did not give a file
    ├── DeviceError                 the chosen device or precision is not to be had here
    │   └── OutOfMemory             the device's memory does not suffice for this request
    ├── RemoteTextError             the text encoder on another machine gave no context
    └── SaveError                   a finished picture could not be written

Anything else that escapes is a defect of ours, not the user's doing.
"""


class StudioError(Exception):
    """Base of the errors whose text is written for the user and may be shown as it stands."""


class RequestError(StudioError):
    """The request cannot be carried out as it was made."""


class ReferenceImageError(RequestError):
    """A reference picture cannot be used."""


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


class SaveError(StudioError):
    """A finished picture could not be written."""
