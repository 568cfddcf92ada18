"""Every error this project raises on purpose.

    NetworkError
      ConfigError             the user must change a file or a flag
      ProtocolError           the peer broke a specification
        CniError              carries the CNI number; the only error that crosses a plugin's stdout
      StoreError              the subnet manager cannot answer
        StoreUnavailable      it cannot be reached now; the last known leases stay in force
        LeaseLost             our lease is gone or belongs to somebody else
        OutOfSubnets          no free subnet is left in the network
      KernelError             a namespace or socket is unusable, or a batch was refused
      InternalError           our bug; the only one logged with a traceback

A single operation that the kernel refuses is not an error but data (`cni.net.plan.Refused`). A call that is
`Declined` is none either: it is served elsewhere.
"""


class NetworkError(Exception):
    """Root of all errors raised on purpose; the text is one line, fit for the user."""


class ConfigError(NetworkError):
    """A file, flag or variable holds what it must not; the text names it, the value and what is right."""


class ProtocolError(NetworkError):
    """The peer broke a specification."""


class CniError(ProtocolError):
    """An error object of the CNI specification ("Error"): number, message, details."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg if not details else f"{msg}; {details}")
        self.code = code
        self.msg = msg
        self.details = details


class StoreError(NetworkError):
    """The subnet manager cannot answer."""


class StoreUnavailable(StoreError):
    """The store cannot be reached now; try again later."""


class LeaseLost(StoreError):
    """The lease is gone from the store, or somebody else holds it."""


class OutOfSubnets(StoreError):
    """No free subnet is left between SubnetMin and SubnetMax."""


class KernelError(NetworkError):
    """A namespace or a socket is unusable, or the kernel refused what cannot be left out."""


class InternalError(NetworkError):
    """Our bug."""


class Declined(Exception):
    """The daemon cannot serve this call of a plugin, and has done nothing: the plugin's own process has to.

    Not a NetworkError, as what handles those would report a failure where there is none.
    """


# Numbers of the CNI specification, "Error", and of its reference library (INVALID_NETNS, INTERNAL).
INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
INVALID_NETNS = 8
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
LIMITED_CONNECTIVITY = 51
INTERNAL = 999
