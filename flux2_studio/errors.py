"""Every error that a user may read. Each message says what is wrong and what to do next.

    StudioError
    ├── RequestError                the request is invalid
    │   ├── ReferenceImageError     a reference picture cannot be used
    │   ├── PresetError             a preset cannot be read, saved or applied
    │   └── SafetyError             the safety check rejects a prompt, a reference or a finished picture
    ├── WeightsError                a checkpoint file is missing, damaged, or belongs to another model
    │   └── DownloadError           a file could not be downloaded from the hub
    ├── DeviceError                 the chosen device or precision is not available on this machine
    │   └── OutOfMemory             the device has too little memory for this request
    ├── RemoteTextError             the remote text encoder returned no usable context
    ├── ClassifierError             the classifier of the safety check is missing or fails
    ├── UpsampleError               the language model returned no usable prompt
    ├── CredentialsError            a finished picture could not be signed
    └── SaveError                   a finished picture could not be written

Any other exception that escapes is a bug in the studio.
"""


class StudioError(Exception):
    """Base of all errors whose message is written for the user and may be shown unchanged."""


class RequestError(StudioError):
    """The request is invalid."""


class ReferenceImageError(RequestError):
    """A reference picture cannot be used."""


class PresetError(RequestError):
    """A preset cannot be read, saved or applied."""


class SafetyError(RequestError):
    """The safety check rejects a prompt, a reference or a finished picture."""


class WeightsError(StudioError):
    """A checkpoint file is missing, damaged, or belongs to another model."""


class DownloadError(WeightsError):
    """A file could not be downloaded from the hub."""


class DeviceError(StudioError):
    """The chosen device or precision is not available on this machine."""


class OutOfMemory(DeviceError):
    """The device has too little memory for this request."""


class RemoteTextError(StudioError):
    """The remote text encoder returned no usable context."""


class ClassifierError(StudioError):
    """The classifier that checks pictures for safety is missing or fails."""


class UpsampleError(StudioError):
    """Prompt enhancement failed: the language model returned no usable prompt."""


class CredentialsError(StudioError):
    """A finished picture could not be signed."""


class SaveError(StudioError):
    """A finished picture could not be written."""
