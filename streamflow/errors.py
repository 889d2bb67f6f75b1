"""The errors a user can cause or meet. Anything else that is raised is a defect of ours.

The command line prints the message and exits 1; the API maps each class to problem details.
"""


class StreamFlowError(Exception):
    """A refusal or failure whose message says what is wrong, where, and what to do."""


class ConfigurationError(StreamFlowError):
    """A setting, policy or port cannot be used as given."""


class UnknownMonth(StreamFlowError):
    """A month that has not landed, or whose data lacks what was asked for."""


class WarehouseUnavailable(StreamFlowError):
    """PostgreSQL does not answer."""


class OnlineStoreUnavailable(WarehouseUnavailable):
    """Redis does not answer, where the online features are there."""


class RegistryUnavailable(StreamFlowError):
    """MLflow does not answer."""


class UnknownVersion(StreamFlowError):
    """A model version that was never registered."""


class UnknownPrediction(StreamFlowError):
    """A request id that no prediction in the log has."""


class PromotionRefused(StreamFlowError):
    """A promotion or rollback that policy, gates or the ledger forbid."""


class TrainingRefused(StreamFlowError):
    """Data that must not be trained on."""


class DriftRefused(StreamFlowError):
    """Months that cannot be compared."""


class ArtifactRefused(StreamFlowError):
    """A model artifact whose digest, format or self-test is not the registered one."""


class LineageBroken(StreamFlowError):
    """A version some of whose origins are missing or altered; the message names each."""
