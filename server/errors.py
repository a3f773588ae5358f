"""Every error that the runtime raises, with its HTTP status and its code (also the metric label).

::

    SlipstreamError                     500 internal
    ├── RequestError                    400 invalid_request
    │   ├── MalformedRequest            400 malformed_request      bytes that are no protocol message
    │   ├── SignatureMismatch           400 signature_mismatch     dtype, shape, missing or unknown tensor
    │   ├── UnknownVariant              400 unknown_variant        a pinned variant that the model does not have
    │   ├── RequestTimeout              408 request_timeout        the client took too long to send its request
    │   ├── BodyTooLarge                413 body_too_large
    │   ├── HeadersTooLarge             431 headers_too_large
    │   ├── UnsupportedEncoding         415 unsupported_encoding   Content-Encoding that is not served
    │   ├── ControlForbidden            403 control_forbidden      model control is off, or not for this client
    │   ├── NothingToRollBack           409 nothing_to_roll_back   no version of the model to go back to
    │   └── NotFound                    404 not_found              no such route
    │       └── UnknownModel            404 unknown_model          no such model or version
    ├── Refused                         429 refused                admission said no; carries retry_after_s
    │   ├── QueueFull                   429 queue_full
    │   └── DeadlineUnmeetable          429 deadline_unmeetable
    ├── Unavailable                     503 unavailable
    │   ├── ModelNotReady               503 model_not_ready
    │   ├── LaneDown                    503 lane_down              every lane that could run it fails
    │   └── Draining                    503 draining
    ├── DeadlineExpired                 504 deadline_expired       expired while waiting in the queue
    ├── InferenceFailed                 500 inference_failed       the session raised; details are in the log only
    │   ├── OutOfMemory                 500 out_of_memory          no memory left for the batch; smaller ones may fit
    │   └── DeviceLost                  500 device_lost            the device fails whatever it is asked
    ├── LoadFailed                      500 load_failed            a version cannot be served; what served before stays
    └── StartupError                    500 startup                the process cannot serve as asked; CLI exit code 1
        ├── ArtifactError               500 invalid_artifact       manifest, digest or file is wrong
        ├── UnsupportedModel            500 unsupported_model      a tensor type or structure that cannot be served
        ├── ProviderUnavailable         500 provider_unavailable   the execution provider is not really active
        └── EnvironmentConflict         500 environment_conflict   e.g. two onnxruntime distributions

The HTTP layer maps ``status`` and ``code`` and nothing else decides a status. A message names the value seen, the value
allowed, and the fix.
"""

from typing import ClassVar


class SlipstreamError(Exception):
    """Root of the tree."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"


class RequestError(SlipstreamError):
    """The client sent something that can never succeed."""

    status = 400
    code = "invalid_request"


class MalformedRequest(RequestError):
    """The bytes are not a message of the Open Inference Protocol."""

    code = "malformed_request"


class SignatureMismatch(RequestError):
    """The message does not fit the model's signature."""

    code = "signature_mismatch"


class UnknownVariant(RequestError):
    """The request pins a variant that the model does not have."""

    code = "unknown_variant"


class RequestTimeout(RequestError):
    """The client took too long to send its request; the connection is closed."""

    status = 408
    code = "request_timeout"


class HeadersTooLarge(RequestError):
    """The request line and the headers exceed their limit; the connection is closed."""

    status = 431
    code = "headers_too_large"


class BodyTooLarge(RequestError):
    """The body exceeds the limit; it was refused before it was read in full."""

    status = 413
    code = "body_too_large"


class UnsupportedEncoding(RequestError):
    """The request's Content-Encoding cannot be decoded."""

    status = 415
    code = "unsupported_encoding"


class ControlForbidden(RequestError):
    """This client may not load, unload or roll back models."""

    status = 403
    code = "control_forbidden"


class NothingToRollBack(RequestError):
    """The model has no version to go back to."""

    status = 409
    code = "nothing_to_roll_back"


class NotFound(RequestError):
    """There is no such route."""

    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """There is no such model or version."""

    code = "unknown_model"


class Refused(SlipstreamError):
    """Admission refused the request.

    Args:
        message: What was full or late, with numbers.
        retry_after_s: Seconds after which a retry may succeed, from the predicted backlog; at least 0.
    """

    status = 429
    code = "refused"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """The model's queue holds as many rows as it may."""

    code = "queue_full"


class DeadlineUnmeetable(Refused):
    """The predicted completion lies behind the request's deadline."""

    code = "deadline_unmeetable"


class Unavailable(SlipstreamError):
    """The server or the model cannot take requests now.

    Args:
        message: Why.
        retry_after_s: Seconds after which a retry may succeed; at least 0.
    """

    status = 503
    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelNotReady(Unavailable):
    """The model is loading or failed to load."""

    code = "model_not_ready"


class LaneDown(Unavailable):
    """Every lane that could run the request fails; ``retry_after_s`` is when the next one is tried."""

    code = "lane_down"


class Draining(Unavailable):
    """The server is shutting down."""

    code = "draining"


class DeadlineExpired(SlipstreamError):
    """The deadline passed while the request waited in the queue."""

    status = 504
    code = "deadline_expired"


class InferenceFailed(SlipstreamError):
    """The session raised while running a batch."""

    code = "inference_failed"


class OutOfMemory(InferenceFailed):
    """A device has no memory left for a batch; a smaller one may fit."""

    code = "out_of_memory"


class DeviceLost(InferenceFailed):
    """A device fails whatever it is asked, until it or the process is started again."""

    code = "device_lost"


class LoadFailed(SlipstreamError):
    """A version that was asked for cannot be served; what served before still does."""

    code = "load_failed"


class StartupError(SlipstreamError):
    """The process cannot do what it was started for."""

    code = "startup"


class ArtifactError(StartupError):
    """An artifact is incomplete, damaged, or of an unknown format."""

    code = "invalid_artifact"


class UnsupportedModel(StartupError):
    """The model has a tensor type or a structure that cannot be served."""

    code = "unsupported_model"


class ProviderUnavailable(StartupError):
    """The execution provider that was asked for is not really active."""

    code = "provider_unavailable"


class EnvironmentConflict(StartupError):
    """Installed packages contradict each other."""

    code = "environment_conflict"
